"""`--base REF`: the same cases on another commit's package, its processes taking turns with this tree's.

Two versions of the package cannot share a process (both define the ops `pixnerd::*`), so every round starts one
process for each, and swaps their order. This tree's benchmarks run both: what is compared is the package.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import provenance
from benchmarks.worker import Job

#: Pairs of processes for each case.
ROUNDS = 5
Launch = Callable[[Job, Path], dict[str, Any]]


def resolve(ref: str) -> str:
    """The commit that a name stands for.

    Raises:
        ValueError: git knows no such commit here.
    """
    command = ["git", "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}"]
    done = subprocess.run(command, cwd=provenance.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"--base: git knows no commit {ref!r} here")
    return done.stdout.strip()


def checkout(commit: str, folder: Path) -> Path:
    """A folder from which Python imports that commit's package and this tree's benchmarks; builds its core.

    Kept from one run to the next.

    Raises:
        ValueError: the core cannot be built; the message ends with the build's.
    """
    home = folder / f"pixnerd-base-{commit[:12]}"
    tree, root = home / "tree", home / "root"
    if not root.exists():
        tree.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(
            ["git", "archive", commit], cwd=provenance.ROOT, capture_output=True, check=True
        )
        subprocess.run(["tar", "-x"], cwd=tree, input=archive.stdout, check=True)
        _build(tree)
        root.mkdir()
        (root / "pixnerd_kernels").symlink_to(tree / "pixnerd_kernels")
        (root / "benchmarks").symlink_to(provenance.ROOT / "benchmarks")
    return root


def _build(tree: Path) -> None:
    environment = {**os.environ, "PIXNERD_REQUIRE_NATIVE": "1"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"--base: the commit's core cannot be built:\n{(done.stdout + done.stderr)[-2000:]}")


def measure(jobs: Sequence[Job], commit: str, root: Path, launch: Launch) -> list[dict[str, Any]]:
    """For each job the seconds of every round on both sides, and base's over this tree's, round by round."""
    return [compare(job, {"base": root, "now": provenance.ROOT}, launch) for job in jobs]


def compare(job: Job, roots: dict[str, Path], launch: Launch) -> dict[str, Any]:
    """One job; a side that fails ends it, and the result says which and why."""
    result: dict[str, Any] = {"case": job.case, "malloc": job.malloc, "status": "ok"}
    seconds: dict[str, list[float]] = {side: [] for side in roots}
    peaks: dict[str, int | None] = {}
    for index in range(ROUNDS):
        sides = list(roots)[:: 1 if index % 2 == 0 else -1]
        for side in sides:
            print(f"    {job.case}: round {index + 1} of {ROUNDS}, {side}", file=sys.stderr, flush=True)
            measured = launch(job, roots[side])
            entry = measured["providers"].get("ours", {})
            if "median_s" not in entry:
                reason = entry.get("reason") or measured.get("reason") or measured["status"]
                return {**result, "status": "error", "reason": f"{side} cannot run it: {reason}"}
            seconds[side].append(entry["median_s"])
            peaks[side] = entry.get("memory", {}).get("peak")
    ratios = np.divide(seconds["base"], seconds["now"])
    return {
        **result,
        "seconds": seconds,
        "median_s": {side: float(np.median(values)) for side, values in seconds.items()},
        "peak": peaks,
        "base_over_now": float(np.median(ratios)),
        "least_ratio": float(ratios.min()),
        "largest_ratio": float(ratios.max()),
    }


def table(document: dict[str, Any]) -> str:
    """Markdown: above 1 this tree is faster."""
    lines = [
        f"| ours, base is {document['base'][:10]} | malloc | base ms | now ms | base over now (range) | peak MB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for result in document["results"]:
        if result["status"] != "ok":
            lines.append(
                f"| {result['case']} | {result['malloc']} | {result['reason'].splitlines()[0]} | | | |"
            )
            continue
        base, now = (f"{1e3 * result['median_s'][side]:.3g}" for side in ("base", "now"))
        spread = f"{result['least_ratio']:.2f}-{result['largest_ratio']:.2f}"
        peak = " to ".join(
            "-" if (bytes_ := result["peak"].get(side)) is None else f"{bytes_ / 1e6:.3g}"
            for side in ("base", "now")
        )
        ratio = f"{result['base_over_now']:.2f}x ({spread})"
        lines.append(f"| {result['case']} | {result['malloc']} | {base} | {now} | {ratio} | {peak} |")
    where = document["provenance"]
    return "\n".join([*lines, "", f"`{where['command']}` on {provenance.summary(where)}.", ""])


def folder() -> Path:
    """Where checkouts are kept: the system's temporary folder."""
    return Path(tempfile.gettempdir())
