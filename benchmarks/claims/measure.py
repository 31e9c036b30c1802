"""Seconds and memory of calls on a CPU or a GPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import device_time
from benchmarks.claims.jobs import Effort
from benchmarks.memory import allocation_peak, resident_peak
from benchmarks.timing import Samples
from benchmarks.worker import failure

Call = Callable[[], Tensor]
#: A round on a GPU makes about so many calls.
_CALLS_A_ROUND = 6


def measure(calls: Mapping[str, Call], device: torch.device, effort: Effort) -> dict[str, dict[str, Any]]:
    """For each call its seconds (rounds take turns) and its memory beyond what was live before.

    `peak` are torch's allocations, on a CPU from the profiler's events, on a GPU the allocator's own count;
    `resident` is the growth of the process's peak resident set in the same call, which checks it: it sees
    scratch memory outside of torch too, and misses what malloc had kept from before. `traced` marks a time taken
    while memory was traced (`Effort.traced_s`).

    On a GPU the seconds are those of calls one after the other, as a sampler makes them; `device_s`, `latency_s` and
    `host_s` are `device_time.Times`'. A call that fails there has its failure as its entry.
    """
    if device.type == "cuda":
        return on_gpu(calls, effort)
    entries: dict[str, dict[str, Any]] = {}
    traced = {}
    for name, call in calls.items():
        if "compile" in name:
            call()  # compiles
        gc.collect()
        start = time.perf_counter()
        entries[name] = {"memory": _memory(call)}
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
            start = time.perf_counter()
            calls[name]()
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


def on_gpu(calls: Mapping[str, Call], effort: Effort) -> dict[str, dict[str, Any]]:
    """`measure` on a GPU."""
    entries: dict[str, dict[str, Any]] = {}
    running = {}
    one = 0.0
    for name, call in calls.items():
        try:
            if not name.endswith("-graph"):  # whose memory is that of its first call, which records it
                call()  # compiles, or lets libraries and caches allocate
            peak = device_time.peak_memory(call, times=2)
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            one += time.perf_counter() - start
        except Exception as error:
            entries[name] = failure(error)
            continue
        running[name] = call
        entries[name] = {"memory": {"peak": peak, "resident": None}}
    if not running:
        return entries
    times = device_time.measure(running, effort.rounds(_CALLS_A_ROUND * one))
    for name, found in times.items():
        entry = entries[name]
        entry.update(found.summary())
        entry.update(
            median_s=entry["repeated_s"],
            p20_s=entry["repeated_p20_s"],
            p80_s=entry["repeated_p80_s"],
            runs=entry["rounds"],
        )
        if "ours" in times:
            entry["time_over_ours"] = found.ratio(times["ours"], "repeated")
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


def _memory(call: Call) -> dict[str, int | None]:
    peaks = []

    def traced() -> tuple[Tensor, ...]:
        peaks.append(allocation_peak(lambda: (call(),)).peak)
        return ()

    resident = resident_peak(traced)
    return {"peak": peaks[-1], "resident": resident}
