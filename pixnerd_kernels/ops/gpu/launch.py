"""What every Triton launch passes through: the GPU it is for, the numbers that kernels take from it, and the call."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction


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
    registers: int = 0  # a thread's at most; 0 leaves it to the compiler
    #: Percent of a processor's fast memory that shall be shared memory, not cache. 0 leaves it to Triton, which wants
    #: all of it for kernels that take more than 48 KiB.
    carveout: int = 0

    def named(self) -> dict[str, int]:
        """As Triton names them."""
        found = {"num_warps": self.warps, "num_stages": self.stages}
        return found | {"maxnreg": self.registers} if self.registers else found


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


class _Compiled(NamedTuple):
    """A variant of a kernel, as Triton's launcher takes it."""

    run: Callable[..., None]
    function: int
    metadata: Any


@dataclass(frozen=True)
class _Known:
    """A kernel that was launched before, and what it was compiled to."""

    kernel: Any  # kept alive: `_known` names it by its id
    size: int = -1  # how many arguments it takes; -1 leaves all launches to Triton
    tensors: Callable[[Any], tuple[Any, ...]] = tuple
    others: Callable[[Any], tuple[Any, ...]] = tuple
    #: Puts tensors and others, one after the other, into the kernel's own order.
    ordered: Callable[[Any], tuple[Any, ...]] = tuple
    variants: dict[tuple[Any, ...], _Compiled] = field(default_factory=dict)


_watcher: Callable[[Launch], bool] | None = None
_pretended: Target | None = None
_known: dict[int, _Known] = {}
#: Variants of a kernel that are remembered: shapes that never end must not fill the memory.
_MOST_VARIANTS = 4096
#: Whether this is one of the Tritons whose launcher is called as `_launch` does, and whose Gluon is written here. All
#: others launch by themselves and run the kernels that are not in Gluon.
KNOWN_TRITON = triton.__version__.startswith(("3.6.", "3.7.", "3.8."))
_RUN = JITFunction.run


@functools.cache
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
    if interpreting():
        kernel[grid](**arguments)
        return
    driver = triton.runtime.driver.active
    if driver.get_current_device() == device.index:
        _launch(driver, kernel, grid, device.index, options, arguments)
    else:
        with torch.cuda.device(device):
            _launch(driver, kernel, grid, device.index, options, arguments)


def _launch(
    driver: Any, kernel: Any, grid: tuple[int, ...], device: int, options: Options, arguments: dict[str, Any]
) -> None:
    """Launch what was compiled for such arguments before; Triton compiles and launches it the first time.

    Triton works out every argument's kind anew at every launch, for longer than a small kernel runs. Here a variant is
    found by more than it depends on: the numbers themselves, and the tensors' dtypes, devices and alignment. Addresses
    go to the launcher as integers, since for each tensor it would ask the CUDA driver where it lies; a variant's first
    launch has asked.
    """
    known = _known.get(id(kernel))
    if known is None:
        known = _known[id(kernel)] = _describe(kernel, arguments)
    if len(arguments) != known.size or _observed(kernel):
        kernel[grid](**arguments, **options.named())
        return
    tensors, others = known.tensors(arguments), known.others(arguments)
    addresses = [tensor.data_ptr() for tensor in tensors]
    key = (
        device, options, others, tuple(map(type, others)),
        tuple([tensor.dtype for tensor in tensors]),
        tuple([tensor.get_device() for tensor in tensors]),
        tuple([address % 16 == 0 for address in addresses]),
    )  # fmt: skip
    found = known.variants.get(key)
    if found is None:
        compiled = kernel[grid](**arguments, **options.named())
        if options.carveout:
            _carve(compiled.function, options.carveout)
        # Triton looks at global variables at every launch; and no address of the host's may pass for the device's.
        constant = all(
            isinstance(value, triton.language.constexpr) for value, _ in kernel.used_global_vals.values()
        )
        if constant and all(tensor.device.index == device for tensor in tensors):
            if len(known.variants) >= _MOST_VARIANTS:
                known.variants.clear()
            known.variants[key] = _Compiled(compiled.run, compiled.function, compiled.packed_metadata)
        return
    x, y, z, *_ = *grid, 1, 1
    # Neither launch metadata nor hooks: nobody has asked for them.
    found.run(
        x, y, z, driver.get_current_stream(device), found.function, found.metadata, None, None, None,
        *known.ordered((*addresses, *others)),
    )  # fmt: skip


@functools.cache
def _cuda() -> Any:
    """The CUDA driver's library, or None where it has another name."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _carve(function: int, percent: int) -> None:
    """Wish for so much shared memory in later launches of a compiled kernel; the driver need not heed it."""
    preferred_shared_memory_carveout = 9  # of CUfunction_attribute
    if (cuda := _cuda()) is not None:
        cuda.cuFuncSetAttribute(
            ctypes.c_void_p(function), ctypes.c_int(preferred_shared_memory_carveout), ctypes.c_int(percent)
        )


def _describe(kernel: Any, arguments: dict[str, Any]) -> _Known:
    """Where a kernel's tensors are among its arguments, if its launches need nothing of Triton."""
    # On AMD's GPUs a variant depends on the sizes of tensors, too.
    if not KNOWN_TRITON or not isinstance(kernel, JITFunction) or torch.version.hip is not None:
        return _Known(kernel)
    names = kernel.arg_names
    if set(names) != set(arguments):  # a default's value is not here, or Triton has to complain
        return _Known(kernel)
    tensors = [name for name in names if isinstance(arguments[name], Tensor)]
    others = [name for name in names if not isinstance(arguments[name], Tensor)]
    places = {name: place for place, name in enumerate((*tensors, *others))}
    return _Known(
        kernel, len(names), _getter(tensors), _getter(others), _getter([places[name] for name in names])
    )


def _getter(keys: list[Any]) -> Callable[[Any], tuple[Any, ...]]:
    """From a container to the tuple of its items at these keys."""
    if len(keys) > 1:
        return itemgetter(*keys)
    return lambda container: tuple([container[key] for key in keys])


def _observed(kernel: Any) -> bool:
    """Whether a profiler, a hook or a debugging option wants Triton itself to launch."""
    knobs = triton.knobs.runtime
    return bool(
        JITFunction.run is not _RUN
        or kernel.pre_run_hooks
        or knobs.launch_enter_hook.calls
        or knobs.launch_exit_hook.calls
        or knobs.debug
        or getattr(knobs, "add_stages_inspection_hook", None)
        or vars(triton.knobs.compilation).get("instrumentation_mode")
    )


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
    return max(16, power_of_two(size))


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`; Triton's own function takes microseconds."""
    return 1 << max(size - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
