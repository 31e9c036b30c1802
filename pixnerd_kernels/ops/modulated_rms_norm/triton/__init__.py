"""Launches the Triton kernels of `modulated_rms_norm` and of its fusion with the residual before it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pixnerd_kernels.checks import describe
from pixnerd_kernels.ops.gpu.launch import (
    Options,
    ceil_div,
    emulates,
    interpreting,
    launch,
    power_of_two,
    target_of,
)
from pixnerd_kernels.ops.modulated_rms_norm.triton import kernels
from pixnerd_kernels.ops.modulated_rms_norm.triton import tangents as tangent_kernels

#: Numbers of a tile of the forward, at four warps; in the interpreter a program costs what its entries do not.
_TILE, _TILE_OF_TANGENTS, _TILE_INTERPRETED = 8192, 4096, 32768
#: Tokens that a program of the backward loads at a time: of two tensors, and of more.
_TOKENS, _TOKENS_OF_MORE = 4, 2
#: Warps of the backward that a processor holds.
_RESIDENT_WARPS = 16
#: Sums (those of a part of an image's tokens) and columns of a tile of the kernel that adds up.
_SUMS, _COLUMNS, _SUM_OPTIONS = 128, 16, Options(4)


class _Plan(NamedTuple):
    """How tokens are shared out: tiles of `block_l` tokens, and in the backward `parts` programs for an image."""

    block_l: int
    head: int
    tail: int
    options: Options
    parts: int = 1
    tokens_each: int = 0


def _split(columns: int) -> tuple[int, int]:
    """HEAD and TAIL: the largest power of two below `columns`, and what holds the rest."""
    head = power_of_two(columns) // 2 if columns > 1 else 1
    return head, power_of_two(columns - head)


@functools.lru_cache(maxsize=256)
def _forward_plan(tokens: int, columns: int, largest: int = _TILE) -> _Plan:
    head, tail = _split(columns)
    tile = _TILE_INTERPRETED if interpreting() else largest
    block_l = max(1, min(power_of_two(tile // (head + tail) + 1) // 2, power_of_two(tokens)))
    # Rows of more than a tile take more warps.
    return _Plan(block_l, head, tail, Options(min(32, max(4, 4 * power_of_two(head + tail) // tile))))


@functools.lru_cache(maxsize=256)
def _backward_plan(batch: int, tokens: int, columns: int, tensors: int, processors: int) -> _Plan:
    """Eight numbers of a head a thread; and so many parts that the programs end together."""
    head, tail = _split(columns)
    block_l = _TOKENS if tensors <= 2 else _TOKENS_OF_MORE
    warps = min(16, max(1, head // 256))
    slots = max(1, _RESIDENT_WARPS // warps) * processors
    best = None
    for parts in range(1, max(1, min(ceil_div(tokens, block_l), ceil_div(2 * slots, max(batch, 1)))) + 1):
        each = max(1, ceil_div(ceil_div(tokens, parts), block_l)) * block_l
        # A program's sums cost as much as three tokens.
        cost = ceil_div(batch * parts, slots) * (each + 3)
        if best is None or cost < best[0]:
            best = cost, each
    assert best is not None
    each = best[1]
    return _Plan(block_l, head, tail, Options(warps), max(1, ceil_div(tokens, each)), each)


def _check(like: Tensor, tensors: dict[str, Tensor | None], rows: dict[str, Tensor | None]) -> None:
    """Exported programs and graph passes call the op without the public function's checks."""
    shape, dtype = like.shape, like.dtype
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype):
            raise ValueError(f"{name}: expected {list(shape)} {dtype}, got {describe(tensor)}")
    row = (shape[0], 1, shape[2])
    for name, tensor in rows.items():
        if tensor is not None and (tensor.shape != row or tensor.dtype != dtype):
            raise ValueError(f"{name}: expected {list(row)} {dtype}, got {describe(tensor)}")


def _dense(tensor: Tensor | None, unused: Tensor) -> tuple[Tensor, int, int]:
    """A tensor with dense rows and its batch and token strides; where it is absent, what is not read."""
    if tensor is None:
        return unused, 0, 0
    batch, token, channel = tensor.stride()
    if channel != 1 and tensor.shape[2] != 1:
        tensor = tensor.contiguous()
        batch, token, _ = tensor.stride()
    return tensor, batch, token


def run_forward(
    x: Tensor,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    y: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """z = x + gate * y (None without y) and its norm (None without weight), contiguous."""
    _check(x, {"y": y}, {"gate": gate, "shift": shift, "scale": scale})
    batch, tokens, columns = x.shape
    out = None if weight is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    z = None if y is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    plan = _forward_plan(tokens, columns)
    source, x_batch, x_token = _dense(x, x)
    y_source, y_batch, y_token = _dense(y, x)
    gate_row, gate_batch, _ = _dense(gate, x)
    shift_row, shift_batch, _ = _dense(shift, x)
    scale_row, scale_batch, _ = _dense(scale, x)
    launch(
        kernels.modulated_rms_norm_forward, (batch * ceil_div(tokens, plan.block_l),), x.device, plan.options,
        x=source, y=y_source, gate=gate_row, weight=x if weight is None else weight, shift=shift_row, scale=scale_row,
        z=x if z is None else z, out=x if out is None else out, eps=eps,
        x_batch=x_batch, x_token=x_token, y_batch=y_batch, y_token=y_token, gate_batch=gate_batch,
        weight_step=0 if weight is None else weight.stride(0), shift_batch=shift_batch, scale_batch=scale_batch,
        tokens=tokens, COLUMNS=columns, BLOCK_L=plan.block_l, HEAD=plan.head, TAIL=plan.tail,
        RESIDUAL=y is not None, NORM=weight is not None, SHIFT=shift is not None, SCALE=scale is not None,
        EMULATE=emulates(x.dtype),
    )  # fmt: skip
    return z, out


def run_jvp(
    x: Tensor,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    y: Tensor | None,
    gate: Tensor | None,
    tangents: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """What `run_forward` returns, and behind it their tangents, from those of x, y, gate, shift and scale."""
    _check(x, {"y": y}, {"gate": gate, "shift": shift, "scale": scale})
    batch, tokens, columns = x.shape
    z, out, dz, d_out = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if there else None
        for there in (y is not None, weight is not None) * 2
    )
    plan = _forward_plan(tokens, columns, _TILE_OF_TANGENTS)
    pointers: dict[str, Tensor] = {}
    strides: dict[str, int] = {}
    moving = dict(zip(("dx", "dy", "d_gate", "d_shift", "d_scale"), tangents, strict=True))
    rows = {"gate": gate, "shift": shift, "scale": scale}
    for name, tensor in ({"x": x, "y": y} | rows | moving).items():
        pointers[name], strides[f"{name}_batch"], token = _dense(tensor, x)
        if name in ("x", "y", "dx", "dy"):
            strides[f"{name}_token"] = token
    launch(
        tangent_kernels.modulated_rms_norm_jvp, (batch * ceil_div(tokens, plan.block_l),), x.device, plan.options,
        **pointers, weight=x if weight is None else weight,
        z=x if z is None else z, out=x if out is None else out,
        dz=x if dz is None else dz, d_out=x if d_out is None else d_out,
        eps=eps, **strides, weight_step=0 if weight is None else weight.stride(0),
        tokens=tokens, COLUMNS=columns, BLOCK_L=plan.block_l, HEAD=plan.head, TAIL=plan.tail,
        RESIDUAL=y is not None, NORM=weight is not None, SHIFT=shift is not None, SCALE=scale is not None,
        **{f"{name.upper()}_GIVEN": tangent is not None for name, tangent in moving.items()},
        EMULATE=emulates(x.dtype),
    )  # fmt: skip
    return z, out, dz, d_out


def run_backward(
    grad_z: Tensor | None,
    grad: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    shifted: bool,
    scale: Tensor | None,
    eps: float,
    y: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, y, gate, weight, shift and scale (None where absent), contiguous."""
    _check(z, {"grad": grad, "grad_z": grad_z, "y": y}, {"gate": gate, "scale": scale})
    batch, tokens, columns = z.shape
    dx = None if weight is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    dy = None if y is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    row = (batch, 1, columns)
    d_gate = None if gate is None else z.new_empty(row)
    d_shift = z.new_empty(row) if shifted else None
    d_scale = None if scale is None else z.new_empty(row)
    d_weight = None if weight is None else weight.new_empty(columns)
    tensors = 1 + sum(tensor is not None for tensor in (grad_z, grad, y))
    plan = _backward_plan(batch, tokens, columns, tensors, target_of(z.device).processors)
    count = (0 if weight is None else 2) + (0 if y is None else 1)
    sums = torch.empty((batch, plan.parts, count, columns), dtype=torch.float32, device=z.device)
    source, z_batch, z_token = _dense(z, z)
    grad_z_source, grad_z_batch, grad_z_token = _dense(grad_z, z)
    grad_source, grad_batch, grad_token = _dense(grad, z)
    y_source, y_batch, y_token = _dense(y, z)
    gate_row, gate_batch, _ = _dense(gate, z)
    scale_row, scale_batch, _ = _dense(scale, z)
    block_b = min(_SUMS // 2, power_of_two(batch))
    shared: dict[str, Any] = {
        "weight": z if weight is None else weight, "scale": scale_row, "sums": sums,
        "weight_step": 0 if weight is None else weight.stride(0), "scale_batch": scale_batch, "parts": plan.parts,
        "COLUMNS": columns, "RESIDUAL": y is not None, "NORM": weight is not None, "SCALE": scale is not None,
        "EMULATE": emulates(z.dtype),
    }  # fmt: skip
    launch(
        kernels.modulated_rms_norm_backward, (batch * plan.parts,), z.device, plan.options, **shared,
        grad_z=grad_z_source, grad=grad_source, z=source, y=y_source, gate=gate_row,
        dx=z if dx is None else dx, dy=z if dy is None else dy, eps=eps,
        grad_z_batch=grad_z_batch, grad_z_token=grad_z_token, grad_batch=grad_batch, grad_token=grad_token,
        z_batch=z_batch, z_token=z_token, y_batch=y_batch, y_token=y_token, gate_batch=gate_batch,
        tokens=tokens, tokens_each=plan.tokens_each, BLOCK_L=plan.block_l, HEAD=plan.head, TAIL=plan.tail,
        GRAD_Z=grad_z is not None,
    )  # fmt: skip
    launch(
        kernels.modulated_rms_norm_sums, (ceil_div(columns, _COLUMNS),), z.device, _SUM_OPTIONS, **shared,
        d_gate=z if d_gate is None else d_gate, d_weight=z if d_weight is None else d_weight,
        d_shift=z if d_shift is None else d_shift, d_scale=z if d_scale is None else d_scale,
        images=batch, BLOCK_B=block_b, BLOCK_P=min(_SUMS // block_b, power_of_two(plan.parts)), BLOCK_C=_COLUMNS,
        SHIFT=shifted,
    )  # fmt: skip
    return dx, dy, d_gate, d_weight, d_shift, d_scale


def forward(x: Tensor, weight: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float) -> Tensor:
    """out [B, L, D] in x's dtype, contiguous."""
    _, out = run_forward(x, weight, shift, scale, eps, None, None)
    assert out is not None
    return out


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, shifted: bool, scale: Tensor | None, eps: float
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, shift and scale (None where absent), contiguous."""
    dx, _, _, *others = run_backward(None, grad, x, weight, shifted, scale, eps, None, None)
    return dx, *others


def jvp(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    x_tangent: Tensor | None,
    shift_tangent: Tensor | None,
    scale_tangent: Tensor | None,
    eps: float,
) -> tuple[Tensor | None, ...]:
    """out [B, L, D] and its tangent in x's dtype, contiguous; no tangent is a zero one."""
    moving = (x_tangent, None, None, shift_tangent, scale_tangent)
    return run_jvp(x, weight, shift, scale, eps, None, None, moving)[1::2]
