"""Hands the tensors of `modulated_rms_norm`, and of its fusion with the residual before it, to the core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pixnerd_kernels.backends import native
from pixnerd_kernels.checks import describe
from pixnerd_kernels.ops.dtypes import compute_dtype
from pixnerd_kernels.ops.native import DTYPES, dense_rows, fresh, strided

#: What may have a tangent.
_MOVING = ("x", "y", "gate", "shift", "scale")


def _norm(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    y: Tensor | None,
    gate: Tensor | None,
) -> tuple[Any, tuple[Tensor | None, ...]]:
    """The core's description of a call, and the tensors that must outlive it.

    Exported programs and graph passes call the op without the public function's checks: what the core relies on is
    checked once more.
    """
    batch, _, columns = x.shape
    for name, tensor, shape in (
        ("y", y, x.shape),
        ("gate", gate, (batch, 1, columns)),
        ("shift", shift, (batch, 1, columns)),
        ("scale", scale, (batch, 1, columns)),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != x.dtype):
            raise ValueError(f"{name}: expected {list(shape)} {x.dtype}, got {describe(tensor)}")
    if weight.shape != (columns,):
        raise ValueError(f"weight: expected [{columns}], got {describe(weight)}")
    x, y, gate, shift, scale = (None if t is None else dense_rows(t) for t in (x, y, gate, shift, scale))  # type: ignore[assignment]
    weight = weight.to(compute_dtype(x.dtype)).contiguous()
    norm = native().ModulatedNorm(
        sizes=tuple(x.shape),
        dtype=DTYPES[x.dtype],
        eps=eps,
        threads=torch.get_num_threads(),
        x=strided(x),
        y=strided(y),
        gate=strided(gate),
        shift=strided(shift),
        scale=strided(scale),
        weight=weight.data_ptr(),
    )
    return norm, (x, y, gate, shift, scale, weight)


def forward(x: Tensor, weight: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float) -> Tensor:
    """out [B, L, D] in x's dtype, contiguous."""
    return run_forward(x, weight, shift, scale, eps, None, None)[1]


def run_forward(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    y: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """z = x + gate * y (None without y) and its norm, contiguous."""
    out = fresh(torch.empty_like(x, memory_format=torch.contiguous_format))
    z = None if y is None else fresh(torch.empty_like(out))
    if out.numel():
        norm, alive = _norm(x, weight, shift, scale, eps, y, gate)
        native().modulated_rms_norm_forward(norm, strided(z), strided(out))
        del alive
    return z, out


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, shifted: bool, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, shift and scale (None where absent), contiguous."""
    dx, _, _, d_weight, d_shift, d_scale = run_backward(
        None, grad, x, weight, shifted, scale, eps, None, None
    )
    return dx, d_weight, d_shift, d_scale


def run_backward(
    grad_z: Tensor | None,
    grad: Tensor,
    z: Tensor,
    weight: Tensor,
    shifted: bool,
    scale: Tensor | None,
    eps: float,
    y: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, y, gate, weight, shift and scale (None where absent), contiguous."""
    for name, tensor in (("grad", grad), ("grad_z", grad_z)):
        if tensor is not None and (tensor.shape != z.shape or tensor.dtype != z.dtype):
            raise ValueError(f"{name}: expected {list(z.shape)} {z.dtype}, got {describe(tensor)}")
    dx = fresh(torch.empty_like(z, memory_format=torch.contiguous_format))
    dy = None if y is None else fresh(torch.empty_like(dx))
    row = (z.shape[0], 1, z.shape[2])
    d_gate, d_shift, d_scale = (
        z.new_empty(row) if wanted else None for wanted in (gate is not None, shifted, scale is not None)
    )
    d_weight = torch.empty_like(weight, dtype=compute_dtype(z.dtype))
    if z.numel():
        norm, alive = _norm(z, weight, None, scale, eps, y, gate)
        grad = dense_rows(grad)
        grad_z = None if grad_z is None else dense_rows(grad_z)
        native().modulated_rms_norm_backward(
            norm,
            grad=strided(grad),
            grad_z=strided(grad_z),
            dx=strided(dx),
            dy=strided(dy),
            d_gate=strided(d_gate),
            d_shift=strided(d_shift),
            d_scale=strided(d_scale),
            d_weight=d_weight.data_ptr(),
        )
        del alive
    else:
        for target in (d_gate, d_shift, d_scale, d_weight):
            if target is not None:
                target.zero_()
    return dx, dy, d_gate, d_weight.to(weight.dtype), d_shift, d_scale


def jvp(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    x_tangent: Tensor | None,
    shift_tangent: Tensor | None,
    scale_tangent: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """out [B, L, D] and its tangent in x's dtype, contiguous; no tangent is a zero one."""
    tangents = (x_tangent, None, None, shift_tangent, scale_tangent)
    _, out, _, out_tangent = run_jvp(x, weight, shift, scale, eps, None, None, tangents)
    return out, out_tangent


def run_jvp(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    y: Tensor | None,
    gate: Tensor | None,
    tangents: Sequence[Tensor | None],
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
    """z = x + gate * y (None without y), its norm, and their tangents, from those of x, y, gate, shift and scale."""
    out, out_tangent = (fresh(torch.empty_like(x, memory_format=torch.contiguous_format)) for _ in range(2))
    z, z_tangent = (None if y is None else fresh(torch.empty_like(out)) for _ in range(2))
    if out.numel():
        norm, alive = _norm(x, weight, shift, scale, eps, y, gate)
        dense = [None if tangent is None else dense_rows(tangent) for tangent in tangents]
        native().modulated_rms_norm_jvp(
            norm,
            **{name: strided(tangent) for name, tangent in zip(_MOVING, dense, strict=True)},
            z=strided(z),
            z_tangent=strided(z_tangent),
            out=strided(out),
            out_tangent=strided(out_tangent),
        )
        del alive
    return z, out, z_tangent, out_tangent
