"""The Triton kernels of `swiglu`: tiles of rows and columns, each read once and written once.

Both work at the speed of memory, so that the accurate exponential costs nothing. Not run on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixnerd_kernels.checks import describe
from pixnerd_kernels.ops.gpu.launch import Options, emulates, interpreting, launch
from pixnerd_kernels.ops.gpu.pieces import activate, activate_with_slope, load_tile, store_tile
from pixnerd_kernels.ops.native import dense_rows

#: Numbers of a tile; in the interpreter a program costs what its entries do not.
_TILE, _TILE_INTERPRETED = 2048, 32768


@triton.jit
def swiglu_tiles(
    gate, up, grad, out, d_gate, d_up, rows, gate_row, up_row, grad_row, d_gate_row, d_up_row,
    COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BACKWARD: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """out [rows, COLUMNS], or where BACKWARD d_gate and d_up; each tensor has a row stride of its own."""
    blocks = (COLUMNS + BLOCK_C - 1) // BLOCK_C
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    z = load_tile(gate, row, gate_row, column, rows, COLUMNS).to(tl.float32)
    u = load_tile(up, row, up_row, column, rows, COLUMNS).to(tl.float32)
    if BACKWARD:
        g = load_tile(grad, row, grad_row, column, rows, COLUMNS).to(tl.float32)
        silu, slope = activate_with_slope(z, "silu", False)
        store_tile(d_gate, row, d_gate_row, column, rows, COLUMNS, g * u * slope, EMULATE)
        store_tile(d_up, row, d_up_row, column, rows, COLUMNS, g * silu, EMULATE)
    else:
        store_tile(out, row, COLUMNS, column, rows, COLUMNS, activate(z, "silu", False) * u, EMULATE)


def _run(
    gate: Tensor,
    up: Tensor,
    grad: Tensor | None,
    out: Tensor | None,
    d_gate: Tensor | None,
    d_up: Tensor | None,
) -> None:
    """Launch forward (into out) or backward (into d_gate and d_up); all [rows, columns]."""
    gate, up = dense_rows(gate), dense_rows(up)
    grad = None if grad is None else dense_rows(grad)
    rows, columns = gate.shape
    tile = _TILE_INTERPRETED if interpreting() else _TILE
    block_c = min(triton.next_power_of_2(max(columns, 1)), tile // 2)
    block_r = min(triton.next_power_of_2(max(rows, 1)), tile // block_c)
    unused = gate
    tensors = {
        name: unused if tensor is None else tensor
        for name, tensor in {"grad": grad, "out": out, "d_gate": d_gate, "d_up": d_up}.items()
    }
    strides = {
        f"{name}_row": tensor.stride(0)
        for name, tensor in {"gate": gate, "up": up, **tensors}.items()
        if name != "out"
    }
    launch(
        swiglu_tiles, (triton.cdiv(rows, block_r) * triton.cdiv(columns, block_c),), gate.device, Options(4),
        gate=gate, up=up, **tensors, rows=rows, **strides,
        COLUMNS=columns, BLOCK_R=block_r, BLOCK_C=block_c, BACKWARD=grad is not None, EMULATE=emulates(gate.dtype),
    )  # fmt: skip


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in gate's dtype, contiguous."""
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(f"up: expected {list(gate.shape)} {gate.dtype}, got {describe(up)}")
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    _run(gate, up, None, out, None, None)
    return out


def backward(grad: Tensor, gate: Tensor, up: Tensor, d_gate: Tensor, d_up: Tensor) -> None:
    """Write the gradients of gate and up."""
    if grad.shape != gate.shape or grad.dtype != gate.dtype:
        raise ValueError(f"grad: expected {list(gate.shape)} {gate.dtype}, got {describe(grad)}")
    _run(gate, up, grad, None, d_gate, d_up)
