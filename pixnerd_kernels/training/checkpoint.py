"""Checkpoint files: safetensors with a JSON of everything that is not a tensor, replaced in one step.

A file at the final path is always whole: the new one is written in a hidden folder beside it, forced to
disk, and renamed over it. A kill or a full disk on the way leaves the old one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

FORMAT = "pixnerd_kernels checkpoint 1"


def save(path: str | Path, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
    """Write a checkpoint, or leave the file at path as it was.

    Args:
        tensors: what to store; names are free.
        content: JSON values.

    Raises:
        OSError: it could not be written; says where, why, and that the old file is whole.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own, because save_file writes through a hidden file that a kill would leave behind.
    workshop = path.with_name(f".{path.name}.new")
    fresh = workshop / path.name
    metadata = {"format": FORMAT, "content": json.dumps(content)}
    try:
        shutil.rmtree(workshop, ignore_errors=True)
        workshop.mkdir()
        fresh.touch()
        permissions = fresh.stat().st_mode
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, fresh, metadata)
        fresh.chmod(permissions)
        _sync(fresh)
        os.replace(fresh, path)
    except (OSError, SafetensorError) as error:
        kept = "; the one before is untouched" if path.exists() else ""
        raise OSError(f"could not save the checkpoint {path}: {error}{kept}") from error
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    _sync(path.parent)


def is_checkpoint(path: str | Path) -> bool:
    """Whether the file's header says that `save` wrote it; False for anything that cannot be read."""
    return _metadata(Path(path)).get("format") == FORMAT


def load(path: str | Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors whose names begin with `prefix`, without it, and the JSON content.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or no checkpoint of this package.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {
                name[len(prefix) :]: file.get_tensor(name).clone()
                for name in file.keys()  # noqa: SIM118, the file is no mapping
                if name.startswith(prefix)
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable checkpoint, or a damaged one: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint that `pixnerd train` wrote")
    return tensors, json.loads(metadata["content"])


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _sync(path: Path) -> None:
    """Force a file or a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
