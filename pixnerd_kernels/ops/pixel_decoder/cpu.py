"""Hands the tensors of `pixel_decoder` to csrc/pixel_decoder."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pixnerd_kernels.backends import native
from pixnerd_kernels.ops.dtypes import compute_dtype
from pixnerd_kernels.ops.linear import CORE_IS_FASTER
from pixnerd_kernels.ops.linear.cpu import matmul
from pixnerd_kernels.ops.native import ABSENT, DTYPES, Strided, strided
from pixnerd_kernels.ops.neural_field_mlp.cpu import ACTIVATIONS
from pixnerd_kernels.ops.neural_field_mlp.cpu import jvp as field_jvp
from pixnerd_kernels.ops.pixel_decoder import reference

if TYPE_CHECKING:
    from pixnerd_kernels.ops.pixel_decoder.chunks import Call


at_once, columns_of_ones = reference.at_once, reference.columns_of_ones


def generate(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out [n, G] = hidden @ weightᵀ + bias.

    Half types take torch's product, which uses what instructions and units for them the processor has; but the core's,
    where it has such instructions too and is the faster library: on AMD's.
    """
    pairs = hidden.dtype == torch.bfloat16 and CORE_IS_FASTER and native().isa() == "avx512_bf16"
    if hidden.dtype != compute_dtype(hidden.dtype) and not pairs:
        reference.generate(hidden, weight, bias, out)
        return
    matmul(hidden, weight.mT, out, bias, row_invariant=True)


def weight_gradient(total: Tensor, d_generated: Tensor, hidden: Tensor, add: bool) -> None:
    """total [G, D] (+)= d_generatedᵀ @ hidden, in the computed dtype for half types too."""
    matmul(d_generated.mT, hidden, total, add=add)


def hidden_gradient(total: Tensor, d_generated: Tensor, weight: Tensor, add: bool) -> None:
    """total [n, D] (+)= d_generated @ weight."""
    matmul(d_generated, weight, total, add=add, row_invariant=True)


def _planes(planes: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0, 0) if planes is None else (planes.data_ptr(), *planes.stride())


def _generated(generated: Tensor | None) -> Strided:
    return ABSENT if generated is None else strided(generated)


def _decoder(call: Call, generated: Tensor, first: int) -> tuple[Any, Tensor | None]:
    """The core's description of a run of patches, and beside call's the tensor that must outlive it."""
    small = call.small
    linear_weight = None if small.linear_weight is None else small.linear_weight.mT.contiguous()
    dense = [small.pixel_weight, small.table, small.norms, small.final_norm, linear_weight, small.linear_bias]
    decoder = native().PixelDecoder(
        first=first,
        count=generated.shape[1],
        grid=call.grid,
        patch=call.patch,
        sizes=(call.image.shape[1], call.channels, call.field_hidden, call.out_channels),
        blocks=len(call.generators),
        gated=call.gated,
        dtype=DTYPES[call.image.dtype],
        activation=ACTIVATIONS[call.activation],
        normalize=call.normalize,
        norm_eps=call.norm_eps,
        weight_eps=call.weight_eps,
        threads=torch.get_num_threads(),
        image=_planes(call.image),
        generated=_generated(generated),
        dense=[0 if tensor is None else tensor.data_ptr() for tensor in dense],
    )
    return decoder, linear_weight


def forward(call: Call, generated: Tensor, first: int, out: Tensor) -> None:
    """Write the pixels of the patches in `out` [B, C_out, H, W]."""
    decoder, alive = _decoder(call, generated, first)
    native().pixel_decoder_forward(decoder, _planes(out))
    del alive


jvp = functools.partial(reference.jvp, block=field_jvp)


def backward(
    call: Call,
    generated: Tensor,
    first: int,
    grad: Tensor,
    d_image: Tensor | None,
    d_generated: Tensor | None,
    sums: Tensor | None,
) -> None:
    """Every wanted gradient. d_generated may be `generated` itself."""
    decoder, alive = _decoder(call, generated, first)
    assert sums is None or sums.numel() == decoder.sums
    native().pixel_decoder_backward(
        decoder,
        grad=_planes(grad),
        d_image=_planes(d_image),
        d_generated=_generated(d_generated),
        sums=0 if sums is None else sums.data_ptr(),
    )
    del alive
