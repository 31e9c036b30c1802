"""The neural-field block in plain PyTorch: the truth that every other backend is measured against.

    n = x                                            without norm_weight
    n = x * rsqrt(mean(x^2, -1) + norm_eps) * norm_weight
    z1 = n @ w1 * s1,   s1 = 1 / max(||w1||, weight_eps) over dim -2, or 1 where w1 is not normalised
    h = act(z1)                                      plain
    h = act(n @ w_gate * s_gate) * z1                gated
    y = x + h @ w2 * s2                              (without the x when residual is False)

x [N, S, D1]; w1, w_gate [N, D1, D2]; w2 [N, D2, D1]; norm_weight [D1]. float32 and float64 compute in their own
dtype, bfloat16 and float16 in float32 with one rounding at the end. Source: the official PixNerd block (plain)
and Chroma1-Radiance's block (gated).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pixnerd_kernels.ops.dtypes import compute_dtype

_GELU_A = math.sqrt(2 / math.pi)
_GELU_B = 0.044715


def activate(z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The activation and its derivative, both of z's shape."""
    if activation == "relu":
        # NaN has a slope, so that it reaches the gradients.
        return torch.relu(z), (z <= 0).logical_not().to(z.dtype)
    if activation == "silu":
        s = torch.sigmoid(z)
        return z * s, s * (1 + z * (1 - s))
    # The tanh form of gelu: 0.5 (1 + tanh(u)) = sigmoid(2u).
    s = torch.sigmoid(2 * _GELU_A * (z + _GELU_B * z**3))
    return z * s, s + z * s * (1 - s) * 2 * _GELU_A * (1 + 3 * _GELU_B * z.square())


def column_scale(w: Tensor, normalize: bool, eps: float) -> Tensor:
    """1 / max(||w||, eps) over dim -2, shape [N, 1, columns]; ones where the weight is not normalised."""
    if not normalize:
        return torch.ones_like(w[:, :1])
    return 1 / torch.linalg.vector_norm(w, dim=-2, keepdim=True).clamp_min(eps)


def weight_grad(w: Tensor, scale: Tensor, grad: Tensor, normalize: bool, eps: float) -> Tensor:
    """Gradient of the raw weight from `grad`, that of the scaled weight w * scale."""
    if not normalize:
        return grad
    clamped = torch.linalg.vector_norm(w, dim=-2, keepdim=True) < eps
    if w.shape[-2] == 1:  # normalised, it is 1 or -1
        return grad * torch.where(clamped, scale, torch.zeros_like(scale))
    projection = (w * grad).sum(-2, keepdim=True) * scale.square()
    return scale * (grad - w * torch.where(clamped, torch.zeros_like(projection), projection))


weight_tangent = weight_grad  # of w * scale, from that of w: the same linear map, which is its own transpose


def rms_norm(x: Tensor, norm_weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The normalised x, and rsqrt(mean(x^2) + eps) [N, S, 1]; x itself and ones without a weight."""
    if norm_weight is None:
        return x, torch.ones_like(x[..., :1])
    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * r * norm_weight, r


def rms_norm_tangent(x: Tensor, r: Tensor, norm_weight: Tensor | None, tangent: Tensor) -> Tensor:
    """The tangent of `rms_norm`'s result, from that of x; r is its second."""
    if norm_weight is None:
        return tangent
    unit = x * r
    return r * (tangent - unit * (unit * tangent).mean(-1, keepdim=True)) * norm_weight


def forward(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w_gate: Tensor | None,
    norm_weight: Tensor | None,
    normalize: Sequence[bool],
    activation: str,
    residual: bool,
    norm_eps: float,
    weight_eps: float,
) -> Tensor:
    """y [N, S, D1] in x's dtype, contiguous. `normalize` says which of w1, w2, w_gate are normalised."""
    out_dtype, dtype = x.dtype, compute_dtype(x.dtype)
    x, w1, w2 = x.to(dtype), w1.to(dtype), w2.to(dtype)
    norm_weight = None if norm_weight is None else norm_weight.to(dtype)
    n, _ = rms_norm(x, norm_weight, norm_eps)
    z = torch.bmm(n, w1) * column_scale(w1, normalize[0], weight_eps)
    if w_gate is None:
        h = activate(z, activation)[0]
    else:
        w_gate = w_gate.to(dtype)
        gate = torch.bmm(n, w_gate) * column_scale(w_gate, normalize[2], weight_eps)
        h = activate(gate, activation)[0] * z
    y = torch.bmm(h, w2) * column_scale(w2, normalize[1], weight_eps)
    return (x + y if residual else y).to(out_dtype).contiguous()


def backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w_gate: Tensor | None,
    norm_weight: Tensor | None,
    normalize: Sequence[bool],
    activation: str,
    residual: bool,
    norm_eps: float,
    weight_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, w1, w2, w_gate and norm_weight in closed form, each in its input's dtype."""
    dtypes = [x.dtype, w1.dtype, w2.dtype]
    dtype = compute_dtype(x.dtype)
    grad, x, w1, w2 = grad.to(dtype), x.to(dtype), w1.to(dtype), w2.to(dtype)
    weight = None if norm_weight is None else norm_weight.to(dtype)
    n, r = rms_norm(x, weight, norm_eps)
    s1 = column_scale(w1, normalize[0], weight_eps)
    s2 = column_scale(w2, normalize[1], weight_eps)
    z = torch.bmm(n, w1) * s1
    dh = torch.bmm(grad * s2, w2.mT)
    if w_gate is None:
        h, slope = activate(z, activation)
        dz = dh * slope
        dn = torch.bmm(dz * s1, w1.mT)
        d_gate = None
    else:
        gate_dtype, w_gate = w_gate.dtype, w_gate.to(dtype)
        s_gate = column_scale(w_gate, normalize[2], weight_eps)
        g, slope = activate(torch.bmm(n, w_gate) * s_gate, activation)
        h, dz, dg = g * z, dh * g, dh * z * slope
        dn = torch.bmm(dz * s1, w1.mT) + torch.bmm(dg * s_gate, w_gate.mT)
        d_gate = weight_grad(w_gate, s_gate, torch.bmm(n.mT, dg), normalize[2], weight_eps).to(gate_dtype)
    d1 = weight_grad(w1, s1, torch.bmm(n.mT, dz), normalize[0], weight_eps)
    d2 = weight_grad(w2, s2, torch.bmm(h.mT, grad), normalize[1], weight_eps)
    if weight is None or norm_weight is None:
        dx, d_norm = dn, None
    else:
        unit = x * r
        d_norm = (dn * unit).sum((0, 1)).to(norm_weight.dtype)
        dn = dn * weight
        dx = r * (dn - unit * (dn * unit).mean(-1, keepdim=True))
    if residual:
        dx = dx + grad
    return dx.to(dtypes[0]), d1.to(dtypes[1]), d2.to(dtypes[2]), d_gate, d_norm


def jvp(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w_gate: Tensor | None,
    norm_weight: Tensor | None,
    x_tangent: Tensor | None,
    w1_tangent: Tensor | None,
    w2_tangent: Tensor | None,
    w_gate_tangent: Tensor | None,
    normalize: Sequence[bool],
    activation: str,
    residual: bool,
    norm_eps: float,
    weight_eps: float,
) -> tuple[Tensor, Tensor]:
    """y [N, S, D1] and its tangent (Jacobian-vector product) in x's dtype, contiguous; no tangent is a zero one.

    The weights' dtype may be another than x's: both are computed in the dtype that x's is computed in.
    """
    out_dtype, dtype = x.dtype, compute_dtype(x.dtype)

    def both(w: Tensor, tangent: Tensor | None, normal: bool) -> tuple[Tensor, Tensor]:
        """A weight as it enters the product, and its tangent."""
        w = w.to(dtype)
        scale = column_scale(w, normal, weight_eps)
        if tangent is None:
            return w * scale, torch.zeros_like(w)
        return w * scale, weight_tangent(w, scale, tangent.to(dtype), normal, weight_eps)

    x = x.to(dtype)
    dx = torch.zeros_like(x) if x_tangent is None else x_tangent.to(dtype)
    norm_weight = None if norm_weight is None else norm_weight.to(dtype)
    n, r = rms_norm(x, norm_weight, norm_eps)
    dn = rms_norm_tangent(x, r, norm_weight, dx)
    w1, d1 = both(w1, w1_tangent, normalize[0])
    w2, d2 = both(w2, w2_tangent, normalize[1])
    z, dz = torch.bmm(n, w1), torch.bmm(dn, w1) + torch.bmm(n, d1)
    if w_gate is None:
        h, slope = activate(z, activation)
        dh = slope * dz
    else:
        w_gate, d_gate = both(w_gate, w_gate_tangent, normalize[2])
        g, slope = activate(torch.bmm(n, w_gate), activation)
        h, dh = g * z, g * dz + slope * (torch.bmm(dn, w_gate) + torch.bmm(n, d_gate)) * z
    y, dy = torch.bmm(h, w2), torch.bmm(dh, w2) + torch.bmm(h, d2)
    if residual:
        y, dy = x + y, dx + dy
    return y.to(out_dtype).contiguous(), dy.to(out_dtype).contiguous()
