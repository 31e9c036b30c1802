"""Hands the tensors of `gated_residual` and `gated_residual_rms_norm` to the core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pixnerd_kernels.backends import native
from pixnerd_kernels.checks import describe
from pixnerd_kernels.ops.modulated_rms_norm import cpu as norm
from pixnerd_kernels.ops.native import DTYPES, dense_rows, fresh, strided


def _residual(y: Tensor, gate: Tensor) -> tuple[Any, tuple[Tensor, Tensor]]:
    """The core's description of a call, and the tensors that must outlive it."""
    expected = (y.shape[0], 1, y.shape[2])
    if gate.shape != expected or gate.dtype != y.dtype:
        raise ValueError(f"gate: expected {list(expected)} {y.dtype}, got {describe(gate)}")
    y, gate = dense_rows(y), dense_rows(gate)
    call = native().GatedResidual(
        sizes=tuple(y.shape),
        dtype=DTYPES[y.dtype],
        threads=torch.get_num_threads(),
        y=strided(y),
        gate=strided(gate),
    )
    return call, (y, gate)


def forward(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """z in x's dtype, contiguous."""
    out = fresh(torch.empty_like(x, memory_format=torch.contiguous_format))
    if y.shape != x.shape or y.dtype != x.dtype:
        raise ValueError(f"y: expected {list(x.shape)} {x.dtype}, got {describe(y)}")
    if out.numel():
        x = dense_rows(x)
        call, alive = _residual(y, gate)
        native().gated_residual_forward(call, strided(x), strided(out))
        del alive
    return out


def jvp(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    x_tangent: Tensor | None,
    y_tangent: Tensor | None,
    gate_tangent: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """z and its tangent in x's dtype, contiguous; no tangent is a zero one."""
    tangents = (x_tangent, y_tangent, gate_tangent)
    if y.shape != x.shape or y.dtype != x.dtype:
        raise ValueError(f"y: expected {list(x.shape)} {x.dtype}, got {describe(y)}")
    out, out_tangent = (fresh(torch.empty_like(x, memory_format=torch.contiguous_format)) for _ in range(2))
    if out.numel():
        x = dense_rows(x)
        call, alive = _residual(y, gate)
        dx, dy, d_gate = (None if tangent is None else dense_rows(tangent) for tangent in tangents)
        native().gated_residual_jvp(
            call,
            x=strided(x),
            x_tangent=strided(dx),
            y_tangent=strided(dy),
            gate_tangent=strided(d_gate),
            out=strided(out),
            out_tangent=strided(out_tangent),
        )
        del alive
    return out, out_tangent


def backward(grad: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y and gate, contiguous."""
    if grad.shape != y.shape or grad.dtype != y.dtype:
        raise ValueError(f"grad: expected {list(y.shape)} {y.dtype}, got {describe(grad)}")
    dy = fresh(torch.empty_like(y, memory_format=torch.contiguous_format))
    d_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if y.numel():
        grad = dense_rows(grad)
        call, alive = _residual(y, gate)
        native().gated_residual_backward(call, strided(grad), strided(dy), strided(d_gate))
        del alive
    else:
        d_gate.zero_()
    return dy, d_gate


def norm_forward(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """z and n in x's dtype, contiguous."""
    z, n = norm.run_forward(x, weight, shift, scale, eps, y, gate)
    assert z is not None
    return z, n


def norm_backward(
    grad_z: Tensor,
    grad: Tensor,
    z: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    shifted: bool,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, y, gate, weight, shift and scale (None where absent), contiguous."""
    return norm.run_backward(grad_z, grad, z, weight, shifted, scale, eps, y, gate)


def norm_jvp(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    tangents: Sequence[Tensor | None],
    eps: float,
) -> tuple[Tensor | None, ...]:
    """z, n and their tangents in x's dtype, contiguous, from those of x, y, gate, shift and scale (None: zero)."""
    return norm.run_jvp(x, weight, shift, scale, eps, y, gate, tangents)
