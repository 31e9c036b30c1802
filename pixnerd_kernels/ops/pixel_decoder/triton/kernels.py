"""The pixel decoder's forward in Triton, made of the field's pieces; the image is read and written in place.

A program owns every num_programs-th patch. A block's weights are read and scaled once. The embedding belongs to the
first block's loop over tiles of pixels, the output layer to the last one's; between two blocks tiles wait in the
program's own scratch, small enough for the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pixnerd_kernels.ops.gpu.pieces import (
    load_tile,
    narrow,
    opaque,
    rms_norm,
    store_tile,
)
from pixnerd_kernels.ops.neural_field_mlp.triton.kernels import forward_tile
from pixnerd_kernels.ops.neural_field_mlp.triton.parts import load_norm, load_weights


@triton.jit
def places_of_pixels(rows, row_stride, column_stride, WIDTH: tl.constexpr):
    """Where pixels of a patch lie in a plane of an image, from the patch's first pixel on, as 64-bit numbers."""
    return (rows // WIDTH).to(tl.int64) * row_stride + (rows % WIDTH).to(tl.int64) * column_stride


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
    at = image + places_of_pixels(rows, image_row, image_column, WIDTH)
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
    at = out + places_of_pixels(rows, out_row, 1, WIDTH)
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
    LATE: tl.constexpr, EMBED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """One block of one patch, from source to target [pixels, CHANNELS].

    EMBED: its tiles come from the image instead, and where KEEP are left in source, too. Unless KEEP, what leaves the
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
    # What `opaque` leads to cannot be loaded ahead of its turn, and a tile of the image need not be.
    for start in tl.range(0, pixels, TILE, num_stages=1 if EMBED else None):
        rows = start + tl.arange(0, TILE)
        # Addresses of the image and the table that were kept from tile to tile would take too many registers.
        fresh = opaque(start) + tl.arange(0, TILE)
        if EMBED:
            tile = embed_pixels(
                image, image_plane, image_row, image_column, pixel_weight, table, fresh, channels,
                HEIGHT, WIDTH, INPUTS, CHANNELS, NARROW, EMULATE,
            )  # fmt: skip
            if KEEP:
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
        if last and not KEEP:
            # Rounded as between blocks, which is what the backward goes back from.
            write_pixels(
                narrow(x, NARROW, EMULATE).to(tl.float32), out, out_plane, out_row,
                final_norm, linear_weight, linear_bias, fresh, channels, norm_eps,
                HEIGHT, WIDTH, OUTPUTS, CHANNELS, FINAL_NORM, LINEAR, BIAS, EMULATE,
            )  # fmt: skip
        else:
            store_tile(target, rows, CHANNELS, channels, pixels, CHANNELS, x, EMULATE)


@triton.jit
def corner(patch, rows_of_patches, columns_of_patches, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """The image that a patch belongs to, and its first row and column there, as 64-bit numbers."""
    batch = patch // (rows_of_patches * columns_of_patches)
    top = (patch // columns_of_patches % rows_of_patches) * HEIGHT
    left = (patch % columns_of_patches) * WIDTH
    return batch.to(tl.int64), top.to(tl.int64), left.to(tl.int64)


# Where a chunk begins and how an image is cut are no reason to compile again.
@triton.jit(do_not_specialize=["first", "patches", "rows_of_patches", "columns_of_patches"])
def pixel_decoder_forward(
    image, generated, norms, final_norm, pixel_weight, table, linear_weight, linear_bias, out, scratch,
    first, patches, image_batch, image_plane, image_row, image_column, generated_block, generated_patch,
    scratch_block, scratch_patch, rows_of_patches, columns_of_patches, norm_eps, weight_eps,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCKS: tl.constexpr,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
    GATED: tl.constexpr, UNIT1: tl.constexpr, UNIT2: tl.constexpr, UNIT_GATE: tl.constexpr,
    FINAL_NORM: tl.constexpr, LINEAR: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr, AHEAD: tl.constexpr,
    LATE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Patches first + program_id(0), first + program_id(0) + num_programs(0), ... of out [B, OUTPUTS, H, W], dense.

    The first block's tiles come from the image, the last block's go to out. Between two blocks they wait in one of two
    places [pixels, CHANNELS] of the program's, which take turns. Or, where KEEP, a program owns one patch only, whose
    place k is left holding what enters block k, and whose last what leaves the last block; out is not written.
    """
    FIRST: tl.constexpr = CHANNELS * HIDDEN if GATED else 0
    SECOND: tl.constexpr = FIRST + CHANNELS * HIDDEN
    channels = tl.arange(0, BLOCK_C)
    patch = tl.program_id(0)
    while patch < patches:
        # What follows from the program's number is worked out anew for each patch: kept, it would take registers.
        places = scratch + opaque(tl.program_id(0)).to(tl.int64) * scratch_patch
        image_width = opaque(columns_of_patches) * WIDTH
        plane = (rows_of_patches * HEIGHT).to(tl.int64) * image_width
        batch, top, left = corner(first + patch, rows_of_patches, columns_of_patches, HEIGHT, WIDTH)
        own_image = image + batch * image_batch + top * image_row + left * image_column
        own_out = out + batch * OUTPUTS * plane + top * image_width + left
        # Pointers move on from block to block: a product of 32-bit numbers would overflow.
        own = generated + patch.to(tl.int64) * generated_patch
        source = places
        block_of_patch(
            source, source + scratch_block, own_image, image_plane, image_row, image_column, pixel_weight, table,
            own + FIRST, own + SECOND, own, load_norm(norms, 1, channels, True, CHANNELS),
            own_out, plane, image_width, final_norm, linear_weight, linear_bias, BLOCKS == 1, channels,
            norm_eps, weight_eps, HEIGHT, WIDTH, INPUTS, OUTPUTS, CHANNELS, HIDDEN, TILE, BLOCK_C, PIECE, PIECES,
            GATED, UNIT1, UNIT2, UNIT_GATE, FINAL_NORM, LINEAR, BIAS, ACTIVATION, FAST, PRECISION, EMULATE,
            AHEAD, LATE, True, KEEP,
        )  # fmt: skip
        for block in range(1, BLOCKS):
            own += generated_block
            if KEEP:
                source += scratch_block
                target = source + scratch_block
            else:
                source = places + (block % 2) * scratch_block
                target = places + (1 - block % 2) * scratch_block
            # What one thread stored to scratch another may load.
            tl.debug_barrier()
            block_of_patch(
                source, target, own_image, image_plane, image_row, image_column, pixel_weight, table,
                own + FIRST, own + SECOND, own, load_norm(norms + block * CHANNELS, 1, channels, True, CHANNELS),
                own_out, plane, image_width, final_norm, linear_weight, linear_bias, block == BLOCKS - 1, channels,
                norm_eps, weight_eps, HEIGHT, WIDTH, INPUTS, OUTPUTS, CHANNELS, HIDDEN, TILE, BLOCK_C, PIECE, PIECES,
                GATED, UNIT1, UNIT2, UNIT_GATE, FINAL_NORM, LINEAR, BIAS, ACTIVATION, FAST, PRECISION, EMULATE,
                AHEAD, LATE, False, KEEP,
            )  # fmt: skip
        tl.debug_barrier()
        patch += tl.num_programs(0)
