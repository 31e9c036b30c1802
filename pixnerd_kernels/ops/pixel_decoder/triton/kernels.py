"""The Triton kernels of the pixel decoder, made of the neural-field block's.

A program owns every num_programs-th patch. What a patch's blocks hand to each other waits in the program's own
scratch, small enough for the cache; the image is read and written in place.

Forward: a block's weights are read and scaled once. The embedding belongs to the first block's loop over tiles of
pixels, the output layer to the last one's.

Backward: the forward runs again, block by block, and keeps what came before each block; the way back reads it and
leaves its own gradients in the places that fall free. A block's weights are read once on the way there, and on the way
back as `neural_field_mlp`'s backward does; every gradient is stored once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pixnerd_kernels.ops.gpu.pieces import (
    load_tile,
    narrow,
    opaque,
    rms_norm,
    rms_norm_grad,
    store_tile,
)
from pixnerd_kernels.ops.neural_field_mlp.triton.kernels import backward_patch, forward_tile
from pixnerd_kernels.ops.neural_field_mlp.triton.parts import load_norm, load_weights


@triton.jit
def embed_pixels(
    image, image_plane, image_row, image_column, pixel_weight, table, rows, channels,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, INPUTS: tl.constexpr, CHANNELS: tl.constexpr,
    NARROW: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """pixel @ pixel_weight + table for a tile of a patch's pixels [T, C], rounded; zeros beyond them and CHANNELS.

    image points to the patch's first pixel; pixel_weight [INPUTS, CHANNELS] and table [pixels, CHANNELS] in float32.
    """
    live = rows < HEIGHT * WIDTH
    inside = live[:, None] & (channels[None, :] < CHANNELS)
    x = tl.load(table + rows[:, None] * CHANNELS + channels[None, :], mask=inside, other=0.0)
    at = image + (rows // WIDTH).to(tl.int64) * image_row + (rows % WIDTH) * image_column
    # Pointers move on: a product of 32-bit numbers would overflow in a large image.
    for _ in range(INPUTS):
        pixel = tl.load(at, mask=live, other=0.0).to(tl.float32)
        row = tl.load(pixel_weight + channels, mask=channels < CHANNELS, other=0.0)
        x += pixel[:, None] * row[None, :]
        at += image_plane
        pixel_weight += CHANNELS
    return narrow(x, NARROW, EMULATE)


@triton.jit
def write_pixels(
    x, out, out_plane, out_row, final_norm, linear_weight, linear_bias, rows, channels, norm_eps,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
    FINAL_NORM: tl.constexpr, LINEAR: tl.constexpr, BIAS: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """The output layer on x [T, C] in float32: a tile's pixels, or their CHANNELS features without LINEAR.

    out points to the patch's first pixel of the first plane.
    """
    live = rows < HEIGHT * WIDTH
    if FINAL_NORM:
        x, _ = rms_norm(x, live, norm_eps, CHANNELS)
        x *= load_norm(final_norm, 1, channels, True, CHANNELS)[None, :]
    at = out + (rows // WIDTH).to(tl.int64) * out_row + rows % WIDTH
    if LINEAR:
        for c in tl.static_range(OUTPUTS):
            row = tl.load(linear_weight + c * CHANNELS + channels, mask=channels < CHANNELS, other=0.0)
            value = tl.sum(x * row[None, :], 1)
            if BIAS:
                value += tl.load(linear_bias + c)
            tl.store(at, narrow(value, out.dtype.element_ty, EMULATE), mask=live)
            at += out_plane
    else:
        inside = live[:, None] & (channels[None, :] < CHANNELS)
        # As many addresses as numbers: they are not kept from tile to tile either.
        places = at[:, None] + channels[None, :].to(tl.int64) * opaque(out_plane)
        tl.store(places, narrow(x, out.dtype.element_ty, EMULATE), mask=inside)


@triton.jit
def block_of_patch(
    source, target, image, image_plane, image_row, image_column, pixel_weight, table, w1, w2, w_gate, weight,
    out, out_plane, out_row, final_norm, linear_weight, linear_bias, last, channels, norm_eps, weight_eps,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
    GATED: tl.constexpr, UNIT1: tl.constexpr, UNIT2: tl.constexpr, UNIT_GATE: tl.constexpr,
    FINAL_NORM: tl.constexpr, LINEAR: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr, AHEAD: tl.constexpr,
    LATE: tl.constexpr, EMBED: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """One block of one patch, from source to target [pixels, CHANNELS].

    EMBED: its tiles come from the image instead; without WRITE they are left in source, too. WRITE: what leaves the
    `last` block goes through the output layer to out instead.
    """
    pixels: tl.constexpr = HEIGHT * WIDTH
    NARROW: tl.constexpr = source.dtype.element_ty
    whole = ()
    if AHEAD and not EMBED:
        following = load_tile(source, tl.arange(0, TILE), CHANNELS, channels, pixels, CHANNELS)
    if PIECE * PIECES >= HIDDEN:
        whole = load_weights(
            w1, w2, w_gate, HIDDEN, CHANNELS, HIDDEN, weight, weight_eps, 0,
            True, GATED, UNIT1, UNIT_GATE, CHANNELS, HIDDEN, BLOCK_C, PIECE, PIECES, EMULATE,
        )  # fmt: skip
    for start in range(0, pixels, TILE):
        rows = start + tl.arange(0, TILE)
        # Addresses of the image and the table that were kept from tile to tile would take too many registers.
        fresh = opaque(start) + tl.arange(0, TILE)
        if EMBED:
            tile = embed_pixels(
                image, image_plane, image_row, image_column, pixel_weight, table, fresh, channels,
                HEIGHT, WIDTH, INPUTS, CHANNELS, NARROW, EMULATE,
            )  # fmt: skip
            if not WRITE:
                store_tile(source, rows, CHANNELS, channels, pixels, CHANNELS, tile, EMULATE)
        elif AHEAD:
            tile = following
            following = load_tile(source, rows + TILE, CHANNELS, channels, pixels, CHANNELS)
        else:
            tile = load_tile(source, rows, CHANNELS, channels, pixels, CHANNELS)
        x = forward_tile(
            tile, rows < pixels, w1, w2, w_gate, whole, weight, norm_eps, weight_eps,
            HIDDEN, CHANNELS, HIDDEN, CHANNELS, HIDDEN, TILE, BLOCK_C, PIECE, PIECES, GATED, True,
            UNIT1, UNIT2, UNIT_GATE, ACTIVATION, True, FAST, PRECISION, EMULATE, LATE,
        )  # fmt: skip
        if WRITE and last:
            # Rounded as between blocks, which is what the backward goes back from.
            write_pixels(
                narrow(x, NARROW, EMULATE).to(tl.float32), out, out_plane, out_row,
                final_norm, linear_weight, linear_bias, fresh, channels, norm_eps,
                HEIGHT, WIDTH, OUTPUTS, CHANNELS, FINAL_NORM, LINEAR, BIAS, EMULATE,
            )  # fmt: skip
        else:
            store_tile(target, rows, CHANNELS, channels, pixels, CHANNELS, x, EMULATE)


# Where a chunk begins and how an image is cut are no reason to compile again.
@triton.jit(do_not_specialize=["first", "patches", "rows_of_patches", "columns_of_patches"])
def pixel_decoder_forward(
    image, generated, norms, final_norm, pixel_weight, table, linear_weight, linear_bias, out, scratch,
    first, patches, image_batch, image_plane, image_row, image_column, generated_block, generated_patch,
    rows_of_patches, columns_of_patches, norm_eps, weight_eps,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCKS: tl.constexpr,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
    GATED: tl.constexpr, UNIT1: tl.constexpr, UNIT2: tl.constexpr, UNIT_GATE: tl.constexpr,
    FINAL_NORM: tl.constexpr, LINEAR: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr, AHEAD: tl.constexpr,
    LATE: tl.constexpr,
):  # fmt: skip
    """Patches first + program_id(0), first + program_id(0) + num_programs(0), ... of out [B, OUTPUTS, H, W], dense.

    The first block's tiles come from the image, the last block's go to out. Between two blocks they wait in one of the
    two places [pixels, CHANNELS] of a program's scratch, which take turns.
    """
    PLACE: tl.constexpr = HEIGHT * WIDTH * CHANNELS
    FIRST: tl.constexpr = CHANNELS * HIDDEN if GATED else 0
    SECOND: tl.constexpr = FIRST + CHANNELS * HIDDEN
    channels = tl.arange(0, BLOCK_C)
    patch = tl.program_id(0)
    scratch += patch.to(tl.int64) * (2 * PLACE)
    image_width = columns_of_patches * WIDTH
    plane = rows_of_patches * HEIGHT * image_width
    while patch < patches:
        batch = (first + patch) // (rows_of_patches * columns_of_patches)
        top = ((first + patch) // columns_of_patches % rows_of_patches) * HEIGHT
        left = ((first + patch) % columns_of_patches) * WIDTH
        own_image = image + batch.to(tl.int64) * image_batch + top.to(tl.int64) * image_row
        own_image += left.to(tl.int64) * image_column
        own_out = out + (batch * OUTPUTS).to(tl.int64) * plane + top.to(tl.int64) * image_width + left
        # Pointers move on from block to block: a product of 32-bit numbers would overflow.
        own = generated + patch.to(tl.int64) * generated_patch
        block_of_patch(
            scratch, scratch + PLACE, own_image, image_plane, image_row, image_column, pixel_weight, table,
            own + FIRST, own + SECOND, own, load_norm(norms, 1, channels, True, CHANNELS),
            own_out, plane, image_width, final_norm, linear_weight, linear_bias, BLOCKS == 1, channels,
            norm_eps, weight_eps, HEIGHT, WIDTH, INPUTS, OUTPUTS, CHANNELS, HIDDEN, TILE, BLOCK_C, PIECE, PIECES,
            GATED, UNIT1, UNIT2, UNIT_GATE, FINAL_NORM, LINEAR, BIAS, ACTIVATION, FAST, PRECISION, EMULATE,
            AHEAD, LATE, True, True,
        )  # fmt: skip
        for block in range(1, BLOCKS):
            own += generated_block
            # What one thread stored to scratch another may load.
            tl.debug_barrier()
            block_of_patch(
                scratch + (block % 2) * PLACE, scratch + (1 - block % 2) * PLACE,
                own_image, image_plane, image_row, image_column, pixel_weight, table,
                own + FIRST, own + SECOND, own, load_norm(norms + block * CHANNELS, 1, channels, True, CHANNELS),
                own_out, plane, image_width, final_norm, linear_weight, linear_bias, block == BLOCKS - 1, channels,
                norm_eps, weight_eps, HEIGHT, WIDTH, INPUTS, OUTPUTS, CHANNELS, HIDDEN, TILE, BLOCK_C, PIECE, PIECES,
                GATED, UNIT1, UNIT2, UNIT_GATE, FINAL_NORM, LINEAR, BIAS, ACTIVATION, FAST, PRECISION, EMULATE,
                AHEAD, LATE, False, True,
            )  # fmt: skip
        tl.debug_barrier()
        patch += tl.num_programs(0)


@triton.jit
def output_patch_grad(
    last, grad, grad_plane, grad_row, grad_column, final_norm, linear_weight, partial, channels, norm_eps,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr, FINAL_NORM: tl.constexpr, LINEAR: tl.constexpr,
    NEED_SHARED: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Back through the output layer, from grad, at the patch's first pixel.

    last [pixels, CHANNELS] is what left the last block; its gradient takes its place. The patch's part of the gradients of final_norm, linear_weight
    and linear_bias goes to partial, one after the other.
    """
    pixels: tl.constexpr = HEIGHT * WIDTH
    weight = load_norm(final_norm, 1, channels, FINAL_NORM, CHANNELS)
    # Added up over tiles first, over a tile's pixels once in the end.
    sum_norm = tl.zeros([TILE, BLOCK_C], tl.float32)
    sum_weight = ()
    sum_bias = ()
    if LINEAR:
        for _ in tl.static_range(OUTPUTS):
            sum_weight = sum_weight + (tl.zeros([TILE, BLOCK_C], tl.float32),)
            sum_bias = sum_bias + (tl.zeros([TILE], tl.float32),)
    for start in range(0, pixels, TILE):
        rows = start + tl.arange(0, TILE)
        live = rows < pixels
        at = grad + (rows // WIDTH).to(tl.int64) * grad_row + (rows % WIDTH) * grad_column
        unit = load_tile(last, rows, CHANNELS, channels, pixels, CHANNELS).to(tl.float32)
        # All are on their way before the first is waited for.
        gradients = ()
        if LINEAR:
            for _ in tl.static_range(OUTPUTS):
                gradients = gradients + (tl.load(at, mask=live, other=0.0).to(tl.float32),)
                at += grad_plane
        if FINAL_NORM:
            unit, r = rms_norm(unit, live, norm_eps, CHANNELS)
        if LINEAR:
            d_unit = tl.zeros([TILE, BLOCK_C], tl.float32)
            next_weight = ()
            next_bias = ()
            for c in tl.static_range(OUTPUTS):
                g = gradients[c]
                row = tl.load(linear_weight + c * CHANNELS + channels, mask=channels < CHANNELS, other=0.0)
                d_unit += g[:, None] * row[None, :]
                next_weight = next_weight + (sum_weight[c] + g[:, None] * unit,)
                next_bias = next_bias + (sum_bias[c] + g,)
            sum_weight = next_weight
            sum_bias = next_bias
        else:
            inside = live[:, None] & (channels[None, :] < CHANNELS)
            planes = channels[None, :].to(tl.int64) * grad_plane
            d_unit = tl.load(at[:, None] + planes, mask=inside, other=0.0).to(tl.float32)
        if FINAL_NORM:
            sum_norm += d_unit * unit
            d_unit = rms_norm_grad(d_unit * weight[None, :], unit, r, False, CHANNELS)
        store_tile(last, rows, CHANNELS, channels, pixels, CHANNELS, d_unit, EMULATE)
    if NEED_SHARED:
        live_channels = channels < CHANNELS
        tl.store(partial + channels, tl.sum(sum_norm, 0), mask=live_channels)
        if LINEAR:
            for c in tl.static_range(OUTPUTS):
                partial += CHANNELS
                tl.store(partial + channels, tl.sum(sum_weight[c], 0) * weight, mask=live_channels)
            partial += CHANNELS
            for c in tl.static_range(OUTPUTS):
                tl.store(partial + c, tl.sum(sum_bias[c], 0))


@triton.jit
def input_patch_grad(
    dx, image, image_plane, image_row, image_column, pixel_weight, d_image, d_image_plane, d_image_row,
    table_sum, partial, channels,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, INPUTS: tl.constexpr, CHANNELS: tl.constexpr,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr, NEED_IMAGE: tl.constexpr, NEED_SHARED: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """Back through the embedding: from dx [pixels, CHANNELS] to the image, whose pointers are at its first pixel.

    The gradient of the table is added to table_sum [pixels, CHANNELS]; the patch's part of that of pixel_weight goes to
    partial [INPUTS, CHANNELS].
    """
    pixels: tl.constexpr = HEIGHT * WIDTH
    sums = ()
    for _ in tl.static_range(INPUTS):
        sums = sums + (tl.zeros([TILE, BLOCK_C], tl.float32),)
    for start in range(0, pixels, TILE):
        rows = start + tl.arange(0, TILE)
        live = rows < pixels
        inside = live[:, None] & (channels[None, :] < CHANNELS)
        # All are on their way before the first is waited for.
        d_embedded = load_tile(dx, rows, CHANNELS, channels, pixels, CHANNELS).to(tl.float32)
        if NEED_SHARED:
            places = table_sum + rows[:, None] * CHANNELS + channels[None, :]
            total = tl.load(places, mask=inside, other=0.0)
            at = image + (rows // WIDTH).to(tl.int64) * image_row + (rows % WIDTH) * image_column
            values = ()
            for _ in tl.static_range(INPUTS):
                values = values + (tl.load(at, mask=live, other=0.0).to(tl.float32),)
                at += image_plane
            tl.store(places, total + d_embedded, mask=inside)
            next_sums = ()
            for c in tl.static_range(INPUTS):
                next_sums = next_sums + (sums[c] + values[c][:, None] * d_embedded,)
            sums = next_sums
        if NEED_IMAGE:
            to = d_image + (rows // WIDTH).to(tl.int64) * d_image_row + rows % WIDTH
            for c in tl.static_range(INPUTS):
                row = tl.load(pixel_weight + c * CHANNELS + channels, mask=channels < CHANNELS, other=0.0)
                d_pixel = narrow(tl.sum(d_embedded * row[None, :], 1), d_image.dtype.element_ty, EMULATE)
                tl.store(to, d_pixel, mask=live)
                to += d_image_plane
    if NEED_SHARED:
        for c in tl.static_range(INPUTS):
            tl.store(partial + c * CHANNELS + channels, tl.sum(sums[c], 0), mask=channels < CHANNELS)


@triton.jit(do_not_specialize=["first", "patches", "rows_of_patches", "columns_of_patches"])
def pixel_decoder_backward(
    image, generated, grad, norms, final_norm, pixel_weight, table, linear_weight,
    d_image, d_generated, table_sum, partial, scratch, scratch_x, scratch_2,
    first, patches, image_batch, image_plane, image_row, image_column, grad_batch, grad_plane, grad_row, grad_column,
    generated_block, generated_patch, d_generated_block, d_generated_patch,
    rows_of_patches, columns_of_patches, norm_eps, weight_eps,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCKS: tl.constexpr,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
    GATED: tl.constexpr, UNIT1: tl.constexpr, UNIT2: tl.constexpr, UNIT_GATE: tl.constexpr,
    FINAL_NORM: tl.constexpr, LINEAR: tl.constexpr,
    ACTIVATION: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr, AHEAD: tl.constexpr,
    LATE: tl.constexpr, NEED_IMAGE: tl.constexpr, NEED_WEIGHTS: tl.constexpr, NEED_SHARED: tl.constexpr,
    SPAN: tl.constexpr, FORWARD_TILE: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Every gradient of patches first + program_id(0), first + program_id(0) + num_programs(0), ...

    d_image [B, INPUTS, H, W] is dense; d_generated may be `generated` itself. partial [patches, ...] holds each patch's
    part of the gradients of pixel_weight, norms, final_norm, linear_weight and linear_bias in turn, table_sum
    [programs, pixels, CHANNELS] each program's of the table, zero before; both in float32.

    A program's scratch has BLOCKS + 1 places [pixels, CHANNELS]: place k holds what enters block k, the last what leaves
    the last block, and then its gradient, which every block's takes the place of. scratch_x and scratch_2 are
    `backward_patch`'s. The way there takes tiles of FORWARD_TILE pixels: it has no sums to keep; the output layer and
    the embedding go back in tiles of PIXELS.
    """
    pixels: tl.constexpr = HEIGHT * WIDTH
    PLACE: tl.constexpr = HEIGHT * WIDTH * CHANNELS
    FIRST: tl.constexpr = CHANNELS * HIDDEN if GATED else 0
    SECOND: tl.constexpr = FIRST + CHANNELS * HIDDEN
    PADDED: tl.constexpr = (HIDDEN + PIECE * PIECES - 1) // (PIECE * PIECES) * (PIECE * PIECES)
    WIDTH_OF_PARTIAL: tl.constexpr = (INPUTS + BLOCKS + 1) * CHANNELS + (
        OUTPUTS * (CHANNELS + 1) if LINEAR else 0
    )
    channels = tl.arange(0, BLOCK_C)
    patch = tl.program_id(0).to(tl.int64)
    scratch += patch * ((BLOCKS + 1) * PLACE)
    scratch_x += patch * (pixels * BLOCK_C)
    scratch_2 += patch * (PADDED * BLOCK_C)
    table_sum += patch * PLACE
    image_width = columns_of_patches * WIDTH
    image_height = rows_of_patches * HEIGHT
    while patch < patches:
        batch = (first + patch) // (rows_of_patches * columns_of_patches)
        top = ((first + patch) // columns_of_patches % rows_of_patches) * HEIGHT
        left = ((first + patch) % columns_of_patches) * WIDTH
        own_image = image + batch * image_batch + top * image_row + left * image_column
        own_partial = partial + patch * WIDTH_OF_PARTIAL
        own = generated + patch * generated_patch
        d_own = d_generated + patch * d_generated_patch
        block_of_patch(
            scratch, scratch + PLACE, own_image, image_plane, image_row, image_column, pixel_weight, table,
            own + FIRST, own + SECOND, own, load_norm(norms, 1, channels, True, CHANNELS),
            image, 0, 0, final_norm, linear_weight, linear_weight, False, channels,
            norm_eps, weight_eps, HEIGHT, WIDTH, INPUTS, OUTPUTS, CHANNELS, HIDDEN, FORWARD_TILE, BLOCK_C, PIECE, PIECES,
            GATED, UNIT1, UNIT2, UNIT_GATE, FINAL_NORM, LINEAR, False, ACTIVATION, FAST, PRECISION, EMULATE,
            AHEAD, LATE, True, False,
        )  # fmt: skip
        for block in range(1, BLOCKS):
            own += generated_block
            d_own += d_generated_block
            # What one thread stored to scratch another may load.
            tl.debug_barrier()
            block_of_patch(
                scratch + block * PLACE, scratch + (block + 1) * PLACE,
                own_image, image_plane, image_row, image_column, pixel_weight, table,
                own + FIRST, own + SECOND, own, load_norm(norms + block * CHANNELS, 1, channels, True, CHANNELS),
                image, 0, 0, final_norm, linear_weight, linear_weight, False, channels,
                norm_eps, weight_eps, HEIGHT, WIDTH, INPUTS, OUTPUTS, CHANNELS, HIDDEN,
                FORWARD_TILE, BLOCK_C, PIECE, PIECES, GATED, UNIT1, UNIT2, UNIT_GATE, FINAL_NORM, LINEAR, False,
                ACTIVATION, FAST, PRECISION, EMULATE, AHEAD, LATE, False, False,
            )  # fmt: skip
        tl.debug_barrier()
        output_patch_grad(
            scratch + BLOCKS * PLACE, grad + batch * grad_batch + top * grad_row + left * grad_column,
            grad_plane, grad_row, grad_column, final_norm, linear_weight,
            own_partial + (INPUTS + BLOCKS) * CHANNELS, channels, norm_eps,
            HEIGHT, WIDTH, OUTPUTS, CHANNELS, PIXELS, BLOCK_C, FINAL_NORM, LINEAR, NEED_SHARED, EMULATE,
        )  # fmt: skip
        for step in range(BLOCKS):
            tl.debug_barrier()
            block = BLOCKS - 1 - step
            backward_patch(
                scratch + BLOCKS * PLACE, scratch + block * PLACE, own + FIRST, own + SECOND, own,
                scratch + BLOCKS * PLACE, d_own + FIRST, d_own + SECOND, d_own,
                own_partial + (INPUTS + block) * CHANNELS, scratch_x, scratch_2,
                load_norm(norms + block * CHANNELS, 1, channels, True, CHANNELS), channels, pixels,
                norm_eps, weight_eps, CHANNELS, CHANNELS, HIDDEN, CHANNELS, HIDDEN, HIDDEN, CHANNELS, HIDDEN,
                CHANNELS, HIDDEN, TILE, BLOCK_C, PIECE, PIECES, GATED, True, UNIT1, UNIT2, UNIT_GATE,
                ACTIVATION, True, FAST, PRECISION, EMULATE, AHEAD, LATE, True, NEED_WEIGHTS, SPAN,
            )  # fmt: skip
            own -= generated_block
            d_own -= d_generated_block
        tl.debug_barrier()
        input_patch_grad(
            scratch + BLOCKS * PLACE, own_image, image_plane, image_row, image_column, pixel_weight,
            d_image + (batch * INPUTS * image_height + top) * image_width + left,
            image_height * image_width, image_width, table_sum, own_partial, channels,
            HEIGHT, WIDTH, INPUTS, CHANNELS, PIXELS, BLOCK_C, NEED_IMAGE, NEED_SHARED, EMULATE,
        )  # fmt: skip
        tl.debug_barrier()
        patch += tl.num_programs(0)
