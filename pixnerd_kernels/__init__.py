"""Fused kernels for pixel-space diffusion with per-patch neural fields (PixNerd, arXiv 2507.23268)."""

from pixnerd_kernels.backends import use_backend
from pixnerd_kernels.ops import (
    DecoderBlockParams,
    DecoderParams,
    FieldParams,
    attention,
    coordinate_encoding,
    gated_residual,
    gated_residual_rms_norm,
    modulated_rms_norm,
    neural_field_mlp,
    neural_field_mlp_packed,
    normalize_weights,
    pixel_decoder,
    qk_norm_rope,
    split_params,
    swiglu,
)
from pixnerd_kernels.patching import patch

__version__ = "0.1.0"

__all__ = [
    "DecoderBlockParams",
    "DecoderParams",
    "FieldParams",
    "__version__",
    "attention",
    "coordinate_encoding",
    "gated_residual",
    "gated_residual_rms_norm",
    "modulated_rms_norm",
    "neural_field_mlp",
    "neural_field_mlp_packed",
    "normalize_weights",
    "patch",
    "pixel_decoder",
    "qk_norm_rope",
    "split_params",
    "swiglu",
    "use_backend",
]
