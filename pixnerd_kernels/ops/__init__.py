"""The ops, one folder each: the public function, the reference, and a file per backend."""

from pixnerd_kernels.ops.attention import attention
from pixnerd_kernels.ops.coordinate_encoding import coordinate_encoding
from pixnerd_kernels.ops.gated_residual import gated_residual, gated_residual_rms_norm
from pixnerd_kernels.ops.linear import linear
from pixnerd_kernels.ops.modulated_rms_norm import modulated_rms_norm
from pixnerd_kernels.ops.neural_field_mlp import (
    FieldParams,
    neural_field_mlp,
    neural_field_mlp_packed,
    split_params,
)
from pixnerd_kernels.ops.normalize_weights import normalize_weights
from pixnerd_kernels.ops.pixel_decoder import DecoderBlockParams, DecoderParams, pixel_decoder
from pixnerd_kernels.ops.qk_norm_rope import qk_norm_rope
from pixnerd_kernels.ops.swiglu import swiglu

__all__ = [
    "DecoderBlockParams",
    "DecoderParams",
    "FieldParams",
    "attention",
    "coordinate_encoding",
    "gated_residual",
    "gated_residual_rms_norm",
    "linear",
    "modulated_rms_norm",
    "neural_field_mlp",
    "neural_field_mlp_packed",
    "normalize_weights",
    "pixel_decoder",
    "qk_norm_rope",
    "split_params",
    "swiglu",
]
