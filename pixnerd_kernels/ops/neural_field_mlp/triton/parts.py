"""Device functions of the neural-field block: its formula for a tile of pixels, and how a program loads its weights.

Weights become operands of the products with all their scales applied and rounded once: the unit columns w * s,
s = 1 / max(||w||, eps), and for w1 and w_gate the norm's weight on their rows. So no product needs a further scale,
none overflows where columns are short, and the gradient of the norm's weight falls out of those of w1 and w_gate. Only
w2 stays raw in the forward: its scale belongs to the output's columns.

Letters in shapes: T pixels of a tile, C padded channels, H padded hidden units of a piece; a program holds PIECES
pieces at once, a chunk, and walks a hidden dimension that does not fit on the chip chunk by chunk. Padded channels and
hidden units hold zeros, and contribute zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pixnerd_kernels.ops.gpu.pieces import (
    activate,
    activate_with_slope,
    flat,
    in_columns,
    inverse_norm_of_columns,
    load_columns,
    narrow,
    operand,
    rms_norm,
    store_columns,
    sum_of_columns,
    unit_columns,
    unit_columns_grad,
)


@triton.jit
def field_input(
    x, live, eps,
    NORM: tl.constexpr, LATE: tl.constexpr, SIZE: tl.constexpr, NARROW: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """A tile of pixels [T, C] as an operand, times r = 1 / root mean square of each row where NORM; and r [T].

    LATE: the operand is the tile as it was loaded, and what comes of its products is multiplied by r instead. A tile
    that was copied to shared memory then enters the products from there.
    """
    if NORM:
        unit, r = rms_norm(x.to(tl.float32), live, eps, SIZE)
        if LATE:
            return operand(x, EMULATE), r
        else:
            return narrow(unit, NARROW, EMULATE), r
    else:
        return operand(x, EMULATE), tl.zeros([x.shape[0]], tl.float32)


@triton.jit
def field_hidden(
    n, r, w1, w_gate,
    GATED: tl.constexpr, LATE: tl.constexpr, ACTIVATION: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Hidden values [T, H]: act(n @ w1), or act(n @ w_gate) * (n @ w1).

    n and r of `field_input`, scaled weights [C, H].
    """
    z = tl.dot(n, w1, input_precision=PRECISION)
    if LATE:
        z *= r[:, None]
    if GATED:
        a = tl.dot(n, w_gate, input_precision=PRECISION)
        if LATE:
            a *= r[:, None]
        return activate(a, ACTIVATION, FAST) * z
    else:
        return activate(z, ACTIVATION, FAST)


@triton.jit
def field_hidden_grad(
    n, r, g, w1, w2, w_gate,
    GATED: tl.constexpr, LATE: tl.constexpr, ACTIVATION: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    NARROW: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """The hidden values again, and the gradients of n @ w1 and of n @ w_gate: operands [H, T].

    n and r of `field_input`; g [T, C] the gradient of the output; scaled weights w1, w_gate [C, H] and w2 [H, C]. Where
    there is no gate, its gradient repeats that of n @ w1. LATE: both are those of the tile itself, n without r.
    """
    z = tl.dot(tl.trans(w1), tl.trans(n), input_precision=PRECISION)
    if LATE:
        z *= r[None, :]
    dh = tl.dot(w2, tl.trans(g), input_precision=PRECISION)
    if GATED:
        a = tl.dot(tl.trans(w_gate), tl.trans(n), input_precision=PRECISION)
        if LATE:
            a *= r[None, :]
        act, slope = activate_with_slope(a, ACTIVATION, FAST)
        h = narrow(act * z, NARROW, EMULATE)
        if LATE:
            dh *= r[None, :]
        dz = narrow(dh * act, NARROW, EMULATE)
        return h, dz, narrow(dh * z * slope, NARROW, EMULATE)
    else:
        act, slope = activate_with_slope(z, ACTIVATION, FAST)
        h = narrow(act, NARROW, EMULATE)
        if LATE:
            slope *= r[None, :]
        dz = narrow(dh * slope, NARROW, EMULATE)
        return h, dz, dz


@triton.jit
def load_norm(norm_weight, step, channels, NORM: tl.constexpr, CHANNELS: tl.constexpr):
    """The norm's weight in float32, zero beyond CHANNELS; ones without a norm."""
    if NORM:
        return tl.load(norm_weight + channels * step, mask=channels < CHANNELS, other=0.0).to(tl.float32)
    else:
        return tl.full(channels.shape, 1.0, tl.float32)


@triton.jit
def of_rows(weight, like):
    """The norm's weight [C], to be broadcast with a tile of `load_columns` that has channels for rows."""
    return tl.reshape(weight, (like.shape[0], 1, like.shape[2], 1))


@triton.jit
def scaled_input_weight(
    raw, weight, eps, first,
    NORM: tl.constexpr, UNIT: tl.constexpr, HIDDEN: tl.constexpr, NARROW: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """w1 or w_gate [C, H] as an operand: unit columns where UNIT, rows times the norm's weight where NORM."""
    if UNIT or NORM:
        unit = unit_columns(raw, eps, first, HIDDEN, UNIT)
        if NORM:
            unit *= of_rows(weight, raw)
        return flat(narrow(unit, NARROW, EMULATE))
    else:
        return operand(flat(raw), EMULATE)


@triton.jit
def finish_input_weight(
    target, row_stride, raw, gradient, weight, eps, first,
    NORM: tl.constexpr, UNIT: tl.constexpr, CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    NEED: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Store the gradient of the raw w1 or w_gate from hidden unit `first` on, and return what sums over H to the norm
    weight's gradient, shaped as raw.

    gradient [C, H] is that of the scaled weight.
    """
    gradient = in_columns(gradient, raw)
    raw = raw.to(tl.float32)
    squares = sum_of_columns(raw * raw)
    product = raw * gradient
    d_norm = product
    if UNIT:
        d_norm = product * inverse_norm_of_columns(squares, eps, first, HIDDEN)
    if NEED:
        if NORM:
            gradient *= of_rows(weight, raw)
            product *= of_rows(weight, raw)
        gradient = unit_columns_grad(raw, squares, sum_of_columns(product), gradient, eps, CHANNELS, UNIT)
        store_columns(target, row_stride, 0, first, CHANNELS, HIDDEN, gradient, EMULATE)
    return d_norm


@triton.jit
def load_input_weight(
    source, row_stride, first,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_C: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """A chunk of the raw w1 or w_gate from hidden unit `first` on: PIECES tiles [C, PIECE], of `load_columns`."""
    pieces = ()
    for p in tl.static_range(PIECES):
        pieces = pieces + (
            load_columns(source, row_stride, 0, first + p * PIECE, CHANNELS, HIDDEN, BLOCK_C, PIECE),
        )
    return pieces


@triton.jit
def scaled_input_weights(
    raw, weight, eps, first, NORM: tl.constexpr, UNIT: tl.constexpr, HIDDEN: tl.constexpr, PIECE: tl.constexpr,
    NARROW: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """`scaled_input_weight` of every piece of a chunk."""
    pieces = ()
    for p in tl.static_range(len(raw)):
        pieces = pieces + (
            scaled_input_weight(raw[p], weight, eps, first + p * PIECE, NORM, UNIT, HIDDEN, NARROW, EMULATE),
        )
    return pieces


@triton.jit
def load_output_weight(
    source, row_stride, first,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_C: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """A chunk of the raw w2: PIECES tiles [PIECE, C], of `load_columns`."""
    pieces = ()
    for p in tl.static_range(PIECES):
        pieces = pieces + (
            load_columns(source, row_stride, first + p * PIECE, 0, HIDDEN, CHANNELS, PIECE, BLOCK_C),
        )
    return pieces


@triton.jit
def squares_of(raw):
    """The sums of squares of the columns of a chunk of w2, to be broadcast with its tiles."""
    squares = tl.zeros(raw[0].shape, tl.float32)
    for p in tl.static_range(len(raw)):
        squares += raw[p].to(tl.float32) * raw[p].to(tl.float32)
    return sum_of_columns(squares)


@triton.jit
def load_weights(
    w1, w2, w_gate, w1_row, w2_row, gate_row, weight, eps, first,
    NORM: tl.constexpr, GATED: tl.constexpr, UNIT1: tl.constexpr, UNIT_GATE: tl.constexpr,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    BLOCK_C: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """A chunk of all weights: operands of w1 and w_gate (w1 again without a gate), the raw w2, its sums of squares.

    All are on their way at once where that takes no more than 32 KiB of registers: a wait for memory then, not three.
    """
    NARROW: tl.constexpr = w1.dtype.element_ty
    TOGETHER: tl.constexpr = (3 if GATED else 2) * BLOCK_C * PIECE * PIECES * (
        NARROW.primitive_bitwidth // 8
    ) <= 32768
    raw1 = load_input_weight(w1, w1_row, first, CHANNELS, HIDDEN, BLOCK_C, PIECE, PIECES)
    if TOGETHER:
        raw2 = load_output_weight(w2, w2_row, first, CHANNELS, HIDDEN, BLOCK_C, PIECE, PIECES)
        if GATED:
            raw_gate = load_input_weight(w_gate, gate_row, first, CHANNELS, HIDDEN, BLOCK_C, PIECE, PIECES)
    scaled1 = scaled_input_weights(raw1, weight, eps, first, NORM, UNIT1, HIDDEN, PIECE, NARROW, EMULATE)
    scaled_gate = scaled1
    if GATED:
        if not TOGETHER:
            raw_gate = load_input_weight(w_gate, gate_row, first, CHANNELS, HIDDEN, BLOCK_C, PIECE, PIECES)
        scaled_gate = scaled_input_weights(
            raw_gate, weight, eps, first, NORM, UNIT_GATE, HIDDEN, PIECE, NARROW, EMULATE
        )
    if not TOGETHER:
        raw2 = load_output_weight(w2, w2_row, first, CHANNELS, HIDDEN, BLOCK_C, PIECE, PIECES)
    return scaled1, scaled_gate, raw2, squares_of(raw2)


@triton.jit
def add_products(
    out, n, r, scaled1, scaled_gate, raw2,
    PIECES: tl.constexpr, GATED: tl.constexpr, LATE: tl.constexpr, ACTIVATION: tl.constexpr, FAST: tl.constexpr,
    PRECISION: tl.constexpr, NARROW: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """out [T, C] plus the hidden values of a chunk times the raw w2; weights as `load_weights` has them."""
    for p in tl.static_range(PIECES):
        h = field_hidden(n, r, scaled1[p], scaled_gate[p], GATED, LATE, ACTIVATION, FAST, PRECISION)
        out = tl.dot(
            narrow(h, NARROW, EMULATE), operand(flat(raw2[p]), EMULATE), out, input_precision=PRECISION
        )
    return out
