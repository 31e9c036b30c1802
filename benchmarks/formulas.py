"""The official formulas in plain PyTorch: the baseline, torch.compile's input, and in float64 the truth.

They are written as the official PixNerd and Chroma1-Radiance code writes them, and share nothing with the
package's own reference.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension; halves square and average in float32."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def neural_field(x: Tensor, w1: Tensor, w2: Tensor, norm_weight: Tensor) -> Tensor:
    """x [N, S, D1], w1 [N, D1, D2], w2 [N, D2, D1], norm_weight [D1] -> [N, S, D1]."""
    w1, w2 = F.normalize(w1, dim=-2), F.normalize(w2, dim=-2)
    return x + torch.bmm(F.silu(torch.bmm(rms_norm(x, norm_weight), w1)), w2)


def gated_neural_field(x: Tensor, w_gate: Tensor, w1: Tensor, w2: Tensor, norm_weight: Tensor) -> Tensor:
    """The gated form: w_gate and w1 [N, D1, D2], the rest as in `neural_field`."""
    w_gate, w1, w2 = F.normalize(w_gate, dim=-2), F.normalize(w1, dim=-2), F.normalize(w2, dim=-2)
    n = rms_norm(x, norm_weight)
    return x + torch.bmm(F.silu(torch.bmm(n, w_gate)) * torch.bmm(n, w1), w2)


def dct_encoding(
    height: int, width: int, max_freqs: int, dtype: torch.dtype, device: torch.device | None = None
) -> Tensor:
    """The class-to-image table cos(pi x f) cos(pi y g) / (1 + f g), [height * width, max_freqs^2]."""
    where: dict[str, Any] = {"dtype": dtype, "device": device}
    y, x = torch.meshgrid(
        torch.linspace(0, 1, height, **where), torch.linspace(0, 1, width, **where), indexing="ij"
    )
    frequencies = torch.linspace(0, max_freqs, max_freqs, **where)
    f_x, f_y = frequencies[None, :, None], frequencies[None, None, :]
    table = torch.cos(x.reshape(-1, 1, 1) * f_x * math.pi) * torch.cos(y.reshape(-1, 1, 1) * f_y * math.pi)
    return (table / (1 + f_x * f_y)).view(height * width, max_freqs * max_freqs)
