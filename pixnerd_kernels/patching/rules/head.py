"""The pixel head in plain PyTorch: what the rules for whole heads compare with."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnerd_kernels.patching.rules.neural_field import FieldFormula

#: Rows of a generating layer that are converted to float64 at a time.
_CHUNK = 4096


def generate(layer: nn.Linear, hidden: Tensor) -> Tensor:
    """The layer at hidden's dtype; wider than the layer's, in chunks of rows that backward converts again."""
    if hidden.dtype == layer.weight.dtype:
        out: Tensor = layer(hidden)
        return out
    biases = [None] * len(layer.weight) if layer.bias is None else layer.bias.split(_CHUNK)
    return torch.cat(
        [_rows(hidden, w, b) for w, b in zip(layer.weight.split(_CHUNK), biases, strict=False)], -1
    )


def _rows(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    def run(h: Tensor) -> Tensor:
        return F.linear(h, weight.to(h.dtype), None if bias is None else bias.to(h.dtype))

    if not torch.is_grad_enabled():
        return run(hidden)
    from torch.utils.checkpoint import checkpoint  # an older torch loads SymPy with it, which takes a second

    out: Tensor = checkpoint(run, hidden, use_reentrant=False)
    return out


def frequencies(embed_weight: Tensor, colours: int) -> int:
    """K, from the columns of the embedder that are left for the encoding."""
    return math.isqrt(embed_weight.shape[1] - colours)


def encode(
    kind: str, patch: tuple[int, int], count: int, like: Tensor, extent: float | None = None
) -> Tensor:
    """The coordinate table [S, count²] as the models compute it: in like's dtype, "rope" in float32 at least.

    `coordinate_encoding` computes in float64; here plain PyTorch's rounding is wanted, which angles make large.
    """
    height, width = patch
    dtype = torch.promote_types(like.dtype, torch.float32) if kind == "rope" else like.dtype
    options: dict[str, Any] = {"dtype": dtype, "device": like.device}
    if kind == "rope":
        right, bottom = (width, height) if extent is None else (extent, extent)
        speeds = 10000.0 ** (-torch.arange(0, 2 * count**2, 4, **options) / (2 * count**2))
    else:
        right, bottom = 1, 1
        speeds = torch.pi * torch.linspace(0, count if kind == "dct" else count - 1, count, **options)
    x = torch.linspace(0, right, width, **options).expand(height, width).reshape(-1, 1)
    y = torch.linspace(0, bottom, height, **options)[:, None].expand(height, width).reshape(-1, 1)
    if kind == "rope":
        return torch.stack([x * speeds, y * speeds], -1).cos().flatten(1).to(like.dtype)
    weight = 1 + speeds[:, None] * speeds / torch.pi**2
    return ((x * speeds).cos()[:, :, None] * (y * speeds).cos()[:, None] / weight).flatten(1)


def fields(
    image: Tensor,
    hidden: Tensor,
    patch: tuple[int, int],
    table: Tensor,
    weight: Tensor,
    bias: Tensor,
    blocks: Iterable[tuple[nn.Linear, Tensor]],
    formula: FieldFormula,
) -> Tensor:
    """image [B, C, H, W] and hidden [B, L, D] to the features of every pixel [B * L, S, D1].

    table [S, K²] is the coordinate encoding; blocks are generating layers and the weights of their norms.
    """
    states = hidden.flatten(0, 1)
    pixels = F.unfold(image, patch, stride=patch).transpose(1, 2)
    pixels = pixels.reshape(len(states), image.shape[1], -1).transpose(1, 2)
    x = F.linear(torch.cat([pixels, table.expand(len(states), -1, -1)], -1), weight, bias)
    for generator, norm in blocks:
        x = formula(x, generate(generator, states), norm)
    return x
