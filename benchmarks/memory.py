"""Peak extra memory of one call: by torch's allocations, and by the process's peak resident set.

The allocation measure is exact and repeatable but sees torch's allocator only: neither the C++ core's scratch
per thread nor a BLAS's packing buffers are in it. The resident set sees everything at page granularity. It is
taken in a fresh process, as freed pages that malloc keeps would otherwise hide growth.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.providers import PROVIDERS, call
from benchmarks.registry import CASES

#: Blocks above this many bytes are mapped and unmapped one by one, so that the resident set follows what is
#: live; setting it also keeps glibc from raising the threshold by itself.
_MMAP_THRESHOLD = 1 << 20


@dataclass(frozen=True)
class Allocated:
    """Bytes beyond what was live before a call: at the peak, and kept in its results."""

    peak: int
    results: int

    @property
    def transient(self) -> int:
        """The peak without outputs and gradients."""
        return self.peak - self.results


def allocation_peak(function: Callable[[], tuple[Tensor, ...]]) -> Allocated:
    """Replay the profiler's allocation events of one call. Blocks that were live before are not counted."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        results = function()
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in results}
    recorded = profile.profiler.kineto_results.events()
    events = sorted((e.start_ns(), e.nbytes()) for e in recorded if e.name() == "[memory]")
    live = peak = 0
    for _, nbytes in events:
        live += nbytes
        peak = max(peak, live)
    return Allocated(peak, sum(sizes.values()))


def resident_growth(case: str, size: str, provider: str) -> int | None:
    """Bytes by which one call raises a fresh process's peak resident set; None where it cannot be read."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(_MMAP_THRESHOLD)}
    environment.pop("MALLOC_TRIM_THRESHOLD_", None)
    command = [sys.executable, "-m", "benchmarks.memory", case, size, provider, str(torch.get_num_threads())]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    growth: int | None = json.loads(done.stdout.splitlines()[-1])
    return growth


def _status(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def resident_peak(function: Callable[[], object]) -> int | None:
    """Bytes by which one call raises this process's peak resident set; None where it cannot be read.

    Pages that malloc keeps are given back first.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except (OSError, AttributeError):
        function()
        return None
    results = function()
    growth = _status("VmHWM") - before
    del results
    return max(growth, 0)


def _measure_growth(case_name: str, size: str, provider_name: str, threads: int) -> int | None:
    """Run one call between two readings of the resident set; meant for a process that does nothing else."""
    torch.set_num_threads(threads)
    case, provider = CASES[case_name], PROVIDERS[provider_name]
    shape = case.size(size)
    # Libraries, thread pools and autograd start on the smoke size. A compiled graph has to exist for the very
    # shape; its pages are given back below.
    warm = shape if provider_name == "compile" else case.smoke
    function = call(case, provider.prepare(case, warm), case.make(warm))
    function()
    made = case.make(shape)
    if provider_name != "compile":
        function = call(case, provider.prepare(case, shape), made)
    return resident_peak(function)


if __name__ == "__main__":
    print(json.dumps(_measure_growth(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))))
