"""The Triton kernels of the neural-field block, and the device functions that they are made of.

A program owns a patch and loops over tiles of its pixels. Weights become operands of the products with all their scales
applied and rounded once: the unit columns w * s, s = 1 / max(||w||, eps), and for w1 and w_gate the norm's weight on
their rows. So no product needs a further scale, none overflows where columns are short, and the gradient of the norm's
weight falls out of those of w1 and w_gate. Only w2 stays raw in the forward: its scale belongs to the output's columns.

Letters in shapes: T pixels of a tile, C padded channels, H padded hidden units of a chunk; a hidden dimension that does
not fit on the chip is walked in chunks. Padded channels and hidden units hold zeros, and contribute zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pixnerd_kernels.ops.gpu.pieces import (
    activate,
    activate_with_slope,
    inverse_norm,
    load_tile,
    narrow,
    operand,
    rms_norm,
    rms_norm_grad,
    store_tile,
    unit_columns,
    unit_columns_grad,
)


@triton.jit
def field_input(
    x, live, eps, NORM: tl.constexpr, SIZE: tl.constexpr, NARROW: tl.constexpr, EMULATE: tl.constexpr
):
    """A tile of pixels [T, C] as an operand, divided by its root mean square where NORM; and each row's divisor."""
    if NORM:
        unit, r = rms_norm(x.to(tl.float32), live, eps, SIZE)
        return narrow(unit, NARROW, EMULATE), r
    else:
        return operand(x, EMULATE), tl.zeros([x.shape[0]], tl.float32)


@triton.jit
def field_hidden(
    n, w1, w_gate,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Hidden values [T, H]: act(n @ w1), or act(n @ w_gate) * (n @ w1). n [T, C], scaled weights [C, H]."""
    z = tl.dot(n, w1, input_precision=PRECISION)
    if GATED:
        return activate(tl.dot(n, w_gate, input_precision=PRECISION), ACTIVATION, FAST) * z
    else:
        return activate(z, ACTIVATION, FAST)


@triton.jit
def field_hidden_grad(
    n, g, w1, w2, w_gate,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    NARROW: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """The hidden values again, and the gradients of n @ w1 and of n @ w_gate: operands [T, H].

    n [T, C] and g [T, C], the gradient of the output; scaled weights w1, w_gate [C, H] and w2 [H, C]. Where there is
    no gate, its gradient repeats that of n @ w1.
    """
    z = tl.dot(n, w1, input_precision=PRECISION)
    if GATED:
        act, slope = activate_with_slope(tl.dot(n, w_gate, input_precision=PRECISION), ACTIVATION, FAST)
        dh = tl.dot(g, tl.trans(w2), input_precision=PRECISION)
        h = narrow(act * z, NARROW, EMULATE)
        dz = narrow(dh * act, NARROW, EMULATE)
        return h, dz, narrow(dh * z * slope, NARROW, EMULATE)
    else:
        act, slope = activate_with_slope(z, ACTIVATION, FAST)
        h = narrow(act, NARROW, EMULATE)
        dz = narrow(tl.dot(g, tl.trans(w2), input_precision=PRECISION) * slope, NARROW, EMULATE)
        return h, dz, dz


@triton.jit
def load_norm(norm_weight, step, channels, NORM: tl.constexpr, CHANNELS: tl.constexpr):
    """The norm's weight in float32, zero beyond CHANNELS; ones without a norm."""
    if NORM:
        return tl.load(norm_weight + channels * step, mask=channels < CHANNELS, other=0.0).to(tl.float32)
    else:
        return tl.full(channels.shape, 1.0, tl.float32)


@triton.jit
def scaled_input_weight(
    raw, weight, eps, live,
    NORM: tl.constexpr, UNIT: tl.constexpr, NARROW: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """w1 or w_gate [C, H] as an operand: unit columns where UNIT, rows times the norm's weight where NORM."""
    if UNIT or NORM:
        unit = unit_columns(raw, eps, live, UNIT)
        if NORM:
            unit *= weight[:, None]
        return narrow(unit, NARROW, EMULATE)
    else:
        return operand(raw, EMULATE)


@triton.jit
def finish_input_weight(
    target, row_stride, raw, gradient, weight, eps, channels, hidden,
    NORM: tl.constexpr, UNIT: tl.constexpr, CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    NEED: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Store the gradient of the raw w1 or w_gate, and return its part of the norm weight's gradient [C].

    gradient [C, H] is that of the scaled weight divided by the norm's weight.
    """
    unit = unit_columns(raw, eps, hidden < HIDDEN, UNIT)
    d_norm = tl.sum(unit * gradient, 1)
    if NEED:
        if NORM:
            gradient *= weight[:, None]
        raw = raw.to(tl.float32)
        squares, projection = tl.sum(raw * raw, 0), tl.sum(raw * gradient, 0)
        gradient = unit_columns_grad(raw, squares, projection, gradient, eps, UNIT)
        store_tile(target, channels, row_stride, hidden, CHANNELS, HIDDEN, gradient, EMULATE)
    return d_norm


@triton.jit
def load_input_weight(
    source, row_stride, weight, eps, first,
    NORM: tl.constexpr, UNIT: tl.constexpr, CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    BLOCK_C: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """A chunk of w1 or w_gate from hidden unit `first` on: PIECES operands [C, PIECE] with all scales applied."""
    channels = tl.arange(0, BLOCK_C)
    pieces = ()
    for p in tl.static_range(PIECES):
        hidden = first + p * PIECE + tl.arange(0, PIECE)
        raw = load_tile(source, channels, row_stride, hidden, CHANNELS, HIDDEN)
        live = hidden < HIDDEN
        pieces = pieces + (
            scaled_input_weight(raw, weight, eps, live, NORM, UNIT, source.dtype.element_ty, EMULATE),
        )
    return pieces


@triton.jit
def load_output_weight(
    source, row_stride, first,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    BLOCK_C: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """A chunk of the raw w2: PIECES tiles [PIECE, C]; and the sums of squares of its columns."""
    channels = tl.arange(0, BLOCK_C)
    squares = tl.zeros([BLOCK_C], tl.float32)
    pieces = ()
    for p in tl.static_range(PIECES):
        hidden = first + p * PIECE + tl.arange(0, PIECE)
        raw = load_tile(source, hidden, row_stride, channels, HIDDEN, CHANNELS)
        squares += tl.sum(raw.to(tl.float32) * raw.to(tl.float32), 0)
        pieces = pieces + (raw,)
    return pieces, squares


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
    EMULATE: tl.constexpr,
):  # fmt: skip
    """y of patch program_id(0); the programs along axis 1 share its tiles."""
    NARROW: tl.constexpr = x.dtype.element_ty
    WHOLE: tl.constexpr = PIECE * PIECES >= HIDDEN
    patch = tl.program_id(0).to(tl.int64)
    x += patch * x_patch
    w1 += patch * w1_patch
    w2 += patch * w2_patch
    w_gate += patch * gate_patch
    y += patch * pixels * CHANNELS
    channels = tl.arange(0, BLOCK_C)
    weight = load_norm(norm_weight, norm_step, channels, NORM, CHANNELS)
    if WHOLE:
        scaled1 = load_input_weight(
            w1, w1_row, weight, weight_eps, 0, NORM, UNIT1, CHANNELS, HIDDEN, BLOCK_C, PIECE, PIECES, EMULATE
        )
        scaled_gate = scaled1
        if GATED:
            scaled_gate = load_input_weight(
                w_gate, gate_row, weight, weight_eps, 0, NORM, UNIT_GATE, CHANNELS, HIDDEN,
                BLOCK_C, PIECE, PIECES, EMULATE,
            )  # fmt: skip
        raw2, squares = load_output_weight(w2, w2_row, 0, CHANNELS, HIDDEN, BLOCK_C, PIECE, PIECES)
    for start in range(tl.program_id(1) * TILE, pixels, tl.num_programs(1) * TILE):
        rows = start + tl.arange(0, TILE)
        tile = load_tile(x, rows, x_row, channels, pixels, CHANNELS)
        n, _ = field_input(tile, rows < pixels, norm_eps, NORM, CHANNELS, NARROW, EMULATE)
        out = tl.zeros([TILE, BLOCK_C], tl.float32)
        if WHOLE:
            for p in tl.static_range(PIECES):
                h = field_hidden(n, scaled1[p], scaled_gate[p], GATED, ACTIVATION, FAST, PRECISION)
                h = narrow(h, NARROW, EMULATE)
                out = tl.dot(h, operand(raw2[p], EMULATE), out, input_precision=PRECISION)
        else:
            squares = tl.zeros([BLOCK_C], tl.float32)
            for first in range(0, HIDDEN, PIECE * PIECES):
                scaled1 = load_input_weight(
                    w1, w1_row, weight, weight_eps, first, NORM, UNIT1, CHANNELS, HIDDEN,
                    BLOCK_C, PIECE, PIECES, EMULATE,
                )  # fmt: skip
                scaled_gate = scaled1
                if GATED:
                    scaled_gate = load_input_weight(
                        w_gate, gate_row, weight, weight_eps, first, NORM, UNIT_GATE, CHANNELS, HIDDEN,
                        BLOCK_C, PIECE, PIECES, EMULATE,
                    )  # fmt: skip
                raw2, part = load_output_weight(w2, w2_row, first, CHANNELS, HIDDEN, BLOCK_C, PIECE, PIECES)
                squares += part
                for p in tl.static_range(PIECES):
                    h = field_hidden(n, scaled1[p], scaled_gate[p], GATED, ACTIVATION, FAST, PRECISION)
                    h = narrow(h, NARROW, EMULATE)
                    out = tl.dot(h, operand(raw2[p], EMULATE), out, input_precision=PRECISION)
        if UNIT2:
            out *= inverse_norm(squares, weight_eps)[None, :]
        if RESIDUAL:
            out += tile.to(tl.float32)
        store_tile(y, rows, CHANNELS, channels, pixels, CHANNELS, out, EMULATE)


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
    EMULATE: tl.constexpr, NEED_X: tl.constexpr, NEED_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Every gradient of one patch; the pointers are its own."""
    NARROW: tl.constexpr = x.dtype.element_ty
    CHUNK: tl.constexpr = PIECE * PIECES
    CHUNKS: tl.constexpr = (HIDDEN + CHUNK - 1) // CHUNK
    squares2 = tl.zeros([BLOCK_C], tl.float32)
    projection2 = tl.zeros([BLOCK_C], tl.float32)
    sum_norm = tl.zeros([BLOCK_C], tl.float32)
    if CHUNKS > 1:
        for first in range(0, HIDDEN, CHUNK):
            _, part = load_output_weight(w2, w2_row, first, CHANNELS, HIDDEN, BLOCK_C, PIECE, PIECES)
            squares2 += part
    for first in range(0, HIDDEN, CHUNK):
        scaled1 = load_input_weight(
            w1, w1_row, weight, weight_eps, first, NORM, UNIT1, CHANNELS, HIDDEN,
            BLOCK_C, PIECE, PIECES, EMULATE,
        )  # fmt: skip
        scaled_gate = scaled1
        if GATED:
            scaled_gate = load_input_weight(
                w_gate, gate_row, weight, weight_eps, first, NORM, UNIT_GATE, CHANNELS, HIDDEN,
                BLOCK_C, PIECE, PIECES, EMULATE,
            )  # fmt: skip
        raw2, part = load_output_weight(w2, w2_row, first, CHANNELS, HIDDEN, BLOCK_C, PIECE, PIECES)
        if CHUNKS == 1:
            squares2 = part
        scale2 = tl.where(channels < CHANNELS, inverse_norm(squares2, weight_eps), 0.0)
        scaled2 = ()
        sum1 = ()
        sum2 = ()
        sum_gate = ()
        for p in tl.static_range(PIECES):
            if UNIT2:
                scaled = narrow(raw2[p].to(tl.float32) * scale2[None, :], NARROW, EMULATE)
            else:
                scaled = operand(raw2[p], EMULATE)
            scaled2 = scaled2 + (scaled,)
            sum1 = sum1 + (tl.zeros([BLOCK_C, PIECE], tl.float32),)
            sum2 = sum2 + (tl.zeros([PIECE, BLOCK_C], tl.float32),)
            if GATED:
                sum_gate = sum_gate + (tl.zeros([BLOCK_C, PIECE], tl.float32),)
        for start in range(0, pixels, TILE):
            rows = start + tl.arange(0, TILE)
            tile = load_tile(x, rows, x_row, channels, pixels, CHANNELS)
            g = load_tile(grad, rows, grad_row, channels, pixels, CHANNELS)
            n, r = field_input(tile, rows < pixels, norm_eps, NORM, CHANNELS, NARROW, EMULATE)
            g_operand = operand(g, EMULATE)
            d_unit = tl.zeros([TILE, BLOCK_C], tl.float32)
            next1 = ()
            next2 = ()
            next_gate = ()
            for p in tl.static_range(PIECES):
                h, dz, da = field_hidden_grad(
                    n, g_operand, scaled1[p], scaled2[p], scaled_gate[p],
                    GATED, ACTIVATION, FAST, PRECISION, NARROW, EMULATE,
                )  # fmt: skip
                if NEED_WEIGHTS:
                    next2 = next2 + (tl.dot(tl.trans(h), g_operand, sum2[p], input_precision=PRECISION),)
                else:
                    next2 = next2 + (sum2[p],)
                if NEED_WEIGHTS or NORM:
                    next1 = next1 + (tl.dot(tl.trans(n), dz, sum1[p], input_precision=PRECISION),)
                    if GATED:
                        next_gate = next_gate + (
                            tl.dot(tl.trans(n), da, sum_gate[p], input_precision=PRECISION),
                        )
                else:
                    next1 = next1 + (sum1[p],)
                    if GATED:
                        next_gate = next_gate + (sum_gate[p],)
                if NEED_X:
                    d_unit = tl.dot(dz, tl.trans(scaled1[p]), d_unit, input_precision=PRECISION)
                    if GATED:
                        d_unit = tl.dot(da, tl.trans(scaled_gate[p]), d_unit, input_precision=PRECISION)
            sum1 = next1
            sum2 = next2
            sum_gate = next_gate
            if NEED_X:
                if CHUNKS > 1:
                    waiting = scratch_x + rows[:, None].to(tl.int64) * BLOCK_C + channels[None, :]
                    inside = (rows[:, None] < pixels) & (channels[None, :] < BLOCK_C)
                    if first > 0:
                        d_unit += tl.load(waiting, mask=inside, other=0.0)
                    if first + CHUNK < HIDDEN:
                        tl.store(waiting, d_unit, mask=inside)
                if first + CHUNK >= HIDDEN:
                    if NORM:
                        d_unit = rms_norm_grad(d_unit, tile.to(tl.float32) * r[:, None], r, CHANNELS)
                    if RESIDUAL:
                        d_unit += g.to(tl.float32)
                    store_tile(dx, rows, CHANNELS, channels, pixels, CHANNELS, d_unit, EMULATE)
        # Weights are read again, from the cache: kept, they would cost the registers that the sums need.
        again2 = ()
        for p in tl.static_range(PIECES):
            hidden = first + p * PIECE + tl.arange(0, PIECE)
            if NEED_WEIGHTS or NORM:
                raw1 = load_tile(w1, channels, w1_row, hidden, CHANNELS, HIDDEN)
                sum_norm += finish_input_weight(
                    d1, d1_row, raw1, sum1[p], weight, weight_eps, channels, hidden,
                    NORM, UNIT1, CHANNELS, HIDDEN, NEED_WEIGHTS, EMULATE,
                )  # fmt: skip
                if GATED:
                    raw_gate = load_tile(w_gate, channels, gate_row, hidden, CHANNELS, HIDDEN)
                    sum_norm += finish_input_weight(
                        d_gate, d_gate_row, raw_gate, sum_gate[p], weight, weight_eps,
                        channels, hidden, NORM, UNIT_GATE, CHANNELS, HIDDEN, NEED_WEIGHTS, EMULATE,
                    )  # fmt: skip
            if NEED_WEIGHTS:
                again = load_tile(w2, hidden, w2_row, channels, HIDDEN, CHANNELS)
                again2 = again2 + (again,)
                projection2 += tl.sum(again.to(tl.float32) * sum2[p], 0)
                if CHUNKS > 1:
                    waiting = scratch_2 + hidden[:, None] * BLOCK_C + channels[None, :]
                    inside = (hidden[:, None] < HIDDEN) & (channels[None, :] < BLOCK_C)
                    tl.store(waiting, sum2[p], mask=inside)
        if NEED_WEIGHTS and CHUNKS == 1:
            for p in tl.static_range(PIECES):
                hidden = p * PIECE + tl.arange(0, PIECE)
                d_raw = unit_columns_grad(again2[p], squares2, projection2, sum2[p], weight_eps, UNIT2)
                store_tile(d2, hidden, d2_row, channels, HIDDEN, CHANNELS, d_raw, EMULATE)
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
            d_raw = unit_columns_grad(again, squares2, projection2, d_raw, weight_eps, UNIT2)
            store_tile(d2, hidden, d2_row, channels, HIDDEN, CHANNELS, d_raw, EMULATE)
        tl.debug_barrier()
    if NORM:
        tl.store(d_norm + channels, sum_norm, mask=channels < CHANNELS)


@triton.jit
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
    EMULATE: tl.constexpr, NEED_X: tl.constexpr, NEED_WEIGHTS: tl.constexpr,
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
            ACTIVATION, RESIDUAL, FAST, PRECISION, EMULATE, NEED_X, NEED_WEIGHTS,
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
                ACTIVATION, RESIDUAL, FAST, PRECISION, EMULATE, NEED_X, NEED_WEIGHTS,
            )  # fmt: skip
            patch += tl.num_programs(0)
