"""`pixnerd verify`: every op and backend that can run here, held against float64.

The rule for each output and gradient: ||out - ref64|| <= 2 ||plain - ref64|| + 4 eps(dtype) ||ref64||, where
plain is the formula in plain PyTorch at that dtype and ref64 the same on the same inputs in float64.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import TYPE_CHECKING, Any

from pixnerd_kernels.cli.arguments import Subparsers, table

if TYPE_CHECKING:
    import torch

    from pixnerd_kernels.cli.verify_cases import Case


def add_parser(subparsers: Subparsers) -> None:
    from pixnerd_kernels.backends import BACKENDS

    parser = subparsers.add_parser("verify", help="check every op on every backend against float64")
    parser.add_argument("--backend", choices=BACKENDS, help="check this backend only")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _check(
    group: list[Case], backend: str, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One row of the table: an op's cases on a backend at a dtype; and what missed the rule."""
    from pixnerd_kernels import use_backend

    worst, relative, misses = 0.0, 0.0, []
    name = str(dtype).removeprefix("torch.")
    row = {"op": group[0].op, "backend": backend, "device": device.type, "dtype": name, "cases": len(group)}
    with use_backend(backend):
        for case in group:
            for result in case.run(device, dtype):
                # A NaN must win the maximum, which Python's max does not promise.
                fraction = math.inf if math.isnan(result.of_bound) else result.of_bound
                worst, relative = max(worst, fraction), max(relative, result.relative)
                if not fraction <= 1:
                    misses.append({**row, "case": case.label, "tensor": result.name, "of_bound": fraction})
    return {**row, "relative_error": relative, "of_bound": worst, "passed": not misses}, misses


def collect(only: str | None = None) -> dict[str, Any]:
    """Run every case: the table's rows, the misses, and the backends that cannot run with all reasons."""
    import torch

    from pixnerd_kernels import backends
    from pixnerd_kernels.cli.verify_cases import cases

    groups: dict[str, list[Case]] = {}
    for case in cases():
        groups.setdefault(case.op, []).append(case)
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    rows: list[dict[str, Any]] = []
    misses: list[dict[str, Any]] = []
    unsupported: list[dict[str, Any]] = []
    for op, group in groups.items():
        for backend in [only] if only else backends.BACKENDS:
            reasons: dict[str, None] = {}
            ran = False
            for device in devices:
                for dtype in dtypes:
                    why = backends.not_supported_reasons(group[0].kernel, backend, device, dtype)
                    if why:
                        reasons |= dict.fromkeys(why)
                        continue
                    row, missed = _check(group, backend, device, dtype)
                    rows.append(row)
                    misses += missed
                    ran = True
            if not ran:
                unsupported.append({"op": op, "backend": backend, "reasons": list(reasons)})
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
