"""Attention where forward mode is on: value and tangent together, some rows of logits at a time.

With P = softmax(S), S = q kᵀ / sqrt(d) + mask, and a prime for tangents:

    S' = (q' kᵀ + q k'ᵀ) / sqrt(d),   P' = P * (S' - sum(P * S')),   out = P v,   out' = P' v + P v'

torch's flash kernels know no tangents, and its formula would keep the logits, P and their tangents for backward. Here
q, k, v and the mask are saved; the value's gradients are those of torch's own kernel. Plain PyTorch on every device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pixnerd_kernels.checks import check_tangents
from pixnerd_kernels.ops.dtypes import compute_dtype
from pixnerd_kernels.ops.library import register, register_autograd, register_jvp

#: Bytes of one matrix of logits that are computed at a time; about four of them are alive.
_BYTES = 16 << 20


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention [B, L, heads, d] by the kernel that torch chooses."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _forward(q, k, v, mask):  # type: ignore[no-untyped-def]
    with torch._C._DisableAutocast():
        return plain(q, k, v, mask).contiguous()


def _formula(q, k, v, mask):  # type: ignore[no-untyped-def]
    with sdpa_kernel(SDPBackend.MATH):
        return plain(q, k, v, mask)


def _rows_jvp(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
    q_tangent: Tensor | None, k_tangent: Tensor | None, v_tangent: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Value and tangent, all [B, heads, rows, d] in the dtype computed in; out of place."""
    scale = max(q.shape[-1], 1) ** -0.5
    q = q * scale
    logits = q @ k.mT
    if mask is None:
        p = logits.softmax(-1)
    else:
        mask = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
        logits = logits + mask.to(logits.dtype)
        # A row without keys is zero, as torch has it, and so are its gradients.
        empty = (logits == -torch.inf).all(-1, keepdim=True)
        p = torch.where(empty, 0.0, torch.where(empty, 0.0, logits).softmax(-1))
    tangent = torch.zeros_like(p)
    if q_tangent is not None:
        tangent = (q_tangent * scale) @ k.mT
    if k_tangent is not None:
        tangent = tangent + q @ k_tangent.mT
    tangent = p * tangent
    tangent = tangent - p * tangent.sum(-1, keepdim=True)
    out_tangent = tangent @ v
    if v_tangent is not None:
        out_tangent = out_tangent + p @ v_tangent
    return p @ v, out_tangent


def _heads_first(tensor: Tensor | None, wide: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.transpose(1, 2).to(wide)


def _jvp_formula(q, k, v, mask, *tangents):  # type: ignore[no-untyped-def]
    wide = [_heads_first(t, compute_dtype(q.dtype)) for t in (q, k, v, *tangents)]
    with torch._C._DisableAutocast():
        found = _rows_jvp(*wide[:3], mask, *wide[3:])
    return tuple(t.transpose(1, 2).to(q.dtype).contiguous() for t in found)


def _part(mask: Tensor | None, images: slice, rows: slice) -> Tensor | None:
    """A mask's part for some images and query rows, where it has several of them."""
    if mask is None:
        return None
    if mask.dim() == 4 and mask.shape[0] > 1:
        mask = mask[images]
    return mask[..., rows, :] if mask.shape[-2] > 1 else mask


def _jvp(q, k, v, mask, *tangents):  # type: ignore[no-untyped-def]
    check_tangents("qkv", (q, k, v), tangents)
    wide, (batch, length, heads, _) = compute_dtype(q.dtype), q.shape
    at_once = max(1, _BYTES // max(heads * k.shape[1] * wide.itemsize, 1))
    rows, images = max(1, min(length, at_once)), max(1, at_once // max(length, 1))
    out, out_tangent = (torch.empty_like(q, memory_format=torch.contiguous_format) for _ in range(2))
    for first in range(0, batch, images):
        some = slice(first, first + images)
        queries, keys, values, dq, *others = (
            None if t is None else _heads_first(t[some], wide) for t in (q, k, v, *tangents)
        )
        for start in range(0, length, rows):
            these = slice(start, start + rows)
            moving = None if dq is None else dq[:, :, these]
            with torch._C._DisableAutocast():
                found = _rows_jvp(
                    queries[:, :, these], keys, values, _part(mask, some, these), moving, *others
                )
            out[some, these], out_tangent[some, these] = (t.transpose(1, 2) for t in found)
    return out, out_tangent


def _with_tangents(jvp, arguments, tangents):  # type: ignore[no-untyped-def]
    return None if tangents[3] is not None else jvp(*arguments, *tangents[:3])


def _value_gradients(grad, needs, *arguments):  # type: ignore[no-untyped-def]
    """By torch's own kernels, which compute the value again; by its formula where they are differentiated again."""
    again = torch.is_grad_enabled()
    with torch.enable_grad(), torch._C._DisableAutocast():
        pairs = list(zip(arguments[:4], needs, strict=False))
        # Views, so that a tensor that is two arguments gets the gradient of each.
        leaves = [t.view_as(t) if again else t.detach().requires_grad_() for t, need in pairs if need]
        rest = iter(leaves)
        out = (_formula if again else plain)(*(next(rest) if need else t for t, need in pairs))
        found = iter(torch.autograd.grad(out, leaves, grad, create_graph=again))
    return [next(found) if need else None for _, need in pairs]


def _fake(q, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(q, memory_format=torch.contiguous_format)


register("attention(Tensor q, Tensor k, Tensor v, Tensor? mask) -> Tensor", _forward, _fake)
register(
    "attention_jvp(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? q_tangent, Tensor? k_tangent, "
    "Tensor? v_tangent) -> (Tensor, Tensor)",
    _jvp,
    lambda q, *rest: (_fake(q), _fake(q)),
)
register_autograd("attention", plain, _formula, _with_tangents)
register_jvp("attention", _jvp_formula, _value_gradients)
