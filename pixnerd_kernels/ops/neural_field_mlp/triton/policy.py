"""Launch policy of the neural field, alone and in the pixel decoder: tiles, pieces and warps by shape and GPU.

On sm_90 a product whose result feeds another uses wgmma only with 16 rows for each warp: of pixels in the forward, of
hidden units in the backward. More warps than rows would compute the same rows twice. The forward takes 64 pixels and 4
warps, so that three patches share a processor, and 168 registers a thread, so that they do; the backward keeps its
weight gradients in registers, which leaves room for tiles of 32 pixels and two patches a processor, and has the next
tiles on their way to shared memory, from where they enter its products as they are; so does the decoder's forward. On
an H100 these were the fastest of some 180 plans each. On sm_100 products accumulate in tensor memory, of which 512
columns are there: a plan that needs more compiles to a kernel that does nothing. benchmarks/results/static_resources.md
has what each plan takes; plans for GPUs other than the H100 have not been timed.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixnerd_kernels.ops.gpu import tuned
from pixnerd_kernels.ops.gpu.launch import KNOWN_TRITON, Options, Target, padded

TUNED = Path(__file__).with_name("tuned.json")
#: Sums of weight gradients that fit in a program's registers, in bytes.
_SUMS = 64 << 10


@dataclass(frozen=True)
class Problem:
    """What the choice depends on, beside the GPU."""

    training: bool
    gated: bool
    dtype: torch.dtype
    patches: int
    pixels: int
    channels: int
    hidden: int
    decoder: bool = False  # a whole decoder's forward
    tangents: bool = False  # the value and its tangent

    @staticmethod
    def of(x: Tensor, hidden: int, gated: bool, training: bool) -> Problem:
        patches, pixels, channels = x.shape
        return Problem(training, gated, x.dtype, patches, pixels, channels, hidden)

    @property
    def key(self) -> str:
        """Its name in `tuned.json`; the number of patches is no part of it."""
        name = "backward" if self.training else "jvp" if self.tangents else "forward"
        form = "gated" if self.gated else "plain"
        dtype = str(self.dtype).removeprefix("torch.")
        own = "decoder " if self.decoder else ""
        return f"{own}{name} {form} {dtype} S={self.pixels} D1={self.channels} D2={self.hidden}"


@dataclass(frozen=True)
class Plan:
    """`tile` pixels at a time; `pieces` of `piece` hidden units on the chip at once.

    `registers`: a thread's at most, 0 leaves it to the compiler. A tile is loaded while the last is computed, into
    registers where `ahead`, into shared memory where there are more `stages` than one. `late`: it enters the products
    as it was loaded, and what comes of them is divided by its root mean square; for bfloat16, whose range has room for
    that. `carveout`: as in `Options`.
    """

    tile: int
    piece: int
    pieces: int
    warps: int
    registers: int = 0
    ahead: bool = False
    stages: int = 1
    late: bool = False
    carveout: int = 0

    @property
    def options(self) -> Options:
        return Options(self.warps, self.stages, self.registers, self.carveout)

    def chunks(self, problem: Problem) -> int:
        return math.ceil(problem.hidden / (self.piece * self.pieces))

    def sharing(self, problem: Problem, target: Target) -> int:
        """Programs that share the tiles of a patch in the forward: more than one where patches are few."""
        wanted = math.ceil(4 * target.processors / max(problem.patches, 1))
        return min(wanted, math.ceil(problem.pixels / self.tile))

    def programs(self, problem: Problem, target: Target) -> int:
        """Programs: one for each patch, or as many as run at once where each needs scratch."""
        if self.chunks(problem) == 1 and not problem.decoder:
            return problem.patches
        return min(problem.patches, target.processors * self.resident(problem))

    def resident(self, problem: Problem) -> int:
        """Programs that a processor runs at once, by their registers."""
        registers = self.registers or (255 if problem.training else 168)
        return max(1, 65536 // (32 * self.warps * registers))

    def entry(self) -> dict[str, Any]:
        return asdict(self)


def span(pixels: int) -> int:
    """Pixels that the backward adds up at a time: 0, which is all, in patches of ordinary size."""
    return 0 if pixels <= 1024 else 256


def on_hopper(problem: Problem, target: Target) -> bool:
    """Whether the kernel in `hopper` takes this backward: no plan is wanted, and tiles of 128 pixels are more than
    half full."""
    return (
        KNOWN_TRITON
        and _arch(target) == 90
        and problem.training
        and not problem.gated
        and problem.dtype in (torch.bfloat16, torch.float16)
        and (problem.channels, problem.hidden) == (64, 128)
        and problem.pixels > 64
        and not span(problem.pixels)
        and tuned.overridden() is None
    )


def choose(problem: Problem, target: Target) -> Plan:
    """The tuned plan of this GPU and problem, or the heuristic's."""
    if isinstance(plan := tuned.overridden(), Plan):
        return plan
    return _chosen(problem, target, TUNED, tuned.version())


@functools.lru_cache(maxsize=1024)
def _chosen(problem: Problem, target: Target, path: Path, version: int) -> Plan:
    """`choose` without what is overridden, which calls of an op ask for every time."""
    if entry := tuned.entry(path, target.name, problem.key):
        return Plan(**entry)
    if problem.tangents:
        return _jvp(problem, target)
    return _backward(problem, target) if problem.training else _forward(problem, target)


def _forward(problem: Problem, target: Target) -> Plan:
    c, wide = padded(problem.channels), problem.dtype == torch.float32
    piece = _piece(problem.hidden, 32 if wide or c > 128 else 64)
    pieces = math.ceil(problem.hidden / piece)
    weights = (3 if problem.gated else 2) * c * piece * pieces * problem.dtype.itemsize
    tile, warps = 64 if c <= 128 and not wide else 32, 8 if wide or c > 128 else 4
    if weights > _weights_budget(target) or pieces > 8:
        # Weights are read again for every tile.
        piece, pieces = _piece(problem.hidden, 32 if _arch(target) < 90 or c > 128 else 64), 1
    elif _arch(target) >= 100 and problem.gated and piece * pieces > 128:
        # The products of all pieces would not fit the 512 columns of tensor memory.
        tile, piece, pieces, warps = 128, _piece(problem.hidden, 64), 1, 8
    elif _arch(target) == 90 and not wide and c <= 64 and not (problem.gated and problem.decoder):
        piece = _piece(problem.hidden, 128)
        pieces = math.ceil(problem.hidden / piece)
        if not problem.gated and pieces == 1:
            tile, late = _tile(problem, target, tile), problem.decoder and problem.dtype == torch.bfloat16
            return Plan(tile, piece, 1, warps, 168, not problem.decoder, stages=2 if late else 1, late=late)
    return Plan(_tile(problem, target, tile), piece, pieces, warps)


def _jvp(problem: Problem, target: Target) -> Plan:
    """Not timed on any GPU yet: plans that compile without spills, with the weights on the chip where they fit."""
    c, wide = padded(problem.channels), problem.dtype == torch.float32
    small = c <= 64 and not (wide or problem.gated)
    piece = _piece(problem.hidden, 128 if small else 32 if wide else 64)
    pieces = math.ceil(problem.hidden / piece)
    weights = (6 if problem.gated else 4) * c * piece * pieces * problem.dtype.itemsize
    if weights > _weights_budget(target) or pieces > 4:
        piece, pieces = min(piece, 64), 1  # weights are read again for every tile
    return Plan(_tile(problem, target, 32), piece, pieces, 4 if small else 8)


def _backward(problem: Problem, target: Target) -> Plan:
    c, wide = padded(problem.channels), problem.dtype == torch.float32
    room = (_SUMS // 2 if wide or target.backend == "hip" else _SUMS) // (4 * c * (3 if problem.gated else 2))
    piece = _piece(problem.hidden, max(16, min(128, 1 << (room.bit_length() - 1))))
    pieces = min(math.ceil(problem.hidden / piece), max(1, room // piece))
    tile = 64 if _arch(target) >= 100 and not (wide or problem.gated) else 32
    tile = _tile(problem, target, tile if c <= 128 and target.backend != "hip" else 16)
    if _arch(target) == 90 and not wide and c <= 64:
        piece = _piece(problem.hidden, 64)
        pieces = min(math.ceil(problem.hidden / piece), max(1, room // piece))
        if piece * pieces < problem.hidden:
            return Plan(tile, piece, pieces, warps=4, ahead=True)
        late = problem.dtype == torch.bfloat16
        # What shared memory two programs leave is cache, from which the weights are read again.
        return Plan(tile, piece, pieces, warps=4, stages=3, late=late, carveout=72 if late else 0)
    return Plan(tile, piece, pieces, warps=8 if c * piece * pieces >= 2048 else 4)


def _arch(target: Target) -> int:
    """The compute capability of an NVIDIA GPU, 90 for 9.0; zero elsewhere."""
    return int(target.arch) if target.backend == "cuda" else 0


def _tile(problem: Problem, target: Target, largest: int) -> int:
    """No larger than the patch; in the interpreter, whose cost is the number of tiles, two or three."""
    if target.backend == "interpreter":
        return min(4096, padded(problem.pixels // 3))
    return min(largest, padded(problem.pixels))


def _piece(hidden: int, largest: int) -> int:
    """The largest piece that pads the hidden dimension by at most an eighth more than the smallest would."""
    sizes = [size for size in (128, 64, 32, 16) if size <= largest]
    least = min(math.ceil(hidden / size) * size for size in sizes)
    return next(size for size in sizes if 8 * math.ceil(hidden / size) * size <= 9 * least)


def _weights_budget(target: Target) -> int:
    """Bytes of weights that the forward keeps in shared memory; two programs should fit a processor."""
    if target.backend == "hip":
        return 32 << 10
    return 100 << 10 if _arch(target) in (90, 100, 103) else 64 << 10
