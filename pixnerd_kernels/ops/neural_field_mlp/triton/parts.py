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
    inverse_norm,
    load_tile,
    narrow,
    operand,
    rms_norm,
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
    """The hidden values again, and the gradients of n @ w1 and of n @ w_gate: operands [H, T].

    n [T, C] and g [T, C], the gradient of the output; scaled weights w1, w_gate [C, H] and w2 [H, C]. Where there is
    no gate, its gradient repeats that of n @ w1.
    """
    z = tl.dot(tl.trans(w1), tl.trans(n), input_precision=PRECISION)
    dh = tl.dot(w2, tl.trans(g), input_precision=PRECISION)
    if GATED:
        a = tl.dot(tl.trans(w_gate), tl.trans(n), input_precision=PRECISION)
        act, slope = activate_with_slope(a, ACTIVATION, FAST)
        h = narrow(act * z, NARROW, EMULATE)
        dz = narrow(dh * act, NARROW, EMULATE)
        return h, dz, narrow(dh * z * slope, NARROW, EMULATE)
    else:
        act, slope = activate_with_slope(z, ACTIVATION, FAST)
        h = narrow(act, NARROW, EMULATE)
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
    """Store the gradient of the raw w1 or w_gate, and return what sums over H to the norm weight's gradient [C, H].

    gradient [C, H] is that of the scaled weight.
    """
    raw = raw.to(tl.float32)
    squares = tl.sum(raw * raw, 0)
    product = raw * gradient
    d_norm = product
    if UNIT:
        d_norm = product * tl.where(hidden < HIDDEN, inverse_norm(squares, eps), 0.0)[None, :]
    if NEED:
        if NORM:
            gradient *= weight[:, None]
            product *= weight[:, None]
        gradient = unit_columns_grad(raw, squares, tl.sum(product, 0), gradient, eps, UNIT)
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
    squares = tl.zeros([PIECE, BLOCK_C], tl.float32)
    pieces = ()
    for p in tl.static_range(PIECES):
        hidden = first + p * PIECE + tl.arange(0, PIECE)
        raw = load_tile(source, hidden, row_stride, channels, HIDDEN, CHANNELS)
        squares += raw.to(tl.float32) * raw.to(tl.float32)
        pieces = pieces + (raw,)
    return pieces, tl.sum(squares, 0)


@triton.jit
def load_weights(
    w1, w2, w_gate, w1_row, w2_row, gate_row, weight, eps, first,
    NORM: tl.constexpr, GATED: tl.constexpr, UNIT1: tl.constexpr, UNIT_GATE: tl.constexpr,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    BLOCK_C: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """A chunk of all weights: operands of w1 and w_gate (w1 again without a gate), the raw w2, its sums of squares."""
    scaled1 = load_input_weight(
        w1, w1_row, weight, eps, first, NORM, UNIT1, CHANNELS, HIDDEN, BLOCK_C, PIECE, PIECES, EMULATE
    )
    scaled_gate = scaled1
    if GATED:
        scaled_gate = load_input_weight(
            w_gate, gate_row, weight, eps, first, NORM, UNIT_GATE, CHANNELS, HIDDEN, BLOCK_C, PIECE, PIECES, EMULATE
        )  # fmt: skip
    raw2, squares = load_output_weight(w2, w2_row, first, CHANNELS, HIDDEN, BLOCK_C, PIECE, PIECES)
    return scaled1, scaled_gate, raw2, squares


@triton.jit
def add_products(
    out, n, scaled1, scaled_gate, raw2,
    PIECES: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, FAST: tl.constexpr,
    PRECISION: tl.constexpr, NARROW: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """out [T, C] plus the hidden values of a chunk times the raw w2; weights as `load_weights` has them, n [T, C]."""
    for p in tl.static_range(PIECES):
        h = field_hidden(n, scaled1[p], scaled_gate[p], GATED, ACTIVATION, FAST, PRECISION)
        out = tl.dot(narrow(h, NARROW, EMULATE), operand(raw2[p], EMULATE), out, input_precision=PRECISION)
    return out
