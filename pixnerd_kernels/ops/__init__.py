"""The ops, one folder each: the public function, the reference, and a file per backend."""

from pixnerd_kernels.ops.attention import attention
from pixnerd_kernels.ops.coordinate_encoding import coordinate_encoding
from pixnerd_kernels.ops.neural_field_mlp import (
    FieldParams,
    neural_field_mlp,
    neural_field_mlp_packed,
    split_params,
)
from pixnerd_kernels.ops.normalize_weights import normalize_weights

__all__ = [
    "FieldParams",
    "attention",
    "coordinate_encoding",
    "neural_field_mlp",
    "neural_field_mlp_packed",
    "normalize_weights",
    "split_params",
]
