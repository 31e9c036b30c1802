"""The Triton kernels of `modulated_rms_norm`, and of its fusion with the residual before it.

Forward: a program per tile of tokens. Backward: a program walks over tiles of one image's tokens and keeps their column
sums (of g, g n and dz y) on chip; a second, small kernel adds up the programs' sums and makes the rows' gradients of
them. No atomics.

A tile is two, HEAD columns wide and TAIL: 1152 channels are 1024 + 128, and not 2048 with half of the registers empty.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pixnerd_kernels.ops.gpu.pieces import load_tile, narrow, store_tile


@triton.jit
def load_rows(
    pointer, rows, row_stride, row_count, COLUMNS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr
):
    """[rows, HEAD] and [rows, TAIL] of a matrix with dense rows, in float32; zeros outside of row_count x COLUMNS."""
    head = load_tile(pointer, rows, row_stride, tl.arange(0, HEAD), row_count, COLUMNS)
    tail = load_tile(pointer, rows, row_stride, HEAD + tl.arange(0, TAIL), row_count, COLUMNS)
    return head.to(tl.float32), tail.to(tl.float32)


@triton.jit
def store_rows(
    pointer, rows, row_count, head, tail,
    COLUMNS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_rows` for dense matrices, rounded once."""
    store_tile(pointer, rows, COLUMNS, tl.arange(0, HEAD), row_count, COLUMNS, head, EMULATE)
    store_tile(pointer, rows, COLUMNS, HEAD + tl.arange(0, TAIL), row_count, COLUMNS, tail, EMULATE)


@triton.jit
def load_row(pointer, step, COLUMNS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """[HEAD] and [TAIL] of a vector in float32, zeros beyond COLUMNS."""
    first, last = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    head = tl.load(pointer + first * step, mask=first < COLUMNS, other=0.0).to(tl.float32)
    tail = tl.load(pointer + last * step, mask=last < COLUMNS, other=0.0).to(tl.float32)
    return head, tail


@triton.jit
def load_factor(
    weight,
    weight_step,
    scale,
    COLUMNS: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    SCALE: tl.constexpr,
):
    """weight * (1 + scale)."""
    head, tail = load_row(weight, weight_step, COLUMNS, HEAD, TAIL)
    if SCALE:
        scale_head, scale_tail = load_row(scale, 1, COLUMNS, HEAD, TAIL)
        head *= 1.0 + scale_head
        tail *= 1.0 + scale_tail
    return head, tail


@triton.jit
def modulated_rms_norm_forward(
    x, y, gate, weight, shift, scale, z, out, eps,
    x_batch, x_token, y_batch, y_token, gate_batch, weight_step, shift_batch, scale_batch, tokens,
    COLUMNS: tl.constexpr, BLOCK_L: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """z = x + gate * y where RESIDUAL, and out, the modulated norm of it (or of x), where NORM."""
    blocks = tl.cdiv(tokens, BLOCK_L)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
    dense = image * tokens * COLUMNS
    head, tail = load_rows(x + image * x_batch, token, x_token, tokens, COLUMNS, HEAD, TAIL)
    if RESIDUAL:
        y_head, y_tail = load_rows(y + image * y_batch, token, y_token, tokens, COLUMNS, HEAD, TAIL)
        gate_head, gate_tail = load_row(gate + image * gate_batch, 1, COLUMNS, HEAD, TAIL)
        head += gate_head[None, :] * y_head
        tail += gate_tail[None, :] * y_tail
    if NORM:
        factor_head, factor_tail = load_factor(
            weight, weight_step, scale + image * scale_batch, COLUMNS, HEAD, TAIL, SCALE
        )
        if SHIFT:
            shift_head, shift_tail = load_row(shift + image * shift_batch, 1, COLUMNS, HEAD, TAIL)
    if RESIDUAL:
        store_rows(z + dense, token, tokens, head, tail, COLUMNS, HEAD, TAIL, EMULATE)
    if NORM:
        r = tl.rsqrt((tl.sum(head * head, 1) + tl.sum(tail * tail, 1)) / COLUMNS + eps)[:, None]
        head *= r * factor_head[None, :]
        tail *= r * factor_tail[None, :]
        if SHIFT:
            head += shift_head[None, :]
            tail += shift_tail[None, :]
        store_rows(out + dense, token, tokens, head, tail, COLUMNS, HEAD, TAIL, EMULATE)


@triton.jit
def load_token(pointer, live, COLUMNS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """[HEAD] and [TAIL] of one token's channels as they are, zeros beyond COLUMNS and where it is not `live`."""
    first, last = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    head = tl.load(pointer + first, mask=(first < COLUMNS) & live, other=0.0)
    tail = tl.load(pointer + last, mask=(last < COLUMNS) & live, other=0.0)
    return head, tail


@triton.jit
def store_token(
    pointer, live, head, tail,
    COLUMNS: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_token`, rounded once."""
    NARROW: tl.constexpr = pointer.dtype.element_ty
    first, last = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    tl.store(pointer + first, narrow(head, NARROW, EMULATE), mask=(first < COLUMNS) & live)
    tl.store(pointer + last, narrow(tail, NARROW, EMULATE), mask=(last < COLUMNS) & live)


@triton.jit
def folded(head, tail, LANES: tl.constexpr):
    """Sums of some channels each, [LANES]: where a thread holds these channels, nothing leaves it."""
    HEAD: tl.constexpr = head.shape[0] // LANES
    TAIL: tl.constexpr = tail.shape[0] // LANES
    return tl.sum(tl.reshape(head, [LANES, HEAD]), 1) + tl.sum(tl.reshape(tail, [LANES, TAIL]), 1)


@triton.jit
def modulated_rms_norm_backward(
    grad_z, grad, z, y, gate, weight, scale, dx, dy, sums, eps,
    grad_z_batch, grad_z_token, grad_batch, grad_token, z_batch, z_token, y_batch, y_token,
    gate_batch, weight_step, scale_batch, tokens, tokens_each, parts,
    COLUMNS: tl.constexpr, BLOCK_L: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, GRAD_Z: tl.constexpr, SCALE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """dx where NORM, dy where RESIDUAL, and sums over tokens [images, parts, sums, COLUMNS].

    The sums are those of g and of g n where NORM, and of dz y where RESIDUAL. Tokens are vectors of their own, BLOCK_L
    of them loaded before the first is computed: a head and a tail then share scalars alone. As tiles they would have to
    agree on the threads that hold a token, and be moved about in every round.
    """
    image = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    grad_z += image * grad_z_batch
    grad += image * grad_batch
    z += image * z_batch
    y += image * y_batch
    dx += image * tokens * COLUMNS
    dy += image * tokens * COLUMNS
    sum_head, sum_tail = tl.zeros([HEAD], tl.float32), tl.zeros([TAIL], tl.float32)
    unit_head, unit_tail = tl.zeros([HEAD], tl.float32), tl.zeros([TAIL], tl.float32)
    y_head, y_tail = tl.zeros([HEAD], tl.float32), tl.zeros([TAIL], tl.float32)
    if NORM:
        factor_head, factor_tail = load_factor(
            weight, weight_step, scale + image * scale_batch, COLUMNS, HEAD, TAIL, SCALE
        )
    if RESIDUAL:
        gate_head, gate_tail = load_row(gate + image * gate_batch, 1, COLUMNS, HEAD, TAIL)
    for start in range(0, tokens_each, BLOCK_L):
        first = (part * tokens_each + start).to(tl.int64)
        loaded = ()
        for i in tl.static_range(BLOCK_L):
            token = first + i
            live = token < tokens
            if NORM:
                loaded = loaded + load_token(grad + token * grad_token, live, COLUMNS, HEAD, TAIL)
                loaded = loaded + load_token(z + token * z_token, live, COLUMNS, HEAD, TAIL)
            if GRAD_Z:
                loaded = loaded + load_token(grad_z + token * grad_z_token, live, COLUMNS, HEAD, TAIL)
            if RESIDUAL:
                loaded = loaded + load_token(y + token * y_token, live, COLUMNS, HEAD, TAIL)
        EACH: tl.constexpr = (4 if NORM else 0) + (2 if GRAD_Z else 0) + (2 if RESIDUAL else 0)
        MORE: tl.constexpr = 4 if NORM else 0
        LANES: tl.constexpr = min(HEAD // 8, TAIL) if HEAD >= 8 else 1
        for i in tl.static_range(BLOCK_L):
            token = first + i
            live = token < tokens
            if NORM:
                g_head = loaded[EACH * i].to(tl.float32)  # type: ignore[var-annotated]
                g_tail = loaded[EACH * i + 1].to(tl.float32)
                head = loaded[EACH * i + 2].to(tl.float32)
                tail = loaded[EACH * i + 3].to(tl.float32)
                d_head, d_tail = g_head * factor_head, g_tail * factor_tail
                squares = folded(head * head, tail * tail, LANES)
                products = folded(d_head * head, d_tail * tail, LANES)
                squares, products = tl.split(tl.sum(tl.join(squares, products), 0))
                # Where there is no token and eps is 0, an infinite r would spoil the sums.
                r = tl.where(live, tl.rsqrt(squares / COLUMNS + eps), 0.0)
                mean = products / COLUMNS * r
                head *= r
                tail *= r
                sum_head += g_head
                sum_tail += g_tail
                unit_head += g_head * head
                unit_tail += g_tail * tail
                dz_head = r * (d_head - head * mean)
                dz_tail = r * (d_tail - tail * mean)
                if GRAD_Z:
                    dz_head += loaded[EACH * i + MORE].to(tl.float32)
                    dz_tail += loaded[EACH * i + MORE + 1].to(tl.float32)
                store_token(dx + token * COLUMNS, live, dz_head, dz_tail, COLUMNS, HEAD, TAIL, EMULATE)
            else:
                dz_head = loaded[EACH * i].to(tl.float32)  # type: ignore[var-annotated]
                dz_tail = loaded[EACH * i + 1].to(tl.float32)
            if RESIDUAL:
                y_head += dz_head * loaded[EACH * i + EACH - 2].to(tl.float32)
                y_tail += dz_tail * loaded[EACH * i + EACH - 1].to(tl.float32)
                dz_head *= gate_head
                dz_tail *= gate_tail
                store_token(dy + token * COLUMNS, live, dz_head, dz_tail, COLUMNS, HEAD, TAIL, EMULATE)
    COUNT: tl.constexpr = (2 if NORM else 0) + (1 if RESIDUAL else 0)
    here = sums + (image * parts + part) * COUNT * COLUMNS
    if NORM:
        store_token(here, True, sum_head, sum_tail, COLUMNS, HEAD, TAIL, False)
        store_token(here + COLUMNS, True, unit_head, unit_tail, COLUMNS, HEAD, TAIL, False)
    if RESIDUAL:
        store_token(here + (COUNT - 1) * COLUMNS, True, y_head, y_tail, COLUMNS, HEAD, TAIL, False)


@triton.jit
def modulated_rms_norm_sums(
    sums, weight, scale, d_gate, d_weight, d_shift, d_scale, weight_step, scale_batch, images, parts,
    COLUMNS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """From the backward's sums the gradients of all rows [images, COLUMNS] and of the weight, a block of columns."""
    COUNT: tl.constexpr = (2 if NORM else 0) + (1 if RESIDUAL else 0)
    ROWS: tl.constexpr = BLOCK_B * BLOCK_P
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    d_factor = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    if NORM:
        factor = tl.load(weight + column * weight_step, mask=column < COLUMNS, other=0.0).to(tl.float32)[
            None, :
        ]
    for first in range(0, images, BLOCK_B):
        g = tl.zeros([ROWS, BLOCK_C], tl.float32)
        unit = tl.zeros([ROWS, BLOCK_C], tl.float32)
        gated = tl.zeros([ROWS, BLOCK_C], tl.float32)
        image = first + tl.arange(0, ROWS) % BLOCK_B
        for start in range(0, parts, BLOCK_P):
            part = start + tl.arange(0, ROWS) // BLOCK_B
            row = tl.where(part < parts, image * parts + part, images * parts)
            if NORM:
                g += load_tile(sums, row, COUNT * COLUMNS, column, images * parts, COLUMNS)
                unit += load_tile(sums + COLUMNS, row, COUNT * COLUMNS, column, images * parts, COLUMNS)
            if RESIDUAL:
                gated += load_tile(
                    sums + (COUNT - 1) * COLUMNS, row, COUNT * COLUMNS, column, images * parts, COLUMNS
                )
        image = first + tl.arange(0, BLOCK_B)
        if SHIFT:
            g = tl.sum(tl.reshape(g, [BLOCK_P, BLOCK_B, BLOCK_C]), 0)
            store_tile(d_shift, image, COLUMNS, column, images, COLUMNS, g, EMULATE)
        if NORM:
            d_unit = tl.sum(tl.reshape(unit, [BLOCK_P, BLOCK_B, BLOCK_C]), 0)
            if SCALE:
                store_tile(d_scale, image, COLUMNS, column, images, COLUMNS, d_unit * factor, EMULATE)
                d_unit *= 1.0 + load_tile(scale, image, scale_batch, column, images, COLUMNS).to(tl.float32)
            d_factor += d_unit
        if RESIDUAL:
            gated = tl.sum(tl.reshape(gated, [BLOCK_P, BLOCK_B, BLOCK_C]), 0)
            store_tile(d_gate, image, COLUMNS, column, images, COLUMNS, gated, EMULATE)
    if NORM:
        total = narrow(tl.sum(d_factor, 0), d_weight.dtype.element_ty, EMULATE)
        tl.store(d_weight + column, total, mask=column < COLUMNS)
