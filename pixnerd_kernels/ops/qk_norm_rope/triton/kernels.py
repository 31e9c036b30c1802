"""The Triton kernels of `qk_norm_rope`: a program takes rows of heads, reads each once and writes it where attention
reads it.

A row is one head of one token, loaded as it lies; a rotation splits it into even and odd channels on chip. Backward
adds up the norm weights' gradients per program, and a second, small kernel adds the programs; no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pixnerd_kernels.ops.gpu.pieces import narrow


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
def norm_rotate_jvp(x, tangent, weight, angles, eps, CHANNELS: tl.constexpr, ROPE: tl.constexpr):
    """`norm_rotate` of x, and its tangent from that of x."""
    x, tangent = x.to(tl.float32), tangent.to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, 1) / CHANNELS + eps)[:, None]
    mean = (tl.sum(x * tangent, 1) / CHANNELS)[:, None]
    tangent = (tangent - x * (r * r * mean)) * r * weight
    x *= r * weight
    if ROPE:
        x, tangent = rotate(x, angles, False), rotate(tangent, angles, False)
    return x, tangent


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
def qk_norm_rope_jvp(
    packed, tangents, q_weight, k_weight, rope, q_out, k_out, v_out, dq_out, dk_out, dv_out, eps,
    batch_stride, token_stride, part_stride, head_stride,
    d_batch_stride, d_token_stride, d_part_stride, d_head_stride, q_step, k_step, count, tokens, heads, keys, first,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, UNIT: tl.constexpr,
    QUERY: tl.constexpr, ROPE: tl.constexpr, MOVES: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """As `qk_norm_rope_forward`, and the results' tangents from those of the projection, which MOVES or has none."""
    head_blocks = tl.cdiv(heads, BLOCK_H)
    image, token, head, live = places(
        tl.program_id(0) // head_blocks, tl.program_id(0) % head_blocks, count, tokens, heads, BLOCK_T, BLOCK_H
    )  # fmt: skip
    at_q = image * batch_stride + token * token_stride + head * head_stride
    at_k = at_q + part_stride if QUERY else at_q
    along_q = image * d_batch_stride + token * d_token_stride + head * d_head_stride
    along_k = along_q + d_part_stride if QUERY else along_q
    key = ((image * keys + first + token) * heads + head) * CHANNELS
    angles = 0.0
    if ROPE:
        angles = load_heads(rope, token * CHANNELS, live, CHANNELS, WIDTH).to(tl.float32)
    if QUERY:
        q = load_heads(packed, at_q * UNIT, live, CHANNELS, WIDTH)
        dq = load_heads(tangents, along_q * UNIT, live & MOVES, CHANNELS, WIDTH)
        weight = load_weight(q_weight, q_step, CHANNELS, WIDTH)
        q, dq = norm_rotate_jvp(q, dq, weight, angles, eps, CHANNELS, ROPE)
        query = ((image * tokens + token) * heads + head) * CHANNELS
        store_heads(q_out, query, live, q, CHANNELS, WIDTH, EMULATE)
        store_heads(dq_out, query, live, dq, CHANNELS, WIDTH, EMULATE)
    k = load_heads(packed, at_k * UNIT, live, CHANNELS, WIDTH)
    dk = load_heads(tangents, along_k * UNIT, live & MOVES, CHANNELS, WIDTH)
    k, dk = norm_rotate_jvp(
        k, dk, load_weight(k_weight, k_step, CHANNELS, WIDTH), angles, eps, CHANNELS, ROPE
    )
    store_heads(k_out, key, live, k, CHANNELS, WIDTH, EMULATE)
    store_heads(dk_out, key, live, dk, CHANNELS, WIDTH, EMULATE)
    v = load_heads(packed, (at_k + part_stride) * UNIT, live, CHANNELS, WIDTH)
    dv = load_heads(tangents, (along_k + d_part_stride) * UNIT, live & MOVES, CHANNELS, WIDTH)
    store_heads(v_out, key, live, v, CHANNELS, WIDTH, EMULATE)
    store_heads(dv_out, key, live, dv, CHANNELS, WIDTH, EMULATE)


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
