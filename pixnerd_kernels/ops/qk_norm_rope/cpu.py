"""Hands the tensors of `qk_norm_rope` to csrc/qk_norm_rope."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pixnerd_kernels.backends import native
from pixnerd_kernels.checks import describe
from pixnerd_kernels.ops.dtypes import compute_dtype
from pixnerd_kernels.ops.native import DTYPES, dense_rows, fresh
from pixnerd_kernels.ops.qk_norm_rope.shapes import new_results

#: (address, batch stride, token stride, head stride) in elements; a zero address is an absent tensor.
_Heads = tuple[int, int, int, int]
_ABSENT: _Heads = (0, 0, 0, 0)


def _heads(tensor: Tensor) -> _Heads:
    """[B, tokens, heads, d] with dense rows, as the core takes it."""
    batch, token, head, _ = tensor.stride()
    return tensor.data_ptr(), batch, token, head


def _parts(packed: Tensor | None, count: int) -> list[_Heads]:
    """The `count` tensors [B, tokens, heads, d] inside [B, tokens, count, heads, d]."""
    return [_ABSENT] * count if packed is None else [_heads(part) for part in packed.unbind(2)]


def _call(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor | None, text_kv: Tensor | None, eps: float
) -> tuple[Any, tuple[Tensor | None, ...]]:
    """The core's description of a call, and the tensors that must outlive it.

    Exported programs and graph passes call the op without the public function's checks: what the core relies on is
    checked once more.
    """
    batch, tokens, _, heads, channels = qkv.shape
    text_tokens = 0 if text_kv is None else text_kv.shape[1]
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("qkv", qkv, (batch, tokens, 3, heads, channels)),
        ("q_weight", q_weight, (channels,)),
        ("k_weight", k_weight, (channels,)),
        ("rope", rope, (tokens, channels // 2, 2)),
        ("text_kv", text_kv, (batch, text_tokens, 2, heads, channels)),
    ]
    for name, tensor, shape in expected:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {describe(tensor)}")
    if rope is not None and channels % 2:
        raise ValueError(f"rope: expected none for heads of {channels} channels, which are no pairs")
    if text_kv is not None and text_kv.dtype != qkv.dtype:
        raise ValueError(f"text_kv: expected {qkv.dtype}, got {describe(text_kv)}")
    wide = compute_dtype(qkv.dtype)
    qkv, text_kv = dense_rows(qkv), None if text_kv is None else dense_rows(text_kv)
    q_weight, k_weight = q_weight.to(wide).contiguous(), k_weight.to(wide).contiguous()
    rope = None if rope is None else rope.to(wide).contiguous()
    q, k, v = _parts(qkv, 3)
    text_k, text_v = _parts(text_kv, 2)
    call = native().QkNormRope(
        sizes=(batch, tokens, text_tokens, heads, channels),
        dtype=DTYPES[qkv.dtype],
        eps=eps,
        threads=torch.get_num_threads(),
        q=q,
        k=k,
        v=v,
        text_k=text_k,
        text_v=text_v,
        q_weight=q_weight.data_ptr(),
        k_weight=k_weight.data_ptr(),
        rope=0 if rope is None else rope.data_ptr(),
    )
    return call, (qkv, text_kv, q_weight, k_weight, rope)


def forward(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor | None, text_kv: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, L, heads, d], k and v [B, L + M, heads, d], contiguous."""
    q, k, v = map(fresh, new_results(qkv, text_kv))
    if k.numel():
        call, alive = _call(qkv, q_weight, k_weight, rope, text_kv, eps)
        native().qk_norm_rope_forward(call, _heads(q), _heads(k), _heads(v))
        del alive
    return q, k, v


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
    values, tangents = ([*map(fresh, new_results(qkv, text_kv))] for _ in range(2))
    if values[1].numel():
        call, alive = _call(qkv, q_weight, k_weight, rope, text_kv, eps)
        along, text_along = (None if t is None else dense_rows(t) for t in (qkv_tangent, text_kv_tangent))
        moving = [*_parts(along, 3), *_parts(text_along, 2)]
        native().qk_norm_rope_jvp(call, moving, [*map(_heads, values)], [*map(_heads, tangents)])
        del alive
    return *values, *tangents


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
    batch, tokens, _, heads, channels = qkv.shape
    keys = tokens + (0 if text_kv is None else text_kv.shape[1])
    for name, grad, length in (
        ("grad_q", grad_q, tokens),
        ("grad_k", grad_k, keys),
        ("grad_v", grad_v, keys),
    ):
        if grad.shape != (batch, length, heads, channels) or grad.dtype != qkv.dtype:
            expected = [batch, length, heads, channels]
            raise ValueError(f"{name}: expected {expected} {qkv.dtype}, got {describe(grad)}")
    d_qkv = fresh(torch.empty_like(qkv, memory_format=torch.contiguous_format))
    d_text = None if text_kv is None else torch.empty_like(text_kv, memory_format=torch.contiguous_format)
    weights = [torch.empty_like(w, dtype=compute_dtype(qkv.dtype)) for w in (q_weight, k_weight)]
    if keys and batch and heads and channels:
        call, alive = _call(qkv, q_weight, k_weight, rope, text_kv, eps)
        grads = [dense_rows(grad) for grad in (grad_q, grad_k, grad_v)]
        native().qk_norm_rope_backward(
            call,
            *(_heads(grad) for grad in grads),
            *_parts(d_qkv, 3),
            *_parts(d_text, 2),
            *(weight.data_ptr() for weight in weights),
        )
        del alive
    else:
        for weight in weights:
            weight.zero_()
    return d_qkv, weights[0].to(q_weight.dtype), weights[1].to(k_weight.dtype), d_text
