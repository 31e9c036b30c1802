"""Layers that the transformer and the pixel decoder share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnerd_kernels.ops.linear import linear
from pixnerd_kernels.ops.modulated_rms_norm import modulated_rms_norm
from pixnerd_kernels.ops.swiglu import swiglu


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


def fusable(norm: nn.Module) -> bool:
    """Whether an op may compute the norm from its weight: it is an `RMSNorm`, and calling it does nothing else."""
    return type(norm) is RMSNorm and untouched(norm)


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
    """w2(SiLU(w1(x)) * w3(x)) with int(8/3 D) hidden channels: `feed_forward`."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        inner = int(2 * (4 * hidden_size) / 3)
        self.w1 = Linear(hidden_size, inner, bias=False)
        self.w2 = Linear(inner, hidden_size, bias=False)
        self.w3 = Linear(hidden_size, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.w1, self.w3, self.w2)


def feed_forward(x: Tensor, gate: nn.Module, up: nn.Module, last: nn.Module) -> Tensor:
    """last(SiLU(gate(x)) * up(x)): x [..., D] through three linear layers, [..., N] in x's dtype.

    On a GPU, hidden channels that fill no whole 16-byte words in half precision (2730 at D = 1024) are computed with
    zero weights up to a multiple of 8, which change no value: with odd rows cuBLAS falls back to kernels that take
    three times as long.
    """
    # What has put itself in a layer's place (an adapter, a hook) has to be called.
    if (missing := _missing_channels(x, gate)) and all(map(_is_plain, (gate, up, last))):
        wide_gate, wide_up = (F.pad(layer.weight, (0, 0, 0, missing)) for layer in (gate, up))  # type: ignore[arg-type]
        product = swiglu(linear(x, wide_gate), linear(x, wide_up))
        return linear(product, F.pad(last.weight, (0, missing)))  # type: ignore[arg-type]
    out: Tensor = last(swiglu(gate(x), up(x)))
    return out


def _missing_channels(x: Tensor, layer: nn.Module) -> int:
    """Channels that a layer's output lacks to whole 16-byte words of half precision; 0 where that costs nothing."""
    return -int(getattr(layer, "out_features", 0)) % 8 if x.is_cuda else 0


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) in (Linear, nn.Linear) and layer.bias is None and untouched(layer)


def untouched(module: nn.Module) -> bool:
    """Whether calling the module does what its class says: it has no hooks, and no `forward` of its own, which is how
    Kohya's adapters and accelerate's offloading put themselves in."""
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return not any(hooks) and "forward" not in module.__dict__
