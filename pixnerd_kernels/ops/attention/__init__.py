"""Scaled dot-product attention behind one function, so that models do not choose a kernel themselves."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pixnerd_kernels.checks import Problems


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v for every head, in the layout that a packed projection gives without a copy.

    Args:
        q: [B, L, heads, d], any strides.
        k, v: [B, M, heads, d].
        mask: [L, M] or what broadcasts to [B, heads, L, M]; booleans (True takes part) or addends of the
            logits.

    Returns:
        [B, L, heads, d] in q's dtype, from torch's scaled_dot_product_attention (a flash kernel where one
        fits).

    Raises:
        TypeError, ValueError: every problem with the arguments at once.
    """
    problems = Problems("attention")
    readable = problems.tensor("q", q, 4, "[B, L, heads, d]")
    readable &= problems.tensor("k", k, 4, "[B, M, heads, d]")
    readable &= problems.tensor("v", v, 4, "[B, M, heads, d]")
    if readable:
        if (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
            problems.add("k", f"batch, heads and d of q {list(q.shape)}", k)
        if v.shape != k.shape:
            problems.add("v", f"the shape of k {list(k.shape)}", v)
    problems.same_dtype("q", q, [("k", k), ("v", v)])
    problems.same_device("q", q, [("k", k), ("v", v), ("mask", mask)])
    problems.raise_if_any()
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
