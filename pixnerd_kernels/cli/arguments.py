"""What the sub-commands share for their arguments: checks, one-line errors, optional packages."""

from __future__ import annotations

import argparse
import importlib
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn


class UsageError(Exception):
    """A user's mistake in one line: the argument, what was expected, what came. The exit code is 2."""


#: The largest seed that every generator of torch takes.
MAX_SEED = 2**63 - 1


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage text before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def integer(minimum: int, maximum: int = 2**31 - 1) -> Callable[[str], int]:
    """An argparse type: an integer from `minimum` to `maximum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {minimum}, got {text!r}")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"expected an integer of at most {maximum}, got {text!r}")
        return value

    return parse


def number(text: str) -> float:
    """An argparse type: a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= 1e300:
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def positive_number(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text!r}")
    return value


def device(text: str) -> str:
    """An argparse type: the name of a device that torch finds here."""
    if text == "cpu":
        return text
    import torch

    expected, names = "cpu (torch finds no accelerator here)", ["cpu"]
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is not None:
        count = torch.accelerator.device_count()
        names += [kind.type, *(f"{kind.type}:{index}" for index in range(count))]
        expected = f"one of {', '.join(names)}"
    if text not in names:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return text


def chosen_backend(device: str) -> str:
    """The backend that runs neural fields on this device.

    Raises:
        UsageError: PIXNERD_BACKEND forces one that cannot; lists every reason.
    """
    import torch

    from pixnerd_kernels import backends

    try:
        return backends.select(
            "neural_field_mlp", torch.device(device), torch.float32, backends.forced_backend()
        )
    except NotImplementedError as error:
        raise UsageError(f"PIXNERD_BACKEND: {error}") from error


def make_writable(argument: str, folder: Path) -> None:
    """Make the folder and try it before the work, not after it.

    Raises:
        UsageError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"{argument}: expected a folder that can be written, got {str(folder)!r} ({error})"
        ) from error


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
