"""The slim PixNerds, their configurations, and the official checkpoints."""

from pixnerd_kernels.models.config import CONFIGS, T2I_CONFIGS, PixNerdConfig, PixNerdT2IConfig
from pixnerd_kernels.models.official import load_official, to_official
from pixnerd_kernels.models.pixnerd import PixNerd
from pixnerd_kernels.models.text_to_image import PixNerdT2I

__all__ = [
    "CONFIGS",
    "T2I_CONFIGS",
    "PixNerd",
    "PixNerdConfig",
    "PixNerdT2I",
    "PixNerdT2IConfig",
    "load_official",
    "to_official",
]
