"""Layers that the transformer and the pixel decoder share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnerd_kernels.ops import linear, modulated_rms_norm, swiglu


class Linear(nn.Linear):
    """torch.nn.Linear on `ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x²) + eps) * weight over the last dimension, in x's dtype whatever the weight's."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return modulated_rms_norm(x, self.weight, eps=self.eps)


class TimestepEmbedding(nn.Module):
    """Diffusion times [B] in [0, 1] to [B, D]: cosines and sines of 128 frequencies, then a two-layer MLP.

    The angles are computed in float32 at least: neighbouring times differ by less than bfloat16 resolves.
    """

    def __init__(self, hidden_size: int, frequencies: int = 128, max_period: float = 10.0) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.max_period = max_period
        self.linear1 = nn.Linear(2 * frequencies, hidden_size)
        self.linear2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, t: Tensor) -> Tensor:
        dtype = torch.promote_types(t.dtype, torch.float32)
        exponents = torch.arange(self.frequencies, dtype=dtype, device=t.device) / self.frequencies
        angles = t.to(dtype)[:, None] * torch.exp(-math.log(self.max_period) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear1.weight.dtype)
        embedded: Tensor = self.linear2(F.silu(self.linear1(waves)))
        return embedded


class SwiGLU(nn.Module):
    """w2(SiLU(w1(x)) * w3(x)) with int(8/3 D) hidden channels."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        inner = int(2 * (4 * hidden_size) / 3)
        self.w1 = Linear(hidden_size, inner, bias=False)
        self.w2 = Linear(inner, hidden_size, bias=False)
        self.w3 = Linear(hidden_size, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(swiglu(self.w1(x), self.w3(x)))
        return out
