"""The Triton kernel of `normalize_weights`, forward and backward in one."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixnerd_kernels.checks import describe
from pixnerd_kernels.ops.gpu.launch import Options, ceil_div, emulates, interpreting, launch, power_of_two
from pixnerd_kernels.ops.gpu.pieces import inverse_norm, narrow

#: Numbers of a tile: columns of more rows than that are read twice. Large in the interpreter, where tiles cost time.
_TILE, _TILE_INTERPRETED = 4096, 32768


@triton.jit
def load_pair(w, grad, places, inside, BACKWARD: tl.constexpr):
    """A tile of w and of the gradient, which without BACKWARD is the same tile, in float32."""
    tile = tl.load(w + places, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        return tile, tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
    else:
        return tile, tile


@triton.jit
def normalize_weights_columns(
    w, grad, out, eps, outer_step, rows, columns, row_step, column_step,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, WHOLE: tl.constexpr, BACKWARD: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """w / max(||w||, eps) of a block of one matrix's columns, or where BACKWARD the gradient of w."""
    blocks = tl.cdiv(columns, BLOCK_C)
    start = (tl.program_id(0) // blocks).to(tl.int64) * outer_step
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.arange(0, BLOCK_R)
    if WHOLE:
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        places = start + row[:, None].to(tl.int64) * row_step + column[None, :] * column_step
        tile, g = load_pair(w, grad, places, inside, BACKWARD)
        squares, products = tl.sum(tile * tile, 0), tl.sum(tile * g, 0)
    else:
        squares = tl.zeros([BLOCK_C], tl.float32)
        products = tl.zeros([BLOCK_C], tl.float32)
        for first in range(0, rows, BLOCK_R):
            inside = ((first + row)[:, None] < rows) & (column[None, :] < columns)
            places = start + (first + row)[:, None].to(tl.int64) * row_step + column[None, :] * column_step
            tile, g = load_pair(w, grad, places, inside, BACKWARD)
            squares += tl.sum(tile * tile, 0)
            products += tl.sum(tile * g, 0)
    scale = inverse_norm(squares, eps)
    clamped = tl.sqrt(squares) < eps
    shift = tl.where(clamped, 0.0, products * scale * scale)
    if BACKWARD:
        # A single row, normalised, is 1 or -1.
        scale = tl.where(clamped | (rows > 1), scale, 0.0)
    if WHOLE:
        if BACKWARD:
            tile = g - tile * shift[None, :]
        tl.store(out + places, narrow(tile * scale[None, :], out.dtype.element_ty, EMULATE), mask=inside)
    else:
        for first in range(0, rows, BLOCK_R):
            inside = ((first + row)[:, None] < rows) & (column[None, :] < columns)
            places = start + (first + row)[:, None].to(tl.int64) * row_step + column[None, :] * column_step
            tile, g = load_pair(w, grad, places, inside, BACKWARD)
            if BACKWARD:
                tile = g - tile * shift[None, :]
            tl.store(out + places, narrow(tile * scale[None, :], out.dtype.element_ty, EMULATE), mask=inside)


class _Plan(NamedTuple):
    grid: tuple[int]
    sizes: dict[str, int]


@functools.lru_cache(maxsize=256)
def _plan(shape: tuple[int, ...], dim: int) -> _Plan:
    """The grid, and what the kernel takes of a contiguous tensor's shape."""
    outer, rows, columns = math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])
    steps = {"outer_step": rows * columns, "row_step": columns, "column_step": 1}
    if columns == 1:  # Neighbours in memory are of one column: all matrices together are columns of one.
        outer, columns = 1, outer
        steps = {"outer_step": rows * columns, "row_step": 1, "column_step": rows}
    tile = _TILE_INTERPRETED if interpreting() else _TILE
    block_r = min(power_of_two(rows), tile)
    block_c = min(power_of_two(columns), tile // block_r)
    sizes = {"rows": rows, "columns": columns, **steps, "BLOCK_R": block_r, "BLOCK_C": block_c}
    return _Plan((outer * ceil_div(columns, block_c) if rows else 0,), sizes | {"WHOLE": block_r >= rows})


_OPTIONS = Options(4)


def _run(w: Tensor, grad: Tensor | None, dim: int, eps: float) -> Tensor:
    w = w.contiguous()
    if grad is not None:
        if grad.shape != w.shape or grad.dtype != w.dtype:
            raise ValueError(f"grad: expected {list(w.shape)} {w.dtype}, got {describe(grad)}")
        grad = grad.contiguous()
    out = torch.empty_like(w)
    plan = _plan(w.shape, dim)
    launch(
        normalize_weights_columns, plan.grid, w.device, _OPTIONS,
        w=w, grad=w if grad is None else grad, out=out, eps=eps, **plan.sizes,
        BACKWARD=grad is not None, EMULATE=emulates(w.dtype),
    )  # fmt: skip
    return out


def forward(w: Tensor, dim: int, eps: float) -> Tensor:
    """The normalised weights in w's shape and dtype, contiguous."""
    return _run(w, None, dim, eps)


def backward(grad: Tensor, w: Tensor, dim: int, eps: float) -> Tensor:
    """Gradient of w in its shape and dtype, contiguous."""
    return _run(w, grad, dim, eps)
