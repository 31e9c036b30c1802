"""Hands the tensors of `swiglu` to csrc/swiglu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pixnerd_kernels.backends import native
from pixnerd_kernels.checks import describe
from pixnerd_kernels.ops.native import ABSENT, DTYPES, Strided, dense_rows, fresh


def _rows(tensor: Tensor) -> Strided:
    return tensor.data_ptr(), 0, tensor.stride(0)


def _call(gate: Tensor, up: Tensor) -> tuple[Any, tuple[Tensor, Tensor]]:
    """The core's description of a call, and the tensors that must outlive it."""
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(f"up: expected {list(gate.shape)} {gate.dtype}, got {describe(up)}")
    gate, up = dense_rows(gate), dense_rows(up)
    call = native().Swiglu(
        rows=gate.shape[0],
        columns=gate.shape[1],
        dtype=DTYPES[gate.dtype],
        threads=torch.get_num_threads(),
        gate=_rows(gate),
        up=_rows(up),
    )
    return call, (gate, up)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in gate's dtype, contiguous."""
    out = fresh(torch.empty_like(gate, memory_format=torch.contiguous_format))
    if out.numel():
        call, alive = _call(gate, up)
        native().swiglu_forward(call, _rows(out))
        del alive
    return out


def backward(grad: Tensor, gate: Tensor, up: Tensor, d_gate: Tensor, d_up: Tensor) -> None:
    """Write the gradients of gate and up."""
    if grad.shape != gate.shape or grad.dtype != gate.dtype:
        raise ValueError(f"grad: expected {list(gate.shape)} {gate.dtype}, got {describe(grad)}")
    if grad.numel():
        grad = dense_rows(grad)
        call, alive = _call(gate, up)
        native().swiglu_backward(call, _rows(grad), _rows(d_gate), _rows(d_up))
        del alive


def jvp(
    gate: Tensor, up: Tensor, gate_tangent: Tensor | None, up_tangent: Tensor | None
) -> tuple[Tensor, Tensor]:
    """silu(gate) * up and its tangent in gate's dtype, contiguous; no tangent is a zero one."""
    out, tangent = (fresh(torch.empty_like(gate, memory_format=torch.contiguous_format)) for _ in range(2))
    if out.numel():
        call, alive = _call(gate, up)
        along = [None if t is None else dense_rows(t) for t in (gate_tangent, up_tangent)]
        moving = (ABSENT if t is None else _rows(t) for t in along)
        native().swiglu_jvp(call, *moving, _rows(out), _rows(tangent))
        del alive
    return out, tangent
