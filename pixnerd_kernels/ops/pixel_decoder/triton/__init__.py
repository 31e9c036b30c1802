"""Launches the Triton kernels of `pixel_decoder`: one for a chunk's patches forward, one backward.

Products with the generators are torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pixnerd_kernels.ops.gpu.launch import Target, emulates, launch, padded, precision, target_of
from pixnerd_kernels.ops.neural_field_mlp.triton.policy import Plan, Problem, choose, span
from pixnerd_kernels.ops.pixel_decoder.chunks import Call
from pixnerd_kernels.ops.pixel_decoder.reference import generate, hidden_gradient, weight_gradient
from pixnerd_kernels.ops.pixel_decoder.triton import kernels

__all__ = ["at_once", "backward", "forward", "generate", "hidden_gradient", "weight_gradient"]

#: Bytes of scratch that a launch may take, unless one patch needs more.
_SCRATCH = 64 << 20


def _plan(call: Call, patches: int, training: bool) -> tuple[Problem, Plan, Target]:
    height, width = call.patch
    problem = Problem(
        training, call.gated, call.hidden.dtype, patches, height * width, call.channels, call.field_hidden, decoder=True
    )  # fmt: skip
    target = target_of(call.image.device)
    return problem, choose(problem, target), target


def at_once(call: Call, training: bool) -> int:
    """Patches that the GPU decodes side by side: one for each program."""
    return _programs(call, *_plan(call, call.patches, training))


def _programs(call: Call, problem: Problem, plan: Plan, target: Target) -> int:
    """Programs of a launch: as many as run at once, and as their scratch allows."""
    place = problem.pixels * problem.channels
    size = 2 * place * problem.dtype.itemsize
    if problem.training:
        size = place * ((len(call.generators) + 1) * problem.dtype.itemsize + 4)
        if plan.chunks(problem) > 1:
            size += 4 * padded(problem.channels) * (_waiting(problem, plan) + problem.pixels)
    return max(1, min(plan.programs(problem, target), _SCRATCH // size))


def _waiting(problem: Problem, plan: Plan) -> int:
    """Hidden units whose sums wait in scratch while a program works on others."""
    chunks = plan.chunks(problem)
    return chunks * plan.piece * plan.pieces if chunks > 1 else 0


def _arguments(call: Call, generated: Tensor, first: int, plan: Plan, target: Target) -> dict[str, Any]:
    """What both kernels take. An absent tensor is stood in for by another, which is not read."""
    height, width = call.patch
    rows, columns = call.grid
    small = call.small
    absent = small.pixel_weight
    strides = zip(("batch", "plane", "row", "column"), call.image.stride(), strict=True)
    return {
        "image": call.image, "generated": generated, "first": first, "norms": small.norms,
        "final_norm": absent if small.final_norm is None else small.final_norm,
        "pixel_weight": small.pixel_weight, "table": small.table,
        "linear_weight": absent if small.linear_weight is None else small.linear_weight,
        **{f"image_{name}": stride for name, stride in strides},
        "generated_block": generated.stride(0), "generated_patch": generated.stride(1),
        "rows_of_patches": rows, "columns_of_patches": columns,
        "norm_eps": call.norm_eps, "weight_eps": call.weight_eps,
        "HEIGHT": height, "WIDTH": width, "INPUTS": call.image.shape[1], "OUTPUTS": call.out_channels,
        "BLOCKS": generated.shape[0], "CHANNELS": call.channels, "HIDDEN": call.field_hidden,
        "TILE": plan.tile, "BLOCK_C": padded(call.channels), "PIECE": plan.piece, "PIECES": plan.pieces,
        "GATED": call.gated, "UNIT1": call.normalize[0], "UNIT2": call.normalize[1], "UNIT_GATE": call.normalize[2],
        "FINAL_NORM": small.final_norm is not None, "LINEAR": small.linear_weight is not None,
        "ACTIVATION": call.activation, "FAST": target.fast_tanh and generated.dtype != torch.float32,
        "PRECISION": precision(generated.dtype, target), "EMULATE": emulates(generated.dtype), "AHEAD": plan.ahead,
        "LATE": plan.late,
    }  # fmt: skip


def forward(call: Call, generated: Tensor, first: int, out: Tensor) -> None:
    """Write the pixels of the patches in `out` [B, C_out, H, W], dense."""
    problem, plan, target = _plan(call, generated.shape[1], training=False)
    bias = call.small.linear_bias
    place = problem.pixels * problem.channels
    programs = _programs(call, problem, plan, target)
    launch(
        kernels.pixel_decoder_forward, (programs,), out.device, plan.options,
        **_arguments(call, generated, first, plan, target), patches=problem.patches,
        linear_bias=call.small.pixel_weight if bias is None else bias, BIAS=bias is not None, out=out,
        scratch=torch.empty(programs, 2, place, dtype=generated.dtype, device=out.device),
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
    """Gradients of a chunk. d_generated may be `generated` itself."""
    problem, plan, target = _plan(call, generated.shape[1], training=True)
    blocks, count, _ = generated.shape
    block_c, waiting = padded(problem.channels), _waiting(problem, plan)
    wide: dict[str, Any] = {"dtype": torch.float32, "device": grad.device}
    place = problem.pixels * problem.channels
    programs = _programs(call, problem, plan, target)
    shapes = [torch.Size(shape).numel() for _, shape in call.sums()]
    partial = torch.empty(count, sum(shapes[1:]), **wide)
    table_sum = torch.zeros(programs if sums is not None else 0, place, **wide)
    strides = zip(("batch", "plane", "row", "column"), grad.stride(), strict=True)
    targets = generated if d_generated is None else d_generated
    launch(
        kernels.pixel_decoder_backward, (programs,), grad.device, plan.options,
        **_arguments(call, generated, first, plan, target),
        grad=grad, **{f"grad_{name}": stride for name, stride in strides},
        d_image=call.image if d_image is None else d_image, d_generated=targets,
        d_generated_block=targets.stride(0), d_generated_patch=targets.stride(1),
        table_sum=table_sum, partial=partial, patches=count,
        scratch=torch.empty(programs, blocks + 1, place, dtype=generated.dtype, device=grad.device),
        scratch_x=torch.empty(programs if waiting else 0, problem.pixels * block_c, **wide),
        scratch_2=torch.empty(programs if waiting else 0, waiting, block_c, **wide),
        NEED_IMAGE=d_image is not None, NEED_WEIGHTS=d_generated is not None, NEED_SHARED=sums is not None,
        SPAN=span(problem.pixels), FORWARD_TILE=min(padded(problem.pixels), 16 * plan.warps), PIXELS=plan.tile,
    )  # fmt: skip
    if sums is not None:
        sums[: shapes[0]] += table_sum.sum(0, dtype=sums.dtype)
        sums[shapes[0] :] += partial.sum(0, dtype=sums.dtype)
