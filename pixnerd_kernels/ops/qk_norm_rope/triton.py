"""The Triton kernels of `qk_norm_rope`: a program takes rows of heads, reads each once and writes it where attention
reads it.

A row is one head of one token, loaded as it lies; a rotation splits it into even and odd channels on chip. Backward
adds up the norm weights' gradients per program, and a second, small kernel adds the programs; no atomics.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixnerd_kernels.checks import describe
from pixnerd_kernels.ops.gpu.launch import (
    Options,
    ceil_div,
    emulates,
    interpreting,
    launch,
    power_of_two,
    target_of,
)
from pixnerd_kernels.ops.gpu.pieces import narrow
from pixnerd_kernels.ops.native import dense_rows

#: Numbers of a tile, forward and backward, at four warps; in the interpreter a program costs what its entries do not.
_TILE, _TILE_BACKWARD, _TILE_INTERPRETED = 2048, 1024, 32768
#: Programs of the backward that a processor holds at a time.
_RESIDENT = 4
_OPTIONS = Options(4)
#: Programs and channels of a tile of the kernel that adds up.
_PROGRAMS, _CHANNELS = 256, 8


@triton.jit
def load_heads(pointer, rows, live, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """[rows, WIDTH] of the rows at these offsets, as they are; zeros beyond CHANNELS."""
    channel = tl.arange(0, WIDTH)[None, :]
    return tl.load(pointer + rows[:, None] + channel, mask=live[:, None] & (channel < CHANNELS), other=0.0)


@triton.jit
def store_heads(
    pointer, rows, live, tile, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, EMULATE: tl.constexpr
):
    """The inverse of `load_heads`, rounded once."""
    channel = tl.arange(0, WIDTH)[None, :]
    tile = narrow(tile, pointer.dtype.element_ty, EMULATE)
    tl.store(pointer + rows[:, None] + channel, tile, mask=live[:, None] & (channel < CHANNELS))


@triton.jit
def load_weight(weight, step, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """[1, WIDTH] in float32."""
    channel = tl.arange(0, WIDTH)
    return tl.load(weight + channel * step, mask=channel < CHANNELS, other=0.0).to(tl.float32)[None, :]


@triton.jit
def rotate(x, angles, INVERSE: tl.constexpr):
    """Neighbouring channels (a, b) of x [rows, n] become (a cos - b sin, a sin + b cos), or INVERSE turned back.

    angles [rows, n] holds cosine and sine of each pair.
    """
    ROWS: tl.constexpr = x.shape[0]
    SIZE: tl.constexpr = x.shape[1]
    even, odd = tl.split(tl.reshape(x, [ROWS, SIZE // 2, 2]))
    cosine, sine = tl.split(tl.reshape(angles, [ROWS, SIZE // 2, 2]))
    if INVERSE:
        sine = -sine
    return tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), [ROWS, SIZE])


@triton.jit
def norm_rotate(x, weight, angles, eps, CHANNELS: tl.constexpr, ROPE: tl.constexpr):
    """rotate(x * r * weight)."""
    x = x.to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, 1) / CHANNELS + eps)
    x = x * r[:, None] * weight
    if ROPE:
        x = rotate(x, angles, False)
    return x


@triton.jit
def norm_rotate_grad(g, x, weight, angles, live, eps, CHANNELS: tl.constexpr, ROPE: tl.constexpr):
    """The gradient of x, and g n, whose sum over rows is the weight's."""
    g, x = g.to(tl.float32), x.to(tl.float32)
    if ROPE:
        g = rotate(g, angles, True)
    # Where there is no row and eps is 0, an infinite r would spoil the sums.
    r = tl.where(live, tl.rsqrt(tl.sum(x * x, 1) / CHANNELS + eps), 0.0)[:, None]
    x *= r
    own = g * x
    g *= weight
    mean = (tl.sum(g * x, 1) / CHANNELS)[:, None]
    return r * (g - x * mean), own


@triton.jit
def places(block, head_block, count, tokens, heads, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):
    """Image, token and head of a tile's rows, and which of them there are: BLOCK_T tokens by BLOCK_H heads."""
    row = tl.arange(0, BLOCK_T * BLOCK_H)
    token = block * BLOCK_T + row // BLOCK_H
    head = head_block * BLOCK_H + row % BLOCK_H
    live = (token < count) & (head < heads)
    return (token // tokens).to(tl.int64), (token % tokens).to(tl.int64), head.to(tl.int64), live


@triton.jit
def qk_norm_rope_forward(
    packed, q_weight, k_weight, rope, q_out, k_out, v_out, eps,
    batch_stride, token_stride, part_stride, head_stride, q_step, k_step, count, tokens, heads, keys, first,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, UNIT: tl.constexpr,
    QUERY: tl.constexpr, ROPE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Rows of one packed projection; its token t becomes key first + t of `keys`. QUERY: it has queries, too.

    Strides count in UNIT elements (see `_unit`).
    """
    head_blocks = tl.cdiv(heads, BLOCK_H)
    image, token, head, live = places(
        tl.program_id(0) // head_blocks,
        tl.program_id(0) % head_blocks,
        count,
        tokens,
        heads,
        BLOCK_T,
        BLOCK_H,
    )
    at_q = image * batch_stride + token * token_stride + head * head_stride
    # Added, not multiplied: a product of 32-bit numbers would overflow where parts lie far apart.
    at_k = at_q + part_stride if QUERY else at_q
    at_v = at_k + part_stride
    key = ((image * keys + first + token) * heads + head) * CHANNELS
    if QUERY:
        q = load_heads(packed, at_q * UNIT, live, CHANNELS, WIDTH)
    k = load_heads(packed, at_k * UNIT, live, CHANNELS, WIDTH)
    v = load_heads(packed, at_v * UNIT, live, CHANNELS, WIDTH)
    angles = 0.0
    if ROPE:
        angles = load_heads(rope, token * CHANNELS, live, CHANNELS, WIDTH).to(tl.float32)
    if QUERY:
        q = norm_rotate(q, load_weight(q_weight, q_step, CHANNELS, WIDTH), angles, eps, CHANNELS, ROPE)
        query = ((image * tokens + token) * heads + head) * CHANNELS
        store_heads(q_out, query, live, q, CHANNELS, WIDTH, EMULATE)
    k = norm_rotate(k, load_weight(k_weight, k_step, CHANNELS, WIDTH), angles, eps, CHANNELS, ROPE)
    store_heads(k_out, key, live, k, CHANNELS, WIDTH, EMULATE)
    store_heads(v_out, key, live, v, CHANNELS, WIDTH, EMULATE)


@triton.jit
def qk_norm_rope_backward(
    grad_q, grad_k, grad_v, packed, q_weight, k_weight, rope, target, sums, eps,
    grad_q_batch, grad_q_token, grad_q_head, grad_k_batch, grad_k_token, grad_k_head,
    grad_v_batch, grad_v_token, grad_v_head, batch_stride, token_stride, part_stride, head_stride, q_step, k_step,
    count, tokens, heads, first, each, program,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, UNIT: tl.constexpr,
    QUERY: tl.constexpr, ROPE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """target: the packed gradient, dense; sums [programs, 2, CHANNELS] from `program` on: of g n for queries and keys.

    A program takes `each` tiles of tokens of one block of heads. Strides count in UNIT elements.
    """
    head_blocks = tl.cdiv(heads, BLOCK_H)
    PARTS: tl.constexpr = 3 if QUERY else 2
    own_q = tl.zeros([BLOCK_T * BLOCK_H, WIDTH], tl.float32)
    own_k = tl.zeros([BLOCK_T * BLOCK_H, WIDTH], tl.float32)
    for i in range(each):
        image, token, head, live = places(
            (tl.program_id(0) // head_blocks) * each + i, tl.program_id(0) % head_blocks, count, tokens, heads,
            BLOCK_T, BLOCK_H,
        )  # fmt: skip
        at_q = image * batch_stride + token * token_stride + head * head_stride
        at_k = at_q + part_stride if QUERY else at_q
        to = ((image * tokens + token) * (PARTS * heads) + head) * CHANNELS
        if QUERY:
            from_q = (image * grad_q_batch + token * grad_q_token + head * grad_q_head) * UNIT
            g_q = load_heads(grad_q, from_q, live, CHANNELS, WIDTH)
            q = load_heads(packed, at_q * UNIT, live, CHANNELS, WIDTH)
        from_k = (image * grad_k_batch + (first + token) * grad_k_token + head * grad_k_head) * UNIT
        g_k = load_heads(grad_k, from_k, live, CHANNELS, WIDTH)
        k = load_heads(packed, at_k * UNIT, live, CHANNELS, WIDTH)
        from_v = (image * grad_v_batch + (first + token) * grad_v_token + head * grad_v_head) * UNIT
        g_v = load_heads(grad_v, from_v, live, CHANNELS, WIDTH)
        angles = 0.0
        if ROPE:
            angles = load_heads(rope, token * CHANNELS, live, CHANNELS, WIDTH).to(tl.float32)
        if QUERY:
            weight = load_weight(q_weight, q_step, CHANNELS, WIDTH)
            d_q, own = norm_rotate_grad(g_q, q, weight, angles, live, eps, CHANNELS, ROPE)
            own_q += own
            store_heads(target, to, live, d_q, CHANNELS, WIDTH, EMULATE)
            to += heads * CHANNELS
        weight = load_weight(k_weight, k_step, CHANNELS, WIDTH)
        d_k, own = norm_rotate_grad(g_k, k, weight, angles, live, eps, CHANNELS, ROPE)
        own_k += own
        store_heads(target, to, live, d_k, CHANNELS, WIDTH, EMULATE)
        store_heads(target, to + heads * CHANNELS, live, g_v, CHANNELS, WIDTH, EMULATE)
    channel = tl.arange(0, WIDTH)
    here = sums + (program + tl.program_id(0)).to(tl.int64) * (2 * CHANNELS) + channel
    tl.store(here, tl.sum(own_q, 0), mask=channel < CHANNELS)
    tl.store(here + CHANNELS, tl.sum(own_k, 0), mask=channel < CHANNELS)


@triton.jit
def qk_norm_rope_sums(
    sums, d_q, d_k, programs,
    CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """The weights' gradients from the sums [programs, 2, CHANNELS]: a program takes a block of channels of one."""
    part = tl.program_id(0) % 2
    channel = (tl.program_id(0) // 2) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, programs, BLOCK_P):
        program = start + tl.arange(0, BLOCK_P)
        inside = (program < programs)[:, None] & (channel < CHANNELS)[None, :]
        offsets = (program[:, None] * 2 + part) * CHANNELS + channel[None, :]
        total += tl.load(sums + offsets, mask=inside, other=0.0)
    result = tl.sum(total, 0)
    if part == 0:
        tl.store(d_q + channel, narrow(result, d_q.dtype.element_ty, EMULATE), mask=channel < CHANNELS)
    else:
        tl.store(d_k + channel, narrow(result, d_k.dtype.element_ty, EMULATE), mask=channel < CHANNELS)


class _Plan(NamedTuple):
    """Tiles of BLOCK_T tokens by BLOCK_H heads; in the backward a program takes `each` of them."""

    sizes: dict[str, Any]
    programs: int
    each: int = 1


@functools.lru_cache(maxsize=256)
def _plan(count: int, heads: int, channels: int, largest: int, slots: int) -> _Plan:
    """The tiles of `count` tokens. slots: programs that run at a time, where each shall run once; 0: one a tile."""
    width = max(2, power_of_two(channels))
    rows = max(1, (_TILE_INTERPRETED if interpreting() else largest) // width)
    # As many heads as pads their number by an eighth at most.
    block_h = min(16, rows, power_of_two(heads))
    while 8 * ceil_div(heads, block_h) * block_h > 9 * heads:
        block_h //= 2
    block_t = min(rows // block_h, power_of_two(count))
    tiles, head_blocks = ceil_div(count, block_t), ceil_div(heads, block_h)
    each = max(1, ceil_div(tiles * head_blocks, slots)) if slots else 1
    sizes = {"CHANNELS": channels, "WIDTH": width, "BLOCK_T": block_t, "BLOCK_H": block_h}
    return _Plan(sizes, ceil_div(tiles, each) * head_blocks, each)


def _check(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor | None, text_kv: Tensor | None
) -> None:
    """Exported programs and graph passes call the op without the public function's checks."""
    batch, tokens, parts, heads, channels = qkv.shape
    fits = parts == 3 and q_weight.shape == k_weight.shape == (channels,)
    if rope is not None:
        fits = fits and rope.shape == (tokens, channels // 2, 2)
    if text_kv is not None:
        fits = fits and text_kv.shape == (batch, text_kv.shape[1], 2, heads, channels)
        fits = fits and text_kv.dtype == qkv.dtype
    if not fits:
        given = {"q_weight": q_weight, "k_weight": k_weight, "rope": rope, "text_kv": text_kv}
        told = [f"{name} {describe(tensor)}" for name, tensor in given.items() if tensor is not None]
        raise ValueError(f"expected tensors that fit qkv {describe(qkv)}, got {', '.join(told)}")


def _unit(strides: dict[str, int]) -> dict[str, int]:
    """Strides of packed tensors and gradients in units of the largest power of two that divides them all, 16 at most.

    Triton is told by itself of numbers that 16 divides; 72 channels of a head it would load one by one.
    """
    bits = 16
    for stride in strides.values():
        bits |= stride
    unit = bits & -bits
    return {"UNIT": unit} | {name: stride // unit for name, stride in strides.items()}


def _strides(packed: Tensor) -> dict[str, int]:
    batch, token, part, head, _ = packed.stride()
    return {"batch_stride": batch, "token_stride": token, "part_stride": part, "head_stride": head}


def forward(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor | None, text_kv: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, L, heads, d], k and v [B, L + M, heads, d], contiguous."""
    _check(qkv, q_weight, k_weight, rope, text_kv)
    batch, tokens, _, heads, channels = qkv.shape
    keys = tokens + (0 if text_kv is None else text_kv.shape[1])
    q_out = qkv.new_empty((batch, tokens, heads, channels))
    k_out, v_out = (
        qkv.new_empty((batch, keys, heads, channels)),
        qkv.new_empty((batch, keys, heads, channels)),
    )
    rope = None if rope is None else rope.contiguous()
    for packed, first in ((qkv, 0), (text_kv, tokens)):
        if packed is None:
            continue
        packed = dense_rows(packed)
        own, query = packed.shape[1], packed.shape[2] == 3
        plan = _plan(batch * own, heads, channels, _TILE, 0)
        table = rope if query else None
        launch(
            qk_norm_rope_forward, (plan.programs,), qkv.device, _OPTIONS,
            packed=packed, q_weight=q_weight, k_weight=k_weight, rope=q_weight if table is None else table,
            q_out=q_out, k_out=k_out, v_out=v_out, eps=eps, **_unit(_strides(packed)),
            q_step=q_weight.stride(0), k_step=k_weight.stride(0),
            count=batch * own, tokens=own, heads=heads, keys=keys, first=first, **plan.sizes,
            QUERY=query, ROPE=table is not None, EMULATE=emulates(qkv.dtype),
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
    grads: dict[str, Tensor] = {}
    grad_strides: dict[str, int] = {}
    for name, grad, length in (
        ("grad_q", grad_q, tokens),
        ("grad_k", grad_k, keys),
        ("grad_v", grad_v, keys),
    ):
        expected = (batch, length, heads, channels)
        if grad.shape != expected or grad.dtype != qkv.dtype:
            raise ValueError(f"{name}: expected {list(expected)} {qkv.dtype}, got {describe(grad)}")
        grads[name] = grad = dense_rows(grad)
        strides = zip(("batch", "token", "head"), grad.stride(), strict=False)
        grad_strides |= {f"{name}_{axis}": stride for axis, stride in strides}
    rope = None if rope is None else rope.contiguous()
    # As many programs as run at a time; more would only write more sums.
    slots = _RESIDENT * target_of(qkv.device).processors
    plans = [
        None if packed is None else _plan(batch * packed.shape[1], heads, channels, _TILE_BACKWARD, slots)
        for packed in (qkv, text_kv)
    ]
    programs = sum(plan.programs for plan in plans if plan is not None)
    sums = torch.empty((programs, 2, channels), dtype=torch.float32, device=qkv.device)
    targets: list[Tensor | None] = []
    done = 0
    for packed, plan, first in ((qkv, plans[0], 0), (text_kv, plans[1], tokens)):
        if packed is None or plan is None:
            targets.append(None)
            continue
        target = torch.empty_like(packed, memory_format=torch.contiguous_format)
        targets.append(target)
        packed = dense_rows(packed)
        own, query = packed.shape[1], packed.shape[2] == 3
        table = rope if query else None
        launch(
            qk_norm_rope_backward, (plan.programs,), qkv.device, _OPTIONS,
            **grads, packed=packed, q_weight=q_weight, k_weight=k_weight, rope=q_weight if table is None else table,
            target=target, sums=sums, eps=eps, **_unit(grad_strides | _strides(packed)),
            q_step=q_weight.stride(0), k_step=k_weight.stride(0),
            count=batch * own, tokens=own, heads=heads, first=first, each=plan.each, program=done, **plan.sizes,
            QUERY=query, ROPE=table is not None, EMULATE=emulates(qkv.dtype),
        )  # fmt: skip
        done += plan.programs
    d_q, d_k = q_weight.new_empty(channels), k_weight.new_empty(channels)
    launch(
        qk_norm_rope_sums, (2 * ceil_div(channels, _CHANNELS),), qkv.device, _OPTIONS,
        sums=sums, d_q=d_q, d_k=d_k, programs=programs,
        CHANNELS=channels, BLOCK_P=_PROGRAMS, BLOCK_C=_CHANNELS,
        EMULATE=emulates(q_weight.dtype) or emulates(k_weight.dtype),
    )  # fmt: skip
    d_qkv, d_text = targets
    assert d_qkv is not None
    return d_qkv, d_q, d_k, d_text
