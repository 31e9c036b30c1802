"""The modulated RMSNorm in plain PyTorch: the truth that every other backend is measured against.

    out = n * weight * (1 + scale) + shift,   n = x * rsqrt(mean(x^2, -1) + eps)

x [B, L, D], weight [D], shift and scale [B, 1, D] or None. With g the gradient of out and a = weight * (1 + scale):

    dx = (g a - n mean(g a n, -1)) * rsqrt(mean(x^2, -1) + eps)
    d_shift = sum_l g,   d_scale = weight * sum_l g n,   d_weight = sum_b (1 + scale) * sum_l g n

A tangent x' moves n by n' = (x' - n mean(x' n, -1)) * rsqrt(mean(x^2, -1) + eps), and

    out' = n' a + n * weight * scale' + shift'

float32 and float64 compute in their own dtype, bfloat16 and float16 in float32 with one rounding at the end. Source:
the official PixNerd's RMSNorm and modulate (DiT, arXiv 2212.09748).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pixnerd_kernels.ops.dtypes import compute_dtype


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """n and 1 / rms of x, in the dtype computed in."""
    wide = x.to(compute_dtype(x.dtype))
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * inverse, inverse


def _factor(weight: Tensor, scale: Tensor | None, wide: torch.dtype) -> Tensor:
    return weight.to(wide) if scale is None else weight.to(wide) * (1 + scale.to(wide))


def forward(x: Tensor, weight: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float) -> Tensor:
    """out [B, L, D] in x's dtype, contiguous."""
    n, _ = _normalise(x, eps)
    out = n * _factor(weight, scale, n.dtype)
    if shift is not None:
        out = out + shift.to(n.dtype)
    return out.to(x.dtype).contiguous()


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, shifted: bool, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight, shift and scale (None where absent), contiguous."""
    n, inverse = _normalise(x, eps)
    g = grad.to(n.dtype)
    dn = g * _factor(weight, scale, n.dtype)
    dx = (dn - n * (dn * n).mean(-1, keepdim=True)) * inverse
    g_n = (g * n).sum(1, keepdim=True)
    d_weight = g_n if scale is None else g_n * (1 + scale.to(n.dtype))
    d_shift = g.sum(1, keepdim=True).to(x.dtype) if shifted else None
    d_scale = None if scale is None else (g_n * weight.to(n.dtype)).to(x.dtype)
    return dx.to(x.dtype).contiguous(), d_weight.sum((0, 1)).to(weight.dtype), d_shift, d_scale


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
    n, inverse = _normalise(x, eps)
    factor = _factor(weight, scale, n.dtype)
    out, tangent = n * factor, torch.zeros_like(n)
    if shift is not None:
        out = out + shift.to(n.dtype)
    if x_tangent is not None:
        dx = x_tangent.to(n.dtype)
        tangent = (dx - n * (dx * n).mean(-1, keepdim=True)) * inverse * factor
    if scale_tangent is not None:
        tangent = tangent + n * (weight.to(n.dtype) * scale_tangent.to(n.dtype))
    if shift_tangent is not None:
        tangent = tangent + shift_tangent.to(n.dtype)
    return out.to(x.dtype).contiguous(), tangent.to(x.dtype).contiguous()
