"""The Triton kernels of the neural-field block: a program owns a patch and loops over tiles of its pixels.

`forward_tile` is what other kernels that run such blocks call.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pixnerd_kernels.ops.gpu.pieces import (
    flat,
    in_columns,
    inverse_norm,
    inverse_norm_of_columns,
    load_tile,
    narrow,
    operand,
    rms_norm_grad,
    store_columns,
    store_tile,
    sum_of_columns,
    unit_columns_grad,
)
from pixnerd_kernels.ops.neural_field_mlp.triton.parts import (
    add_products,
    field_hidden_grad,
    field_input,
    finish_input_weight,
    load_input_weight,
    load_norm,
    load_output_weight,
    load_weights,
    squares_of,
)


@triton.jit
def forward_tile(
    tile, live, w1, w2, w_gate, whole, weight, norm_eps, weight_eps,
    w1_row: tl.constexpr, w2_row: tl.constexpr, gate_row: tl.constexpr,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
    GATED: tl.constexpr, NORM: tl.constexpr,
    UNIT1: tl.constexpr, UNIT2: tl.constexpr, UNIT_GATE: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    EMULATE: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """What leaves the block where `tile` [T, C] enters it, in float32.

    whole: all weights, of `load_weights`, where they fit on the chip at once; read chunk by chunk where they do not.
    """
    NARROW: tl.constexpr = w1.dtype.element_ty
    n, r = field_input(tile, live, norm_eps, NORM, LATE, CHANNELS, NARROW, EMULATE)
    out = tl.zeros([TILE, BLOCK_C], tl.float32)
    if PIECE * PIECES >= HIDDEN:
        scaled1, scaled_gate, raw2, squares = whole
        squares = tl.reshape(squares, [BLOCK_C])
        out = add_products(
            out, n, r, scaled1, scaled_gate, raw2, PIECES, GATED, LATE,
            ACTIVATION, FAST, PRECISION, NARROW, EMULATE,
        )  # fmt: skip
    else:
        squares = tl.zeros([BLOCK_C], tl.float32)
        for first in range(0, HIDDEN, PIECE * PIECES):
            scaled1, scaled_gate, raw2, part = load_weights(
                w1, w2, w_gate, w1_row, w2_row, gate_row, weight, weight_eps, first,
                NORM, GATED, UNIT1, UNIT_GATE, CHANNELS, HIDDEN, BLOCK_C, PIECE, PIECES, EMULATE,
            )  # fmt: skip
            squares += tl.reshape(part, [BLOCK_C])
            out = add_products(
                out, n, r, scaled1, scaled_gate, raw2, PIECES, GATED, LATE,
                ACTIVATION, FAST, PRECISION, NARROW, EMULATE,
            )  # fmt: skip
    if UNIT2:
        out *= inverse_norm(squares, weight_eps)[None, :]
    if RESIDUAL:
        out += tile.to(tl.float32)
    return out


@triton.jit
def neural_field_mlp_forward(
    x, w1, w2, w_gate, norm_weight, y,
    pixels, x_patch, w1_patch, w2_patch, gate_patch, norm_step, norm_eps, weight_eps,
    x_row: tl.constexpr, w1_row: tl.constexpr, w2_row: tl.constexpr, gate_row: tl.constexpr,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
    GATED: tl.constexpr, NORM: tl.constexpr,
    UNIT1: tl.constexpr, UNIT2: tl.constexpr, UNIT_GATE: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    EMULATE: tl.constexpr, AHEAD: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """y of patch program_id(0); the programs along axis 1 share its tiles.

    AHEAD: the next tile is loaded before this one is computed.
    """
    patch, apart = tl.program_id(0).to(tl.int64), tl.num_programs(1) * TILE
    x += patch * x_patch
    y += patch * pixels * CHANNELS
    w1 += patch * w1_patch
    w2 += patch * w2_patch
    w_gate += patch * gate_patch
    channels = tl.arange(0, BLOCK_C)
    weight = load_norm(norm_weight, norm_step, channels, NORM, CHANNELS)
    begin = tl.program_id(1) * TILE
    if AHEAD:
        following = load_tile(x, begin + tl.arange(0, TILE), x_row, channels, pixels, CHANNELS)
    whole = ()
    if PIECE * PIECES >= HIDDEN:
        whole = load_weights(
            w1, w2, w_gate, w1_row, w2_row, gate_row, weight, weight_eps, 0,
            NORM, GATED, UNIT1, UNIT_GATE, CHANNELS, HIDDEN, BLOCK_C, PIECE, PIECES, EMULATE,
        )  # fmt: skip
    for start in range(begin, pixels, apart):
        rows = start + tl.arange(0, TILE)
        if AHEAD:
            tile = following
            following = load_tile(x, rows + apart, x_row, channels, pixels, CHANNELS)
        else:
            tile = load_tile(x, rows, x_row, channels, pixels, CHANNELS)
        out = forward_tile(
            tile, rows < pixels, w1, w2, w_gate, whole, weight, norm_eps, weight_eps, w1_row, w2_row, gate_row,
            CHANNELS, HIDDEN, TILE, BLOCK_C, PIECE, PIECES, GATED, NORM, UNIT1, UNIT2, UNIT_GATE,
            ACTIVATION, RESIDUAL, FAST, PRECISION, EMULATE, LATE,
        )  # fmt: skip
        store_tile(y, rows, CHANNELS, channels, pixels, CHANNELS, out, EMULATE)


@triton.jit
def backward_tiles(
    grad, x, dx, scratch_x, scaled1, scaled2, scaled_gate, channels, begin, end, first, norm_eps,
    grad_row: tl.constexpr, x_row: tl.constexpr,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
    GATED: tl.constexpr, NORM: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    EMULATE: tl.constexpr, AHEAD: tl.constexpr, LATE: tl.constexpr, NEED_X: tl.constexpr, NEED_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """One chunk of hidden units on pixels begin ... end: dx; the sums for w1, w2 and w_gate, each [H, C] a piece."""
    NARROW: tl.constexpr = x.dtype.element_ty
    CHUNK: tl.constexpr = PIECE * PIECES
    CHUNKS: tl.constexpr = (HIDDEN + CHUNK - 1) // CHUNK
    sum1 = ()
    sum2 = ()
    sum_gate = ()
    for _ in tl.static_range(PIECES):
        sum1 = sum1 + (tl.zeros([PIECE, BLOCK_C], tl.float32),)
        sum2 = sum2 + (tl.zeros([PIECE, BLOCK_C], tl.float32),)
        if GATED:
            sum_gate = sum_gate + (tl.zeros([PIECE, BLOCK_C], tl.float32),)
    if AHEAD:
        rows = begin + tl.arange(0, TILE)
        next_tile = load_tile(x, rows, x_row, channels, end, CHANNELS)
        next_g = load_tile(grad, rows, grad_row, channels, end, CHANNELS)
    for start in range(begin, end, TILE):
        rows = start + tl.arange(0, TILE)
        if AHEAD:
            tile = next_tile
            g = next_g
        else:
            tile = load_tile(x, rows, x_row, channels, end, CHANNELS)
            g = load_tile(grad, rows, grad_row, channels, end, CHANNELS)
        n, r = field_input(tile, rows < end, norm_eps, NORM, LATE, CHANNELS, NARROW, EMULATE)
        g_operand = operand(g, EMULATE)
        next1 = ()
        next2 = ()
        next_gate = ()
        d_hidden = ()
        d_gate = ()
        for p in tl.static_range(PIECES):
            h, dz, da = field_hidden_grad(
                n, r, g_operand, scaled1[p], scaled2[p], scaled_gate[p],
                GATED, LATE, ACTIVATION, FAST, PRECISION, NARROW, EMULATE,
            )  # fmt: skip
            if NEED_WEIGHTS:
                next2 = next2 + (tl.dot(h, g_operand, sum2[p], input_precision=PRECISION),)
            else:
                next2 = next2 + (sum2[p],)
            if NEED_WEIGHTS or NORM:
                next1 = next1 + (tl.dot(dz, n, sum1[p], input_precision=PRECISION),)
                if GATED:
                    next_gate = next_gate + (tl.dot(da, n, sum_gate[p], input_precision=PRECISION),)
            else:
                next1 = next1 + (sum1[p],)
                if GATED:
                    next_gate = next_gate + (sum_gate[p],)
            d_hidden = d_hidden + (dz,)
            d_gate = d_gate + (da,)
        sum1 = next1
        sum2 = next2
        sum_gate = next_gate
        if AHEAD:
            # Here, where the fewest registers are taken.
            next_tile = load_tile(x, rows + TILE, x_row, channels, end, CHANNELS)
            next_g = load_tile(grad, rows + TILE, grad_row, channels, end, CHANNELS)
        if NEED_X:
            d_unit = tl.zeros([BLOCK_C, TILE], tl.float32)
            for p in tl.static_range(PIECES):
                d_unit = tl.dot(scaled1[p], d_hidden[p], d_unit, input_precision=PRECISION)
                if GATED:
                    d_unit = tl.dot(scaled_gate[p], d_gate[p], d_unit, input_precision=PRECISION)
            d_unit = tl.trans(d_unit)
            if CHUNKS > 1:
                waiting = scratch_x + rows[:, None].to(tl.int64) * BLOCK_C + channels[None, :]
                inside = (rows[:, None] < end) & (channels[None, :] < BLOCK_C)
                if first > 0:
                    d_unit += tl.load(waiting, mask=inside, other=0.0)
                if first + CHUNK < HIDDEN:
                    tl.store(waiting, d_unit, mask=inside)
            if first + CHUNK >= HIDDEN:
                if NORM:
                    unit = tile.to(tl.float32) * r[:, None]
                    d_unit = rms_norm_grad(d_unit, unit, r, LATE, CHANNELS)
                if RESIDUAL:
                    d_unit += g.to(tl.float32)
                store_tile(dx, rows, CHANNELS, channels, end, CHANNELS, d_unit, EMULATE)
    return sum1, sum2, sum_gate


@triton.jit
def added(a, b):
    """The sums of two tuples of tiles, tile by tile."""
    out = ()
    for k in tl.static_range(len(a)):
        out = out + (a[k] + b[k],)
    return out


@triton.jit
def backward_patch(
    grad, x, w1, w2, w_gate, dx, d1, d2, d_gate, d_norm, scratch_x, scratch_2,
    weight, channels, pixels, norm_eps, weight_eps,
    grad_row: tl.constexpr, x_row: tl.constexpr, w1_row: tl.constexpr, w2_row: tl.constexpr, gate_row: tl.constexpr,
    d1_row: tl.constexpr, d2_row: tl.constexpr, d_gate_row: tl.constexpr,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
    GATED: tl.constexpr, NORM: tl.constexpr,
    UNIT1: tl.constexpr, UNIT2: tl.constexpr, UNIT_GATE: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    EMULATE: tl.constexpr, AHEAD: tl.constexpr, LATE: tl.constexpr,
    NEED_X: tl.constexpr, NEED_WEIGHTS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Every gradient of one patch; the pointers are its own. The weights' gradients may take the weights' own place.

    Hidden values are held as [H, T]: products then have hidden units for rows, as many as the widest tensor-core
    instructions want whatever the tile, and those for the weights take them from registers. SPAN is 0, or the number of
    pixels that are added up before they join the sum of all, which would lose digits in long sums.
    """
    NARROW: tl.constexpr = x.dtype.element_ty
    CHUNK: tl.constexpr = PIECE * PIECES
    CHUNKS: tl.constexpr = (HIDDEN + CHUNK - 1) // CHUNK
    squares2 = tl.zeros([BLOCK_C], tl.float32)
    projection2 = tl.zeros([BLOCK_C], tl.float32)
    sum_norm = tl.zeros([BLOCK_C], tl.float32)
    if CHUNKS > 1:
        for first in range(0, HIDDEN, CHUNK):
            raw2 = load_output_weight(w2, w2_row, first, CHANNELS, HIDDEN, BLOCK_C, PIECE, PIECES)
            squares2 += tl.reshape(squares_of(raw2), [BLOCK_C])
    for first in range(0, HIDDEN, CHUNK):
        scaled1, scaled_gate, raw2, part = load_weights(
            w1, w2, w_gate, w1_row, w2_row, gate_row, weight, weight_eps, first,
            NORM, GATED, UNIT1, UNIT_GATE, CHANNELS, HIDDEN, BLOCK_C, PIECE, PIECES, EMULATE,
        )  # fmt: skip
        whole2 = part if CHUNKS == 1 else tl.reshape(squares2, part.shape)
        scaled2 = ()
        for p in tl.static_range(PIECES):
            if UNIT2:
                unit = raw2[p].to(tl.float32) * inverse_norm_of_columns(whole2, weight_eps, 0, CHANNELS)
                scaled = flat(narrow(unit, NARROW, EMULATE))
            else:
                scaled = operand(flat(raw2[p]), EMULATE)
            scaled2 = scaled2 + (scaled,)
        sum1, sum2, sum_gate = backward_tiles(
            grad, x, dx, scratch_x, scaled1, scaled2, scaled_gate, channels,
            0, tl.minimum(SPAN, pixels) if SPAN else pixels, first, norm_eps, grad_row, x_row,
            CHANNELS, HIDDEN, TILE, BLOCK_C, PIECE, PIECES, GATED, NORM,
            ACTIVATION, RESIDUAL, FAST, PRECISION, EMULATE, AHEAD, LATE, NEED_X, NEED_WEIGHTS,
        )  # fmt: skip
        if SPAN:
            for begin in range(SPAN, pixels, SPAN):
                more1, more2, more_gate = backward_tiles(
                    grad, x, dx, scratch_x, scaled1, scaled2, scaled_gate, channels,
                    begin, tl.minimum(begin + SPAN, pixels), first, norm_eps, grad_row, x_row,
                    CHANNELS, HIDDEN, TILE, BLOCK_C, PIECE, PIECES, GATED, NORM,
                    ACTIVATION, RESIDUAL, FAST, PRECISION, EMULATE, AHEAD, LATE, NEED_X, NEED_WEIGHTS,
                )  # fmt: skip
                sum1, sum2, sum_gate = added(sum1, more1), added(sum2, more2), added(sum_gate, more_gate)
        # Weights are read again, from the cache: kept, they would cost the registers that the sums need. All of a
        # chunk of a matrix before any of its gradient is stored, which may take its place.
        if NEED_WEIGHTS or NORM:
            again1 = load_input_weight(w1, w1_row, first, CHANNELS, HIDDEN, BLOCK_C, PIECE, PIECES)
            product1 = tl.zeros(again1[0].shape, tl.float32)
            if GATED:
                again_gate = load_input_weight(
                    w_gate, gate_row, first, CHANNELS, HIDDEN, BLOCK_C, PIECE, PIECES
                )
            tl.debug_barrier()
            for p in tl.static_range(PIECES):
                product1 += finish_input_weight(
                    d1, d1_row, again1[p], tl.trans(sum1[p]), weight, weight_eps, first + p * PIECE,
                    NORM, UNIT1, CHANNELS, HIDDEN, NEED_WEIGHTS, EMULATE,
                )  # fmt: skip
                if GATED:
                    product1 += finish_input_weight(
                        d_gate, d_gate_row, again_gate[p], tl.trans(sum_gate[p]), weight, weight_eps,
                        first + p * PIECE, NORM, UNIT_GATE, CHANNELS, HIDDEN, NEED_WEIGHTS, EMULATE,
                    )  # fmt: skip
            if NORM:
                over_hidden = tl.sum(tl.sum(product1, 3, keep_dims=True), 1, keep_dims=True)
                sum_norm += tl.reshape(over_hidden, [BLOCK_C])
        if NEED_WEIGHTS:
            again2 = load_output_weight(w2, w2_row, first, CHANNELS, HIDDEN, BLOCK_C, PIECE, PIECES)
            product2 = tl.zeros(again2[0].shape, tl.float32)
            for p in tl.static_range(PIECES):
                product2 += again2[p].to(tl.float32) * in_columns(sum2[p], again2[p])
                if CHUNKS > 1:
                    hidden = first + p * PIECE + tl.arange(0, PIECE)
                    waiting = scratch_2 + hidden[:, None] * BLOCK_C + channels[None, :]
                    inside = (hidden[:, None] < HIDDEN) & (channels[None, :] < BLOCK_C)
                    tl.store(waiting, sum2[p], mask=inside)
            along2 = sum_of_columns(product2)
            projection2 += tl.reshape(along2, [BLOCK_C])
            if CHUNKS == 1:
                tl.debug_barrier()
                for p in tl.static_range(PIECES):
                    d_scaled = in_columns(sum2[p], again2[p])
                    d_raw = unit_columns_grad(again2[p], whole2, along2, d_scaled, weight_eps, HIDDEN, UNIT2)
                    store_columns(d2, d2_row, p * PIECE, 0, HIDDEN, CHANNELS, d_raw, EMULATE)
        if CHUNKS > 1:
            # What one thread stored to scratch another may load.
            tl.debug_barrier()
    if NEED_WEIGHTS and CHUNKS > 1:
        for first in range(0, HIDDEN, PIECE):
            hidden = first + tl.arange(0, PIECE)
            waiting = scratch_2 + hidden[:, None] * BLOCK_C + channels[None, :]
            inside = (hidden[:, None] < HIDDEN) & (channels[None, :] < BLOCK_C)
            d_raw = tl.load(waiting, mask=inside, other=0.0)
            again = load_tile(w2, hidden, w2_row, channels, HIDDEN, CHANNELS)
            d_raw = unit_columns_grad(
                again, squares2[None, :], projection2[None, :], d_raw, weight_eps, HIDDEN, UNIT2
            )
            tl.debug_barrier()  # d2 may be w2 itself
            store_tile(d2, hidden, d2_row, channels, HIDDEN, CHANNELS, d_raw, EMULATE)
        tl.debug_barrier()
    if NORM:
        tl.store(d_norm + channels, sum_norm, mask=channels < CHANNELS)


@triton.jit(do_not_specialize=["patches"])
def neural_field_mlp_backward(
    grad, x, w1, w2, w_gate, norm_weight, dx, d1, d2, d_gate, d_norm, scratch_x, scratch_2,
    patches, pixels, grad_patch, x_patch, w1_patch, w2_patch, gate_patch, norm_step,
    d1_patch, d2_patch, d_gate_patch, norm_eps, weight_eps,
    grad_row: tl.constexpr, x_row: tl.constexpr, w1_row: tl.constexpr, w2_row: tl.constexpr, gate_row: tl.constexpr,
    d1_row: tl.constexpr, d2_row: tl.constexpr, d_gate_row: tl.constexpr,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
    GATED: tl.constexpr, NORM: tl.constexpr,
    UNIT1: tl.constexpr, UNIT2: tl.constexpr, UNIT_GATE: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    EMULATE: tl.constexpr, AHEAD: tl.constexpr, LATE: tl.constexpr,
    NEED_X: tl.constexpr, NEED_WEIGHTS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Every gradient of patch program_id(0), or where scratch is needed of every num_programs(0)-th patch from it.

    d_norm is [patches, CHANNELS] in float32. With several chunks of hidden units, sums over all of them wait in this
    program's part of two float32 buffers: the gradient of the normalised pixels in scratch_x [programs, pixels,
    BLOCK_C], and that of the scaled w2 in scratch_2 [programs, padded hidden, BLOCK_C].
    """
    PADDED: tl.constexpr = (HIDDEN + PIECE * PIECES - 1) // (PIECE * PIECES) * (PIECE * PIECES)
    channels = tl.arange(0, BLOCK_C)
    weight = load_norm(norm_weight, norm_step, channels, NORM, CHANNELS)
    patch = tl.program_id(0).to(tl.int64)
    if PIECE * PIECES >= HIDDEN:
        backward_patch(
            grad + patch * grad_patch, x + patch * x_patch, w1 + patch * w1_patch, w2 + patch * w2_patch,
            w_gate + patch * gate_patch, dx + patch * pixels * CHANNELS,
            d1 + patch * d1_patch, d2 + patch * d2_patch, d_gate + patch * d_gate_patch,
            d_norm + patch * CHANNELS, scratch_x, scratch_2, weight, channels, pixels, norm_eps, weight_eps,
            grad_row, x_row, w1_row, w2_row, gate_row, d1_row, d2_row, d_gate_row,
            CHANNELS, HIDDEN, TILE, BLOCK_C, PIECE, PIECES, GATED, NORM, UNIT1, UNIT2, UNIT_GATE,
            ACTIVATION, RESIDUAL, FAST, PRECISION, EMULATE, AHEAD, LATE, NEED_X, NEED_WEIGHTS, SPAN,
        )  # fmt: skip
    else:
        scratch_x += patch * pixels * BLOCK_C
        scratch_2 += patch * PADDED * BLOCK_C
        while patch < patches:
            backward_patch(
                grad + patch * grad_patch, x + patch * x_patch, w1 + patch * w1_patch, w2 + patch * w2_patch,
                w_gate + patch * gate_patch, dx + patch * pixels * CHANNELS,
                d1 + patch * d1_patch, d2 + patch * d2_patch, d_gate + patch * d_gate_patch,
                d_norm + patch * CHANNELS, scratch_x, scratch_2, weight, channels, pixels, norm_eps, weight_eps,
                grad_row, x_row, w1_row, w2_row, gate_row, d1_row, d2_row, d_gate_row,
                CHANNELS, HIDDEN, TILE, BLOCK_C, PIECE, PIECES, GATED, NORM, UNIT1, UNIT2, UNIT_GATE,
                ACTIVATION, RESIDUAL, FAST, PRECISION, EMULATE, AHEAD, LATE, NEED_X, NEED_WEIGHTS, SPAN,
            )  # fmt: skip
            patch += tl.num_programs(0)
