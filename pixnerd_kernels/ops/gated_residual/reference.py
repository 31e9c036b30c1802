"""The gated residual, alone and with the norm behind it, in plain PyTorch.

    z = x + gate * y
    n = modulated_rms_norm(z, weight, shift, scale, eps)

x and y [B, L, D], gate [B, 1, D]. With g the gradient of z: dx = g, dy = g * gate, d_gate = sum_l g * y. A tangent:
z' = x' + gate * y' + gate' * y. float32 and float64 compute in their own dtype, bfloat16 and float16 in float32 with
one rounding at the end. Source: the official PixNerd's DiT block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pixnerd_kernels.ops.dtypes import compute_dtype
from pixnerd_kernels.ops.modulated_rms_norm import reference as norm


def _sum(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """z in the dtype computed in."""
    wide = compute_dtype(x.dtype)
    return x.to(wide) + gate.to(wide) * y.to(wide)


def _sum_tangent(
    y: Tensor, gate: Tensor, x_tangent: Tensor | None, y_tangent: Tensor | None, gate_tangent: Tensor | None
) -> Tensor:
    """The tangent of z in the dtype computed in."""
    wide = compute_dtype(y.dtype)
    tangent = torch.zeros_like(y, dtype=wide) if x_tangent is None else x_tangent.to(wide)
    if y_tangent is not None:
        tangent = tangent + gate.to(wide) * y_tangent.to(wide)
    if gate_tangent is not None:
        tangent = tangent + gate_tangent.to(wide) * y.to(wide)
    return tangent


def forward(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """z in x's dtype, contiguous."""
    return _sum(x, y, gate).to(x.dtype).contiguous()


def backward(grad: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y and gate, contiguous."""
    wide = compute_dtype(y.dtype)
    g = grad.to(wide)
    d_gate = (g * y.to(wide)).sum(1, keepdim=True)
    return (g * gate.to(wide)).to(y.dtype).contiguous(), d_gate.to(y.dtype)


def jvp(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    x_tangent: Tensor | None,
    y_tangent: Tensor | None,
    gate_tangent: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """z and its tangent in x's dtype, contiguous; no tangent is a zero one."""
    # One that is x's own would be both an argument of the op and its result.
    tangent = _sum_tangent(y, gate, x_tangent, y_tangent, gate_tangent).to(x.dtype)
    return forward(x, y, gate), tangent.clone(memory_format=torch.contiguous_format)


def norm_forward(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """z and n in x's dtype, contiguous; n is taken of z before it is rounded."""
    z = _sum(x, y, gate)
    shift, scale = (None if row is None else row.to(z.dtype) for row in (shift, scale))
    n = norm.forward(z, weight, shift, scale, eps)
    return z.to(x.dtype).contiguous(), n.to(x.dtype)


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
    wide = compute_dtype(z.dtype)
    dz, d_weight, d_shift, d_scale = norm.backward(
        grad.to(wide), z.to(wide), weight, shifted, None if scale is None else scale.to(wide), eps
    )
    dz = dz + grad_z.to(wide)
    d_gate = (dz * y.to(wide)).sum(1, keepdim=True).to(z.dtype)
    dy = (dz * gate.to(wide)).to(z.dtype)
    rows = [None if row is None else row.to(z.dtype) for row in (d_shift, d_scale)]
    return dz.to(z.dtype).contiguous(), dy.contiguous(), d_gate, d_weight, *rows


def norm_jvp(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    tangents: Sequence[Tensor | None],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, n and their tangents in x's dtype, contiguous, from those of x, y, gate, shift and scale (None: zero)."""
    *of_sum, shift_tangent, scale_tangent = tangents
    z, dz = _sum(x, y, gate), _sum_tangent(y, gate, *of_sum)
    shift, scale = (None if row is None else row.to(z.dtype) for row in (shift, scale))
    n, dn = norm.jvp(z, weight, shift, scale, dz, shift_tangent, scale_tangent, eps)
    dz = dz.to(x.dtype).clone(memory_format=torch.contiguous_format)
    return z.to(x.dtype).contiguous(), n.to(x.dtype), dz, dn.to(x.dtype)
