"""`pixnerd patch --check`: tries `pixnerd_kernels.patch` on the models of a checkout."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pixnerd_kernels.cli.arguments import Subparsers, UsageError

KINDS = ("official", "flow", "diffusers")


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "patch",
        help="try the drop-in patch on the models of a checkout",
        description="Build small models with random weights from a checkout (its code is run), patch them, and compare "
        "output and gradients before and after.",
    )
    parser.add_argument("--check", type=Path, required=True, metavar="PATH", help="the checkout")
    parser.add_argument("--kind", choices=KINDS, required=True, help="whose code it is")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _text(results: list[dict[str, Any]]) -> str:
    blocks = []
    for result in results:
        verdict = "ok" if result["passed"] else "FAILED"
        restored = "restored bit for bit" if result["restored"] else "NOT RESTORED"
        blocks.append(
            f"{result['label']}\n{result['report']}\n"
            f"output differs by {result['output']:.1e}, gradients by {result['gradient']:.1e}, {restored}: {verdict}"
        )
    return "\n\n".join(blocks)


def run(args: argparse.Namespace) -> int:
    from pixnerd_kernels.patching.check import check

    if not args.check.is_dir():
        raise UsageError(f"--check: expected a folder, got {str(args.check)!r}")
    try:
        results = check(args.check.resolve(), args.kind)
    except ImportError as error:
        raise UsageError(
            f"{args.check}: not a checkout of kind {args.kind!r} that can be imported: {error}"
        ) from error
    if args.json:
        print(json.dumps([{**result, "report": result["report"].data()} for result in results], indent=2))
    else:
        print(_text(results))
    return 0 if all(result["passed"] for result in results) else 1
