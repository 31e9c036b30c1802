"""Which backend runs an op, and for each that cannot, every reason why.

Three backends exist: ``reference`` (plain PyTorch, any device), ``cpu`` (the compiled C++ core) and ``triton``
(CUDA). By default CPU tensors take ``cpu`` when the core is there, CUDA tensors take ``triton``, and everything
else takes ``reference``. `use_backend` or the environment variable ``PIXNERD_BACKEND`` forces one.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

from pixnerd_kernels.checks import FLOATS

BACKENDS = ("reference", "cpu", "triton")

#: Ops with a compiled CPU kernel; every op has a reference.
CPU_OPS = frozenset(
    {
        "coordinate_encoding",
        "gated_residual",
        "modulated_rms_norm",
        "neural_field_mlp",
        "normalize_weights",
        "pixel_decoder",
        "qk_norm_rope",
        "swiglu",
    }
)
#: Ops with a Triton kernel.
TRITON_OPS = CPU_OPS
#: Those whose Triton kernel computes in float64 too.
TRITON_FLOAT64_OPS = frozenset({"coordinate_encoding"})
#: The oldest Triton that the kernels are compiled with in tests.
_OLDEST_TRITON = (3, 6)


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no", "off")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


# A plain global and no ContextVar: torch.compile reads it as a constant guarded against change, so that a
# forced backend is part of the compiled graph, backward included.
# The environment's value is checked when an op asks for it: importing the package must not fail.
_forced: str = os.environ.get("PIXNERD_BACKEND", "")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every op called inside the block onto one backend.

    Args:
        name: ``"reference"``, ``"cpu"`` or ``"triton"``.

    The choice holds for the whole process while the block is open (all threads), and the backward of an op
    runs on the backend that its forward took, also after the block. An op that cannot run on the forced
    backend raises ``NotImplementedError`` with every reason.

    Raises:
        ValueError: the name is unknown.
    """
    global _forced
    previous = _forced
    _forced = _checked(name, "use_backend")
    try:
        yield
    finally:
        _forced = previous


def forced_backend() -> str:
    """The name of the forced backend, or an empty string when each op chooses for itself.

    Raises:
        ValueError: ``PIXNERD_BACKEND`` names an unknown backend.
    """
    return _checked(_forced, "PIXNERD_BACKEND") if _forced else ""


def _import_core() -> ModuleType:
    """The compiled module beside this file, and no other.

    An ordinary import would also ask the finder of an editable installation, and bring this copy of the package the
    core of another.
    """
    name = "pixnerd_kernels._native"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.machinery.PathFinder.find_spec(name, [str(Path(__file__).parent)])
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


@functools.cache
def _load_native() -> tuple[ModuleType | None, str]:
    """The compiled core and an empty string, or None and the reason why it is not there."""
    if _flag("PIXNERD_SKIP_NATIVE"):
        return None, "PIXNERD_SKIP_NATIVE is set"
    try:
        return _import_core(), ""
    except Exception as error:
        note = Path(__file__).with_name("_native_missing.txt")
        if isinstance(error, ModuleNotFoundError) and note.exists():
            return None, f"it was not built: {note.read_text().strip()}"
        return None, f"importing pixnerd_kernels._native failed: {type(error).__name__}: {error}"


def native() -> ModuleType:
    """The compiled core.

    Raises:
        NotImplementedError: the core is not there; the message says why.
    """
    module, reason = _load_native()
    if module is None:
        raise NotImplementedError(f"the compiled CPU core is not available: {reason}")
    return module


@functools.cache
def _warn_missing_core(reason: str) -> None:
    warnings.warn(
        f"pixnerd_kernels runs on the slow PyTorch reference because the compiled CPU core is not available: "
        f"{reason}",
        RuntimeWarning,
        stacklevel=4,
    )


@functools.cache
def _triton_missing() -> str:
    """Why Triton cannot be used at all, or an empty string."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "triton is not installed"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < _OLDEST_TRITON:
        return f"triton {'.'.join(map(str, _OLDEST_TRITON))} or newer is needed, {version} is installed"
    return ""


def _interpreting() -> bool:
    """Whether Triton's interpreter runs kernels on CPU tensors, as the tests do without a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def _gpu_too_old(device: torch.device) -> str:
    """Why this GPU cannot run the kernels, or an empty string."""
    if torch.version.hip is not None:
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"compute capability 8.0 or newer is needed, {device} has {major}.{minor}"


def _triton_reasons(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    reasons = []
    if op not in TRITON_OPS:
        reasons.append(f"no Triton kernel is written for {op} yet")
    elif dtype == torch.float64 and op not in TRITON_FLOAT64_OPS:
        reasons.append(f"the Triton kernel of {op} does not compute in float64")
    if missing := _triton_missing():
        reasons.append(missing)
    if _interpreting():
        if device.type != "cpu":
            reasons.append(f"TRITON_INTERPRET is set: it needs CPU tensors, the inputs are on {device}")
        return reasons
    if device.type != "cuda":
        reasons.append(f"it needs CUDA tensors, the inputs are on {device}")
    if not torch.cuda.is_available():
        reasons.append("torch sees no CUDA device")
    elif device.type == "cuda" and (old := _gpu_too_old(device)):
        reasons.append(old)
    return reasons


def not_supported_reasons(
    op: str, backend: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[str]:
    """Every reason why `op` cannot run on `backend` for tensors of this device and dtype; empty if it can."""
    reasons: list[str] = []
    if dtype not in FLOATS:
        reasons.append(f"{dtype} is not one of float32, float64, bfloat16, float16")
    if backend == "triton":
        reasons += _triton_reasons(op, device, dtype)
    elif backend == "cpu":
        if op not in CPU_OPS:
            reasons.append(f"no CPU kernel is written for {op}")
        if device.type != "cpu":
            reasons.append(f"it needs CPU tensors, the inputs are on {device}")
        _, missing = _load_native()
        if missing:
            reasons.append(f"the compiled CPU core is not available: {missing}")
    return reasons


def select(op: str, device: torch.device, dtype: torch.dtype, forced: str) -> str:
    """The backend that runs `op` for these tensors: the forced one, or the best that can.

    Raises:
        TypeError: no backend computes in this dtype.
        NotImplementedError: the forced backend cannot run; the message lists every reason.
    """
    return _select(op, device, dtype, forced, _load_native()[1] if device.type == "cpu" else "")


# Ops ask at every call, and nothing else that the answer depends on changes while a process lives.
@functools.cache
def _select(op: str, device: torch.device, dtype: torch.dtype, forced: str, missing: str) -> str:
    """`select`, where `missing` says why there is no compiled core for CPU tensors."""
    if dtype not in FLOATS:
        raise TypeError(f"{op}: expected float32, float64, bfloat16 or float16, got {dtype}")
    if forced:
        if reasons := not_supported_reasons(op, forced, device, dtype):
            lines = "\n".join(f"  - {reason}" for reason in reasons)
            raise NotImplementedError(f"{op} cannot run on the forced backend {forced!r}:\n{lines}")
        return forced
    if device.type == "cpu" and op in CPU_OPS:
        if not missing:
            return "cpu"
        _warn_missing_core(missing)
    elif device.type == "cuda" and op in TRITON_OPS and not _triton_reasons(op, device, dtype):
        return "triton"
    return "reference"
