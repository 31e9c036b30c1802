"""Back through the pixel decoder's two ends in Triton, its output layer and its embedding.

The forward runs again, for some hundred patches, and keeps what enters each block. A gradient then goes back through
the output layer, through block after block with `neural_field_mlp`'s own backward, and through the embedding, always
in the same place. The first and the last of these kernels, which are here, add up the gradients of what all patches
share: a program owns a tile of pixels, and goes from patch to patch, a few neighbours in the image at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pixnerd_kernels.ops.gpu.pieces import (
    load_tile,
    narrow,
    rms_norm,
    rms_norm_grad,
    store_tile,
)
from pixnerd_kernels.ops.neural_field_mlp.triton.parts import load_norm
from pixnerd_kernels.ops.pixel_decoder.triton.kernels import corner, places_of_pixels


@triton.jit
def live_pixels(patch, patches, PIXELS: tl.constexpr):
    """How many pixels of a patch count: none where it does not belong to the chunk."""
    return tl.where((patch >= 0) & (patch < patches), PIXELS, 0)


@triton.jit
def load_neighbours(
    place,
    start,
    patches,
    rows,
    channels,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Tiles of TOGETHER patches from `start` on, the first of which is at `place`; zeros outside of the chunk."""
    tiles = ()
    for k in tl.static_range(TOGETHER):
        row_count = live_pixels(start + k, patches, PIXELS)
        own = place + k * (PIXELS * CHANNELS)
        tiles = tiles + (load_tile(own, rows, CHANNELS, channels, row_count, CHANNELS),)
    return tiles


@triton.jit
def load_pixels(
    places, image_plane, image_column, start, patches, rows,
    PIXELS: tl.constexpr, WIDTH: tl.constexpr, PLANES: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """PLANES numbers for each pixel of TOGETHER patches from `start` on, patch by patch; `places` are the first's."""
    values = ()
    for k in tl.static_range(TOGETHER):
        live = rows < live_pixels(start + k, patches, PIXELS)
        # Pointers move on: a product of 32-bit numbers would overflow in a large image.
        at = places
        for _ in tl.static_range(PLANES):
            values = values + (tl.load(at, mask=live, other=0.0),)
            at += image_plane
        places += tl.cast(image_column, tl.int64) * WIDTH
    return values


@triton.jit(do_not_specialize=["first", "patches", "rows_of_patches", "columns_of_patches"])
def pixel_decoder_output_grad(
    last, grad, final_norm, linear_weight, partial,
    first, patches, grad_batch, grad_plane, grad_row, grad_column, rows_of_patches, columns_of_patches, norm_eps,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr, TOGETHER: tl.constexpr, FINAL_NORM: tl.constexpr,
    LINEAR: tl.constexpr, NEED_SHARED: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Back through the output layer, on tile program_id(0) of every num_programs(1)-th block from program_id(1) on.

    A block is TOGETHER patches side by side in an image, of which a line of patches holds a whole number. last
    [patches, pixels, CHANNELS] is what left the last block of the decoder; its gradient takes its place. The gradients
    of final_norm, linear_weight and linear_bias, one after the other, are added to the program's row of partial
    [programs, ...] in float32.
    """
    pixels: tl.constexpr = HEIGHT * WIDTH
    ROW: tl.constexpr = CHANNELS + (OUTPUTS * (CHANNELS + 1) if LINEAR else 0)
    channels = tl.arange(0, BLOCK_C)
    live_channels = channels < CHANNELS
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    weight = load_norm(final_norm, 1, channels, FINAL_NORM, CHANNELS)
    # Added up over patches first, over a tile's pixels once in the end.
    sum_norm = tl.zeros([TILE, BLOCK_C], tl.float32)
    matrix = ()
    sum_weight = ()
    sum_bias = ()
    if LINEAR:
        for c in tl.static_range(OUTPUTS):
            row = tl.load(linear_weight + c * CHANNELS + channels, mask=live_channels, other=0.0)
            matrix = matrix + (row * weight,)
            sum_weight = sum_weight + (tl.zeros([TILE, BLOCK_C], tl.float32),)
            sum_bias = sum_bias + (tl.zeros([TILE], tl.float32),)
    block = first // TOGETHER + tl.program_id(1)
    while block * TOGETHER < first + patches:
        start = block * TOGETHER - first
        batch, top, left = corner(block * TOGETHER, rows_of_patches, columns_of_patches, HEIGHT, WIDTH)
        at = grad + batch * grad_batch + top * grad_row + left * grad_column
        at += places_of_pixels(rows, grad_row, grad_column, WIDTH)
        own = last + start.to(tl.int64) * (pixels * CHANNELS)
        # All are on their way before the first is waited for.
        tiles = load_neighbours(own, start, patches, rows, channels, pixels, CHANNELS, TOGETHER)
        if LINEAR:
            gradients = load_pixels(
                at, grad_plane, grad_column, start, patches, rows, pixels, WIDTH, OUTPUTS, TOGETHER
            )
        else:
            planes = channels[None, :].to(tl.int64) * grad_plane
            gradients = load_pixels(
                at[:, None] + planes, grad_plane, grad_column, start, patches,
                tl.where(live_channels[None, :], rows[:, None], pixels), pixels, WIDTH, 1, TOGETHER,
            )  # fmt: skip
        if LINEAR and not FINAL_NORM:
            # Then no number that is stored follows from one that was loaded from the same place.
            tl.debug_barrier()
        for k in tl.static_range(TOGETHER):
            row_count = live_pixels(start + k, patches, pixels)
            unit = tiles[k].to(tl.float32)
            if FINAL_NORM:
                unit, r = rms_norm(unit, rows < row_count, norm_eps, CHANNELS)
            if LINEAR:
                d_unit = tl.zeros([TILE, BLOCK_C], tl.float32)
                next_weight = ()
                next_bias = ()
                for c in tl.static_range(OUTPUTS):
                    gradient = gradients[k * OUTPUTS + c].to(tl.float32)
                    d_unit += gradient[:, None] * matrix[c][None, :]
                    next_weight = next_weight + (sum_weight[c] + gradient[:, None] * unit,)
                    next_bias = next_bias + (sum_bias[c] + gradient,)
                sum_weight = next_weight
                sum_bias = next_bias
            else:
                d_unit = gradients[k].to(tl.float32)
                if FINAL_NORM:
                    sum_norm += d_unit * unit
                    d_unit *= weight[None, :]
            if FINAL_NORM:
                d_unit = rms_norm_grad(d_unit, unit, r, False, CHANNELS)
            store_tile(own, rows, CHANNELS, channels, row_count, CHANNELS, d_unit, EMULATE)
            own += pixels * CHANNELS
        block += tl.num_programs(1)
    if NEED_SHARED:
        partial += (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * ROW
        d_norm = tl.sum(sum_norm, 0)
        if LINEAR:
            to = partial
            for c in tl.static_range(OUTPUTS):
                to += CHANNELS
                sum_row = tl.sum(sum_weight[c], 0)
                add_to(to + channels, sum_row * weight, live_channels)
                # The sum over pixels of gradient @ linear_weight times unit, without sums of its own.
                row = tl.load(linear_weight + c * CHANNELS + channels, mask=live_channels, other=0.0)
                d_norm += row * sum_row
            to += CHANNELS
            for c in tl.static_range(OUTPUTS):
                tl.store(to + c, tl.load(to + c) + tl.sum(sum_bias[c], 0))
        add_to(partial + channels, d_norm, live_channels)


@triton.jit
def add_to(pointers, value, mask):
    """What no other program touches, plus value."""
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + value, mask=mask)


@triton.jit(do_not_specialize=["first", "patches", "rows_of_patches", "columns_of_patches"])
def pixel_decoder_input_grad(
    dx, image, pixel_weight, d_image, table_sum, partial,
    first, patches, image_batch, image_plane, image_row, image_column, rows_of_patches, columns_of_patches,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, INPUTS: tl.constexpr, CHANNELS: tl.constexpr,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr, TOGETHER: tl.constexpr, NEED_IMAGE: tl.constexpr,
    NEED_SHARED: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Back through the embedding, on tile program_id(0) of every num_programs(1)-th block from program_id(1) on.

    Blocks are those of `pixel_decoder_output_grad`. From dx [patches, pixels, CHANNELS] to d_image [B, INPUTS, H, W],
    dense. The gradient of the table is added to table_sum [num_programs(1), pixels, CHANNELS], that of pixel_weight to
    the program's row of partial [programs, INPUTS, CHANNELS]; both in float32.
    """
    pixels: tl.constexpr = HEIGHT * WIDTH
    channels = tl.arange(0, BLOCK_C)
    neighbours = tl.arange(0, TOGETHER)
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = (rows < pixels)[:, None] & (channels[None, :] < CHANNELS)
    image_width = columns_of_patches * WIDTH
    plane = (rows_of_patches * HEIGHT).to(tl.int64) * image_width
    total = tl.zeros([TILE, BLOCK_C], tl.float32)
    matrix = ()
    sums = ()
    for c in tl.static_range(INPUTS):
        row = tl.load(pixel_weight + c * CHANNELS + channels, mask=channels < CHANNELS, other=0.0)
        matrix = matrix + (row,)
        sums = sums + (tl.zeros([TILE, BLOCK_C], tl.float32),)
    own_sum = table_sum + tl.program_id(1).to(tl.int64) * (pixels * CHANNELS)
    own_sum += rows[:, None] * CHANNELS + channels[None, :]
    if NEED_SHARED:
        # Here, where there is something else to wait for.
        before = tl.load(own_sum, mask=inside, other=0.0)
    block = first // TOGETHER + tl.program_id(1)
    while block * TOGETHER < first + patches:
        start = block * TOGETHER - first
        batch, top, left = corner(block * TOGETHER, rows_of_patches, columns_of_patches, HEIGHT, WIDTH)
        own = dx + start.to(tl.int64) * (pixels * CHANNELS)
        # All are on their way before the first is waited for.
        tiles = load_neighbours(own, start, patches, rows, channels, pixels, CHANNELS, TOGETHER)
        if NEED_SHARED:
            at = image + batch * image_batch + top * image_row + left * image_column
            at += places_of_pixels(rows, image_row, image_column, WIDTH)
            values = load_pixels(
                at, image_plane, image_column, start, patches, rows, pixels, WIDTH, INPUTS, TOGETHER
            )
        # Gradients of neighbours' pixels [TILE, TOGETHER] are stored together: warps have to meet for each store.
        d_pixels = ()
        for _ in tl.static_range(INPUTS):
            d_pixels = d_pixels + (tl.zeros([TILE, TOGETHER], tl.float32),)
        for k in tl.static_range(TOGETHER):
            d_embedded = tiles[k].to(tl.float32)
            if NEED_SHARED:
                total += d_embedded
                next_sums = ()
                for c in tl.static_range(INPUTS):
                    value = values[k * INPUTS + c].to(tl.float32)
                    next_sums = next_sums + (sums[c] + value[:, None] * d_embedded,)
                sums = next_sums
            if NEED_IMAGE:
                next_pixels = ()
                for c in tl.static_range(INPUTS):
                    d_pixel = tl.sum(d_embedded * matrix[c][None, :], 1)[:, None]
                    next_pixels = next_pixels + (tl.where(neighbours[None, :] == k, d_pixel, d_pixels[c]),)
                d_pixels = next_pixels
        if NEED_IMAGE:
            to = d_image + batch * INPUTS * plane + top * image_width + left
            to += places_of_pixels(rows, image_width, 1, WIDTH)[:, None] + neighbours[None, :] * WIDTH
            there = rows[:, None] < live_pixels(start + neighbours, patches, pixels)[None, :]
            for c in tl.static_range(INPUTS):
                tl.store(to, narrow(d_pixels[c], d_image.dtype.element_ty, EMULATE), mask=there)
                to += plane
        block += tl.num_programs(1)
    if NEED_SHARED:
        tl.store(own_sum, before + total, mask=inside)
        partial += (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (
            INPUTS * CHANNELS
        )
        for c in tl.static_range(INPUTS):
            add_to(partial + c * CHANNELS + channels, tl.sum(sums[c], 0), channels < CHANNELS)
