"""The slim PixNerd, its configurations, and the official checkpoints."""

from pixnerd_kernels.models.config import CONFIGS, PixNerdConfig
from pixnerd_kernels.models.official import load_official, to_official
from pixnerd_kernels.models.pixnerd import PixNerd

__all__ = ["CONFIGS", "PixNerd", "PixNerdConfig", "load_official", "to_official"]
