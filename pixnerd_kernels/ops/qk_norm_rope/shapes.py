"""The shapes of `qk_norm_rope`'s results, which every backend and the fake make."""

from __future__ import annotations

from torch import Tensor


def new_results(qkv: Tensor, text_kv: Tensor | None) -> list[Tensor]:
    """q [B, L, heads, d], k and v [B, L + M, heads, d], to be written."""
    batch, tokens, _, heads, channels = qkv.shape
    keys = tokens if text_kv is None else tokens + text_kv.shape[1]
    return [qkv.new_empty(batch, length, heads, channels) for length in (tokens, keys, keys)]
