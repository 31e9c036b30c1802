"""PixelFlow's transformer, and the block noise that its sampler draws between stages.

Source: PixelFlow (arXiv 2504.07963) and ShoufaChen/PixelFlow.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Edge of the image in each of the four stages that end at 256 pixels.
STAGES = (32, 64, 128, 256)
#: Covariance of neighbouring pixels in a 2 x 2 block of the noise added between stages.
GAMMA = -1 / 3


def sinusoids(position: Tensor, channels: int = 256) -> Tensor:
    """[B] -> [B, channels]: cosines and sines of frequencies from 1 down to 1/10000."""
    half = channels // 2
    exponents = torch.arange(half, device=position.device, dtype=torch.float32) / (half - 1)
    angles = position.float()[:, None] * torch.exp(-math.log(10000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotary_angles(edge: int, head: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [edge^2, head]: the first half of a head's channels turns by row, the second by column."""
    speeds = 10000.0 ** (-torch.arange(0, head // 2, 2, device=device) / (head // 2))
    turns = torch.outer(torch.arange(edge, device=device), speeds).repeat_interleave(2, dim=1)
    rows = turns[:, None].expand(edge, edge, head // 2)
    columns = turns[None].expand(edge, edge, head // 2)
    angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn neighbouring channel pairs of x [B, heads, L, head]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotary
    return (x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin).to(x.dtype)


class Embedder(nn.Module):
    """A number [B] to [B, D]: sinusoids and a two-layer MLP."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(sinusoids(x).to(self.mlp[0].weight.dtype))


class Block(nn.Module):
    """Attention and an MLP, modulated by the condition [B, 1, D]; queries and keys are normalised over D."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(size, 6 * size)
        self.norm1 = nn.LayerNorm(size, elementwise_affine=False, eps=1e-6)
        self.q, self.k, self.v = (nn.Linear(size, size) for _ in range(3))
        self.q_norm, self.k_norm = nn.RMSNorm(size, eps=1e-6), nn.RMSNorm(size, eps=1e-6)
        self.proj = nn.Linear(size, size)
        self.norm2 = nn.RMSNorm(size, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU("tanh"), nn.Linear(4 * size, size))

    def forward(self, x: Tensor, condition: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition)).chunk(6, dim=-1)
        h = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q_norm(self.q(h)), self.k_norm(self.k(h)), self.v(h))
        )
        attended = F.scaled_dot_product_attention(rotate(q, rotary), rotate(k, rotary), v)
        x = x + gate1 * self.proj(attended.transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PixelFlow(nn.Module):
    """Image x [B, 3, H, H] of any stage, time t [B], class y [B] (the last is none) to velocity [B, 3, H, H]."""

    def __init__(
        self, depth: int = 28, heads: int = 16, size: int = 1152, patch: int = 4, classes: int = 1000
    ) -> None:
        super().__init__()
        self.patch, self.head = patch, size // heads
        self.embed = nn.Conv2d(3, size, patch, patch)
        self.time, self.resolution = Embedder(size), Embedder(size)
        self.label = nn.Embedding(classes + 1, size)
        self.blocks = nn.ModuleList(Block(size, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(size, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(size, 2 * size)
        self.out = nn.Linear(size, patch**2 * 3)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        edge = x.shape[-1] // self.patch
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        resolution = torch.full((1,), edge, device=x.device)
        condition = (self.time(t) + self.label(y) + self.resolution(resolution))[:, None]
        rotary = rotary_angles(edge, self.head, x.device)
        rotary = (rotary[0].to(x.dtype), rotary[1].to(x.dtype))
        for block in self.blocks:
            tokens = block(tokens, condition, rotary)
        shift, scale = self.modulation(F.silu(condition)).chunk(2, dim=-1)
        pixels = self.out(self.norm(tokens) * (1 + scale) + shift)
        # [B, rows, columns, row in patch, column in patch, channel]
        grid = pixels.unflatten(1, (edge, edge)).unflatten(-1, (self.patch, self.patch, 3))
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def blocks_per_image() -> int:
    """How many 2 x 2 blocks of noise one image takes: after the first stage, every stage draws its own."""
    return sum(3 * (edge // 2) ** 2 for edge in STAGES[1:])


def draw_blocks(count: int) -> Tensor:
    """Block noise [count, 4] the way PixelFlow's sampler draws it: one draw a block, in a Python loop."""
    covariance = torch.eye(4) * (1 - GAMMA) + torch.ones(4, 4) * GAMMA + 1e-6 * torch.eye(4)
    distribution = torch.distributions.MultivariateNormal(torch.zeros(4), covariance)
    return torch.stack([distribution.sample() for _ in range(count)])
