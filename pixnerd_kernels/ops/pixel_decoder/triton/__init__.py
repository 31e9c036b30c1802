"""Launches the Triton kernels of `pixel_decoder` for a chunk's patches; products with the generators are torch's."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from pixnerd_kernels.ops.gpu.launch import (
    Options,
    Target,
    ceil_div,
    emulates,
    launch,
    padded,
    precision,
    target_of,
)
from pixnerd_kernels.ops.neural_field_mlp import split_params
from pixnerd_kernels.ops.neural_field_mlp.triton import backward_into
from pixnerd_kernels.ops.neural_field_mlp.triton import jvp as field_jvp
from pixnerd_kernels.ops.neural_field_mlp.triton.policy import Plan, Problem, choose
from pixnerd_kernels.ops.pixel_decoder import reference
from pixnerd_kernels.ops.pixel_decoder.chunks import Call
from pixnerd_kernels.ops.pixel_decoder.reference import generate, hidden_gradient, weight_gradient
from pixnerd_kernels.ops.pixel_decoder.triton import ends, kernels

__all__ = [
    "at_once", "backward", "columns_of_ones", "forward", "generate", "hidden_gradient", "jvp", "weight_gradient",
]  # fmt: skip

#: Bytes of scratch that the forward may take, and in the backward block inputs and the table's sums, unless one patch
#: needs more.
_SCRATCH, _KEPT, _SUMS = 64 << 20, 128 << 20, 32 << 20


def _problem(call: Call, patches: int, training: bool) -> Problem:
    """A block's problem."""
    return Problem(
        training, call.gated, call.hidden.dtype, patches, call.patch[0] * call.patch[1], call.channels,
        call.field_hidden, decoder=not training,
    )  # fmt: skip


def at_once(call: Call, training: bool) -> int:
    """Patches that the GPU decodes side by side, or goes back through."""
    target = target_of(call.image.device)
    problem = _problem(call, call.patches, training)
    plan = choose(problem, target)
    place = problem.pixels * problem.channels * problem.dtype.itemsize
    if not training:
        return _programs(problem, plan, target)
    # As many as can be kept, in full rounds of those that run at once.
    most = max(1, _KEPT // (place * (len(call.generators) + 1)))
    side_by_side = target.processors * plan.resident(problem)
    return min(call.patches, most if most < side_by_side else most // side_by_side * side_by_side)


def columns_of_ones(call: Call) -> int:
    """Of 5544 patches of XL/16's head an H100 adds up a block's gradients in 0.083 ms. The product with 1152 columns of
    hidden takes 0.293 ms, with 1184 0.312; their rows, too, begin on 128 bytes."""
    return 32 if call.image.is_cuda and call.hidden.dtype != torch.float32 and reference.WIDE_PRODUCTS else 0


def _programs(problem: Problem, plan: Plan, target: Target) -> int:
    """Programs of the forward: as many as run at once, and as their scratch allows."""
    size = 2 * problem.pixels * problem.channels * problem.dtype.itemsize
    return max(1, min(plan.programs(problem, target), _SCRATCH // size))


def _shared(call: Call, first: int) -> dict[str, Any]:
    """What all kernels take."""
    height, width = call.patch
    rows, columns = call.grid
    return {
        "first": first, "rows_of_patches": rows, "columns_of_patches": columns, "HEIGHT": height, "WIDTH": width,
        "CHANNELS": call.channels, "BLOCK_C": padded(call.channels), "EMULATE": emulates(call.hidden.dtype),
    }  # fmt: skip


def _strides(name: str, image: Tensor) -> dict[str, Any]:
    """An image and its strides, as kernels name them."""
    axes = ("batch", "plane", "row", "column")
    return {name: image} | {
        f"{name}_{axis}": stride for axis, stride in zip(axes, image.stride(), strict=True)
    }


def _output(call: Call) -> dict[str, Any]:
    """The output layer. An absent tensor is stood in for by another, which is not read."""
    small, absent = call.small, call.small.pixel_weight
    return {
        "final_norm": absent if small.final_norm is None else small.final_norm,
        "linear_weight": absent if small.linear_weight is None else small.linear_weight,
        "OUTPUTS": call.out_channels, "norm_eps": call.norm_eps,
        "FINAL_NORM": small.final_norm is not None, "LINEAR": small.linear_weight is not None,
    }  # fmt: skip


def _run_blocks(
    call: Call, generated: Tensor, first: int, programs: int, scratch: Tensor, out: Tensor | None
) -> None:
    """The forward's kernel: to `out`, or without it what enters each block to scratch [blocks + 1, n, S, D1]."""
    problem, target = _problem(call, generated.shape[1], training=False), target_of(call.image.device)
    plan, small = choose(problem, target), call.small
    launch(
        kernels.pixel_decoder_forward, (programs,), call.image.device, plan.options,
        **_shared(call, first), **_strides("image", call.image), **_output(call),
        generated=generated, generated_block=generated.stride(0), generated_patch=generated.stride(1),
        scratch=scratch, scratch_block=scratch.stride(0), scratch_patch=scratch.stride(1),
        norms=small.norms, pixel_weight=small.pixel_weight, table=small.table,
        linear_bias=small.pixel_weight if small.linear_bias is None else small.linear_bias,
        out=call.image if out is None else out, patches=problem.patches, weight_eps=call.weight_eps,
        INPUTS=call.image.shape[1], BLOCKS=generated.shape[0], HIDDEN=call.field_hidden,
        TILE=plan.tile, PIECE=plan.piece, PIECES=plan.pieces, AHEAD=plan.ahead, LATE=plan.late, KEEP=out is None,
        GATED=call.gated, UNIT1=call.normalize[0], UNIT2=call.normalize[1], UNIT_GATE=call.normalize[2],
        BIAS=small.linear_bias is not None, ACTIVATION=call.activation,
        FAST=target.fast_tanh and generated.dtype != torch.float32, PRECISION=precision(generated.dtype, target),
    )  # fmt: skip


def forward(call: Call, generated: Tensor, first: int, out: Tensor) -> None:
    """Write the pixels of the patches in `out` [B, C_out, H, W], dense."""
    problem, target = _problem(call, generated.shape[1], training=False), target_of(call.image.device)
    programs = _programs(problem, choose(problem, target), target)
    place = problem.pixels * problem.channels
    scratch = torch.empty(programs, 2, place, dtype=generated.dtype, device=out.device).transpose(0, 1)
    _run_blocks(call, generated, first, programs, scratch, out)


jvp = functools.partial(reference.jvp, block=field_jvp)


def _share(call: Call, planes: int, count: int, tiles: int) -> tuple[int, int]:
    """How a kernel at the decoder's ends shares out `count` patches, whose image has so many planes.

    The patches that a program works on at once, side by side in the image: four or fewer, a part of a line of patches,
    and of few planes, since all are loaded before the first is waited for. And the programs for each tile: four run at
    once on a processor, and each owns sums over patches, which would take long to read and write for more.
    """
    together = math.gcd(4 if planes <= 4 else 2 if planes <= 8 else 1, call.grid[1])
    blocks = ceil_div(count, together)
    most = max(1, _SUMS // (4 * call.patch[0] * call.patch[1] * call.channels))
    groups = max(1, min(blocks, most, 4 * target_of(call.image.device).processors // tiles))
    # No more than are needed for the longest to have as little to do.
    return together, ceil_div(blocks, ceil_div(blocks, groups))


def backward(
    call: Call,
    generated: Tensor,
    first: int,
    grad: Tensor,
    d_image: Tensor | None,
    d_generated: Tensor | None,
    sums: Tensor | None,
) -> None:
    """Gradients of a chunk. d_generated may be `generated` itself."""
    blocks, count, _ = generated.shape
    device, channels, pixels = call.image.device, call.channels, call.patch[0] * call.patch[1]
    inputs, outputs = call.image.shape[1], call.out_channels
    side_by_side = min(count, at_once(call, training=True))
    tile = min(padded(pixels), max(1, 1024 // padded(channels)))
    tiles = ceil_div(pixels, tile)
    output_together, output_groups = _share(call, outputs, side_by_side, tiles)
    input_together, input_groups = _share(call, inputs, side_by_side, tiles)
    wide: dict[str, Any] = {"dtype": torch.float32, "device": device}
    some = sums is not None
    table = torch.zeros(input_groups if some else 0, pixels * channels, **wide)
    pixel_weight = torch.zeros(input_groups * tiles if some else 0, inputs * channels, **wide)
    norms = torch.empty(blocks, count, channels, **wide)
    linear = 0 if call.linear_weight is None else outputs * (channels + 1)
    output = torch.zeros(output_groups * tiles if some else 0, channels + linear, **wide)
    scratch = torch.empty(blocks + 1, side_by_side, pixels, channels, dtype=generated.dtype, device=device)
    for begin in range(0, count, side_by_side):
        end = min(begin + side_by_side, count)
        kept = scratch[:, : end - begin]
        dx = kept[blocks]
        shared: dict[str, Any] = {**_shared(call, first + begin), "patches": end - begin, "TILE": tile}
        _run_blocks(call, generated[:, begin:end], first + begin, end - begin, kept, None)
        launch(
            ends.pixel_decoder_output_grad, (tiles, output_groups), device, Options(),
            **shared, **_strides("grad", grad), **_output(call), last=dx, partial=output, TOGETHER=output_together,
            NEED_SHARED=some,
        )  # fmt: skip
        for block in reversed(range(blocks)):
            weights = split_params(generated[block, begin:end], channels, call.field_hidden, call.gated)
            targets: Any = (None, None, None)
            if d_generated is not None:
                targets = split_params(d_generated[block, begin:end], channels, call.field_hidden, call.gated)
            backward_into(
                dx, norms[block, begin:end], dx, kept[block], *weights, call.small.norms[block], targets,
                *call.field_options,
            )  # fmt: skip
        launch(
            ends.pixel_decoder_input_grad, (tiles, input_groups), device, Options(),
            **shared, **_strides("image", call.image), dx=dx, pixel_weight=call.small.pixel_weight,
            d_image=call.image if d_image is None else d_image, table_sum=table, partial=pixel_weight,
            INPUTS=inputs, TOGETHER=input_together, NEED_IMAGE=d_image is not None, NEED_SHARED=some,
        )  # fmt: skip
    if sums is not None:
        parts = (table, pixel_weight, *norms, output)
        sums += torch.cat([part.sum(0, dtype=sums.dtype) for part in parts])
