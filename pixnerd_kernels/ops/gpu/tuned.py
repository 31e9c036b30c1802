"""Launch plans by GPU: committed entries that `python -m benchmarks tune` measures, and a heuristic for the rest.

An op's `tuned.json` beside its kernels maps a GPU's name to plans by problem, a problem being named by exactly what the
kernel's compilation and loops depend on. Nothing is measured when an op is called.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_override: Any = None
_version = 0


@functools.cache
def _entries(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    return json.loads(path.read_text()) if path.exists() else {}


def entry(path: Path, gpu: str, problem: str) -> dict[str, Any] | None:
    """The committed plan of a problem on this GPU, or None."""
    return _entries(path).get(gpu, {}).get(problem)


def version() -> int:
    """A number that changes with every entry that this process writes."""
    return _version


def overridden() -> Any:
    """The plan that `override` has set, or None."""
    return _override


@contextmanager
def override(plan: Any) -> Iterator[None]:
    """Launch with this plan inside the block: for tuning, and for tests of plans that no policy would choose."""
    global _override
    before = _override
    _override = plan
    try:
        yield
    finally:
        _override = before


def save(path: Path, gpu: str, problem: str, plan: dict[str, Any]) -> None:
    """Write an entry, replacing that of the same GPU and problem."""
    global _version
    entries = json.loads(path.read_text()) if path.exists() else {}
    entries.setdefault(gpu, {})[problem] = plan
    path.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")
    _entries.cache_clear()
    _version += 1
