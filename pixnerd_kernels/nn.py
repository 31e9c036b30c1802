"""Modules: parameters, and a call of an op.

Letters in shapes: B images, L tokens or patches of an image, N = B * L patches, D hidden size, D1 channels of
a pixel in a neural field, P patch size in pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnerd_kernels.ops import attention, coordinate_encoding, neural_field_mlp_packed


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x²) + eps) * weight over the last dimension, in x's dtype whatever the weight's."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


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
        self.w1 = nn.Linear(hidden_size, inner, bias=False)
        self.w2 = nn.Linear(inner, hidden_size, bias=False)
        self.w3 = nn.Linear(hidden_size, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


def rotary_table(
    height: int, width: int, head_size: int, extent: float = 16.0, device: torch.device | None = None
) -> Tensor:
    """(cos, sin) of every token's rotation angles: float32 [height * width, head_size / 2, 2].

    Token y * width + x turns its channel pairs 0, 1, 2 ... by x w_0, y w_0, x w_1 ..., with positions
    linspace(0, extent, n) along each axis and w_m = 10000^(-4 m / head_size).
    """
    like = {"dtype": torch.float64, "device": device}
    speeds = 10000.0 ** (-torch.arange(0, head_size, 4, **like) / head_size)  # type: ignore[arg-type]
    x = torch.outer(torch.linspace(0, extent, width, **like), speeds)  # type: ignore[arg-type]
    y = torch.outer(torch.linspace(0, extent, height, **like), speeds)  # type: ignore[arg-type]
    grid = (height, width, speeds.shape[0])
    angles = torch.stack([x[None].expand(grid), y[:, None].expand(grid)], dim=-1).flatten(0, 1).flatten(1)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn neighbouring channel pairs of x [B, L, heads, d] by `rotary_table`'s angles [L, d/2, 2]."""
    cos, sin = table[:, None].to(x.dtype).unbind(-1)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class Attention(nn.Module):
    """Self-attention with normalised, rotated queries and keys."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.q_norm = RMSNorm(hidden_size // num_heads)
        self.k_norm = RMSNorm(hidden_size // num_heads)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # [B, L, heads, d]
        q = rotate(self.q_norm(q), rotary)
        k = rotate(self.k_norm(k), rotary)
        out: Tensor = self.proj(attention(q, k, v).flatten(2))
        return out


class DiTBlock(nn.Module):
    """Attention and SwiGLU on tokens x [B, L, D], shifted, scaled and gated by the condition [B, 1, D]."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(hidden_size)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = RMSNorm(hidden_size)
        self.mlp = SwiGLU(hidden_size)
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(self, x: Tensor, condition: Tensor, rotary: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rotary)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class NeuralFieldBlock(nn.Module):
    """Generates a small MLP per patch from its hidden state, and runs it on every pixel of that patch."""

    def __init__(self, hidden_size: int, channels: int, ratio: int) -> None:
        super().__init__()
        self.inner = channels * ratio
        self.generator = nn.Linear(hidden_size, 2 * channels * self.inner)
        self.norm = RMSNorm(channels)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """x [N, pixels, D1], hidden [N, D] -> [N, pixels, D1]."""
        params = self.generator(hidden)
        return neural_field_mlp_packed(
            x.to(params.dtype),
            params,
            hidden=self.inner,
            norm_weight=self.norm.weight,
            norm_eps=self.norm.eps,
        )


def patchify(image: Tensor, height: int, width: int) -> Tensor:
    """[B, C, H, W] -> [B, L, height * width, C], patches and pixels row by row."""
    batch, channels, rows, columns = image.shape
    grid = image.view(batch, channels, rows // height, height, columns // width, width)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, height * width, channels)


def unpatchify(patches: Tensor, height: int, width: int, rows: int, columns: int) -> Tensor:
    """The inverse of `patchify`: [B, L, height * width, C] -> [B, C, rows * height, columns * width]."""
    batch, _, _, channels = patches.shape
    grid = patches.view(batch, rows, columns, height, width, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, rows * height, columns * width)


def scaled_patch(patch_size: int, decoder_scale: tuple[float, float]) -> tuple[int, int]:
    """Pixels of a decoded patch (height, width): int(P * sh) x int(P * sw), exact for a scale of n / P."""
    height, width = (int(patch_size * scale + 1e-6) for scale in decoder_scale)
    return height, width


class PixelDecoder(nn.Module):
    """The pixel head: noisy image and hidden states to velocity image, one neural field per patch.

        embed(p) = pixel Wpᵀ + (encoding Weᵀ + b)      the bracket is one table [pixels, D1] for all patches
        velocity(p) = linear(norm(block_n(... block_1(embed(p)))))

    Args:
        in_channels: C. hidden_size: D. channels: D1. ratio: D2 / D1. num_blocks: neural-field blocks.
        patch_size: P, pixels. max_freqs, encoding: `coordinate_encoding`'s max_freqs and kind.

    Source: PixNerd (arXiv 2507.23268), section 3, whose linear layer on pixel and encoding concatenated is
    split into the two terms above.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_size: int,
        channels: int,
        ratio: int,
        num_blocks: int,
        patch_size: int,
        max_freqs: int = 8,
        encoding: str = "dct",
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.max_freqs = max_freqs
        self.encoding = encoding
        self.embed = nn.Linear(in_channels + max_freqs**2, channels)
        self.blocks = nn.ModuleList(NeuralFieldBlock(hidden_size, channels, ratio) for _ in range(num_blocks))
        self.norm = RMSNorm(channels)
        self.linear = nn.Linear(channels, in_channels)

    def forward(
        self, image: Tensor, hidden: Tensor, decoder_scale: tuple[float, float] = (1.0, 1.0)
    ) -> Tensor:
        """image [B, C, H, W], hidden [B, L, D] (activated) -> velocity [B, C, H, W]."""
        height, width = scaled_patch(self.patch_size, decoder_scale)
        rows, columns = image.shape[2] // height, image.shape[3] // width
        x = self._embed(patchify(image, height, width).flatten(0, 1), height, width)
        states = hidden.flatten(0, 1)
        for block in self.blocks:
            x = block(x, states)
        velocity = self.linear(self.norm(x)).unflatten(0, (-1, rows * columns))
        return unpatchify(velocity, height, width, rows, columns)

    def _embed(self, pixels: Tensor, height: int, width: int) -> Tensor:
        """[N, pixels, C] -> [N, pixels, D1]."""
        weight = self.embed.weight
        encoding = coordinate_encoding(
            height, width, self.max_freqs, self.encoding, device=weight.device, dtype=weight.dtype
        )
        table = F.linear(encoding, weight[:, self.in_channels :], self.embed.bias)
        return F.linear(pixels, weight[:, : self.in_channels]) + table
