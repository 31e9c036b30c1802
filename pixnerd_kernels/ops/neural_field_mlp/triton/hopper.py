"""The backward of the plain neural-field block of 64 channels and 128 hidden units on sm_90, in Gluon.

The block is n = x * r with r = rsqrt(mean(x²) + eps), z = n @ v1, y = x + silu(z) @ v2. v1 is w1 with columns of length
1, times the norm's weight, v2 is w2 with columns of length 1. With u = z / 2 = n @ (v1 / 2) and t = tanh(u),

    silu(z) = u * (1 + t),    e = dL/du = dh * (1 + t + u * (1 - t²)).

Gluon is Triton with layouts, copies and waits in the programmer's hands. A program per processor takes patch after
patch: 8 warps, four for each half of the hidden units, walk the pixels in tiles of 128, while later tiles and the next
patch's weights are on their way to shared memory. Hidden values are held as [hidden, pixels], so that they enter the
products for the weights from registers. In float16 e is infinite where dL/dz exceeds half of the largest number.

What takes it is in `policy.on_hopper` and `_run_on_hopper`; everything else takes `neural_field_mlp_backward`, as does
Triton's interpreter, which does not know Gluon.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

#: Triton 3.6 has it by another name.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier

CHANNELS = gl.constexpr(64)
HIDDEN = gl.constexpr(128)
TILE = gl.constexpr(128)
HALF = gl.constexpr(64)

#: Products [128, 64]: four warps have 64 rows.
PRODUCT = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, 64, 16])
)
#: The same numbers of the same thread as a product's first operand.
OPERAND = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=PRODUCT.value, k_width=2))
OF_ROWS = gl.constexpr(gl.SliceLayout(1, PRODUCT.value))
OF_COLUMNS = gl.constexpr(gl.SliceLayout(0, PRODUCT.value))
#: `PRODUCT` with columns exchanged among the four threads of a row, so that each has 16 bytes in a row.
CHUNKS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 32], [8, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], [64, 0]],
        block_bases=[],
        shape=[128, 64],
    )
)
#: 16 bytes a thread and whole rows a warp: of [rows, 64] and of [rows, 128].
ROWS64 = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
ROWS128 = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0]))
#: Whole columns a warp: a sum over rows needs no other warp.
COLUMNS = gl.constexpr(gl.BlockedLayout([1, 2], [8, 4], [1, 8], [1, 0]))
#: Every fourth row of one column a thread.
SUMS = gl.constexpr(gl.BlockedLayout([1, 1], [4, 8], [1, 8], [1, 0]))

#: In shared memory, as the tensor cores want it.
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
#: Without bank conflicts from `PRODUCT` and to `SUMS`.
SUMS_SWIZZLED = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, order=[1, 0]))
LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[0]))


@gluon.jit
def tanh(x):
    """The hardware's approximation, which is exactly 1 from 8 on."""
    return gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def store_scales(squares, eps, scales, UNIT: gl.constexpr):
    """Of columns of a weight, from their sums of squares: 1 / max(||w||, eps), which is returned, to scales[0]; and to
    scales[1] its square, or 0 where it is 1 / eps and has no gradient. NaN stays NaN."""
    inverse = gl.rsqrt(squares)
    most = 1.0 / eps
    again = gl.where(inverse > most, 0.0, inverse * inverse)
    inverse = gl.where(inverse > most, most, inverse)
    if not UNIT:
        inverse = gl.full_like(inverse, 1.0)
        again = gl.full_like(again, 0.0)
    scales.index(0).store(inverse)
    scales.index(1).store(again)
    return inverse


@gluon.jit
def pointers(base, HEIGHT: gl.constexpr, WIDTH: gl.constexpr, row: gl.constexpr, LAYOUT: gl.constexpr):
    """To the elements of a matrix whose rows are `row` apart."""
    rows = gl.arange(0, HEIGHT, layout=gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    return base + rows[:, None] * row + columns[None, :]


@gluon.jit
def inside(start, pixels, LAYOUT: gl.constexpr):
    """Which numbers of the tile that begins with pixel `start` belong to a pixel."""
    rows = gl.arange(0, TILE, layout=gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, LAYOUT))
    return (start + rows[:, None] < pixels) & (columns[None, :] < CHANNELS)


@gluon.jit
def copy_weights(w1, w2, w1_row: gl.constexpr, w2_row: gl.constexpr, raw1, raw2):
    """Start to copy a patch's weights to shared memory."""
    async_copy.async_copy_global_to_shared(raw1, pointers(w1, CHANNELS, HIDDEN, w1_row, ROWS128))
    async_copy.async_copy_global_to_shared(raw2, pointers(w2, HIDDEN, CHANNELS, w2_row, ROWS64))


@gluon.jit
def copy_pixels(source, row: gl.constexpr, start, pixels, target, FULL: gl.constexpr):
    """Start to copy a tile to shared memory; zeros beyond the last pixel."""
    tile = pointers(source + start.to(gl.int64) * row, TILE, CHANNELS, row, ROWS64)
    if FULL:
        async_copy.async_copy_global_to_shared(target, tile)
    else:
        async_copy.async_copy_global_to_shared(target, tile, mask=inside(start, pixels, ROWS64))


@gluon.jit
def copy_tile(
    k, tiles, patch, step, patches, x, grad, x_patch, grad_patch, x_row: gl.constexpr, grad_row: gl.constexpr, pixels,
    x_tile, g_tile, FULL: gl.constexpr,
):  # fmt: skip
    """Start to copy tile k of a patch, k <= tiles + 1; from `tiles` on they are the following patches'."""
    ahead = gl.where(k < tiles, 0, gl.where(tiles == 1, k, 1))
    start = (k - ahead * tiles) * TILE
    patch = patch + ahead * step
    if patch < patches:
        copy_pixels(x + patch * x_patch, x_row, start, pixels, x_tile, FULL)
        copy_pixels(grad + patch * grad_patch, grad_row, start, pixels, g_tile, FULL)


@gluon.jit
def normalize(tile, divisors, start, pixels, norm_eps, FULL: gl.constexpr):
    """x to n in shared memory, and r of each pixel, zero beyond the last."""
    x = tile.load(ROWS64).to(gl.float32)
    r = gl.rsqrt(gl.sum(x * x, 1) / CHANNELS + norm_eps)
    if not FULL:
        rows = start + gl.arange(0, TILE, layout=gl.SliceLayout(1, ROWS64))
        r = gl.where(rows < pixels, r, 0.0)
    tile.store((x * r[:, None]).to(tile.dtype))
    divisors.store(r)


@gluon.jit
def scale_weights(
    raw1, raw2, norm, weight_eps, v1, v2, scales1, scales2, UNIT1: gl.constexpr, UNIT2: gl.constexpr
):
    """v1 / 2 and v2 from the raw weights, shared memory to shared memory; and the scales of their columns."""
    w1 = raw1.permute([1, 0]).load(PRODUCT).to(gl.float32)
    scale = store_scales(gl.sum(w1 * w1, 1), weight_eps, scales1, UNIT1)
    weight = norm.load(OF_COLUMNS) * 0.5
    v1.permute([1, 0]).store((w1 * scale[:, None] * weight[None, :]).to(v1.dtype))
    w2 = raw2.load(COLUMNS).to(gl.float32)
    scale = store_scales(gl.sum(w2 * w2, 0), weight_eps, scales2, UNIT2)
    v2.store((w2 * scale[None, :]).to(v2.dtype))


@gluon.jit
def hidden_products(n, g, v1, v2):
    """u and dh of 64 pixels [hidden, pixels], on their way."""
    zero = gl.zeros([HIDDEN, HALF], gl.float32, layout=PRODUCT)
    u = warpgroup_mma(v1.permute([1, 0]), n.permute([1, 0]), zero, use_acc=False, is_async=True)
    dh = warpgroup_mma(v2, g.permute([1, 0]), zero, use_acc=False, is_async=True)
    return u, dh


@gluon.jit
def hidden_gradient(u, dh, NARROW: gl.constexpr):
    """silu(2 u), and e."""
    t = tanh(u)
    once = t + 1.0
    slope = once + u * (1.0 - t * t)
    return (u * once).to(NARROW), (dh * slope).to(NARROW)


@gluon.jit
def backward_tile(
    start, following, here, sum1, sum2, dx, pixels, norm_eps, xs, gs, rs, v1, v2, es,
    RESIDUAL: gl.constexpr, FULL: gl.constexpr,
):  # fmt: skip
    """dx of the tile that begins with pixel `start`, and the sums with it added: eᵀ n of v1 / 2 and hᵀ dy of v2, both
    [hidden, channels].

    Its n, dy and r are in shared memory at `here`. The tile at the other place, which has been copied and begins with
    pixel `following`, becomes n. In the end nobody reads this tile any longer, and products may read the next.
    """
    NARROW: gl.constexpr = v1.dtype
    n, g = xs.index(here), gs.index(here)
    n0, n1 = n.slice(0, HALF), n.slice(HALF, HALF)
    g0, g1 = g.slice(0, HALF), g.slice(HALF, HALF)
    u, dh = hidden_products(n0, g0, v1, v2)
    u, dh = warpgroup_mma_wait(0, deps=[u, dh])
    h0, e0 = hidden_gradient(u, dh, NARROW)
    u, dh = hidden_products(n1, g1, v1, v2)
    h = gl.convert_layout(h0, OPERAND)
    e = gl.convert_layout(e0, OPERAND)
    sum2 = warpgroup_mma(h, g0, sum2, is_async=True)
    sum1 = warpgroup_mma(e, n0, sum1, is_async=True)
    u, dh, sum1, sum2, h, e = warpgroup_mma_wait(0, deps=[u, dh, sum1, sum2, h, e])
    h1, e1 = hidden_gradient(u, dh, NARROW)
    es.store(gl.reshape(gl.permute(gl.join(e0, e1), (0, 2, 1)), [HIDDEN, TILE]))
    h = gl.convert_layout(h1, OPERAND)
    e = gl.convert_layout(e1, OPERAND)
    fence_async_shared()
    barrier()
    zero = gl.zeros([TILE, CHANNELS], gl.float32, layout=PRODUCT)
    d = warpgroup_mma(es.permute([1, 0]), v1.permute([1, 0]), zero, use_acc=False, is_async=True)
    sum2 = warpgroup_mma(h, g1, sum2, is_async=True)
    sum1 = warpgroup_mma(e, n1, sum1, is_async=True)
    unit = n.load(PRODUCT)
    # Every thread normalizes what others have copied.
    async_copy.wait_group(0)
    barrier()
    normalize(xs.index(1 - here), rs.index(1 - here), following, pixels, norm_eps, FULL)
    fence_async_shared()
    d = warpgroup_mma_wait(2, deps=[d])
    unit = unit.to(gl.float32)
    d -= unit * (gl.sum(d * unit, 1) * (1.0 / CHANNELS))[:, None]
    d *= rs.index(here).load(OF_ROWS)[:, None]
    if RESIDUAL:
        d += g.load(PRODUCT).to(gl.float32)
    out = gl.convert_layout(d.to(NARROW), CHUNKS)
    tile = pointers(dx + start.to(gl.int64) * CHANNELS, TILE, CHANNELS, CHANNELS, CHUNKS)
    if FULL:
        gl.store(tile, out)
    else:
        gl.store(tile, out, mask=inside(start, pixels, CHUNKS))
    sum1, sum2 = warpgroup_mma_wait(0, deps=[sum1, sum2])
    barrier()
    return sum1, sum2


@gluon.jit
def add_rows(product):
    """[128, 64] to [64, 64]: the two rows of a thread are added."""
    return gl.reshape(gl.sum(gl.reshape(product, [8, 2, 8, 64]), 1), [64, 64])


@gluon.jit
def store_weights(
    d1, d2, d_norm, d1_row: gl.constexpr, d2_row: gl.constexpr, norm, raw1, raw2, scales1, scales2, spare, sums,
    sum1, sum2,
):  # fmt: skip
    """Gradients of the raw weights and the patch's of the norm's, from the sums over its pixels. `spare` [channels,
    hidden] and `sums` [2, 64, 64] are shared memory that nobody reads any longer."""
    NARROW: gl.constexpr = spare.dtype
    w1 = raw1.permute([1, 0]).load(PRODUCT).to(gl.float32)
    # With n's and the column's factors in place of v1 / 2's.
    sum1 *= (0.5 * scales1.index(0).load(OF_ROWS))[:, None]
    product1 = w1 * sum1
    sum1 *= norm.load(OF_COLUMNS)[None, :]
    shift1 = gl.sum(w1 * sum1, 1) * scales1.index(1).load(OF_ROWS)
    spare.permute([1, 0]).store((sum1 - w1 * shift1[:, None]).to(NARROW))
    w2 = raw2.load(PRODUCT).to(gl.float32)
    sums.index(0).store(add_rows(product1))
    sums.index(1).store(add_rows(w2 * sum2))
    barrier()
    channels = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, SUMS))
    gl.store(d_norm + channels, gl.sum(sums.index(0).load(SUMS), 0))
    along2 = gl.convert_layout(gl.sum(sums.index(1).load(SUMS), 0), OF_COLUMNS)
    scale2 = scales2.index(0).load(OF_COLUMNS)
    shift2 = along2 * scales2.index(1).load(OF_COLUMNS) * scale2
    out = gl.convert_layout((sum2 * scale2[None, :] - w2 * shift2[None, :]).to(NARROW), CHUNKS)
    gl.store(pointers(d2, HIDDEN, CHANNELS, d2_row, CHUNKS), out)
    gl.store(pointers(d1, CHANNELS, HIDDEN, d1_row, ROWS128), spare.load(ROWS128))


@gluon.jit(do_not_specialize=["patches", "pixels"])
def neural_field_mlp_backward_hopper(
    grad, x, w1, w2, norm_weight, dx, d1, d2, d_norm, patches, pixels,
    grad_patch, x_patch, w1_patch, w2_patch, d1_patch, d2_patch, norm_step, norm_eps, weight_eps,
    grad_row: gl.constexpr, x_row: gl.constexpr, w1_row: gl.constexpr, w2_row: gl.constexpr,
    d1_row: gl.constexpr, d2_row: gl.constexpr,
    UNIT1: gl.constexpr, UNIT2: gl.constexpr, RESIDUAL: gl.constexpr, FULL: gl.constexpr,
):  # fmt: skip
    """Every gradient of patch program_id(0) and of every num_programs(0)-th patch after it.

    dx [patches, pixels, 64] and d_norm [patches, 64], in float32, are dense; dx may be grad, d1 and d2 may be w1 and
    w2. FULL: pixels are a multiple of 128.

    All tiles of the program's patches are one sequence, of which tile k has place k % 2. When a tile is done, copies
    begin of the second after it, to the same place, and behind a patch's first tile of the next patch's weights.
    `backward_tile` waits for all copies when it needs the next tile.
    """
    NARROW: gl.constexpr = x.dtype.element_ty
    raw1 = gl.allocate_shared_memory(NARROW, [2, CHANNELS, HIDDEN], SWIZZLED)
    raw2 = gl.allocate_shared_memory(NARROW, [2, HIDDEN, CHANNELS], SWIZZLED)
    v1 = gl.allocate_shared_memory(NARROW, [CHANNELS, HIDDEN], SWIZZLED)
    v2 = gl.allocate_shared_memory(NARROW, [HIDDEN, CHANNELS], SWIZZLED)
    xs = gl.allocate_shared_memory(NARROW, [2, TILE, CHANNELS], SWIZZLED)
    gs = gl.allocate_shared_memory(NARROW, [2, TILE, CHANNELS], SWIZZLED)
    es = gl.allocate_shared_memory(NARROW, [HIDDEN, TILE], SWIZZLED)
    rs = gl.allocate_shared_memory(gl.float32, [2, TILE], LINE)
    scales1 = gl.allocate_shared_memory(gl.float32, [2, HIDDEN], LINE)
    scales2 = gl.allocate_shared_memory(gl.float32, [2, CHANNELS], LINE)
    norm = gl.allocate_shared_memory(gl.float32, [CHANNELS], LINE)
    sums = es._reinterpret(gl.float32, [2, 64, 64], SUMS_SWIZZLED)

    channels = gl.arange(0, CHANNELS, layout=gl.SliceLayout(1, COLUMNS))
    norm.store(gl.load(norm_weight + channels * norm_step).to(gl.float32))
    tiles = gl.cdiv(pixels, TILE)
    step = gl.num_programs(0)
    patch = gl.program_id(0).to(gl.int64)
    here = gl.to_tensor(0)
    place = gl.to_tensor(0)
    copy_weights(w1 + patch * w1_patch, w2 + patch * w2_patch, w1_row, w2_row, raw1.index(0), raw2.index(0))
    for k in gl.static_range(2):
        copy_tile(
            gl.to_tensor(k), tiles, patch, step, patches, x, grad, x_patch, grad_patch, x_row, grad_row, pixels,
            xs.index(k), gs.index(k), FULL,
        )  # fmt: skip
        async_copy.commit_group()
    async_copy.wait_group(1)
    barrier()
    normalize(xs.index(0), rs.index(0), gl.to_tensor(0), pixels, norm_eps, FULL)
    while patch < patches:
        if tiles == 1:
            # Else the wait for a later tile has been one for the weights.
            async_copy.wait_group(0)
        barrier()
        scale_weights(
            raw1.index(place), raw2.index(place), norm, weight_eps, v1, v2, scales1, scales2, UNIT1, UNIT2
        )
        fence_async_shared()
        barrier()
        sum1 = gl.zeros([HIDDEN, CHANNELS], gl.float32, layout=PRODUCT)
        sum2 = gl.zeros([HIDDEN, CHANNELS], gl.float32, layout=PRODUCT)
        following = patch + step
        for i in range(tiles):
            sum1, sum2 = backward_tile(
                i * TILE, gl.where(i + 1 < tiles, i + 1, 0) * TILE, here, sum1, sum2, dx + patch * pixels * CHANNELS,
                pixels, norm_eps, xs, gs, rs, v1, v2, es, RESIDUAL, FULL,
            )  # fmt: skip
            copy_tile(
                i + 2, tiles, patch, step, patches, x, grad, x_patch, grad_patch, x_row, grad_row, pixels,
                xs.index(here), gs.index(here), FULL,
            )  # fmt: skip
            if (i == 0) & (following < patches):
                copy_weights(
                    w1 + following * w1_patch, w2 + following * w2_patch, w1_row, w2_row,
                    raw1.index(1 - place), raw2.index(1 - place),
                )  # fmt: skip
            async_copy.commit_group()
            here = 1 - here
        store_weights(
            d1 + patch * d1_patch, d2 + patch * d2_patch, d_norm + patch * CHANNELS, d1_row, d2_row, norm,
            raw1.index(place), raw2.index(place), scales1, scales2, v1, sums, sum1, sum2,
        )  # fmt: skip
        patch = following
        place = 1 - place
