"""Parts of the comparison below a whole network: the two halves of PixNerd, its head's variants, block noise."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import halves as split
from benchmarks.baselines import pixelflow, samplers
from benchmarks.baselines.networks import FastRandom
from benchmarks.claims.jobs import Job
from benchmarks.claims.measure import Call, measure
from benchmarks.worker import failure
from pixnerd_kernels.models import PixNerd, PixNerdConfig, to_official
from pixnerd_kernels.nn import PixelDecoder

SIZES = (256, 512, 1024)


def halves(job: Job, config: PixNerdConfig) -> Iterator[dict[str, Any]]:
    """Transformer and head alone at each size, eager and ours: time, memory and GFLOP of each.

    Sizes are square; positions stretch, so the weights fit all of them.
    """
    from benchmarks.baselines.pixnerd import PlainPixNerd

    device, dtype = torch.device(job.device), getattr(torch, job.dtype)
    with device, FastRandom():
        model = PixNerd(config).eval().requires_grad_(False).to(dtype)
    with torch.device("meta"):
        plain = PlainPixNerd(config).eval().requires_grad_(False)
    plain.load_state_dict(to_official(model), assign=True)
    for size in (32, 64) if job.smoke else SIZES:
        with device:
            x = torch.randn(1, config.in_channels, size, size, dtype=dtype)
            t, y = torch.full((1,), 0.5), torch.zeros(1, dtype=torch.long)
        try:
            calls = split.halves(model, plain, x, t, y)
            calls = {name: call for name, call in calls.items() if name.split()[-1] in job.providers}
            entries = measure(calls, device, job.effort)
            if lost := [entry for entry in entries.values() if "median_s" not in entry]:
                yield {"halves": {str(size): {"all": lost[0]}}}
                continue
            entries = {
                name: {**entry, "gflop": _gflop(config, size, name)} for name, entry in entries.items()
            }
        except Exception as error:
            entries = {"all": failure(error)}
        yield {"halves": {str(size): entries}}


def _gflop(config: PixNerdConfig, size: int, name: str) -> float:
    from benchmarks.baselines.pixnerd import PlainPixNerd

    with torch.device("meta"):
        plain = PlainPixNerd(config)
        x, t = torch.empty(1, config.in_channels, size, size), torch.empty(1)
        y = torch.zeros(1, dtype=torch.long)
        states = torch.empty(1, (size // config.patch_size) ** 2, config.hidden_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if name.startswith("head"):
            plain.head(x, states)
        else:
            plain.transformer(x, t, y)
    return counter.get_total_flops() / 1e9


#: Setting -> the head's arguments that differ from the official ones. Quality needs training: cost only.
ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "normalised weights": {
        "none": {"normalize": ()},
        "w1": {"normalize": ("w1",)},
        "w1 and w2 (official)": {},
    },
    "channels D1": {str(size): {"channels": size} for size in (36, 64, 72)},
    "neural-field blocks": {str(depth): {"num_blocks": depth} for depth in (1, 2, 4)},
    "coordinate encoding": {
        kind: {"encoding": kind} for kind in ("dct", "dct_integer", "dct_paper", "sincos")
    },
}

#: Solver -> arguments of the sampler; guided on the official interval.
SOLVERS: dict[str, dict[str, Any]] = {
    **{f"Euler, {n} steps": {"solver": "euler", "num_steps": n} for n in (25, 50, 100)},
    **{f"Adams 2, {n} steps": {"solver": "adams", "num_steps": n} for n in (25, 50)},
    **{f"Heun, {n} steps": {"solver": "heun", "num_steps": n, "exact_heun": True} for n in (25, 50)},
}


def ablations(job: Job, config: PixNerdConfig) -> Iterator[dict[str, Any]]:
    """The head alone in each setting (ours, one image of 256 x 256), and each solver's evaluations."""
    device, dtype = torch.device(job.device), getattr(torch, job.dtype)
    size = 32 if job.smoke else 256
    official: dict[str, Any] = {
        "in_channels": config.in_channels,
        "hidden_size": config.hidden_size,
        "channels": config.field_channels,
        "ratio": config.field_ratio,
        "num_blocks": config.num_field_blocks,
        "patch_size": config.patch_size,
        "max_freqs": config.max_freqs,
    }
    with device:
        x = torch.randn(1, config.in_channels, size, size, dtype=dtype)
        states = torch.randn(1, (size // config.patch_size) ** 2, config.hidden_size, dtype=dtype)
    for group, settings in ABLATIONS.items():
        calls: dict[str, Call] = {}
        for name, changed in settings.items():
            with device:
                head = PixelDecoder(**{**official, **changed}).eval().requires_grad_(False).to(dtype)
            calls[name] = lambda head=head: head(x, states)  # type: ignore[misc]
        with torch.no_grad():
            entries = measure(calls, device, job.effort)
        yield {"ablations": {group: entries}}
    evaluations = {name: samplers.pixnerd_evaluations(**options) for name, options in SOLVERS.items()}
    yield {"solvers": {name: {"guided": both, "single": one} for name, (both, one) in evaluations.items()}}


def block_noise(job: Job) -> Iterator[dict[str, Any]]:
    """PixelFlow's block noise for one image: a sample of its draws timed, and extrapolated to all of them."""
    total = pixelflow.blocks_per_image()
    drawn = 200 if job.smoke else 4000
    pixelflow.draw_blocks(100)
    start = time.perf_counter()
    pixelflow.draw_blocks(drawn)
    seconds = time.perf_counter() - start
    yield {
        "providers": {"eager": {"status": "ok", "median_s": seconds / drawn * total}},
        "blocks": total,
        "drawn": drawn,
    }
