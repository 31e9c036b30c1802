"""The Triton side of `pixel_decoder`: one kernel decodes a chunk's patches, `neural_field_mlp`'s kernels go back.

Forward: a program takes a tile of one patch's pixels through embedding, every block and the output layer. Between
blocks the activations stay on chip in float32, and the image is read and written in place. The generated weights are
read once for each tile of the patch.

Backward: a whole-decoder kernel would hold the gradients of several blocks' weights at once, which do not fit. Instead
the activations before each block are kept for a group of patches (`_SCRATCH` bytes, whatever the chunk), and the
blocks' own backward kernel walks back over them; the ends are a few small torch products. Between blocks both are
rounded to the image's dtype.

Products with the generators are torch's. Not run on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixnerd_kernels.ops.gpu.launch import emulates, launch, padded, precision, target_of
from pixnerd_kernels.ops.gpu.pieces import inverse_norm, narrow, operand, rms_norm
from pixnerd_kernels.ops.neural_field_mlp import split_params
from pixnerd_kernels.ops.neural_field_mlp import triton as field
from pixnerd_kernels.ops.neural_field_mlp.triton.kernels import (
    field_hidden,
    field_input,
    load_input_weight,
    load_norm,
    load_output_weight,
)
from pixnerd_kernels.ops.neural_field_mlp.triton.policy import Problem, choose
from pixnerd_kernels.ops.pixel_decoder import reference
from pixnerd_kernels.ops.pixel_decoder.chunks import Call
from pixnerd_kernels.ops.pixel_decoder.reference import generate, hidden_gradient, weight_gradient

__all__ = ["backward", "forward", "generate", "hidden_gradient", "weight_gradient"]

#: Bytes of activations that the backward keeps at a time; a group has at least one patch.
_SCRATCH = 32 << 20


@triton.jit
def embed_pixels(
    image, plane, places, rows, pixels, channels, pixel_weight, table,
    INPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """pixel @ pixel_weight + table for a tile of pixels, [T, C] in float32; zeros beyond pixels and CHANNELS.

    pixel_weight [INPUTS, CHANNELS] and table [pixels, CHANNELS] in float32.
    """
    inside = (rows[:, None] < pixels) & (channels[None, :] < CHANNELS)
    x = tl.load(table + rows[:, None] * CHANNELS + channels[None, :], mask=inside, other=0.0)
    # Pointers move on: a product of 32-bit numbers would overflow in a large image.
    for _ in range(INPUTS):
        pixel = tl.load(image + places, mask=rows < pixels, other=0.0).to(tl.float32)
        row = tl.load(pixel_weight + channels, mask=channels < CHANNELS, other=0.0)
        x += pixel[:, None] * row[None, :]
        image += plane
        pixel_weight += CHANNELS
    return x


@triton.jit
def add_block(
    x, live, generated, norm_weight, norm_step, norm_eps, weight_eps, channels,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_C: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
    GATED: tl.constexpr, UNIT1: tl.constexpr, UNIT2: tl.constexpr, UNIT_GATE: tl.constexpr,
    ACTIVATION: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """x [T, C] in float32 plus a neural-field block of it; generated holds w_gate (where GATED), w1 and w2 in turn."""
    NARROW: tl.constexpr = generated.dtype.element_ty
    weight = load_norm(norm_weight, norm_step, channels, True, CHANNELS)
    w1 = generated
    w2 = generated + CHANNELS * HIDDEN
    w_gate = generated
    if GATED:
        w1 = generated + CHANNELS * HIDDEN
        w2 = generated + 2 * CHANNELS * HIDDEN
    n, _ = field_input(x, live, norm_eps, True, CHANNELS, NARROW, EMULATE)
    out = tl.zeros([x.shape[0], BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, HIDDEN, PIECE * PIECES):
        scaled1 = load_input_weight(
            w1,
            HIDDEN,
            weight,
            weight_eps,
            first,
            True,
            UNIT1,
            CHANNELS,
            HIDDEN,
            BLOCK_C,
            PIECE,
            PIECES,
            EMULATE,
        )
        scaled_gate = scaled1
        if GATED:
            scaled_gate = load_input_weight(
                w_gate, HIDDEN, weight, weight_eps, first, True, UNIT_GATE, CHANNELS, HIDDEN,
                BLOCK_C, PIECE, PIECES, EMULATE,
            )  # fmt: skip
        raw2, part = load_output_weight(w2, CHANNELS, first, CHANNELS, HIDDEN, BLOCK_C, PIECE, PIECES)
        squares += part
        for p in tl.static_range(PIECES):
            h = field_hidden(n, scaled1[p], scaled_gate[p], GATED, ACTIVATION, FAST, PRECISION)
            h = narrow(h, NARROW, EMULATE)
            out = tl.dot(h, operand(raw2[p], EMULATE), out, input_precision=PRECISION)
    if UNIT2:
        out *= inverse_norm(squares, weight_eps)[None, :]
    return x + out


@triton.jit
def pixel_decoder_forward(
    image, generated, norms, final_norm, pixel_weight, table, linear_weight, linear_bias, out,
    first, image_batch, image_plane, image_row, image_column, generated_block, generated_patch, out_plane,
    rows_of_patches, columns_of_patches, norm_eps, weight_eps,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCKS: tl.constexpr,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
    GATED: tl.constexpr, UNIT1: tl.constexpr, UNIT2: tl.constexpr, UNIT_GATE: tl.constexpr,
    FINAL_NORM: tl.constexpr, LINEAR: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Tile program_id(1) of patch first + program_id(0): out's pixels, or its CHANNELS features without LINEAR."""
    pixels: tl.constexpr = HEIGHT * WIDTH
    patch = first + tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * TILE + tl.arange(0, TILE)
    channels = tl.arange(0, BLOCK_C)
    live = rows < pixels
    batch = patch // (rows_of_patches * columns_of_patches)
    y = (patch // columns_of_patches % rows_of_patches) * HEIGHT + rows // WIDTH
    column = (patch % columns_of_patches) * WIDTH + rows % WIDTH
    x = embed_pixels(
        image + batch * image_batch, image_plane, y * image_row + column * image_column,
        rows, pixels, channels, pixel_weight, table, INPUTS, CHANNELS,
    )  # fmt: skip
    generated += tl.program_id(0).to(tl.int64) * generated_patch
    for _ in range(BLOCKS):
        x = add_block(
            x, live, generated, norms, 1, norm_eps, weight_eps, channels,
            CHANNELS, HIDDEN, BLOCK_C, PIECE, PIECES, GATED, UNIT1, UNIT2, UNIT_GATE,
            ACTIVATION, FAST, PRECISION, EMULATE,
        )  # fmt: skip
        generated += generated_block
        norms += CHANNELS
    if FINAL_NORM:
        x, _ = rms_norm(x, live, norm_eps, CHANNELS)
        x *= load_norm(final_norm, 1, channels, True, CHANNELS)[None, :]
    places = y * (columns_of_patches * WIDTH) + column
    if LINEAR:
        out += batch * OUTPUTS * out_plane
        for c in range(OUTPUTS):
            row = tl.load(linear_weight + c * CHANNELS + channels, mask=channels < CHANNELS, other=0.0)
            value = tl.sum(x * row[None, :], 1)
            if BIAS:
                value += tl.load(linear_bias + c)
            tl.store(out + places, narrow(value, out.dtype.element_ty, EMULATE), mask=live)
            out += out_plane
    else:
        out += batch * CHANNELS * out_plane
        inside = live[:, None] & (channels[None, :] < CHANNELS)
        at = out + channels[None, :].to(tl.int64) * out_plane + places[:, None]
        tl.store(at, narrow(x, out.dtype.element_ty, EMULATE), mask=inside)


def forward(call: Call, generated: Tensor, first: int, out: Tensor) -> None:
    """Write the pixels of the patches in `out` [B, C_out, H, W]."""
    count, (height, width) = generated.shape[1], call.patch
    target = target_of(call.image.device)
    problem = Problem(
        False, call.gated, generated.dtype, count, height * width, call.channels, call.field_hidden
    )
    plan = choose(problem, target)
    absent = pixel_weight = call.pixel_weight.float().mT.contiguous()
    final_norm, linear_weight, linear_bias = (
        None if tensor is None else tensor.float().contiguous()
        for tensor in (call.final_norm, call.linear_weight, call.linear_bias)
    )
    image = dict(zip(("batch", "plane", "row", "column"), call.image.stride(), strict=True))
    rows, columns = call.grid
    launch(
        pixel_decoder_forward, (count, triton.cdiv(height * width, plan.tile)), out.device, plan.options,
        image=call.image, generated=generated, norms=torch.stack([norm.float() for norm in call.norms]),
        final_norm=absent if final_norm is None else final_norm, pixel_weight=pixel_weight,
        table=call.table.contiguous(), linear_weight=absent if linear_weight is None else linear_weight,
        linear_bias=absent if linear_bias is None else linear_bias, out=out, first=first,
        **{f"image_{name}": stride for name, stride in image.items()},
        generated_block=generated.stride(0), generated_patch=generated.stride(1), out_plane=out.stride(1),
        rows_of_patches=rows, columns_of_patches=columns, norm_eps=call.norm_eps, weight_eps=call.weight_eps,
        HEIGHT=height, WIDTH=width, INPUTS=call.image.shape[1], OUTPUTS=out.shape[1], BLOCKS=generated.shape[0],
        CHANNELS=call.channels, HIDDEN=call.field_hidden,
        TILE=plan.tile, BLOCK_C=padded(call.channels), PIECE=plan.piece, PIECES=plan.pieces, GATED=call.gated,
        UNIT1=call.normalize[0], UNIT2=call.normalize[1], UNIT_GATE=call.normalize[2],
        FINAL_NORM=final_norm is not None, LINEAR=linear_weight is not None, BIAS=linear_bias is not None,
        ACTIVATION=call.activation, FAST=target.fast_tanh and generated.dtype != torch.float32,
        PRECISION=precision(generated.dtype, target), EMULATE=emulates(generated.dtype),
    )  # fmt: skip


def backward(
    call: Call,
    generated: Tensor,
    first: int,
    grad: Tensor,
    d_image: Tensor | None,
    d_generated: Tensor | None,
    sums: Tensor | None,
) -> None:
    """Gradients of a chunk, group by group. d_generated may be `generated` itself."""
    blocks, count, size = generated.shape
    patch_bytes = generated.element_size() * (
        call.patch[0] * call.patch[1] * call.channels * (blocks + 1) + size
    )
    group = max(1, _SCRATCH // patch_bytes)
    for start in range(0, count, group):
        part = slice(start, start + group)
        targets = None if d_generated is None else d_generated[:, part]
        _backward_group(call, generated[:, part], first + start, grad, d_image, targets, sums)


def _backward_group(
    call: Call,
    generated: Tensor,
    first: int,
    grad: Tensor,
    d_image: Tensor | None,
    d_generated: Tensor | None,
    sums: Tensor | None,
) -> None:
    dtype = generated.dtype
    norms = [norm.float() for norm in call.norms]
    options: tuple[Any, ...] = (call.normalize, call.activation, True, call.norm_eps, call.weight_eps)
    weights = [split_params(part, call.channels, call.field_hidden, call.gated) for part in generated]
    x = [reference.embed(call, first, generated.shape[1]).to(dtype)]
    for matrices, norm in zip(weights, norms, strict=True):
        x.append(field.forward(x[-1], *matrices, norm, *options))
    dx, shared = reference.output_gradient(call, x.pop().float(), grad, first)
    # A program of the kernel must not write where another thread of it still reads: so not into `generated` itself.
    room = None if d_generated is None else torch.empty_like(generated[0])
    targets = [None] * 3 if room is None else split_params(room, call.channels, call.field_hidden, call.gated)
    d_norms: list[Tensor] = []
    dx = dx.to(dtype)
    for block in reversed(range(len(norms))):
        found, d_norm = field.backward(dx, x[block], *weights[block], norms[block], True, targets, *options)
        assert found is not None
        assert d_norm is not None
        dx = found
        d_norms.append(d_norm)
        if d_generated is not None and room is not None:
            d_generated[block].copy_(room)
    reference.input_gradient(
        call, first, dx.float(), {**shared, "norms": torch.stack(d_norms[::-1])}, d_image, sums
    )
