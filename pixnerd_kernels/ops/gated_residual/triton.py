"""Hands `gated_residual` and `gated_residual_rms_norm` to the kernels that they share with `modulated_rms_norm`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pixnerd_kernels.ops.modulated_rms_norm import triton as norm


def forward(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """z in x's dtype, contiguous."""
    z, _ = norm.run_forward(x, None, None, None, 0.0, y, gate)
    assert z is not None
    return z


def backward(grad: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of y and gate, contiguous."""
    _, dy, d_gate, *_ = norm.run_backward(grad, None, y, None, False, None, 0.0, y, gate)
    return dy, d_gate


def norm_forward(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor | None, Tensor | None]:
    """z and n in x's dtype, contiguous."""
    return norm.run_forward(x, weight, shift, scale, eps, y, gate)


def jvp(x: Tensor, y: Tensor, gate: Tensor, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """z and its tangent in x's dtype, contiguous, from those of x, y and gate; no tangent is a zero one."""
    return norm.run_jvp(x, None, None, None, 0.0, y, gate, (*tangents, None, None))[::2]


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
