"""Normalised and rotated queries and keys in plain PyTorch: the truth that every other backend is measured against.

    n(x) = x * rsqrt(mean(x^2, -1) + eps) * weight
    rotate((a, b)) = (a cos - b sin, a sin + b cos)        for neighbouring channels a, b
    q = rotate(n(q)),  k = [rotate(n(k)), n(text k)],  v = [v, text v]

qkv [B, L, 3, heads, d], text_kv [B, M, 2, heads, d] or None, rope [L, d / 2, (cos, sin)] or None (no rotation).
float32 and float64 compute in their own dtype, bfloat16 and float16 in float32 with one rounding at the end. Source:
the official PixNerd's attention, class-to-image and (with text) text-to-image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pixnerd_kernels.ops.dtypes import compute_dtype
from pixnerd_kernels.ops.modulated_rms_norm import reference as norm


def rotate(x: Tensor, rope: Tensor, back: bool = False) -> Tensor:
    """Turn neighbouring channel pairs of x [B, L, heads, d] by the table's angles, or back."""
    cos, sin = rope[:, None].to(x.dtype).unbind(-1)
    sin = -sin if back else sin
    even, odd = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).reshape(x.shape)


def _rows(x: Tensor) -> Tensor:
    """[B, L, heads, d] as [B * L, heads, d]. Not by flatten, which gradients computed several at a time do not know."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """n(x) in the dtype computed in."""
    wide = x.to(compute_dtype(x.dtype))
    return norm.forward(_rows(wide), weight, None, None, eps).view(x.shape)


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and, in the dtype computed in, of weight."""
    wide = compute_dtype(x.dtype)
    dx, d_weight, _, _ = norm.backward(_rows(grad), _rows(x.to(wide)), weight.to(wide), False, None, eps)
    return dx.view(x.shape).to(x.dtype), d_weight


def forward(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor | None, text_kv: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, L, heads, d], k and v [B, L + M, heads, d], contiguous."""
    q, k, v = qkv.unbind(2)
    q, k = _norm(q, q_weight, eps), _norm(k, k_weight, eps)
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope)
    if text_kv is not None:
        text_k, text_v = text_kv.unbind(2)
        k = torch.cat([k, _norm(text_k, k_weight, eps)], dim=1)
        v = torch.cat([v, text_v], dim=1)
    dense = torch.contiguous_format
    return q.to(qkv.dtype).contiguous(), k.to(qkv.dtype).contiguous(), v.clone(memory_format=dense)


def backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor | None,
    text_kv: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of qkv, q_weight, k_weight and text_kv, contiguous."""
    tokens, wide = qkv.shape[1], compute_dtype(qkv.dtype)
    q, k, _ = qkv.unbind(2)
    # Not by indexing, which makes an alias of the whole: gradients computed several at a time do not know that.
    own_k, own_v = grad_k.narrow(1, 0, tokens), grad_v.narrow(1, 0, tokens)
    g_q, g_k = grad_q.to(wide), own_k.to(wide)
    if rope is not None:
        g_q, g_k = rotate(g_q, rope, back=True), rotate(g_k, rope, back=True)
    dq, dq_weight = _norm_backward(g_q, q, q_weight, eps)
    dk, dk_weight = _norm_backward(g_k, k, k_weight, eps)
    d_text = None
    if text_kv is not None:
        text_k, text_v = (g.narrow(1, tokens, g.shape[1] - tokens) for g in (grad_k, grad_v))
        d_text_k, more = _norm_backward(text_k.to(wide), text_kv[:, :, 0], k_weight, eps)
        d_text = torch.stack([d_text_k, text_v], dim=2)
        dk_weight = dk_weight + more
    d_qkv = torch.stack([dq, dk, own_v], dim=2)
    return d_qkv, dq_weight.to(q_weight.dtype), dk_weight.to(k_weight.dtype), d_text


def _norm_jvp(x: Tensor, tangent: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """n(x) and its tangent in the dtype computed in."""
    wide = compute_dtype(x.dtype)
    along = None if tangent is None else _rows(tangent.to(wide))
    n, dn = norm.jvp(_rows(x.to(wide)), weight, None, None, along, None, None, eps)
    return n.view(x.shape), dn.view(x.shape)


def jvp(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor | None,
    text_kv: Tensor | None,
    qkv_tangent: Tensor | None,
    text_kv_tangent: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """q [B, L, heads, d], k and v [B, L + M, heads, d], and a tangent of each; no tangent is a zero one."""
    q, k, v = qkv.unbind(2)
    dq, dk, dv = (None, None, torch.zeros_like(v)) if qkv_tangent is None else qkv_tangent.unbind(2)
    queries: tuple[Tensor, ...] = _norm_jvp(q, dq, q_weight, eps)
    keys: tuple[Tensor, ...] = _norm_jvp(k, dk, k_weight, eps)
    values: tuple[Tensor, ...] = (v, dv)
    if rope is not None:
        queries, keys = (tuple(rotate(x, rope) for x in pair) for pair in (queries, keys))
    if text_kv is not None:
        text_k, text_v = text_kv.unbind(2)
        more = (None, torch.zeros_like(text_v)) if text_kv_tangent is None else text_kv_tangent.unbind(2)
        pairs = zip(keys, _norm_jvp(text_k, more[0], k_weight, eps), strict=True)
        keys = tuple(torch.cat(pair, dim=1) for pair in pairs)
        values = tuple(torch.cat(pair, dim=1) for pair in zip(values, (text_v, more[1]), strict=True))
    found = zip(queries, keys, values, strict=True)
    return tuple(t.to(qkv.dtype).clone(memory_format=torch.contiguous_format) for each in found for t in each)
