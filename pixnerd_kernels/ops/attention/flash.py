"""The FlashAttention packages: looked for at the first use, and every reason why one cannot run.

None of them has been run yet: calls and limits follow the packages' documentation.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Package:
    """One generation: where its function is, and on which compute capabilities and head sizes it runs."""

    module: str
    capabilities: tuple[int, ...]
    max_head_size: int


PACKAGES = {
    "flash2": _Package("flash_attn", (8, 9, 10, 12), 256),
    "flash3": _Package("flash_attn_interface", (9,), 256),
    "flash4": _Package("flash_attn.cute", (9, 10), 128),
}


@functools.cache
def load(name: str) -> tuple[Callable[..., Any] | None, str]:
    """The package's flash_attn_func and an empty string, or None and the reason why it is not there."""
    module = PACKAGES[name].module
    try:
        return importlib.import_module(module).flash_attn_func, ""
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            return None, f"the package {module} is not installed"
        return None, f"importing {module} failed: {type(error).__name__}: {error}"
    except Exception as error:
        return None, f"importing {module} failed: {type(error).__name__}: {error}"


def not_supported_reasons(
    name: str, device: torch.device, dtype: torch.dtype, head_size: int, masked: bool
) -> list[str]:
    """Every reason why this package cannot run for such tensors; empty if it can."""
    package = PACKAGES[name]
    reasons = []
    _, missing = load(name)
    if missing:
        reasons.append(missing)
    if device.type != "cuda":
        reasons.append(f"it needs CUDA tensors, the inputs are on {device}")
    elif torch.cuda.is_available():
        major = torch.cuda.get_device_capability(device)[0]
        if major not in package.capabilities:
            known = ", ".join(f"{each}.x" for each in package.capabilities)
            reasons.append(f"it runs on compute capability {known}, {device} has {major}.x")
    if dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"it takes float16 and bfloat16, the inputs are {dtype}")
    if head_size > package.max_head_size or head_size % 8:
        reasons.append(
            f"it takes heads of a multiple of 8 up to {package.max_head_size} channels, not {head_size}"
        )
    if masked:
        reasons.append("it takes no mask")
    return reasons


def run(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, L, heads, d] by the named package."""
    function, missing = load(name)
    assert function is not None, missing
    out = function(q, k, v)
    # Some versions return (out, log-sum-exp).
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result
