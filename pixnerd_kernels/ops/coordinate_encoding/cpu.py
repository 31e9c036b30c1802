"""Hands `coordinate_encoding` to csrc/coordinate_encoding."""

from __future__ import annotations

import torch
from torch import Tensor

from pixnerd_kernels.backends import native

_KINDS = {"dct": 0, "dct_integer": 1, "dct_paper": 2, "rope": 3, "sincos": 4, "dct_aligned": 5}


def forward(
    height: int,
    width: int,
    max_freqs: int,
    kind: str,
    scale_x: float,
    scale_y: float,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """The table [height * width, max_freqs^2], contiguous."""
    table = torch.empty(height * width, max_freqs * max_freqs, dtype=torch.float64, device=device)
    native().coordinate_encoding(height, width, max_freqs, _KINDS[kind], scale_x, scale_y, table.data_ptr())
    return table.to(dtype)
