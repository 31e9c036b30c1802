"""The Triton kernels of `modulated_rms_norm`, and of its fusion with the residual before it.

Forward: a program per tile of tokens. Backward: a program walks over tiles of one image's tokens and keeps their column
sums (of g, g n and dz y) on chip; a second, small kernel adds up the programs' sums and makes the rows' gradients of
them. No atomics.

A tile is two, HEAD columns wide and TAIL: 1152 channels are 1024 + 128, and not 2048 with half of the registers empty.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
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
from pixnerd_kernels.ops.gpu.pieces import load_tile, narrow, store_tile

#: Numbers of a tile of the forward, at four warps; in the interpreter a program costs what its entries do not.
_TILE, _TILE_INTERPRETED = 8192, 32768
#: Tokens that a program of the backward loads at a time: of two tensors, and of more.
_TOKENS, _TOKENS_OF_MORE = 4, 2
#: Warps of the backward that a processor holds.
_RESIDENT_WARPS = 16
#: Sums (those of a part of an image's tokens) and columns of a tile of the kernel that adds up.
_SUMS, _COLUMNS, _SUM_OPTIONS = 128, 16, Options(4)


@triton.jit
def load_rows(
    pointer, rows, row_stride, row_count, COLUMNS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr
):
    """[rows, HEAD] and [rows, TAIL] of a matrix with dense rows, in float32; zeros outside of row_count x COLUMNS."""
    head = load_tile(pointer, rows, row_stride, tl.arange(0, HEAD), row_count, COLUMNS)
    tail = load_tile(pointer, rows, row_stride, HEAD + tl.arange(0, TAIL), row_count, COLUMNS)
    return head.to(tl.float32), tail.to(tl.float32)


@triton.jit
def store_rows(
    pointer, rows, row_count, head, tail,
    COLUMNS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_rows` for dense matrices, rounded once."""
    store_tile(pointer, rows, COLUMNS, tl.arange(0, HEAD), row_count, COLUMNS, head, EMULATE)
    store_tile(pointer, rows, COLUMNS, HEAD + tl.arange(0, TAIL), row_count, COLUMNS, tail, EMULATE)


@triton.jit
def load_row(pointer, step, COLUMNS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """[HEAD] and [TAIL] of a vector in float32, zeros beyond COLUMNS."""
    first, last = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    head = tl.load(pointer + first * step, mask=first < COLUMNS, other=0.0).to(tl.float32)
    tail = tl.load(pointer + last * step, mask=last < COLUMNS, other=0.0).to(tl.float32)
    return head, tail


@triton.jit
def load_factor(
    weight,
    weight_step,
    scale,
    COLUMNS: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    SCALE: tl.constexpr,
):
    """weight * (1 + scale)."""
    head, tail = load_row(weight, weight_step, COLUMNS, HEAD, TAIL)
    if SCALE:
        scale_head, scale_tail = load_row(scale, 1, COLUMNS, HEAD, TAIL)
        head *= 1.0 + scale_head
        tail *= 1.0 + scale_tail
    return head, tail


@triton.jit
def modulated_rms_norm_forward(
    x, y, gate, weight, shift, scale, z, out, eps,
    x_batch, x_token, y_batch, y_token, gate_batch, weight_step, shift_batch, scale_batch, tokens,
    COLUMNS: tl.constexpr, BLOCK_L: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """z = x + gate * y where RESIDUAL, and out, the modulated norm of it (or of x), where NORM."""
    blocks = tl.cdiv(tokens, BLOCK_L)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
    dense = image * tokens * COLUMNS
    head, tail = load_rows(x + image * x_batch, token, x_token, tokens, COLUMNS, HEAD, TAIL)
    if RESIDUAL:
        y_head, y_tail = load_rows(y + image * y_batch, token, y_token, tokens, COLUMNS, HEAD, TAIL)
        gate_head, gate_tail = load_row(gate + image * gate_batch, 1, COLUMNS, HEAD, TAIL)
        head += gate_head[None, :] * y_head
        tail += gate_tail[None, :] * y_tail
    if NORM:
        factor_head, factor_tail = load_factor(
            weight, weight_step, scale + image * scale_batch, COLUMNS, HEAD, TAIL, SCALE
        )
        if SHIFT:
            shift_head, shift_tail = load_row(shift + image * shift_batch, 1, COLUMNS, HEAD, TAIL)
    if RESIDUAL:
        store_rows(z + dense, token, tokens, head, tail, COLUMNS, HEAD, TAIL, EMULATE)
    if NORM:
        r = tl.rsqrt((tl.sum(head * head, 1) + tl.sum(tail * tail, 1)) / COLUMNS + eps)[:, None]
        head *= r * factor_head[None, :]
        tail *= r * factor_tail[None, :]
        if SHIFT:
            head += shift_head[None, :]
            tail += shift_tail[None, :]
        store_rows(out + dense, token, tokens, head, tail, COLUMNS, HEAD, TAIL, EMULATE)


@triton.jit
def load_token(pointer, live, COLUMNS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """[HEAD] and [TAIL] of one token's channels as they are, zeros beyond COLUMNS and where it is not `live`."""
    first, last = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    head = tl.load(pointer + first, mask=(first < COLUMNS) & live, other=0.0)
    tail = tl.load(pointer + last, mask=(last < COLUMNS) & live, other=0.0)
    return head, tail


@triton.jit
def store_token(
    pointer, live, head, tail,
    COLUMNS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_token`, rounded once."""
    NARROW: tl.constexpr = pointer.dtype.element_ty
    first, last = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    tl.store(pointer + first, narrow(head, NARROW, EMULATE), mask=(first < COLUMNS) & live)
    tl.store(pointer + last, narrow(tail, NARROW, EMULATE), mask=(last < COLUMNS) & live)


@triton.jit
def folded(head, tail, LANES: tl.constexpr):
    """Sums of some channels each, [LANES]: where a thread holds these channels, nothing leaves it."""
    HEAD: tl.constexpr = head.shape[0] // LANES
    TAIL: tl.constexpr = tail.shape[0] // LANES
    return tl.sum(tl.reshape(head, [LANES, HEAD]), 1) + tl.sum(tl.reshape(tail, [LANES, TAIL]), 1)


@triton.jit
def modulated_rms_norm_backward(
    grad_z, grad, z, y, gate, weight, scale, dx, dy, sums, eps,
    grad_z_batch, grad_z_token, grad_batch, grad_token, z_batch, z_token, y_batch, y_token,
    gate_batch, weight_step, scale_batch, tokens, tokens_each, parts,
    COLUMNS: tl.constexpr, BLOCK_L: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, GRAD_Z: tl.constexpr, SCALE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """dx where NORM, dy where RESIDUAL, and sums over tokens [images, parts, sums, COLUMNS].

    The sums are those of g and of g n where NORM, and of dz y where RESIDUAL. Tokens are vectors of their own, BLOCK_L
    of them loaded before the first is computed: a head and a tail then share scalars alone. As tiles they would have to
    agree on the threads that hold a token, and be moved about in every round.
    """
    image = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    grad_z += image * grad_z_batch
    grad += image * grad_batch
    z += image * z_batch
    y += image * y_batch
    dx += image * tokens * COLUMNS
    dy += image * tokens * COLUMNS
    sum_head, sum_tail = tl.zeros([HEAD], tl.float32), tl.zeros([TAIL], tl.float32)
    unit_head, unit_tail = tl.zeros([HEAD], tl.float32), tl.zeros([TAIL], tl.float32)
    y_head, y_tail = tl.zeros([HEAD], tl.float32), tl.zeros([TAIL], tl.float32)
    if NORM:
        factor_head, factor_tail = load_factor(
            weight, weight_step, scale + image * scale_batch, COLUMNS, HEAD, TAIL, SCALE
        )
    if RESIDUAL:
        gate_head, gate_tail = load_row(gate + image * gate_batch, 1, COLUMNS, HEAD, TAIL)
    for start in range(0, tokens_each, BLOCK_L):
        first = (part * tokens_each + start).to(tl.int64)
        loaded = ()
        for i in tl.static_range(BLOCK_L):
            token = first + i
            live = token < tokens
            if NORM:
                loaded = loaded + load_token(grad + token * grad_token, live, COLUMNS, HEAD, TAIL)
                loaded = loaded + load_token(z + token * z_token, live, COLUMNS, HEAD, TAIL)
            if GRAD_Z:
                loaded = loaded + load_token(grad_z + token * grad_z_token, live, COLUMNS, HEAD, TAIL)
            if RESIDUAL:
                loaded = loaded + load_token(y + token * y_token, live, COLUMNS, HEAD, TAIL)
        EACH: tl.constexpr = (4 if NORM else 0) + (2 if GRAD_Z else 0) + (2 if RESIDUAL else 0)
        MORE: tl.constexpr = 4 if NORM else 0
        LANES: tl.constexpr = min(HEAD // 8, TAIL) if HEAD >= 8 else 1
        for i in tl.static_range(BLOCK_L):
            token = first + i
            live = token < tokens
            if NORM:
                g_head = loaded[EACH * i].to(tl.float32)  # type: ignore[var-annotated]
                g_tail = loaded[EACH * i + 1].to(tl.float32)
                head = loaded[EACH * i + 2].to(tl.float32)
                tail = loaded[EACH * i + 3].to(tl.float32)
                d_head, d_tail = g_head * factor_head, g_tail * factor_tail
                squares = folded(head * head, tail * tail, LANES)
                products = folded(d_head * head, d_tail * tail, LANES)
                squares, products = tl.split(tl.sum(tl.join(squares, products), 0))
                # Where there is no token and eps is 0, an infinite r would spoil the sums.
                r = tl.where(live, tl.rsqrt(squares / COLUMNS + eps), 0.0)
                mean = products / COLUMNS * r
                head *= r
                tail *= r
                sum_head += g_head
                sum_tail += g_tail
                unit_head += g_head * head
                unit_tail += g_tail * tail
                dz_head = r * (d_head - head * mean)
                dz_tail = r * (d_tail - tail * mean)
                if GRAD_Z:
                    dz_head += loaded[EACH * i + MORE].to(tl.float32)
                    dz_tail += loaded[EACH * i + MORE + 1].to(tl.float32)
                store_token(dx + token * COLUMNS, live, dz_head, dz_tail, COLUMNS, HEAD, TAIL, EMULATE)
            else:
                dz_head = loaded[EACH * i].to(tl.float32)  # type: ignore[var-annotated]
                dz_tail = loaded[EACH * i + 1].to(tl.float32)
            if RESIDUAL:
                y_head += dz_head * loaded[EACH * i + EACH - 2].to(tl.float32)
                y_tail += dz_tail * loaded[EACH * i + EACH - 1].to(tl.float32)
                dz_head *= gate_head
                dz_tail *= gate_tail
                store_token(dy + token * COLUMNS, live, dz_head, dz_tail, COLUMNS, HEAD, TAIL, EMULATE)
    COUNT: tl.constexpr = (2 if NORM else 0) + (1 if RESIDUAL else 0)
    here = sums + (image * parts + part) * COUNT * COLUMNS
    if NORM:
        store_token(here, True, sum_head, sum_tail, COLUMNS, HEAD, TAIL, False)
        store_token(here + COLUMNS, True, unit_head, unit_tail, COLUMNS, HEAD, TAIL, False)
    if RESIDUAL:
        store_token(here + (COUNT - 1) * COLUMNS, True, y_head, y_tail, COLUMNS, HEAD, TAIL, False)


@triton.jit
def modulated_rms_norm_sums(
    sums, weight, scale, d_gate, d_weight, d_shift, d_scale, weight_step, scale_batch, images, parts,
    COLUMNS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """From the backward's sums the gradients of all rows [images, COLUMNS] and of the weight, a block of columns."""
    COUNT: tl.constexpr = (2 if NORM else 0) + (1 if RESIDUAL else 0)
    ROWS: tl.constexpr = BLOCK_B * BLOCK_P
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    d_factor = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    if NORM:
        factor = tl.load(weight + column * weight_step, mask=column < COLUMNS, other=0.0).to(tl.float32)[
            None, :
        ]
    for first in range(0, images, BLOCK_B):
        g = tl.zeros([ROWS, BLOCK_C], tl.float32)
        unit = tl.zeros([ROWS, BLOCK_C], tl.float32)
        gated = tl.zeros([ROWS, BLOCK_C], tl.float32)
        image = first + tl.arange(0, ROWS) % BLOCK_B
        for start in range(0, parts, BLOCK_P):
            part = start + tl.arange(0, ROWS) // BLOCK_B
            row = tl.where(part < parts, image * parts + part, images * parts)
            if NORM:
                g += load_tile(sums, row, COUNT * COLUMNS, column, images * parts, COLUMNS)
                unit += load_tile(sums + COLUMNS, row, COUNT * COLUMNS, column, images * parts, COLUMNS)
            if RESIDUAL:
                gated += load_tile(
                    sums + (COUNT - 1) * COLUMNS, row, COUNT * COLUMNS, column, images * parts, COLUMNS
                )
        image = first + tl.arange(0, BLOCK_B)
        if SHIFT:
            g = tl.sum(tl.reshape(g, [BLOCK_P, BLOCK_B, BLOCK_C]), 0)
            store_tile(d_shift, image, COLUMNS, column, images, COLUMNS, g, EMULATE)
        if NORM:
            d_unit = tl.sum(tl.reshape(unit, [BLOCK_P, BLOCK_B, BLOCK_C]), 0)
            if SCALE:
                store_tile(d_scale, image, COLUMNS, column, images, COLUMNS, d_unit * factor, EMULATE)
                d_unit *= 1.0 + load_tile(scale, image, scale_batch, column, images, COLUMNS).to(tl.float32)
            d_factor += d_unit
        if RESIDUAL:
            gated = tl.sum(tl.reshape(gated, [BLOCK_P, BLOCK_B, BLOCK_C]), 0)
            store_tile(d_gate, image, COLUMNS, column, images, COLUMNS, gated, EMULATE)
    if NORM:
        total = narrow(tl.sum(d_factor, 0), d_weight.dtype.element_ty, EMULATE)
        tl.store(d_weight + column, total, mask=column < COLUMNS)


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
def _forward_plan(tokens: int, columns: int) -> _Plan:
    head, tail = _split(columns)
    tile = _TILE_INTERPRETED if interpreting() else _TILE
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
        modulated_rms_norm_forward, (batch * ceil_div(tokens, plan.block_l),), x.device, plan.options,
        x=source, y=y_source, gate=gate_row, weight=x if weight is None else weight, shift=shift_row, scale=scale_row,
        z=x if z is None else z, out=x if out is None else out, eps=eps,
        x_batch=x_batch, x_token=x_token, y_batch=y_batch, y_token=y_token, gate_batch=gate_batch,
        weight_step=0 if weight is None else weight.stride(0), shift_batch=shift_batch, scale_batch=scale_batch,
        tokens=tokens, COLUMNS=columns, BLOCK_L=plan.block_l, HEAD=plan.head, TAIL=plan.tail,
        RESIDUAL=y is not None, NORM=weight is not None, SHIFT=shift is not None, SCALE=scale is not None,
        EMULATE=emulates(x.dtype),
    )  # fmt: skip
    return z, out


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
        modulated_rms_norm_backward, (batch * plan.parts,), z.device, plan.options, **shared,
        grad_z=grad_z_source, grad=grad_source, z=source, y=y_source, gate=gate_row,
        dx=z if dx is None else dx, dy=z if dy is None else dy, eps=eps,
        grad_z_batch=grad_z_batch, grad_z_token=grad_z_token, grad_batch=grad_batch, grad_token=grad_token,
        z_batch=z_batch, z_token=z_token, y_batch=y_batch, y_token=y_token, gate_batch=gate_batch,
        tokens=tokens, tokens_each=plan.tokens_each, BLOCK_L=plan.block_l, HEAD=plan.head, TAIL=plan.tail,
        GRAD_Z=grad_z is not None,
    )  # fmt: skip
    launch(
        modulated_rms_norm_sums, (ceil_div(columns, _COLUMNS),), z.device, _SUM_OPTIONS, **shared,
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
