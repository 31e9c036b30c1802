"""The Triton kernels of `qk_norm_rope`: a program takes rows of heads, reads each once and writes it where attention
reads it.

A row is one head of one token. Channels are held as two tiles, the even and the odd ones, so that a rotation is
arithmetic between tiles. Backward adds up the norm weights' gradients per program, and a second, small reduction adds
the programs; no atomics. Not run on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixnerd_kernels.checks import describe
from pixnerd_kernels.ops.gpu.launch import Options, emulates, interpreting, launch, target_of
from pixnerd_kernels.ops.gpu.pieces import narrow
from pixnerd_kernels.ops.native import dense_rows

#: Numbers of a tile of even or odd channels; in the interpreter a program costs what its entries do not.
_TILE, _TILE_INTERPRETED = 512, 16384


@triton.jit
def load_pairs(pointer, offsets, pair, live, CHANNELS: tl.constexpr):
    """Even and odd channels [rows, pairs] of the rows at these offsets, in float32; zeros beyond CHANNELS."""
    places = pointer + offsets[:, None] + 2 * pair[None, :]
    even = tl.load(places, mask=live[:, None] & (2 * pair < CHANNELS)[None, :], other=0.0).to(tl.float32)
    odd = tl.load(places + 1, mask=live[:, None] & (2 * pair + 1 < CHANNELS)[None, :], other=0.0).to(
        tl.float32
    )
    return even, odd


@triton.jit
def store_pairs(pointer, offsets, pair, live, even, odd, CHANNELS: tl.constexpr, EMULATE: tl.constexpr):
    """The inverse of `load_pairs`, rounded once."""
    places = pointer + offsets[:, None] + 2 * pair[None, :]
    NARROW: tl.constexpr = pointer.dtype.element_ty
    tl.store(places, narrow(even, NARROW, EMULATE), mask=live[:, None] & (2 * pair < CHANNELS)[None, :])
    tl.store(
        places + 1, narrow(odd, NARROW, EMULATE), mask=live[:, None] & (2 * pair + 1 < CHANNELS)[None, :]
    )


@triton.jit
def load_weight(weight, pair, CHANNELS: tl.constexpr):
    """Even and odd entries [1, pairs] of a float32 weight."""
    even = tl.load(weight + 2 * pair, mask=2 * pair < CHANNELS, other=0.0)
    odd = tl.load(weight + 2 * pair + 1, mask=2 * pair + 1 < CHANNELS, other=0.0)
    return even[None, :], odd[None, :]


@triton.jit
def rotation(rope, token, pair, live, CHANNELS: tl.constexpr):
    """Cosines and sines [rows, pairs] of the tokens' angles."""
    places = rope + token.to(tl.int64)[:, None] * CHANNELS + 2 * pair[None, :]
    inside = live[:, None] & (2 * pair < CHANNELS)[None, :]
    return tl.load(places, mask=inside, other=1.0), tl.load(places + 1, mask=inside, other=0.0)


@triton.jit
def inverse_rms(even, odd, eps, CHANNELS: tl.constexpr):
    """rsqrt(mean(x²) + eps) of each row, [rows, 1]."""
    return tl.rsqrt((tl.sum(even * even, 1) + tl.sum(odd * odd, 1)) / CHANNELS + eps)[:, None]


@triton.jit
def norm_rotate(
    source, target, weight, rope, source_row, target_row, token, pair, live, eps,
    CHANNELS: tl.constexpr, ROPE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """target = rotate(x * r * weight) for rows x of source."""
    even, odd = load_pairs(source, source_row, pair, live, CHANNELS)
    r = inverse_rms(even, odd, eps, CHANNELS)
    weight_even, weight_odd = load_weight(weight, pair, CHANNELS)
    even, odd = even * r * weight_even, odd * r * weight_odd
    if ROPE:
        cosine, sine = rotation(rope, token, pair, live, CHANNELS)
        even, odd = even * cosine - odd * sine, even * sine + odd * cosine
    store_pairs(target, target_row, pair, live, even, odd, CHANNELS, EMULATE)


@triton.jit
def norm_rotate_grad(
    grad, source, target, weight, rope, grad_row, source_row, target_row, token, pair, live, eps,
    CHANNELS: tl.constexpr, ROPE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """target = the gradient of source's rows; and the rows' sums of g n, even and odd, for the weight's."""
    g_even, g_odd = load_pairs(grad, grad_row, pair, live, CHANNELS)
    if ROPE:
        cosine, sine = rotation(rope, token, pair, live, CHANNELS)
        g_even, g_odd = g_even * cosine + g_odd * sine, g_odd * cosine - g_even * sine
    even, odd = load_pairs(source, source_row, pair, live, CHANNELS)
    r = inverse_rms(even, odd, eps, CHANNELS)
    even, odd = even * r, odd * r
    sum_even, sum_odd = tl.sum(g_even * even, 0), tl.sum(g_odd * odd, 0)
    weight_even, weight_odd = load_weight(weight, pair, CHANNELS)
    g_even, g_odd = g_even * weight_even, g_odd * weight_odd
    mean = ((tl.sum(g_even * even, 1) + tl.sum(g_odd * odd, 1)) / CHANNELS)[:, None]
    g_even, g_odd = r * (g_even - even * mean), r * (g_odd - odd * mean)
    store_pairs(target, target_row, pair, live, g_even, g_odd, CHANNELS, EMULATE)
    return sum_even, sum_odd


@triton.jit
def copy_rows(
    source, target, source_row, target_row, pair, live, CHANNELS: tl.constexpr, EMULATE: tl.constexpr
):
    even, odd = load_pairs(source, source_row, pair, live, CHANNELS)
    store_pairs(target, target_row, pair, live, even, odd, CHANNELS, EMULATE)


@triton.jit
def qk_norm_rope_forward(
    q, k, v, q_weight, k_weight, rope, q_out, k_out, v_out, eps,
    batch_stride, token_stride, head_stride, rows, tokens, heads, keys, first,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr,
    QUERY: tl.constexpr, ROPE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Rows of one packed projection; its token t becomes key first + t of `keys`. QUERY: it has queries, too."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.arange(0, PAIRS)
    live = row < rows
    head, token, image = row % heads, (row // heads) % tokens, row // heads // tokens
    at = image * batch_stride + token * token_stride + head * head_stride
    key = ((image * keys + first + token) * heads + head) * CHANNELS
    if QUERY:
        norm_rotate(
            q, q_out, q_weight, rope, at, row * CHANNELS, token, pair, live, eps, CHANNELS, ROPE, EMULATE
        )
    norm_rotate(k, k_out, k_weight, rope, at, key, token, pair, live, eps, CHANNELS, ROPE, EMULATE)
    copy_rows(v, v_out, at, key, pair, live, CHANNELS, EMULATE)


@triton.jit
def qk_norm_rope_backward(
    grad_q, grad_k, grad_v, q, k, q_weight, k_weight, rope, target, sums, eps,
    grad_q_batch, grad_q_token, grad_q_head, grad_k_batch, grad_k_token, grad_k_head,
    grad_v_batch, grad_v_token, grad_v_head, batch_stride, token_stride, head_stride,
    rows, rows_each, tokens, heads, first,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr,
    QUERY: tl.constexpr, ROPE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """target: the packed gradient, dense; sums [programs, 2, 2 * PAIRS]: of g n for queries and keys, even and odd."""
    pair = tl.arange(0, PAIRS)
    q_even, q_odd = tl.zeros([PAIRS], tl.float32), tl.zeros([PAIRS], tl.float32)
    k_even, k_odd = tl.zeros([PAIRS], tl.float32), tl.zeros([PAIRS], tl.float32)
    PARTS: tl.constexpr = 3 if QUERY else 2
    part = heads * CHANNELS
    for start in range(0, rows_each, BLOCK):
        row = tl.program_id(0).to(tl.int64) * rows_each + start + tl.arange(0, BLOCK)
        live = row < rows
        head, token, image = row % heads, (row // heads) % tokens, row // heads // tokens
        at = image * batch_stride + token * token_stride + head * head_stride
        packed = (row // heads) * (PARTS * part) + head * CHANNELS
        if QUERY:
            g_at = image * grad_q_batch + token * grad_q_token + head * grad_q_head
            even, odd = norm_rotate_grad(
                grad_q, q, target, q_weight, rope, g_at, at, packed, token, pair, live, eps, CHANNELS, ROPE, EMULATE
            )  # fmt: skip
            q_even += even
            q_odd += odd
            packed += part
        g_at = image * grad_k_batch + (first + token) * grad_k_token + head * grad_k_head
        even, odd = norm_rotate_grad(
            grad_k, k, target, k_weight, rope, g_at, at, packed, token, pair, live, eps, CHANNELS, ROPE, EMULATE
        )  # fmt: skip
        k_even += even
        k_odd += odd
        g_at = image * grad_v_batch + (first + token) * grad_v_token + head * grad_v_head
        copy_rows(grad_v, target, g_at, packed + part, pair, live, CHANNELS, EMULATE)
    here = sums + tl.program_id(0).to(tl.int64) * 4 * PAIRS + 2 * pair
    tl.store(here, q_even)
    tl.store(here + 1, q_odd)
    tl.store(here + 2 * PAIRS, k_even)
    tl.store(here + 2 * PAIRS + 1, k_odd)


def _shape(packed: Tensor) -> dict[str, Any]:
    """Sizes, strides and tiles of [B, tokens, 2 or 3, heads, d] with dense rows."""
    batch, tokens, _, heads, channels = packed.shape
    pairs = triton.next_power_of_2((channels + 1) // 2)
    rows = batch * tokens * heads
    tile = _TILE_INTERPRETED if interpreting() else _TILE
    return {
        "batch_stride": packed.stride(0), "token_stride": packed.stride(1), "head_stride": packed.stride(3),
        "rows": rows, "tokens": tokens, "heads": heads, "CHANNELS": channels, "PAIRS": pairs,
        "BLOCK": max(1, min(tile // pairs, triton.next_power_of_2(max(rows, 1)))), "EMULATE": emulates(packed.dtype),
    }  # fmt: skip


def _check(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor | None, text_kv: Tensor | None
) -> None:
    """Exported programs and graph passes call the op without the public function's checks."""
    batch, tokens, _, heads, channels = qkv.shape
    text_tokens = 0 if text_kv is None else text_kv.shape[1]
    for name, tensor, shape in (
        ("qkv", qkv, (batch, tokens, 3, heads, channels)),
        ("q_weight", q_weight, (channels,)),
        ("k_weight", k_weight, (channels,)),
        ("rope", rope, (tokens, channels // 2, 2)),
        ("text_kv", text_kv, (batch, text_tokens, 2, heads, channels)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {describe(tensor)}")
    if text_kv is not None and text_kv.dtype != qkv.dtype:
        raise ValueError(f"text_kv: expected {qkv.dtype}, got {describe(text_kv)}")


def forward(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor | None, text_kv: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, L, heads, d], k and v [B, L + M, heads, d], contiguous."""
    _check(qkv, q_weight, k_weight, rope, text_kv)
    batch, tokens, _, heads, channels = qkv.shape
    keys = tokens + (0 if text_kv is None else text_kv.shape[1])
    q_out = qkv.new_empty(batch, tokens, heads, channels)
    k_out, v_out = (qkv.new_empty(batch, keys, heads, channels) for _ in range(2))
    q_weight, k_weight = q_weight.float().contiguous(), k_weight.float().contiguous()
    rope = None if rope is None else rope.float().contiguous()
    for packed, first in ((qkv, 0), (text_kv, tokens)):
        if packed is None:
            continue
        packed = dense_rows(packed)
        query, rotates = packed.shape[2] == 3, rope is not None and first == 0
        *q, k, v = packed.unbind(2)
        shape = _shape(packed)
        launch(
            qk_norm_rope_forward, (triton.cdiv(shape["rows"], shape["BLOCK"]),), qkv.device, Options(4),
            q=q[0] if query else k, k=k, v=v, q_weight=q_weight, k_weight=k_weight,
            rope=rope if rotates else q_weight, q_out=q_out, k_out=k_out, v_out=v_out, eps=eps, **shape,
            keys=keys, first=first, QUERY=query, ROPE=rotates,
        )  # fmt: skip
    return q_out, k_out, v_out


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
    _check(qkv, q_weight, k_weight, rope, text_kv)
    batch, tokens, _, heads, channels = qkv.shape
    keys = tokens + (0 if text_kv is None else text_kv.shape[1])
    grads: dict[str, Any] = {}
    for name, grad, length in (("q", grad_q, tokens), ("k", grad_k, keys), ("v", grad_v, keys)):
        expected = (batch, length, heads, channels)
        if tuple(grad.shape) != expected or grad.dtype != qkv.dtype:
            raise ValueError(f"grad_{name}: expected {list(expected)} {qkv.dtype}, got {describe(grad)}")
        grad = dense_rows(grad)
        grads |= {f"grad_{name}": grad}
        grads |= {f"grad_{name}_{axis}": grad.stride(i) for i, axis in enumerate(("batch", "token", "head"))}
    weights = q_weight.float().contiguous(), k_weight.float().contiguous()
    rope = None if rope is None else rope.float().contiguous()
    targets, total = [], torch.zeros(2, channels, dtype=torch.float32, device=qkv.device)
    for packed, first in ((qkv, 0), (text_kv, tokens)):
        if packed is None:
            continue
        target = torch.empty_like(packed, memory_format=torch.contiguous_format)
        targets.append(target)
        packed = dense_rows(packed)
        query, rotates = packed.shape[2] == 3, rope is not None and first == 0
        *q, k, _ = packed.unbind(2)
        shape = _shape(packed)
        # As many programs as keep the GPU busy; more would only write more sums.
        each = triton.cdiv(triton.cdiv(shape["rows"], 4 * target_of(qkv.device).processors), shape["BLOCK"])
        each = max(each, 1) * shape["BLOCK"]
        programs = triton.cdiv(shape["rows"], each)
        sums = torch.empty(programs, 2, 2 * shape["PAIRS"], dtype=torch.float32, device=qkv.device)
        launch(
            qk_norm_rope_backward, (programs,), qkv.device, Options(4),
            **grads, q=q[0] if query else k, k=k, q_weight=weights[0], k_weight=weights[1],
            rope=rope if rotates else weights[0], target=target, sums=sums, eps=eps, **shape,
            rows_each=each, first=first, QUERY=query, ROPE=rotates,
        )  # fmt: skip
        total = total + sums.sum(0)[:, :channels]
    d_q, d_k = total.unbind(0)
    return (
        targets[0],
        d_q.to(q_weight.dtype),
        d_k.to(k_weight.dtype),
        targets[1] if text_kv is not None else None,
    )
