"""`pixnerd verify`: every op and backend that can run here, held against float64.

The rule for each output and gradient: ||out - ref64|| <= 2 ||plain - ref64|| + 4 eps(dtype) ||ref64||, where
plain is the formula in plain PyTorch at that dtype and ref64 the same on the same inputs in float64.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from pixnerd_kernels.cli.arguments import Subparsers, table

if TYPE_CHECKING:
    import torch

    from pixnerd_kernels.cli.verify_cases import Case


def add_parser(subparsers: Subparsers) -> None:
    from pixnerd_kernels.backends import BACKENDS

    parser = subparsers.add_parser("verify", help="check every op on every backend against float64")
    parser.add_argument("--backend", choices=BACKENDS, help="check this backend only")
    parser.add_argument("--json", action="store_true", help="print JSON")


class Where(NamedTuple):
    """What cases run on."""

    backend: str
    device: torch.device
    dtype: torch.dtype


#: A case's place in `cases()`, and where it runs.
Run = tuple[int, Where]
#: For each tensor of a run its name, its error as a fraction of the bound, and its relative error.
Errors = list[tuple[str, float, float]]


def _measure(case: Case, where: Where) -> Errors:
    from pixnerd_kernels import use_backend

    with use_backend(where.backend):
        results = case.run(where.device, where.dtype)
    # A NaN must win the maximum, which Python's max does not promise.
    return [(r.name, math.inf if math.isnan(r.of_bound) else r.of_bound, r.relative) for r in results]


@functools.cache
def _cases() -> tuple[Case, ...]:
    from pixnerd_kernels.cli.verify_cases import cases

    return tuple(cases())


def _measure_there(run: Run) -> Errors:
    """`_measure` in a process of `_measure_side_by_side`."""
    import torch

    torch.set_num_threads(1)
    index, where = run
    return _measure(_cases()[index], where)


def _measure_side_by_side(runs: list[Run]) -> list[Errors]:
    """`_measure` of every run in processes of their own, for runs that spend their time in Triton's compiler."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    if not runs:
        return []
    # Each holds a CUDA context, half a gigabyte of the GPU.
    processes = min(len(runs), os.cpu_count() or 1, 8)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_measure_there, runs))


def _row(group: list[tuple[Case, Errors]], where: Where) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One row of the table: an op's cases on a backend at a dtype; and what missed the rule."""
    worst, relative, misses = 0.0, 0.0, []
    row = {
        "op": group[0][0].op,
        "backend": where.backend,
        "device": where.device.type,
        "dtype": str(where.dtype).removeprefix("torch."),
        "cases": len(group),
    }
    for case, errors in group:
        for tensor, of_bound, error in errors:
            worst, relative = max(worst, of_bound), max(relative, error)
            if not of_bound <= 1:
                misses.append({**row, "case": case.label, "tensor": tensor, "of_bound": of_bound})
    return {**row, "relative_error": relative, "of_bound": worst, "passed": not misses}, misses


def collect(only: str | None = None) -> dict[str, Any]:
    """Run every case: the table's rows, the misses, and the backends that cannot run with all reasons."""
    import torch

    from pixnerd_kernels import backends
    from pixnerd_kernels.cli.verify_cases import cases

    every = list(cases())
    groups: dict[str, list[int]] = {}
    for index, case in enumerate(every):
        groups.setdefault(case.op, []).append(index)
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    planned: list[tuple[list[int], Where]] = []
    unsupported: list[dict[str, Any]] = []
    for op, group in groups.items():
        for backend in [only] if only else backends.BACKENDS:
            reasons: dict[str, None] = {}
            ran = False
            for device in devices:
                for dtype in dtypes:
                    why = backends.not_supported_reasons(every[group[0]].kernel, backend, device, dtype)
                    if why:
                        reasons |= dict.fromkeys(why)
                        continue
                    planned.append((group, Where(backend, device, dtype)))
                    ran = True
            if not ran:
                unsupported.append({"op": op, "backend": backend, "reasons": list(reasons)})
    compiled = [
        (index, where)
        for group, where in planned
        if where.backend == "triton" and where.device.type == "cuda"
        for index in group
    ]
    done: dict[Run, Errors] = dict(zip(compiled, _measure_side_by_side(compiled), strict=True))
    rows: list[dict[str, Any]] = []
    misses: list[dict[str, Any]] = []
    for group, where in planned:
        measured = [
            (every[index], done[index, where] if (index, where) in done else _measure(every[index], where))
            for index in group
        ]
        row, missed = _row(measured, where)
        rows.append(row)
        misses += missed
    return {"passed": bool(rows) and not misses, "rows": rows, "misses": misses, "unsupported": unsupported}


def _text(data: dict[str, Any]) -> str:
    blocks = []
    if data["rows"]:
        rows = [["op", "backend", "on", "dtype", "cases", "worst error", "of bound", ""]]
        for row in data["rows"]:
            rows.append(
                [row["op"], row["backend"], row["device"], row["dtype"], str(row["cases"]),
                 f"{row['relative_error']:.1e}", f"{row['of_bound']:.2f}", "ok" if row["passed"] else "MISS"]
            )  # fmt: skip
        blocks.append(table(rows))
    for miss in data["misses"]:
        where = f"{miss['op']} on {miss['backend']} ({miss['device']}, {miss['dtype']})"
        blocks.append(
            f"MISS {where}, {miss['case']}: {miss['tensor']} is {miss['of_bound']:.3g} of its bound"
        )
    if data["unsupported"]:
        lines = [
            f"  {entry['op']} on {entry['backend']}: {'; '.join(entry['reasons'])}"
            for entry in data["unsupported"]
        ]
        blocks.append("\n".join(["not run here:", *lines]))
    checked, missed = len(data["rows"]), sum(not row["passed"] for row in data["rows"])
    blocks.append(f"{checked - missed} of {checked} passed" if checked else "nothing could be verified")
    return "\n\n".join(blocks)


def run(args: argparse.Namespace) -> int:
    data = collect(args.backend)
    print(json.dumps(data, indent=2) if args.json else _text(data))
    if not data["rows"]:
        print(f"pixnerd verify: error: backend {args.backend!r} cannot run any op here", file=sys.stderr)
    return 0 if data["passed"] else 1
