"""The Triton kernel of the neural field's Jacobian-vector product: a block's value and its tangent in one pass.

With W = w * s the normalised weights and dw the raw weights' tangents, the tangent of W is dw * s - W * change, where
change = s² * sum of w * dw over each column. So

    dz = dn @ W1 + (n @ dw1) * s1 - z * change1
    dy = dx + (dh @ w2 + h @ dw2) * s2 - (y - x) * change2

and tangents of weights enter the products as they were loaded, but for the norm's weight on the rows of dw1. Letters in
shapes are those of `parts`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pixnerd_kernels.ops.gpu.pieces import (
    activate_with_slope,
    flat,
    inverse_norm,
    inverse_norm_of_columns,
    load_columns,
    load_tile,
    narrow,
    operand,
    rms_norm,
    rms_norm_grad,
    store_tile,
    sum_of_columns,
)
from pixnerd_kernels.ops.neural_field_mlp.triton.parts import load_norm, of_rows, scaled_input_weight


@triton.jit
def change_of_norm(squares, projection, scale, ROWS: tl.constexpr):
    """`change` of columns of ROWS numbers from their sums of w² and of w * dw, and the factor s of dw, which is zero
    where a normalised column is 1 or -1."""
    clamped = tl.rsqrt(squares) > scale
    change = tl.where(clamped, 0.0, projection * scale * scale)
    if ROWS == 1:
        return tl.zeros_like(change), tl.where(clamped, scale, 0.0)
    else:
        return change, scale


@triton.jit
def load_input_weight(
    w, dw, w_row, dw_row, weight, eps, first,
    NORM: tl.constexpr, UNIT: tl.constexpr, MOVING: tl.constexpr, CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    BLOCK_C: tl.constexpr, PIECE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """w1 or w_gate of PIECE hidden units as an operand [C, H], its tangent dw as one, and change and s, each [H]."""
    NARROW: tl.constexpr = w.dtype.element_ty
    raw = load_columns(w, w_row, 0, first, CHANNELS, HIDDEN, BLOCK_C, PIECE)
    scaled = scaled_input_weight(raw, weight, eps, first, NORM, UNIT, HIDDEN, NARROW, EMULATE)
    tangent = scaled
    change = tl.zeros([PIECE], tl.float32)
    scale = tl.full([PIECE], 1.0, tl.float32)
    if MOVING:
        along = load_columns(dw, dw_row, 0, first, CHANNELS, HIDDEN, BLOCK_C, PIECE)
        if UNIT:
            wide = raw.to(tl.float32)
            squares = sum_of_columns(wide * wide)
            columns = inverse_norm_of_columns(squares, eps, first, HIDDEN)
            moved, factor = change_of_norm(
                squares, sum_of_columns(wide * along.to(tl.float32)), columns, CHANNELS
            )
            change = tl.reshape(moved, [PIECE])
            scale = tl.reshape(factor, [PIECE])
        if NORM:
            tangent = flat(narrow(along.to(tl.float32) * of_rows(weight, along), NARROW, EMULATE))
        else:
            tangent = operand(flat(along), EMULATE)
    return scaled, tangent, change, scale


@triton.jit
def product(
    n, dn, w, dw, change, scale,
    UNIT: tl.constexpr, INPUT: tl.constexpr, MOVING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z = n @ W [T, H] and its tangent, of `load_input_weight`. INPUT: n has a tangent; MOVING: the weight has one."""
    z = tl.dot(n, w, input_precision=PRECISION)
    if MOVING:
        dz = tl.dot(n, dw, input_precision=PRECISION)
        if UNIT:
            dz = dz * scale[None, :] - z * change[None, :]
        if INPUT:
            dz = tl.dot(dn, w, dz, input_precision=PRECISION)
    else:
        dz = tl.dot(dn, w, input_precision=PRECISION)
    return z, dz


@triton.jit
def load_piece(
    w1, w2, w_gate, dw1, dw2, dw_gate, w1_row, w2_row, gate_row, dw1_row, dw2_row, dw_gate_row, weight, eps, first,
    NORM: tl.constexpr, GATED: tl.constexpr, UNIT1: tl.constexpr, UNIT2: tl.constexpr, UNIT_GATE: tl.constexpr,
    MOVING: tl.constexpr,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_C: tl.constexpr, PIECE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """PIECE hidden units of all weights: w1 and w_gate as of `load_input_weight`; w2 and its tangent as operands
    [H, C], and their sums of w² and w * dw over these units, [C]."""
    first_weight = load_input_weight(
        w1, dw1, w1_row, dw1_row, weight, eps, first,
        NORM, UNIT1, MOVING, CHANNELS, HIDDEN, BLOCK_C, PIECE, EMULATE,
    )  # fmt: skip
    gate = first_weight
    if GATED:
        gate = load_input_weight(
            w_gate, dw_gate, gate_row, dw_gate_row, weight, eps, first,
            NORM, UNIT_GATE, MOVING, CHANNELS, HIDDEN, BLOCK_C, PIECE, EMULATE,
        )  # fmt: skip
    raw = load_columns(w2, w2_row, first, 0, HIDDEN, CHANNELS, PIECE, BLOCK_C)
    wide = raw.to(tl.float32)
    sums = sum_of_columns(wide * wide)
    squares = tl.reshape(sums, [BLOCK_C])
    second = operand(flat(raw), EMULATE)
    tangent = second
    projection = tl.zeros([BLOCK_C], tl.float32)
    if MOVING:
        along = load_columns(dw2, dw2_row, first, 0, HIDDEN, CHANNELS, PIECE, BLOCK_C)
        if UNIT2 and HIDDEN == 1:  # normalised, they are 1 or -1, unless the norm is clamped
            along = tl.where(tl.rsqrt(sums) > inverse_norm(sums, eps), along, tl.zeros_like(along))
        projection = tl.reshape(sum_of_columns(wide * along.to(tl.float32)), [BLOCK_C])
        tangent = operand(flat(along), EMULATE)
    return first_weight, gate, second, tangent, squares, projection


@triton.jit
def add_piece(
    out, d_out, n, dn, piece,
    GATED: tl.constexpr, UNIT1: tl.constexpr, UNIT_GATE: tl.constexpr, INPUT: tl.constexpr, MOVING: tl.constexpr,
    ACTIVATION: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, NARROW: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """out and d_out [T, C] plus h @ w2, and dh @ w2 + h @ dw2, of the hidden units of a `load_piece`."""
    first, gate, w2, dw2, _, _ = piece
    z, dz = product(n, dn, first[0], first[1], first[2], first[3], UNIT1, INPUT, MOVING, PRECISION)
    if GATED:
        a, da = product(n, dn, gate[0], gate[1], gate[2], gate[3], UNIT_GATE, INPUT, MOVING, PRECISION)
        act, slope = activate_with_slope(a, ACTIVATION, FAST)
        h = act * z
        dh = act * dz + slope * da * z
    else:
        h, slope = activate_with_slope(z, ACTIVATION, FAST)
        dh = slope * dz
    h = narrow(h, NARROW, EMULATE)
    out = tl.dot(h, w2, out, input_precision=PRECISION)
    d_out = tl.dot(narrow(dh, NARROW, EMULATE), w2, d_out, input_precision=PRECISION)
    if MOVING:
        d_out = tl.dot(h, dw2, d_out, input_precision=PRECISION)
    return out, d_out


@triton.jit
def neural_field_mlp_jvp(
    x, w1, w2, w_gate, norm_weight, dx, dw1, dw2, dw_gate, y, dy,
    pixels, x_patch, w1_patch, w2_patch, gate_patch, dx_patch, dw1_patch, dw2_patch, dw_gate_patch, norm_step,
    norm_eps, weight_eps,
    x_row: tl.constexpr, w1_row: tl.constexpr, w2_row: tl.constexpr, gate_row: tl.constexpr,
    dx_row: tl.constexpr, dw1_row: tl.constexpr, dw2_row: tl.constexpr, dw_gate_row: tl.constexpr,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
    GATED: tl.constexpr, NORM: tl.constexpr, INPUT: tl.constexpr, MOVING: tl.constexpr,
    UNIT1: tl.constexpr, UNIT2: tl.constexpr, UNIT_GATE: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """y and dy of patch program_id(0); the programs along axis 1 share its tiles. INPUT: x moves; MOVING: the weights.

    Weights that do not fit on the chip, PIECES pieces at once, are read again for every tile, piece by piece.
    """
    NARROW: tl.constexpr = w1.dtype.element_ty
    WHOLE: tl.constexpr = PIECE * PIECES >= HIDDEN
    patch = tl.program_id(0).to(tl.int64)
    x += patch * x_patch
    dx += patch * dx_patch
    y += patch * pixels * CHANNELS
    dy += patch * pixels * CHANNELS
    w1 += patch * w1_patch
    w2 += patch * w2_patch
    w_gate += patch * gate_patch
    dw1 += patch * dw1_patch
    dw2 += patch * dw2_patch
    dw_gate += patch * dw_gate_patch
    channels = tl.arange(0, BLOCK_C)
    weight = load_norm(norm_weight, norm_step, channels, NORM, CHANNELS)
    pieces = ()
    if WHOLE:
        for p in tl.static_range(PIECES):
            pieces = pieces + (
                load_piece(
                    w1, w2, w_gate, dw1, dw2, dw_gate, w1_row, w2_row, gate_row, dw1_row, dw2_row, dw_gate_row,
                    weight, weight_eps, p * PIECE,
                    NORM, GATED, UNIT1, UNIT2, UNIT_GATE, MOVING, CHANNELS, HIDDEN, BLOCK_C, PIECE, EMULATE,
                ),
            )  # fmt: skip
    for start in range(tl.program_id(1) * TILE, pixels, tl.num_programs(1) * TILE):
        rows = start + tl.arange(0, TILE)
        tile = load_tile(x, rows, x_row, channels, pixels, CHANNELS).to(tl.float32)
        along = tl.zeros([TILE, BLOCK_C], tl.float32)
        if INPUT:
            along = load_tile(dx, rows, dx_row, channels, pixels, CHANNELS).to(tl.float32)
        unit = tile
        d_unit = along
        if NORM:
            unit, r = rms_norm(tile, rows < pixels, norm_eps, CHANNELS)
            d_unit = rms_norm_grad(along, unit, r, False, CHANNELS)  # a symmetric matrix
        n = narrow(unit, NARROW, EMULATE)
        dn = narrow(d_unit, NARROW, EMULATE)
        out = tl.zeros([TILE, BLOCK_C], tl.float32)
        d_out = tl.zeros([TILE, BLOCK_C], tl.float32)
        squares = tl.zeros([BLOCK_C], tl.float32)
        projection = tl.zeros([BLOCK_C], tl.float32)
        if WHOLE:
            for p in tl.static_range(PIECES):
                out, d_out = add_piece(
                    out, d_out, n, dn, pieces[p],
                    GATED, UNIT1, UNIT_GATE, INPUT, MOVING, ACTIVATION, FAST, PRECISION, NARROW, EMULATE,
                )  # fmt: skip
                squares += pieces[p][4]
                projection += pieces[p][5]
        else:
            for first in range(0, HIDDEN, PIECE):
                piece = load_piece(
                    w1, w2, w_gate, dw1, dw2, dw_gate, w1_row, w2_row, gate_row, dw1_row, dw2_row, dw_gate_row,
                    weight, weight_eps, first,
                    NORM, GATED, UNIT1, UNIT2, UNIT_GATE, MOVING, CHANNELS, HIDDEN, BLOCK_C, PIECE, EMULATE,
                )  # fmt: skip
                out, d_out = add_piece(
                    out, d_out, n, dn, piece,
                    GATED, UNIT1, UNIT_GATE, INPUT, MOVING, ACTIVATION, FAST, PRECISION, NARROW, EMULATE,
                )  # fmt: skip
                squares += piece[4]
                projection += piece[5]
        if UNIT2:
            scale = inverse_norm(squares, weight_eps)
            out *= scale[None, :]
            if MOVING:
                change, _ = change_of_norm(squares, projection, scale, 2)
                d_out = d_out * scale[None, :] - out * change[None, :]
            else:
                d_out *= scale[None, :]
        if RESIDUAL:
            out += tile
            d_out += along
        store_tile(y, rows, CHANNELS, channels, pixels, CHANNELS, out, EMULATE)
        store_tile(dy, rows, CHANNELS, channels, pixels, CHANNELS, d_out, EMULATE)
