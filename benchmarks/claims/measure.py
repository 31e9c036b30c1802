"""Seconds and memory of calls on a CPU or a GPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.claims.jobs import Effort
from benchmarks.memory import allocation_peak, resident_peak
from benchmarks.timing import Samples

Call = Callable[[], Tensor]


def measure(calls: Mapping[str, Call], device: torch.device, effort: Effort) -> dict[str, dict[str, Any]]:
    """For each call its seconds (rounds take turns) and its memory beyond what was live before.

    `peak` are torch's allocations, on a CPU from the profiler's events, on a GPU the allocator's own count;
    `resident` is the growth of the process's peak resident set in the same call, which checks it: it sees
    scratch memory outside of torch too, and misses what malloc had kept from before. `traced` marks a time taken
    while memory was traced (`Effort.traced_s`).
    """
    entries: dict[str, dict[str, Any]] = {}
    traced = {}
    for name, call in calls.items():
        call_once = _synchronised(call, device)
        if device.type != "cpu" or name == "compile":
            call_once()  # compiles, or lets libraries and caches allocate
        gc.collect()
        start = time.perf_counter()
        entries[name] = {"memory": _memory(call_once, device)}
        traced[name] = time.perf_counter() - start
    samples = {name: Samples([], []) for name in calls}
    order = list(calls)
    rounds = effort.rounds(sum(traced.values()), rivals=len(calls) > 1)
    if not rounds:
        for name, seconds in traced.items():
            samples[name].seconds.append(seconds)
            entries[name]["traced"] = True
    for index in range(rounds):
        shift = index % len(order)
        for name in order[shift:] + order[:shift]:
            call_once = _synchronised(calls[name], device)
            start = time.perf_counter()
            call_once()
            samples[name].seconds.append(time.perf_counter() - start)
    for name, entry in entries.items():
        entry.update(
            median_s=samples[name].median,
            p20_s=samples[name].quantile(0.2),
            p80_s=samples[name].quantile(0.8),
            runs=len(samples[name].seconds),
        )
        if "ours" in samples:
            entry["time_over_ours"] = samples[name].ratio(samples["ours"])
    return entries


def matmul_gflops(device: torch.device, dtype: torch.dtype) -> float:
    """The speed of a large square product, median of three calls: what the machine can do just now."""
    edge = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
    product = _synchronised(lambda: a @ b, device)
    product()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return 2e-9 * edge**3 / sorted(seconds)[1]


def _synchronised(call: Call, device: torch.device) -> Call:
    if device.type != "cuda":
        return call

    def run() -> Tensor:
        out = call()
        torch.cuda.synchronize(device)
        return out

    return run


def _memory(call: Call, device: torch.device) -> dict[str, int | None]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return {"peak": torch.cuda.max_memory_allocated(device) - before, "resident": None}
    peaks = []

    def traced() -> tuple[Tensor, ...]:
        peaks.append(allocation_peak(lambda: (call(),)).peak)
        return ()

    resident = resident_peak(traced)
    return {"peak": peaks[-1], "resident": resident}
