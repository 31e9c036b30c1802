"""Times of calls on a GPU: of the device with the host kept ahead, and of the wall clock as calls are used."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Call = Callable[[], object]

#: Seconds that calls without a synchronisation between them fill, and the fewest and most of them.
BACK_TO_BACK = (0.15, 3, 50)
#: No wait that hides the host is longer than this, in seconds.
LONGEST_WAIT = 0.5


@dataclass(frozen=True)
class Times:
    """Seconds of one call, round by round.

    Attributes:
        device: between two events. The device first waits until all of the call is enqueued, so the host's work does
            not show, as under a CUDA graph.
        ahead: whether that worked. A call that synchronises, or has more launches than the queue holds (1024), shows
            part of the host's work in `device`; where any round was ahead, the others do not count.
        latency: from the call to the end of its last kernel, with a synchronisation for every call.
        host: from the call to its return, on an idle device.
        repeated: of calls one after the other with one synchronisation after the last, as a sampler makes them.
    """

    device: list[float] = field(default_factory=list)
    ahead: list[bool] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    repeated: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Medians and the quantiles 0.2 and 0.8."""
        result: dict[str, Any] = {"rounds": len(self.device), "ahead": float(np.mean(self.ahead))}
        for name in ("device", "latency", "host", "repeated"):
            values = getattr(self, name)
            if name == "device" and any(self.ahead):
                values = [value for value, ahead in zip(values, self.ahead, strict=True) if ahead]
            result[f"{name}_s"] = float(np.median(values))
            result[f"{name}_p20_s"] = float(np.quantile(values, 0.2))
            result[f"{name}_p80_s"] = float(np.quantile(values, 0.8))
        return result

    def ratio(self, other: Times, name: str) -> float:
        """The median over rounds of this call's time over the other's in the same round."""
        return float(np.median(np.divide(getattr(self, name), getattr(other, name))))


def measure(calls: Mapping[str, Call], rounds: int) -> dict[str, Times]:
    """Time every call in every round; each round starts with another. The calls are warm already."""
    hosts, repeats = {}, {}
    for name, call in calls.items():
        whole, hosts[name] = _latency(call)
        seconds, least, most = BACK_TO_BACK
        repeats[name] = min(most, max(least, math.ceil(seconds / max(whole, 1e-6))))
    rate = cycles_per_second()
    times = {name: Times() for name in calls}
    names = list(calls)
    gc.collect()
    gc.freeze()  # what lives now is passed over by the collections between rounds
    gc.disable()
    try:
        for index in range(rounds):
            gc.collect()  # cycles of autograd's may hold gigabytes
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                entry, call = times[name], calls[name]
                latency, host = _latency(call)
                entry.latency.append(latency)
                entry.host.append(host)
                entry.repeated.append(_repeated(call, repeats[name]))
                device, ahead = device_seconds(call, hosts[name], rate)
                entry.device.append(device)
                entry.ahead.append(ahead)
    finally:
        gc.enable()
        gc.unfreeze()
    return times


def cycles_per_second() -> float:
    """Of the clock that torch.cuda._sleep counts, on a device that has just worked."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1_000_000)
    start.record()
    torch.cuda._sleep(20_000_000)
    end.record()
    torch.cuda.synchronize()
    return 20_000_000 / (start.elapsed_time(end) / 1e3)


def device_seconds(call: Call, host: float, rate: float, before: Call | None = None) -> tuple[float, bool]:
    """A call's time on the device, which waits for the host before, and whether it waited long enough.

    A wait that was too short is repeated twice as long, up to LONGEST_WAIT.

    Args:
        host: seconds that the call takes to return. rate: of `cycles_per_second`. before: work for the device that is
            not timed.
    """
    wait = min(1.5 * host + 2e-4, LONGEST_WAIT)
    while True:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if before is not None:
            before()
        torch.cuda._sleep(int(rate * wait))
        start.record()
        result = call()
        end.record()
        ahead = not start.query()
        torch.cuda.synchronize()
        del result
        if ahead or wait >= LONGEST_WAIT:
            return start.elapsed_time(end) / 1e3, ahead
        wait = min(2 * wait, LONGEST_WAIT)


def host_seconds(call: Call, calls: int = 5) -> float:
    """The host's time to enqueue one call on an idle device: the median of some."""
    return float(np.median([_latency(call)[1] for _ in range(calls)]))


def _latency(call: Call) -> tuple[float, float]:
    """Seconds until the device is done, and until the call returns."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    returned = time.perf_counter()
    torch.cuda.synchronize()
    done = time.perf_counter()
    del result
    return done - start, returned - start


def _repeated(call: Call, number: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(number):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / number


def peak_memory(call: Call, times: int = 1) -> int:
    """Bytes that calls allocate beyond what was live before the first, at their peak."""
    # Tensors in cycles that calls before have left would count as live, and might be freed in the middle.
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(times):
        call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Matmul:
    """What the device can do: a square product of 8192 rows, `calls` of them in one call, `work` FLOPs."""

    calls = 4

    def __init__(self, device: torch.device, dtype: torch.dtype, rows: int = 8192) -> None:
        self.label = f"{rows}^3 {str(dtype).removeprefix('torch.')} matmul"
        self.work = self.calls * 2 * rows**3
        self.a, self.b = (torch.randn(rows, rows, device=device, dtype=dtype) for _ in range(2))
        self.product = torch.empty_like(self.a)

    def __call__(self) -> None:
        for _ in range(self.calls):
            torch.mm(self.a, self.b, out=self.product)
