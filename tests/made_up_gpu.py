"""What the GPU benchmarks ask of CUDA, played on a CPU: events are clocks, and every wait is over at once."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch


class Event:
    """An event that is over as soon as it is recorded, which the host is told only after a synchronisation."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return False

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


def install(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put it in torch.cuda's place; the list tells what was called."""
    told: list[str] = []
    memory = iter(range(1000, 10**9, 1000))

    def note(name: str, result: Any = None) -> None:
        def call(*arguments: Any) -> Any:
            told.append(name)
            return next(memory) if result == "bytes" else result

        monkeypatch.setattr(torch.cuda, name, call)

    for name in ("synchronize", "_sleep", "reset_peak_memory_stats", "empty_cache"):
        note(name)
    note("memory_allocated", "bytes")
    note("max_memory_allocated", "bytes")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return told
