"""Interleaved timing in one process: every round runs each task, so that machine drift hits all alike."""

from __future__ import annotations

import gc
import math
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from pixnerd_kernels import backends

#: Tasks shorter than this are repeated inside a sample, which then holds their mean. Seconds.
MIN_SAMPLE = 1e-3


@dataclass(frozen=True)
class Budget:
    """How long to measure: rounds until `seconds` would be spent, within the two bounds.

    malloc's heap settles only after several calls: each task is warmed up by 10, or as many as `warm_up`
    seconds hold, and by 2 at least.
    """

    seconds: float = 10.0
    least: int = 11
    most: int = 101
    warm_up: float = 0.5

    def rounds(self, round_seconds: float) -> int:
        return min(self.most, max(self.least, int(self.seconds / max(round_seconds, 1e-9))))


QUICK = Budget(seconds=1.5, least=3, most=21, warm_up=0.2)


@dataclass(frozen=True)
class Samples:
    """Seconds and minor page faults of one call of a task, round by round."""

    seconds: list[float]
    faults: list[float]

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.seconds, q))

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    def ratio(self, other: Samples) -> float:
        """The median over rounds of this task's time over the other's in the same round."""
        return float(np.median(np.divide(self.seconds, other.seconds)))


def interleave(tasks: Mapping[str, Callable[[], object]], budget: Budget) -> dict[str, Samples]:
    """Time every task in every round; each round starts with another task.

    A call's results are freed inside its own time, as they would be in use.
    """
    repeats = {name: _calibrate(task, budget.warm_up) for name, task in tasks.items()}
    rounds = budget.rounds(sum(number * seconds for number, seconds in repeats.values()))
    samples = {name: Samples([], []) for name in tasks}
    names = list(tasks)
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                task, (number, _) = tasks[name], repeats[name]
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                start = time.perf_counter()
                for _ in range(number):
                    task()
                elapsed = time.perf_counter() - start
                faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
                samples[name].seconds.append(elapsed / number)
                samples[name].faults.append(faults / number)
    finally:
        gc.enable()
    return samples


def _calibrate(task: Callable[[], object], warm_up: float) -> tuple[int, float]:
    """Warm a task up; how many calls make a sample, and the seconds of one."""
    begin, calls = time.perf_counter(), 0
    while calls < 2 or (calls < 10 and time.perf_counter() - begin < warm_up):
        start = time.perf_counter()
        task()
        seconds = time.perf_counter() - start
        calls += 1
    return max(1, math.ceil(MIN_SAMPLE / max(seconds, 1e-7))), seconds


@dataclass(frozen=True)
class Yardstick:
    """What the machine can do: the work of one call of `run`, in FLOPs or bytes (`work`)."""

    name: str
    label: str
    work: int
    run: Callable[[], object]


#: Steps of one call of the multiply-adds: some 20 ms.
_STEPS = 5_000_000


def multiply_adds() -> list[Yardstick]:
    """The limit of float32 arithmetic: multiply-adds on registers alone, on torch's threads; none without the core."""
    try:
        core = backends.native()
    except NotImplementedError:
        return []
    threads = torch.get_num_threads()
    work = core.multiply_adds(1, threads) * _STEPS
    label = f"multiply-adds on registers ({core.isa()})"
    return [Yardstick("peak", label, work, lambda: core.multiply_adds(_STEPS, threads))]


def yardsticks(matmul: int = 2048, copy_mib: int = 64) -> list[Yardstick]:
    """A square float32 matmul of that many rows, a copy of that many MiB (reads and writes count), and the limit."""
    a, b = torch.randn(matmul, matmul), torch.randn(matmul, matmul)
    product = torch.empty(matmul, matmul)
    source = torch.ones(copy_mib << 18)
    target = torch.zeros_like(source)
    return [
        Yardstick("matmul", f"{matmul}^3 float32 matmul", 2 * matmul**3, lambda: torch.mm(a, b, out=product)),
        Yardstick("copy", f"{copy_mib} MiB copy", 2 * source.nbytes, lambda: target.copy_(source)),
        *multiply_adds(),
    ]
