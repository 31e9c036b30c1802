"""What the ops ask of the operating system for the tensors that they make."""

from pathlib import Path

import pytest
import torch

from pixnerd_kernels.ops.native import fresh

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


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
    tensor = fresh(torch.empty(64 << 20, dtype=torch.uint8))
    tensor.fill_(1)
    assert huge_kilobytes(tensor) >= 32 << 10


def test_every_size_is_taken(core_calls):
    for size in (0, 1, (4 << 20) - 1, 4 << 20, (5 << 20) + 3):
        tensor = fresh(torch.empty(size, dtype=torch.uint8))
        assert tensor.shape == (size,)
        tensor.fill_(7)
        assert bool((tensor == 7).all())
