"""What the ops ask of the operating system for the tensors that they make."""

import mmap
from pathlib import Path

import pytest
import torch

from pixnerd_kernels.ops.native import fresh

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SIZE = 64 << 20


def huge_kilobytes(tensor):
    """How much of the memory around a tensor lies on huge pages."""
    first, total, inside = tensor.data_ptr(), 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):
            low, high = (int(part, 16) for part in name.split("-"))
            inside = low < first + tensor.nbytes and first < high
        elif inside and name == "AnonHugePages:":
            total += int(values[0])
    return total


@pytest.mark.skipif(
    not SWITCH.exists() or "[never]" in SWITCH.read_text(), reason="this system has no transparent huge pages"
)
def test_large_new_tensors_lie_on_huge_pages(core_calls):
    """Where memory is scarce or in pieces, the system may refuse whoever asks: then it is asked directly beside it."""
    for _ in range(3):
        tensor = fresh(torch.empty(SIZE, dtype=torch.uint8)).fill_(1)
        asked = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        asked.madvise(mmap.MADV_HUGEPAGE)
        beside = torch.frombuffer(asked, dtype=torch.uint8).fill_(1)
        found, possible = huge_kilobytes(tensor), huge_kilobytes(beside)
        if found >= SIZE >> 11:
            return
    if possible < SIZE >> 11:
        pytest.skip(f"the system gives only {possible} KiB of {SIZE >> 10} on huge pages now")
    raise AssertionError(f"{found} KiB of {SIZE >> 10} lie on huge pages, where {possible} could")


def test_every_size_is_taken(core_calls):
    for size in (0, 1, (4 << 20) - 1, 4 << 20, (5 << 20) + 3):
        tensor = fresh(torch.empty(size, dtype=torch.uint8))
        assert tensor.shape == (size,)
        tensor.fill_(7)
        assert bool((tensor == 7).all())
