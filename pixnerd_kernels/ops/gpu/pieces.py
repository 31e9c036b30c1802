"""Device functions that the Triton kernels share: rounding, products, column norms, RMSNorm and activations.

Tiles are float32 unless a name says otherwise. Two constexpr arguments recur:

    NARROW   the dtype of a product's operands, that of the kernel's inputs
    EMULATE  whether bfloat16 is emulated in float32: Triton's interpreter truncates where it should round, and its
             tl.dot takes bfloat16's bits for integers. Set by the launcher under the interpreter, never on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pixnerd_kernels.ops.gpu.launch import interpreting


@triton.jit
def opaque(x):
    """x, of which the compiler knows nothing: what follows from it is neither kept nor counted up by a loop around."""
    return tl.inline_asm_elementwise("", "=r,0", [x], dtype=x.dtype, is_pure=False, pack=1)


if interpreting():  # which has no assembler

    @triton.jit
    def opaque(x):
        return x


@triton.jit
def load_tile(pointer, rows, row_stride, columns, row_count, COLUMNS: tl.constexpr):
    """The tile at these rows and columns of a matrix with dense rows; zeros outside of row_count x COLUMNS."""
    offsets = rows[:, None].to(tl.int64) * row_stride + columns[None, :]
    inside = (rows[:, None] < row_count) & (columns[None, :] < COLUMNS)
    return tl.load(pointer + offsets, mask=inside, other=0.0)


@triton.jit
def store_tile(
    pointer, rows, row_stride, columns, row_count, COLUMNS: tl.constexpr, tile, EMULATE: tl.constexpr
):
    """Round a tile once and store the part of it that lies inside of row_count x COLUMNS."""
    offsets = rows[:, None].to(tl.int64) * row_stride + columns[None, :]
    inside = (rows[:, None] < row_count) & (columns[None, :] < COLUMNS)
    tl.store(pointer + offsets, narrow(tile, pointer.dtype.element_ty, EMULATE), mask=inside)


@triton.jit
def narrow(x, NARROW: tl.constexpr, EMULATE: tl.constexpr):
    """x rounded to NARROW, to the nearest even."""
    if EMULATE and tl.bfloat16 == NARROW:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(NARROW)


@triton.jit
def operand(x, EMULATE: tl.constexpr):
    """A loaded tile as tl.dot takes it."""
    if EMULATE:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def inverse_norm(squares, eps):
    """1 / max(||w||, eps) from the sum of squares, min(1 / ||w||, 1 / eps); NaN stays NaN."""
    inverse, most = tl.rsqrt(squares), tl.full(squares.shape, 1.0, tl.float32) / eps
    return tl.where(inverse > most, most, inverse)


@triton.jit
def unit_columns(w, eps, live, NORMALIZE: tl.constexpr):
    """w / max(||w||, eps) over axis 0 of a tile that holds whole columns; zero where not `live`."""
    w = w.to(tl.float32)
    if NORMALIZE:
        w *= tl.where(live, inverse_norm(tl.sum(w * w, 0), eps), 0.0)[None, :]
    return w


@triton.jit
def unit_columns_grad(w, squares, projection, gradient, eps, NORMALIZE: tl.constexpr):
    """Gradient of the raw w from that of its normalised columns.

    squares: sum of w² over each whole column; projection: sum of w * gradient over it.
    """
    if NORMALIZE:
        scale = inverse_norm(squares, eps)
        shift = tl.where(tl.rsqrt(squares) > scale, 0.0, projection * scale * scale)
        gradient = scale[None, :] * (gradient - w.to(tl.float32) * shift[None, :])
    return gradient


@triton.jit
def rms_norm(x, live, eps, SIZE: tl.constexpr):
    """x * r with r = rsqrt(mean(x²) + eps) of each row, zero where a row is not `live`; and r.

    x [rows, channels] is zero beyond the SIZE channels that count. The norm's weight is left to the matrix that the
    result is multiplied with, whose rows it scales: so its gradient needs no sum over pixels of its own.
    """
    r = tl.where(live, tl.rsqrt(tl.sum(x * x, 1) / SIZE + eps), 0.0)
    return x * r[:, None], r


@triton.jit
def rms_norm_grad(d_unit, unit, r, SCALED: tl.constexpr, SIZE: tl.constexpr):
    """Gradient of x from that of unit = x * r, which where SCALED has been multiplied by r already."""
    mean = tl.sum(d_unit * unit, 1) / SIZE
    d_x = d_unit - unit * mean[:, None]
    return d_x if SCALED else r[:, None] * d_x


@triton.jit
def fast_tanh(x):
    """tanh in one special-function operation, relative error 2^-11 (NVIDIA GPUs from compute capability 7.5)."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def sigmoid(z):
    """sigmoid(z) and sigmoid(-z), neither by a difference that cancels."""
    e = tl.exp(-tl.abs(z))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(z < 0, small, large), tl.where(z < 0, large, small)


@triton.jit
def gelu_argument(z):
    """u of gelu(z) = z (1 + tanh u) / 2 = z sigmoid(2 u), and du/dz."""
    return 0.7978845608028654 * (z + 0.044715 * z * z * z), 0.7978845608028654 * (1.0 + 0.134145 * z * z)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, FAST: tl.constexpr):
    """silu, gelu (tanh form) or relu.

    FAST takes the approximate tanh, one special-function operation for each number where exp and the quotient are
    two: sigmoid(2 u) = (1 + tanh u) / 2. Its error, half of 2^-11 of z at most, is an eighth of bfloat16's rounding
    and half of float16's, which the result is rounded to next; float32 takes the accurate form.
    """
    if ACTIVATION == "relu":
        return tl.where(z < 0, 0.0, z)
    elif FAST:
        half = 0.5 * z
        if ACTIVATION == "silu":
            u = half
        else:
            u, _ = gelu_argument(z)
        return half * fast_tanh(u) + half
    elif ACTIVATION == "silu":
        return z / (1.0 + tl.exp(-z))
    else:
        u, _ = gelu_argument(z)
        return z / (1.0 + tl.exp(-2.0 * u))


@triton.jit
def activate_with_slope(z, ACTIVATION: tl.constexpr, FAST: tl.constexpr):
    """The activation and its derivative."""
    if ACTIVATION == "relu":
        return tl.where(z < 0, 0.0, z), tl.where(z > 0, 1.0, tl.where(z <= 0, 0.0, z))
    elif FAST:
        # Beyond 16 both are saturated, but for the error of tanh, which a large z or du must not multiply.
        least = tl.clamp(z, -16.0, 16.0)
        if ACTIVATION == "silu":
            u = 0.5 * z
            twice_du = 1.0
        else:
            u, du = gelu_argument(least)
            twice_du = 2.0 * du
        tanh = fast_tanh(u)
        s = 0.5 + 0.5 * tanh
        return z * s, s + least * (s * (0.5 - 0.5 * tanh) * twice_du)
    else:
        if ACTIVATION == "silu":
            u = 0.5 * z
            twice_du = 1.0
        else:
            u, du = gelu_argument(z)
            twice_du = 2.0 * du
        s, complement = sigmoid(2.0 * u)
        return z * s, s + z * s * complement * twice_du
