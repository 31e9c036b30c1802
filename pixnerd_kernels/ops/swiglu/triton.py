"""The Triton kernel of `swiglu`: tiles of rows and columns, each read once and written once.

Forward and backward work at the speed of memory, so that the accurate exponential costs nothing.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixnerd_kernels.checks import describe
from pixnerd_kernels.ops.gpu.launch import Options, ceil_div, emulates, interpreting, launch, power_of_two
from pixnerd_kernels.ops.gpu.pieces import activate, activate_with_slope, load_tile, store_tile
from pixnerd_kernels.ops.native import dense_rows

#: Numbers of a tile, 16 a thread; in the interpreter a program costs what its entries do not.
_TILE, _TILE_INTERPRETED = 2048, 32768
_OPTIONS = Options(4)


@triton.jit
def swiglu_tiles(
    gate, up, grad, out, d_gate, d_up, rows, gate_row, up_row, grad_row, out_row, up_first,
    COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BACKWARD: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """out [rows, COLUMNS], or where BACKWARD d_gate and d_up, with row strides; up and d_up begin at up_first.

    out_row is the stride of what is written. A packed tensor is both gate and up.
    """
    blocks = (COLUMNS + BLOCK_C - 1) // BLOCK_C
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    z = load_tile(gate, row, gate_row, column, rows, COLUMNS)
    u = load_tile(up + up_first, row, up_row, column, rows, COLUMNS)
    if BACKWARD:
        g = load_tile(grad, row, grad_row, column, rows, COLUMNS).to(tl.float32)
        silu, slope = activate_with_slope(z.to(tl.float32), "silu", False)
        d_u = g * silu
        g *= u.to(tl.float32) * slope
        store_tile(d_gate, row, out_row, column, rows, COLUMNS, g, EMULATE)
        store_tile(d_up + up_first, row, out_row, column, rows, COLUMNS, d_u, EMULATE)
    else:
        silu = activate(z.to(tl.float32), "silu", False)
        store_tile(out, row, out_row, column, rows, COLUMNS, silu * u.to(tl.float32), EMULATE)


@triton.jit
def swiglu_jvp(
    gate, up, d_gate, d_up, out, d_out, rows, gate_row, up_row, d_gate_row, d_up_row,
    COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    GATE_MOVES: tl.constexpr, UP_MOVES: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """out [rows, COLUMNS] and its tangent d_out, dense, from d_gate and d_up where these move."""
    blocks = (COLUMNS + BLOCK_C - 1) // BLOCK_C
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    z = load_tile(gate, row, gate_row, column, rows, COLUMNS).to(tl.float32)
    u = load_tile(up, row, up_row, column, rows, COLUMNS).to(tl.float32)
    silu, slope = activate_with_slope(z, "silu", False)
    tangent = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    if GATE_MOVES:
        tangent += load_tile(d_gate, row, d_gate_row, column, rows, COLUMNS).to(tl.float32) * u * slope
    if UP_MOVES:
        tangent += silu * load_tile(d_up, row, d_up_row, column, rows, COLUMNS).to(tl.float32)
    store_tile(out, row, COLUMNS, column, rows, COLUMNS, silu * u, EMULATE)
    store_tile(d_out, row, COLUMNS, column, rows, COLUMNS, tangent, EMULATE)


@functools.lru_cache(maxsize=256)
def _plan(rows: int, columns: int) -> tuple[tuple[int], int, int]:
    """The grid, and rows and columns of a tile: as wide as pads the columns by an eighth at most."""
    tile = _TILE_INTERPRETED if interpreting() else _TILE
    block_c = min(power_of_two(columns), tile)
    while block_c > 64 and 8 * ceil_div(columns, block_c) * block_c > 9 * columns:
        block_c //= 2
    block_r = min(power_of_two(rows), tile // block_c)
    return (ceil_div(rows, block_r) * ceil_div(columns, block_c),), block_r, block_c


def _run(
    gate: Tensor, up: Tensor, up_first: int, columns: int,
    grad: Tensor | None, out: Tensor, d_up: Tensor,
) -> None:  # fmt: skip
    """Launch forward into out, or backward into out (as d_gate) and d_up; all have rows of their own stride."""
    rows = gate.shape[0]
    grid, block_r, block_c = _plan(rows, columns)
    launch(
        swiglu_tiles, grid, gate.device, _OPTIONS,
        gate=gate, up=up, grad=gate if grad is None else grad, out=out, d_gate=out, d_up=d_up, rows=rows,
        gate_row=gate.stride(0), up_row=up.stride(0), grad_row=0 if grad is None else grad.stride(0),
        out_row=out.stride(0), up_first=up_first,
        COLUMNS=columns, BLOCK_R=block_r, BLOCK_C=block_c, BACKWARD=grad is not None, EMULATE=emulates(gate.dtype),
    )  # fmt: skip


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in gate's dtype, contiguous."""
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(f"up: expected {list(gate.shape)} {gate.dtype}, got {describe(up)}")
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    _run(dense_rows(gate), dense_rows(up), 0, gate.shape[1], None, out, out)
    return out


def jvp(
    gate: Tensor, up: Tensor, gate_tangent: Tensor | None, up_tangent: Tensor | None
) -> tuple[Tensor, Tensor]:
    """silu(gate) * up and its tangent in gate's dtype, contiguous; no tangent is a zero one."""
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(f"up: expected {list(gate.shape)} {gate.dtype}, got {describe(up)}")
    rows, columns = gate.shape
    out, d_out = (torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(2))
    gate, up = dense_rows(gate), dense_rows(up)
    d_gate, d_up = (gate if t is None else dense_rows(t) for t in (gate_tangent, up_tangent))
    grid, block_r, block_c = _plan(rows, columns)
    launch(
        swiglu_jvp, grid, gate.device, _OPTIONS,
        gate=gate, up=up, d_gate=d_gate, d_up=d_up, out=out, d_out=d_out, rows=rows,
        gate_row=gate.stride(0), up_row=up.stride(0), d_gate_row=d_gate.stride(0), d_up_row=d_up.stride(0),
        COLUMNS=columns, BLOCK_R=block_r, BLOCK_C=block_c,
        GATE_MOVES=gate_tangent is not None, UP_MOVES=up_tangent is not None, EMULATE=emulates(gate.dtype),
    )  # fmt: skip
    return out, d_out


def backward(grad: Tensor, gate: Tensor, up: Tensor, d_gate: Tensor, d_up: Tensor) -> None:
    """Write the gradients of gate and up, which have the same strides."""
    _check_gradient(grad, gate.shape, gate)
    _run(dense_rows(gate), dense_rows(up), 0, gate.shape[1], dense_rows(grad), d_gate, d_up)


def packed_forward(x: Tensor) -> Tensor:
    """silu(x[:, :F]) * x[:, F:], [rows, F] in x's dtype, contiguous."""
    x = dense_rows(x)
    half = x.shape[1] // 2
    out = x.new_empty((x.shape[0], half))
    _run(x, x, half, half, None, out, out)
    return out


def packed_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, packed like it, contiguous."""
    half = x.shape[1] // 2
    _check_gradient(grad, (x.shape[0], half), x)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    x = dense_rows(x)
    _run(x, x, half, half, dense_rows(grad), dx, dx)
    return dx


def _check_gradient(grad: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if grad.shape != shape or grad.dtype != like.dtype:
        raise ValueError(f"grad: expected {list(shape)} {like.dtype}, got {describe(grad)}")
