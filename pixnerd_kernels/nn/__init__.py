"""Modules: parameters, and a call of an op.

Letters in shapes: B images, L tokens or patches of an image, N = B * L patches, D hidden size, D1 channels of
a pixel in a neural field, P patch size in pixels.
"""

from pixnerd_kernels.nn.decoder import NeuralFieldBlock, PixelDecoder, patchify, unpatchify
from pixnerd_kernels.nn.layers import Linear, RMSNorm, SwiGLU, TimestepEmbedding
from pixnerd_kernels.nn.text import JointAttention, PackedSwiGLU
from pixnerd_kernels.nn.transformer import Attention, DiTBlock, rotary_table
from pixnerd_kernels.ops.pixel_decoder import scaled_patch

__all__ = [
    "Attention",
    "DiTBlock",
    "JointAttention",
    "Linear",
    "NeuralFieldBlock",
    "PackedSwiGLU",
    "PixelDecoder",
    "RMSNorm",
    "SwiGLU",
    "TimestepEmbedding",
    "patchify",
    "rotary_table",
    "scaled_patch",
    "unpatchify",
]
