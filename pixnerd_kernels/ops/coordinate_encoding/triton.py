"""The Triton kernel of `coordinate_encoding`: every entry of the table by itself, in float64, rounded once."""

from __future__ import annotations

import struct
import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixnerd_kernels.ops.gpu.launch import Options, ceil_div, emulates, interpreting, launch
from pixnerd_kernels.ops.gpu.pieces import narrow

#: Entries of a program; in the interpreter a program costs what its entries do not.
_BLOCK, _BLOCK_INTERPRETED = 256, 8192


@triton.jit
def linspace(i, count, end):
    """Entry i of linspace(0, end, count), all in float64; each half counts from its own end."""
    last = tl.maximum(count - 1, 1).to(tl.float64)
    step = end / last
    return tl.where(2 * i < count, i * step, end - (last - i) * step)


@triton.jit
def coordinate_encoding_table(
    out, entries, height, width, end_x, end_y,
    COUNT: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """out [height * width, COUNT * COUNT]; end_x and end_y are the bits of float64 numbers, "rope"'s last positions."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pixel = index // (COUNT * COUNT)
    entry = index % (COUNT * COUNT)
    x, y = (pixel % width).to(tl.float64), (pixel // width).to(tl.float64)
    if KIND == "rope":
        half: tl.constexpr = COUNT * COUNT // 2
        speed = tl.exp((entry // 2).to(tl.float64) * (-9.210340371976184 / half))
        position_x = linspace(x, width, end_x.to(tl.int64).to(tl.float64, bitcast=True))
        position_y = linspace(y, height, end_y.to(tl.int64).to(tl.float64, bitcast=True))
        value = tl.cos(tl.where(entry % 2 == 0, position_x, position_y) * speed)
    elif KIND == "sincos":
        quarter: tl.constexpr = COUNT * COUNT // 4
        block = entry // quarter
        speed = tl.exp((entry % quarter).to(tl.float64) * (-9.210340371976184 / quarter))
        angle = tl.where(block < 2, x, y) * speed
        value = tl.where(block % 2 == 0, tl.sin(angle), tl.cos(angle))
    else:
        one = tl.full([], 1.0, tl.float64)
        a, b = (entry // COUNT).to(tl.float64), (entry % COUNT).to(tl.float64)
        if KIND == "dct" or KIND == "dct_aligned":
            count = tl.full([], COUNT, tl.int32)
            a, b = linspace(a, count, one * COUNT), linspace(b, count, one * COUNT)
        elif KIND == "dct_paper":
            a, b = a + 1.0, b + 1.0
        if KIND == "dct_aligned":
            u, v = x / tl.maximum(width, 1).to(tl.float64), y / tl.maximum(height, 1).to(tl.float64)
        else:
            u, v = linspace(x, width, one), linspace(y, height, one)
        value = tl.cos(u * a * 3.141592653589793) * tl.cos(v * b * 3.141592653589793)
        if KIND != "dct_paper":
            value = value / (1.0 + a * b)
    tl.store(out + index, narrow_once(value, out.dtype.element_ty, EMULATE), mask=index < entries)


@triton.jit
def narrow_once(value, NARROW: tl.constexpr, EMULATE: tl.constexpr):
    """A float64 rounded to NARROW in one step."""
    if tl.float64 == NARROW or tl.float32 == NARROW:
        return value.to(NARROW)
    else:
        # Through float32, rounded to odd: its last bit then remembers whether anything was cut off.
        single = value.to(tl.float32)
        bits = single.to(tl.int32, bitcast=True)
        cut = value - single.to(tl.float64)
        away = ((cut > 0) & (value > 0)) | ((cut < 0) & (value < 0))
        even = (bits & 1) == 0
        bits = tl.where((cut != 0) & even, tl.where(away, bits + 1, bits - 1), bits)
        return narrow(bits.to(tl.float32, bitcast=True), NARROW, EMULATE)


_OPTIONS = Options(4)


def _bits(number: float) -> int:
    """A float64 as an integer: as a float argument it would be rounded to float32 on its way."""
    return int.from_bytes(struct.pack("=d", number), sys.byteorder)


def forward(
    height: int,
    width: int,
    max_freqs: int,
    kind: str,
    scale_x: float,
    scale_y: float,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """The table [height * width, max_freqs^2], contiguous."""
    out = torch.empty(height * width, max_freqs * max_freqs, dtype=dtype, device=device)
    block = _BLOCK_INTERPRETED if interpreting() else _BLOCK
    launch(
        coordinate_encoding_table, (ceil_div(out.numel(), block),), out.device, _OPTIONS,
        out=out, entries=out.numel(), height=height, width=width,
        end_x=_bits(width * scale_x), end_y=_bits(height * scale_y),
        COUNT=max_freqs, KIND=kind, BLOCK=block, EMULATE=emulates(dtype),
    )  # fmt: skip
    return out
