"""Fused kernels for pixel-space diffusion with per-patch neural fields (PixNerd, arXiv 2507.23268)."""

from pixnerd_kernels.backends import use_backend
from pixnerd_kernels.ops import (
    FieldParams,
    coordinate_encoding,
    neural_field_mlp,
    neural_field_mlp_packed,
    normalize_weights,
    split_params,
)

__version__ = "0.1.0"

__all__ = [
    "FieldParams",
    "__version__",
    "coordinate_encoding",
    "neural_field_mlp",
    "neural_field_mlp_packed",
    "normalize_weights",
    "split_params",
    "use_backend",
]
