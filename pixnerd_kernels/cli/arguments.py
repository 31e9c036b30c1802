"""What the sub-commands share for their arguments: checked numbers, one-line errors, optional packages."""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn


class UsageError(Exception):
    """A user's mistake in one line: the argument, what was expected, what came. The exit code is 2."""


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage text before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def integer(minimum: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least `minimum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {minimum}, got {text!r}")
        return value

    return parse


def positive_number(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text!r}")
    return value


def optional_package(module: str) -> ModuleType:
    """Import a module that only the command line needs.

    Raises:
        UsageError: its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"this command needs {error.name}, which is not installed; "
            'install the extras: pip install "pixnerd-kernels[cli]"'
        ) from error


def table(rows: list[list[str]]) -> str:
    """Rows of cells as aligned text; the first row is the heading, underlined."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


#: What `argparse.ArgumentParser.add_subparsers` returns; its class has no public name.
Subparsers = Any
