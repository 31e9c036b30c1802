"""The `pixnerd` command.

A sub-command is a module of this package with `add_parser(subparsers)` and `run(args) -> int`, named in
`COMMANDS`. It imports only what its arguments need and everything else in `run`, so that help is fast.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from pixnerd_kernels.cli.arguments import Parser, UsageError

#: Modules of this package, in the order of the help text.
COMMANDS = ("info", "verify", "fit", "train", "sample", "patch")


def _parser() -> argparse.ArgumentParser:
    from pixnerd_kernels import __version__

    parser = Parser(prog="pixnerd", description="Fused kernels for per-patch neural fields (PixNerd).")
    parser.add_argument("--version", action="version", version=f"pixnerd {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"pixnerd_kernels.cli.{name}")
        module.add_parser(subparsers)
        subparsers.choices[name].set_defaults(run=module.run)
    return parser


def _check_environment() -> None:
    import torch

    from pixnerd_kernels import backends

    try:
        backends.forced_backend()
        if not backends.not_supported_reasons("neural_field_mlp", "cpu", torch.device("cpu")):
            backends.native().isa()
    except ValueError as error:
        raise UsageError(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    0 is success, 1 a failed check, 2 a mistake in the arguments (one line on stderr), 130 an interruption.
    """
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    try:
        _check_environment()
        code: int = args.run(args)
        return code
    except UsageError as error:
        line = " ".join(part.strip() for part in str(error).splitlines())
        print(f"pixnerd {args.command}: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
