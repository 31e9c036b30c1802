"""What this machine and this installation are, for reports that carry figures."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

#: The CPU features that matter for these kernels, as Linux names them.
_FEATURES = ("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16",
             "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "asimdhp", "bf16", "sve")  # fmt: skip


def _cpuinfo(*keys: str) -> str:
    """The first of these entries in /proc/cpuinfo, or an empty string."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in keys:
            return value.strip()
    return ""


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    return _cpuinfo("model name", "Model") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The vector extensions that this processor reports (Linux; elsewhere empty)."""
    present = set(_cpuinfo("flags", "Features").split())
    return [name for name in _FEATURES if name in present]


def installed(package: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions of this package and what it stands on; None where it is not installed."""
    import torch

    from pixnerd_kernels import __version__

    return {
        "pixnerd_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "numpy": installed("numpy"),
    }


def summary() -> dict[str, Any]:
    """The provenance of a figure: processor, threads, versions."""
    import torch

    return {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        **versions(),
    }
