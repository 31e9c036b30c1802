"""The rules, one file each: a structure to recognise, the forms it may have, and what runs in place of them."""

from pixnerd_kernels.patching.rules.attention import AttentionRule
from pixnerd_kernels.patching.rules.base import Left, Rule
from pixnerd_kernels.patching.rules.dit_block import DiTBlockRule
from pixnerd_kernels.patching.rules.neural_field import NeuralFieldRule
from pixnerd_kernels.patching.rules.official_head import OfficialHeadRule
from pixnerd_kernels.patching.rules.radiance_head import RadianceHeadRule
from pixnerd_kernels.patching.rules.rms_norm import RMSNormRule
from pixnerd_kernels.patching.rules.swiglu import SwiGLURule

#: In the order in which a module is tried; the first rule that knows it decides.
RULES: tuple[Rule, ...] = (
    RadianceHeadRule(),
    OfficialHeadRule(),
    NeuralFieldRule(),
    DiTBlockRule(),
    AttentionRule(),
    SwiGLURule(),
    RMSNormRule(),
)

__all__ = ["RULES", "Left", "Rule"]
