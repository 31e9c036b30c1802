"""Where and with what a result was measured."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import shlex
import subprocess
from pathlib import Path
from typing import Any

import torch

import pixnerd_kernels
from pixnerd_kernels import backends

#: Results that were just written change no measurement.
_CODE = ("--", ".", ":(exclude)benchmarks/results")
ROOT = Path(__file__).resolve().parents[1]


def core_isa() -> str:
    """The instruction set that the compiled core runs with, or an empty string without the core."""
    try:
        return str(backends.native().isa())
    except NotImplementedError:
        return ""


def collect(arguments: list[str]) -> dict[str, Any]:
    """Machine, versions, commit, command and time of this run."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": core_isa() or "none (no compiled core: ours runs on the reference)",
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release()}",
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pixnerd_kernels": pixnerd_kernels.__version__,
        **_commit(),
        "command": shlex.join(["python", "-m", "benchmarks", *arguments]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _commit() -> dict[str, Any]:
    """What git says; or what PIXNERD_COMMIT says of a copy of the files without their history, which nobody checks."""
    if told := os.environ.get("PIXNERD_COMMIT"):
        return {"commit": told, "dirty": None, "commit_source": "told by PIXNERD_COMMIT"}
    status = _git("status", "--porcelain", *_CODE)
    return {"commit": _git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def summary(provenance: dict[str, Any]) -> str:
    """One line for tables and plots."""
    commit = (provenance["commit"] or "no commit")[:10] + ("+changes" if provenance["dirty"] else "")
    commit += " (as told)" if provenance.get("commit_source") else ""
    if card := provenance.get("gpu"):
        triton = f"Triton {provenance['triton']}, " if provenance.get("triton") else ""
        return f"{card['name']}, torch {provenance['torch']}, {triton}{commit}, {provenance['date'][:10]}"
    return (
        f"{provenance['cpu']}, {provenance['threads']} threads, core {provenance['isa'].split(' ')[0]}, "
        f"torch {provenance['torch']}, Python {provenance['python']}, {commit}, {provenance['date'][:10]}"
    )


def announce(provenance: dict[str, Any]) -> None:
    """Print where a run is measured, and the warning where other work runs."""
    print(summary(provenance), flush=True)
    if warning := busy(provenance):
        print(f"warning: {warning}", flush=True)


def busy(provenance: dict[str, Any]) -> str:
    """A warning when other work takes more than a quarter of the cores, and an empty string otherwise.

    OpenMP's barriers spin: threads that share a core with other work can make a call many times slower.
    """
    load, cores = provenance["load_average"], provenance["cores"]
    if load is None or load <= cores / 4:
        return ""
    return f"the load average is {load:.1f} on {cores} cores: other work ran just now; do not trust these timings"


def _cpu_model() -> str:
    """The name, and what tells apart processors that a virtual machine gives one name."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    if name := found.get("model name"):
        numbers = [f"{key.split()[-1]} {found[key]}" for key in ("cpu family", "model") if key in found]
        return f"{name} ({', '.join(numbers)})" if numbers else name
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    """What git prints, or None outside of a checkout."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
