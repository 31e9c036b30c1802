"""Reading files of tensors that others wrote, without running any code in them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def read(path: str | Path, what: str = "checkpoint") -> Mapping[Any, Any]:
    """The dictionary in a .safetensors file or, with any other ending, in one that torch.save wrote.

    Pickles are read with ``weights_only=True``. Messages call the file `what`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or holds no dictionary.
        ImportError: safetensors is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no {what} at {path}")
    if not path.stat().st_size:
        raise ValueError(f"{path}: an empty file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # not a zip archive: the format before torch 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except pickle.UnpicklingError as error:
        # Torch's message advises to switch the protection off; only its reason is of use.
        reason = str(error).partition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        reason = reason.partition(" Please use")[0] or "unreadable"
        raise ValueError(
            f"{path}: refused, because it is damaged or holds more than tensors and plain values: {reason}"
        ) from error
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{path}: not a readable {what}, or a damaged one ({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a dictionary of tensors, got {type(content).__name__}")
    return content
