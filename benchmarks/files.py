"""Result files: read with checks, written in one step, and marked until they are complete."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def save(path: Path, content: dict[str, Any] | str) -> None:
    """Replace the file in one step: an interruption leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_text(content if isinstance(content, str) else json.dumps(content, indent=1) + "\n")
    os.replace(fresh, path)


def load(path: Path, kind: str | None = None) -> dict[str, Any]:
    """A result document.

    Raises:
        ValueError: the file is not one, or not of that kind.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a benchmark's JSON: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("results"), list):
        raise ValueError(f"{path}: expected a benchmark's JSON with a list of results")
    if kind is not None and document.get("kind") != kind:
        raise ValueError(f"{path}: expected results of {kind!r}, got {document.get('kind')!r}")
    return document


def publish(document: dict[str, Any], text: str, folder: Path | None, name: str) -> None:
    """Print a finished run's table; where there is a folder, write both there, as NAME.json and NAME.md."""
    print(text)
    if folder:
        save(folder / f"{name}.json", document)
        save(folder / f"{name}.md", text)


@contextmanager
def measuring(document: dict[str, Any], advice: str = "") -> Iterator[None]:
    """While a run fills a document, and where it is interrupted or killed, what is saved of it says "interrupted".

    Ctrl-C ends the block, and what the run has is kept.
    """
    document["interrupted"] = True
    try:
        yield
    except KeyboardInterrupt:
        print(f"\ninterrupted after {len(document['results'])} results{advice}", file=sys.stderr)
    else:
        document["interrupted"] = False
