"""The dtypes that ops compute in, and what autocast does to their inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# torch.is_autocast_enabled raises for others, and torch 2.6's compiler cannot trace is_autocast_available.
_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")
_AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for the half types, the dtype itself otherwise."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device, and casts such a tensor."""
    return _autocast_is_on(tensor.device.type) and tensor.dtype in _AUTOCAST_DTYPES


def _autocast_is_on(kind: str) -> bool:
    return kind in _AUTOCAST_DEVICES and torch.is_autocast_enabled(kind)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Cast to the autocast dtype where autocast is on for the first tensor's device; float64 is left alone."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not _autocast_is_on(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in _AUTOCAST_DTYPES else t for t in tensors)
