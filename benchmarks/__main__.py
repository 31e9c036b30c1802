"""`python -m benchmarks COMMAND`: a command is a module with `add_arguments` and `run`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks import (
    chunks,
    claims,
    curves,
    decoder,
    gpu,
    model,
    ops,
    patch,
    products,
    report,
    resources,
    tune,
)

COMMANDS = {
    "ops": ops,
    "decoder": decoder,
    "model": model,
    "claims": claims,
    "curves": curves,
    "chunks": chunks,
    "products": products,
    "report": report,
    "patch": patch,
    "gpu": gpu,
    "tune": tune,
    "resources": resources,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command: 0 is success, 1 a wrong or failed case, 2 a bad argument, 130 an interruption."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    arguments = parser.parse_args(argv)
    return COMMANDS[arguments.command].run(arguments)


if __name__ == "__main__":
    sys.exit(main())
