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
def numbers_of_columns(first, G: tl.constexpr, W: tl.constexpr):
    """The columns of a tile of `load_columns` from column `first` on, [1, G, 1, W]."""
    return first + tl.arange(0, G)[None, :, None, None] * W + tl.arange(0, W)[None, None, None, :]


@triton.jit
def places_of_columns(
    row_stride, first_row, first_column, row_count, COLUMN_COUNT: tl.constexpr,
    A: tl.constexpr, G: tl.constexpr, B: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Offsets of a tile's elements in a matrix with dense rows, as [A, G, B, W], and which lie inside of it.

    Element (a, g, b, w) is that of row a * B + b and column g * W + w.
    """
    rows = first_row + tl.arange(0, A)[:, None, None, None] * B + tl.arange(0, B)[None, None, :, None]
    columns = numbers_of_columns(first_column, G, W)
    return rows.to(tl.int64) * row_stride + columns, (rows < row_count) & (columns < COLUMN_COUNT)


@triton.jit
def load_columns(
    pointer, row_stride, first_row, first_column, row_count, COLUMN_COUNT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile as `places_of_columns` has it, zeros outside of row_count x COLUMN_COUNT.

    Each of four warps gets whole columns, some rows in each lane and the others across lanes: sums over columns stay
    within it, where tiles of two dimensions would have all warps meet in shared memory, in the same bank eight times.
    """
    G: tl.constexpr = 4 if COLUMNS >= 32 else 1
    W: tl.constexpr = COLUMNS // G
    # Sixteen bytes of a row to a lane.
    LANES: tl.constexpr = min(ROWS, 32 // max(W * pointer.dtype.element_ty.primitive_bitwidth // 128, 1))
    A: tl.constexpr = first_of_rows(ROWS, LANES)
    offsets, inside = places_of_columns(
        row_stride, first_row, first_column, row_count, COLUMN_COUNT, A, G, ROWS // A, W
    )
    return tl.load(pointer + offsets, mask=inside, other=0.0)


# Triton gives a warp's lanes to the last axis of such a tile first, and then, from 3.7 on, to the one before the last,
# in earlier versions to the first one. That axis shall have the rows across lanes; the other one is kept in registers,
# and summed over first.
if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7):

    @triton.constexpr_function
    def first_of_rows(rows, lanes):
        return rows // lanes

    @triton.jit
    def sum_of_columns(tile):
        """The sum of each column of a tile of `load_columns`, to be broadcast with it: [1, G, 1, W]."""
        return tl.sum(tl.sum(tile, 0, keep_dims=True), 2, keep_dims=True)

else:

    @triton.constexpr_function
    def first_of_rows(rows, lanes):
        return lanes

    @triton.jit
    def sum_of_columns(tile):
        """The sum of each column of a tile of `load_columns`, to be broadcast with it: [1, G, 1, W]."""
        return tl.sum(tl.sum(tile, 2, keep_dims=True), 0, keep_dims=True)


@triton.jit
def store_columns(
    pointer, row_stride, first_row, first_column, row_count, COLUMN_COUNT: tl.constexpr, tile,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """Round such a tile once and store the part of it that lies inside of row_count x COLUMN_COUNT."""
    offsets, inside = places_of_columns(
        row_stride, first_row, first_column, row_count, COLUMN_COUNT,
        tile.shape[0], tile.shape[1], tile.shape[2], tile.shape[3],
    )  # fmt: skip
    tl.store(pointer + offsets, narrow(tile, pointer.dtype.element_ty, EMULATE), mask=inside)


@triton.jit
def flat(tile):
    """Such a tile as [rows, columns]."""
    return tl.reshape(
        tl.permute(tile, (0, 2, 1, 3)), (tile.shape[0] * tile.shape[2], tile.shape[1] * tile.shape[3])
    )


@triton.jit
def in_columns(tile, like):
    """A tile [rows, columns] as `like` has its own."""
    shape: tl.constexpr = (like.shape[0], like.shape[2], like.shape[1], like.shape[3])
    return tl.permute(tl.reshape(tile, shape), (0, 2, 1, 3))


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
def inverse_norm_of_columns(squares, eps, first, COUNT: tl.constexpr):
    """`inverse_norm` of sums of `sum_of_columns`, zero from column COUNT on; `first` is the tile's first column."""
    columns = numbers_of_columns(first, squares.shape[1], squares.shape[3])
    return tl.where(columns < COUNT, inverse_norm(squares, eps), 0.0)


@triton.jit
def unit_columns(w, eps, first, COUNT: tl.constexpr, NORMALIZE: tl.constexpr):
    """w / max(||w||, eps) of a tile of `load_columns` that holds whole columns, from column `first` to COUNT."""
    w = w.to(tl.float32)
    if NORMALIZE:
        w *= inverse_norm_of_columns(sum_of_columns(w * w), eps, first, COUNT)
    return w


@triton.jit
def unit_columns_grad(w, squares, projection, gradient, eps, ROWS: tl.constexpr, NORMALIZE: tl.constexpr):
    """Gradient of the raw w from that of its normalised columns of ROWS numbers: of one, they are 1 or -1.

    squares: sum of w² over each whole column; projection: sum of w * gradient over it; both to be broadcast with w.
    """
    if NORMALIZE:
        scale = inverse_norm(squares, eps)
        clamped = tl.rsqrt(squares) > scale
        shift = tl.where(clamped, 0.0, projection * scale * scale)
        if ROWS == 1:
            scale = tl.where(clamped, scale, 0.0)
        gradient = scale * (gradient - w.to(tl.float32) * shift)
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
