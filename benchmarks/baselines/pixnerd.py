"""The official class-to-image PixNerd in plain PyTorch, under the official checkpoint's names.

What `eager` and `compile` run. It shares no code with the package, and agrees with tensors recorded from the
official implementation.

Source: PixNerd (arXiv 2507.23268) and MCG-NJU/PixNerd. The official code rotates with complex numbers, which
torch.compile leaves uncompiled; pairs of real ones are used here, which is the same and kinder to the baseline.
Reshapes stand for F.unfold and F.fold, whose code torch.compile of torch 2.13 gets wrong on a CPU.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import formulas
from pixnerd_kernels.models import PixNerdConfig


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return formulas.rms_norm(x, self.weight)


class Holder(nn.Module):
    """Submodules by name, to give parameters their official path."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class TimeEmbedder(nn.Module):
    """[B] in [0, 1] -> [B, D]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, t: Tensor) -> Tensor:
        wide = torch.promote_types(t.dtype, torch.float32)
        exponents = torch.arange(128, device=t.device, dtype=wide) / 128
        angles = t.to(wide)[:, None] * torch.exp(-math.log(10) * exponents)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class Attention(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.q_norm, self.k_norm = RMSNorm(size // heads), RMSNorm(size // heads)
        self.proj = nn.Linear(size, size)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = rotate(self.q_norm(q), rotary), rotate(self.k_norm(k), rotary)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(out.transpose(1, 2).flatten(2))


def rotary_table(rows: int, columns: int, head: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [rows * columns, 1, head / 2] in like's dtype; positions linspace(0, 16, n)."""
    wide = torch.promote_types(like.dtype, torch.float32)
    speeds = 10000.0 ** (-torch.arange(0, head, 4, device=like.device, dtype=wide) / head)
    x = torch.linspace(0, 16, columns, device=like.device, dtype=wide)
    y = torch.linspace(0, 16, rows, device=like.device, dtype=wide)
    grid = (rows, columns, len(speeds))
    angles = torch.stack([(x[:, None] * speeds).expand(grid), (y[:, None, None] * speeds).expand(grid)], -1)
    angles = angles.reshape(rows * columns, 1, -1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn neighbouring channel pairs of x [B, L, heads, head]."""
    (cos, sin), (even, odd) = rotary, x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class SwiGLU(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        inner = int(2 * (4 * size) / 3)
        self.w1, self.w3 = nn.Linear(size, inner, bias=False), nn.Linear(size, inner, bias=False)
        self.w2 = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class DiTBlock(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = RMSNorm(size), Attention(size, heads)
        self.norm2, self.mlp = RMSNorm(size), SwiGLU(size)
        self.adaLN_modulation = nn.Sequential(nn.Linear(size, 6 * size))

    def forward(self, x: Tensor, condition: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rotary)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FieldBlock(nn.Module):
    def __init__(self, size: int, channels: int, inner: int) -> None:
        super().__init__()
        self.channels, self.inner = channels, inner
        self.param_generator1 = nn.Sequential(nn.Linear(size, 2 * channels * inner))
        self.norm = RMSNorm(channels)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        w1, w2 = self.param_generator1(hidden).chunk(2, dim=-1)
        w1, w2 = w1.unflatten(-1, (self.channels, -1)), w2.unflatten(-1, (self.inner, -1))
        return formulas.neural_field(x, w1, w2, self.norm.weight)


def patches(image: Tensor, size: int) -> Tensor:
    """[B, C, H, W] -> [B, L, C, size * size]."""
    batch, channels, height, width = image.shape
    tiles = image.reshape(batch, channels, height // size, size, width // size, size).permute(
        0, 2, 4, 1, 3, 5
    )
    return tiles.reshape(batch, -1, channels, size * size)


class PlainPixNerd(nn.Module):
    """x [B, C, H, W], times t [B], classes y [B] -> velocity [B, C, H, W]."""

    def __init__(self, config: PixNerdConfig) -> None:
        super().__init__()
        if config.encoding != "dct":
            raise ValueError(f"encoding: expected the official model's 'dct', got {config.encoding!r}")
        self.config = config
        size, channels, pixels = config.hidden_size, config.field_channels, config.patch_size**2
        self.s_embedder = Holder(proj=nn.Linear(config.in_channels * pixels, size))
        self.t_embedder = TimeEmbedder(size)
        self.y_embedder = Holder(embedding_table=nn.Embedding(config.num_classes + 1, size))
        self.x_embedder = Holder(
            embedder=nn.Sequential(nn.Linear(config.in_channels + config.max_freqs**2, channels))
        )
        inner = channels * config.field_ratio
        self.blocks = nn.ModuleList(
            [
                *(DiTBlock(size, config.num_heads) for _ in range(config.num_blocks)),
                *(FieldBlock(size, channels, inner) for _ in range(config.num_field_blocks)),
            ]
        )
        self.final_layer = Holder(norm=RMSNorm(channels), linear=nn.Linear(channels, config.in_channels))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.head(x, self.transformer(x, t, y))

    def transformer(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The hidden states that the head reads, activated: [B, L, D]."""
        config, patch = self.config, self.config.patch_size
        rows, columns = x.shape[2] // patch, x.shape[3] // patch
        time = self.t_embedder(t)[:, None]
        condition = F.silu(time + self.y_embedder.embedding_table(y)[:, None])
        states = self.s_embedder.proj(patches(x, patch).flatten(2))
        rotary = rotary_table(rows, columns, config.hidden_size // config.num_heads, states)
        for block in self.blocks[: config.num_blocks]:
            states = block(states, condition, rotary)
        return F.silu(time + states)

    def head(self, x: Tensor, states: Tensor) -> Tensor:
        """Noisy image and hidden states -> velocity image."""
        config, patch = self.config, self.config.patch_size
        rows, columns = x.shape[2] // patch, x.shape[3] // patch
        pixels = patches(x, patch).flatten(0, 1).transpose(1, 2)  # [N, P^2, C]
        encoding = self._encoding(x).expand(len(pixels), -1, -1)
        pixels = self.x_embedder.embedder(torch.cat([pixels, encoding], dim=-1))
        hidden = states.flatten(0, 1)
        for block in self.blocks[config.num_blocks :]:
            pixels = block(pixels, hidden)
        out = self.final_layer.linear(self.final_layer.norm(pixels))
        out = out.view(len(x), rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(len(x), -1, *x.shape[2:])

    def _encoding(self, x: Tensor) -> Tensor:
        patch = self.config.patch_size
        wide = torch.promote_types(x.dtype, torch.float32)
        return formulas.dct_encoding(patch, patch, self.config.max_freqs, wide, x.device).to(x.dtype)
