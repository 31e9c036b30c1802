"""What every Triton launch passes through: the GPU it is for, the numbers that kernels take from it, and the call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Target:
    """A GPU as launch policies see it: "cuda" or "hip", compute capability (90) or name ("gfx942"), its size."""

    backend: str
    arch: int | str
    processors: int
    name: str

    @property
    def fast_tanh(self) -> bool:
        """Whether the hardware has an approximate tanh."""
        return self.backend == "cuda" and int(self.arch) >= 75


#: Triton's interpreter runs kernels in NumPy; a small "GPU", so that tests see several programs and tiles.
INTERPRETER = Target("interpreter", "interpreter", 2, "interpreter")


@dataclass(frozen=True)
class Options:
    """How a launch is compiled, beside the kernel's own arguments."""

    warps: int = 4
    stages: int = 1


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any] = field(hash=False)
    options: Options

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)


_watcher: Callable[[Launch], bool] | None = None
_pretended: Target | None = None


def interpreting() -> bool:
    """Whether TRITON_INTERPRET was set when the kernels were defined: they run on CPU tensors then."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _target(device: torch.device) -> Target:
    properties = torch.cuda.get_device_properties(device)
    processors, name = properties.multi_processor_count, properties.name
    if torch.version.hip is not None:
        return Target("hip", properties.gcnArchName.split(":")[0], processors, name)
    return Target("cuda", 10 * properties.major + properties.minor, processors, name)


def target_of(device: torch.device) -> Target:
    """The GPU behind a device; the interpreter's stand-in on a CPU."""
    if _pretended is not None:
        return _pretended
    return _target(device) if device.type == "cuda" else INTERPRETER


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, options: Options, **arguments: Any
) -> None:
    """Run `kernel` on the current stream of `device`; an empty grid runs nothing."""
    if 0 in grid:
        return
    if _watcher is not None and not _watcher(Launch(kernel, grid, arguments, options)):
        return
    if device.type != "cuda":
        kernel[grid](**arguments)
        return
    with torch.cuda.device(device):
        kernel[grid](**arguments, num_warps=options.warps, num_stages=options.stages)


@contextmanager
def watch(watcher: Callable[[Launch], bool]) -> Iterator[None]:
    """Show every launch to `watcher`, which says whether it shall run."""
    global _watcher
    before = _watcher
    _watcher = watcher
    try:
        yield
    finally:
        _watcher = before


@contextmanager
def capture(target: Target) -> Iterator[list[Launch]]:
    """Collect launches as they would be on `target`, without running them; meta tensors will do."""
    global _pretended
    before, launches = _pretended, list[Launch]()

    def collect(seen: Launch) -> bool:
        launches.append(seen)
        return False

    _pretended = target
    try:
        with watch(collect):
            yield launches
    finally:
        _pretended = before


def precision(dtype: torch.dtype, target: Target) -> str:
    """How products of this dtype are computed: "tf32" for float32 only where the user has allowed it."""
    allowed = torch.get_float32_matmul_precision() != "highest"
    return "tf32" if dtype == torch.float32 and allowed and target.backend == "cuda" else "ieee"


def emulates(dtype: torch.dtype) -> bool:
    """Whether kernels must emulate this dtype: see `pieces`."""
    return interpreting() and dtype == torch.bfloat16


def padded(size: int) -> int:
    """The power of two that holds `size`, 16 at least: the smallest operand of a product."""
    return max(16, triton.next_power_of_2(size))
