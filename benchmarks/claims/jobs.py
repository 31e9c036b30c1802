"""What is measured, each in a process of its own: networks, PixNerds, their two halves, ablations."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from benchmarks.baselines.networks import NETWORKS
from benchmarks.claims.models import MODELS

PIXNERDS = ("PixNerd-L/16", "PixNerd-XL/16")
#: Ways to run a PixNerd; those with a graph, a CUDA graph of the way before the hyphen, need a GPU.
PROVIDERS = ("eager", "compile", "compile-graph", "ours", "ours-compile", "ours-graph")
_BY_ITSELF = {
    "cpu": ("eager", "compile", "ours"),
    "cuda": ("eager", "compile", "compile-graph", "ours", "ours-graph"),
}
#: Above this, a guided step is taken as two forwards of one image, and said to be: a CPU would take too long.
BATCHED_GFLOP = 500.0


@dataclass(frozen=True)
class Effort:
    """Rounds of timed calls: as many as `seconds` hold, within bounds. The traced call before warms up.

    A call with no rival in its job that takes more than `traced_s` is not repeated: the traced one's time is taken.
    """

    seconds: float
    least: int
    most: int
    traced_s: float = float("inf")

    def rounds(self, one: float, rivals: bool = True) -> int:
        """At least `least`, unless one round takes half a minute: then one; none above `traced_s`."""
        if one > self.traced_s and not rivals:
            return 0
        least = self.least if one < 30 else 1
        return min(self.most, max(least, int(self.seconds / max(one, 1e-9))))


FULL, QUICK = Effort(seconds=20, least=3, most=15), Effort(seconds=3, least=1, most=3, traced_s=3)
#: A round on a GPU makes several calls (`device_time.measure`), whose spread is small.
GPU_FULL, GPU_QUICK = Effort(seconds=2, least=3, most=5), Effort(seconds=1, least=3, most=3)


@dataclass(frozen=True)
class Job:
    """`name` tells what; the rest under which conditions. Equal jobs are interchangeable when resuming."""

    name: str
    providers: tuple[str, ...]
    effort: Effort
    batches: tuple[int, ...] = (1,)
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 0
    smoke: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        fields = json.loads(text)
        fields.update(
            effort=Effort(**fields["effort"]),
            providers=tuple(fields["providers"]),
            batches=tuple(fields["batches"]),
        )
        return Job(**fields)


def names() -> list[str]:
    """Every job, cheap ones first, so that an early end leaves the most."""
    used = {name for model in MODELS.values() for name in model.networks()} - set(PIXNERDS)
    flops = {name: NETWORKS[name].gflop or 1e3 for name in used}
    return [
        *PIXNERDS,
        "block-noise",
        *sorted(used, key=lambda name: flops[name]),
        "ablations",
        *(f"halves-{name}" for name in PIXNERDS),
    ]


#: `--quick` leaves the paper's claim, PixNerd-L/16 against ADM-G and PixelFlow, whose last stage is then taken from
#: the one before, by FLOPs.
QUICK_CASES = ("PixNerd-L/16", "block-noise", "ADM-*", "PixelFlow-32", "PixelFlow-64", "PixelFlow-128")


def select(patterns: Sequence[str], quick: bool = False) -> list[str]:
    """Jobs by name or shell pattern; none means all, or with `quick` the paper's claim.

    Raises:
        ValueError: a pattern matches nothing; the message lists what there is.
    """
    known = names()
    if not patterns:
        return [n for n in known if not quick or any(fnmatch.fnmatch(n, kept) for kept in QUICK_CASES)]
    chosen = []
    unknown = []
    for pattern in patterns:
        found = fnmatch.filter(known, pattern)
        chosen += found
        if not found:
            unknown.append(repr(pattern))
    if unknown:
        raise ValueError(f"unknown case {', '.join(unknown)}; known: {', '.join(known)}")
    return [name for name in known if name in chosen]


def select_providers(wanted: Sequence[str], device: str) -> list[str]:
    """The named ones; none means what a device runs by itself.

    Raises:
        ValueError: a name is unknown, or needs a GPU.
    """
    known = [name for name in PROVIDERS if device == "cuda" or not name.endswith("-graph")]
    if unknown := [repr(name) for name in wanted if name not in known]:
        raise ValueError(f"unknown provider {', '.join(unknown)}; known on {device}: {', '.join(known)}")
    return [name for name in known if name in (wanted or _BY_ITSELF[device])]


def compiled_batches(job: Job) -> tuple[int, ...]:
    """The batch sizes that compiled networks run at: on a GPU those of a step and of an image, because compiling takes
    most of a job's time there."""
    if job.device != "cuda":
        return job.batches
    used = {1 for model in MODELS.values() if job.name in model.once}
    for model in MODELS.values():
        used |= {images for stage in model.stages for name, images in stage.networks if name == job.name}
    return tuple(batch for batch in job.batches if batch in used) or job.batches[:1]


def batches(name: str, extra: Sequence[int]) -> tuple[int, ...]:
    """The batch sizes of a job: 1, the 2 of a guided step where that is affordable, and those asked for."""
    guided = any((name, 2) in stage.networks for model in MODELS.values() for stage in model.stages)
    affordable = name in NETWORKS and (NETWORKS[name].gflop or 1e4) < BATCHED_GFLOP
    return tuple(sorted({1, *([2] if guided and (affordable or extra) else []), *extra}))
