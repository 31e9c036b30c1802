"""The Triton kernel of value and tangent of `modulated_rms_norm` and of its fusion with the residual before it.

A program per tile of tokens, as in the forward, of half as many: everything is there twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pixnerd_kernels.ops.modulated_rms_norm.triton.kernels import load_factor, load_row, load_rows, store_rows


@triton.jit
def modulated_rms_norm_jvp(
    x, y, gate, weight, shift, scale, dx, dy, d_gate, d_shift, d_scale, z, out, dz, d_out, eps,
    x_batch, x_token, y_batch, y_token, gate_batch, weight_step, shift_batch, scale_batch,
    dx_batch, dx_token, dy_batch, dy_token, d_gate_batch, d_shift_batch, d_scale_batch, tokens,
    COLUMNS: tl.constexpr, BLOCK_L: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr,
    DX_GIVEN: tl.constexpr, DY_GIVEN: tl.constexpr, D_GATE_GIVEN: tl.constexpr, D_SHIFT_GIVEN: tl.constexpr,
    D_SCALE_GIVEN: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """z and dz where RESIDUAL, out and d_out where NORM, as `modulated_rms_norm_forward` has them.

    With r = rsqrt(mean(z²) + eps), a = weight (1 + scale) and n = z r:
    d_out = (dz - n mean(n dz)) r a + n weight d_scale + d_shift.
    """
    blocks = tl.cdiv(tokens, BLOCK_L)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
    dense = image * tokens * COLUMNS
    head, tail = load_rows(x + image * x_batch, token, x_token, tokens, COLUMNS, HEAD, TAIL)
    d_head, d_tail = tl.zeros([BLOCK_L, HEAD], tl.float32), tl.zeros([BLOCK_L, TAIL], tl.float32)
    if DX_GIVEN:
        d_head, d_tail = load_rows(dx + image * dx_batch, token, dx_token, tokens, COLUMNS, HEAD, TAIL)
    if RESIDUAL:
        y_head, y_tail = load_rows(y + image * y_batch, token, y_token, tokens, COLUMNS, HEAD, TAIL)
        gate_head, gate_tail = load_row(gate + image * gate_batch, 1, COLUMNS, HEAD, TAIL)
        head += gate_head[None, :] * y_head
        tail += gate_tail[None, :] * y_tail
        if D_GATE_GIVEN:
            row_head, row_tail = load_row(d_gate + image * d_gate_batch, 1, COLUMNS, HEAD, TAIL)
            d_head += row_head[None, :] * y_head
            d_tail += row_tail[None, :] * y_tail
        if DY_GIVEN:
            y_head, y_tail = load_rows(dy + image * dy_batch, token, dy_token, tokens, COLUMNS, HEAD, TAIL)
            d_head += gate_head[None, :] * y_head
            d_tail += gate_tail[None, :] * y_tail
        store_rows(z + dense, token, tokens, head, tail, COLUMNS, HEAD, TAIL, EMULATE)
        store_rows(dz + dense, token, tokens, d_head, d_tail, COLUMNS, HEAD, TAIL, EMULATE)
    if NORM:
        factor_head, factor_tail = load_factor(
            weight, weight_step, scale + image * scale_batch, COLUMNS, HEAD, TAIL, SCALE
        )
        r = tl.rsqrt((tl.sum(head * head, 1) + tl.sum(tail * tail, 1)) / COLUMNS + eps)[:, None]
        products = tl.sum(head * d_head, 1) + tl.sum(tail * d_tail, 1)
        mean = products[:, None] / COLUMNS * r
        head *= r
        tail *= r
        d_head = (d_head - head * mean) * r * factor_head[None, :]
        d_tail = (d_tail - tail * mean) * r * factor_tail[None, :]
        if D_SCALE_GIVEN:
            row_head, row_tail = load_row(d_scale + image * d_scale_batch, 1, COLUMNS, HEAD, TAIL)
            weight_head, weight_tail = load_row(weight, weight_step, COLUMNS, HEAD, TAIL)
            d_head += head * (weight_head * row_head)[None, :]
            d_tail += tail * (weight_tail * row_tail)[None, :]
        if D_SHIFT_GIVEN:
            row_head, row_tail = load_row(d_shift + image * d_shift_batch, 1, COLUMNS, HEAD, TAIL)
            d_head += row_head[None, :]
            d_tail += row_tail[None, :]
        head *= factor_head[None, :]
        tail *= factor_tail[None, :]
        if SHIFT:
            shift_head, shift_tail = load_row(shift + image * shift_batch, 1, COLUMNS, HEAD, TAIL)
            head += shift_head[None, :]
            tail += shift_tail[None, :]
        store_rows(out + dense, token, tokens, head, tail, COLUMNS, HEAD, TAIL, EMULATE)
        store_rows(d_out + dense, token, tokens, d_head, d_tail, COLUMNS, HEAD, TAIL, EMULATE)
