"""Coordinate encodings in plain PyTorch, computed in float64 and rounded once.

Every kind is a product or a list of one-dimensional tables over x (width) and y (height); row y * width + x.
With K = max_freqs and coordinates u in linspace(0, 1, n):

    dct          cos(pi u_x f_a) cos(pi u_y f_b) / (1 + f_a f_b),  f = linspace(0, K, K),   column a * K + b
    dct_integer  the same with f = 0, 1, ..., K - 1
    dct_paper    cos(pi u_x a) cos(pi u_y b),  a, b = 1 ... K
    dct_aligned  as dct, with u = 0, 1/n, ..., (n - 1)/n
    rope         cos(p_x w_m), cos(p_y w_m) interleaved,  w_m = 10000^(-2 m / K^2), m < K^2 / 2,
                 p_x in linspace(0, width * scale_x, width),  p_y in linspace(0, height * scale_y, height)
    sincos       sin(x w_m), cos(x w_m), sin(y w_m), cos(y w_m) one block after the other,
                 w_m = 10000^(-4 m / K^2), m < K^2 / 4, x and y in pixels

Sources: dct, the official class-to-image PixNerd; dct_integer, Chroma1-Radiance; dct_paper, arXiv 2507.23268;
rope, the official text-to-image PixNerd (its rotary table's real part); sincos, the usual transformer table.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_THETA = 10000.0


def _grid(table_x: Tensor, table_y: Tensor) -> tuple[Tensor, Tensor]:
    """Both [height, width, columns] from [width, columns] and [height, columns]."""
    height, width = table_y.shape[0], table_x.shape[0]
    return table_x[None].expand(height, width, -1), table_y[:, None].expand(height, width, -1)


def _dct(height: int, width: int, frequencies: Tensor, weights: Tensor, aligned: bool = False) -> Tensor:
    like: dict[str, Any] = {"dtype": torch.float64, "device": frequencies.device}
    if aligned:
        u_x, u_y = torch.arange(width, **like) / width, torch.arange(height, **like) / height
    else:
        u_x, u_y = torch.linspace(0, 1, width, **like), torch.linspace(0, 1, height, **like)
    x = torch.cos(math.pi * torch.outer(u_x, frequencies))
    y = torch.cos(math.pi * torch.outer(u_y, frequencies))
    return x[None, :, :, None] * y[:, None, None, :] * weights


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
    count = max_freqs
    like: dict[str, Any] = {"dtype": torch.float64, "device": device}
    if kind in ("dct", "dct_integer", "dct_aligned"):
        f = torch.linspace(0, count - 1 if kind == "dct_integer" else count, count, **like)
        table = _dct(height, width, f, 1 / (1 + torch.outer(f, f)), kind == "dct_aligned")
    elif kind == "dct_paper":
        f = torch.arange(1, count + 1, **like)
        table = _dct(height, width, f, torch.ones(count, count, **like))
    elif kind == "rope":
        half = count * count // 2
        w = _THETA ** (-torch.arange(half, **like) / half)
        p_x = torch.linspace(0, width * scale_x, width, **like)
        p_y = torch.linspace(0, height * scale_y, height, **like)
        x, y = _grid(torch.cos(torch.outer(p_x, w)), torch.cos(torch.outer(p_y, w)))
        table = torch.stack([x, y], dim=-1)
    else:
        quarter = count * count // 4
        w = _THETA ** (-torch.arange(quarter, **like) / quarter)
        angle_x = torch.outer(torch.arange(width, **like), w)
        angle_y = torch.outer(torch.arange(height, **like), w)
        x, y = _grid(
            torch.cat([angle_x.sin(), angle_x.cos()], -1), torch.cat([angle_y.sin(), angle_y.cos()], -1)
        )
        table = torch.cat([x, y], dim=-1)
    return table.reshape(height * width, count * count).to(dtype)
