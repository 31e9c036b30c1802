"""The official class-to-image PixNerd."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class NerfBlock(nn.Module):
    """The class-to-image block; subclasses change one thing each."""

    mlps = ("fc1", "fc2")

    def __init__(self, hidden_size_s, hidden_size_x, mlp_ratio=4):
        super().__init__()
        self.param_generator1 = nn.Sequential(nn.Linear(hidden_size_s, 2 * hidden_size_x**2 * mlp_ratio))
        self.norm = RMSNorm(hidden_size_x)
        self.mlp_ratio = mlp_ratio

    def forward(self, x, s):
        first, second = self.param_generator1(s).chunk(2, dim=-1)
        size = x.shape[2]
        first = F.normalize(first.view(len(x), size, size * self.mlp_ratio), dim=-2)
        second = second.view(len(x), size * self.mlp_ratio, size)
        if "fc2" in self.mlps:
            second = F.normalize(second, dim=-2)
        return torch.bmm(F.silu(torch.bmm(self.norm(x), first)), second) + x


class Embedder(nn.Module):
    """Pixels and their coordinate encoding, concatenated, to D1 channels."""

    def __init__(self, in_channels, channels, max_freqs=8):
        super().__init__()
        self.max_freqs = max_freqs
        self.embedder = nn.Sequential(nn.Linear(in_channels + max_freqs**2, channels))

    def encode(self, height, width, like):
        x, y = torch.linspace(0, 1, width), torch.linspace(0, 1, height)
        y, x = (v.reshape(-1, 1, 1) for v in torch.meshgrid(y, x, indexing="ij"))
        f = torch.linspace(0, self.max_freqs, self.max_freqs)
        table = torch.cos(x * f[None, :, None] * torch.pi) * torch.cos(y * f[None, None, :] * torch.pi)
        return (table / (1 + f[None, :, None] * f[None, None, :])).view(1, height * width, -1).to(like)

    def forward(self, inputs):
        side = math.isqrt(inputs.shape[1])
        table = self.encode(side, side, inputs).repeat(len(inputs), 1, 1)
        return self.embedder(torch.cat([inputs, table], dim=-1))


class FinalLayer(nn.Module):
    def __init__(self, channels, out_channels, norm=True):
        super().__init__()
        if norm:
            self.norm = RMSNorm(channels)
        self.linear = nn.Linear(channels, out_channels)

    def forward(self, x):
        return self.linear(self.norm(x) if hasattr(self, "norm") else x)


class Embed(nn.Module):
    def __init__(self, inputs, outputs, norm=False):
        super().__init__()
        self.proj = nn.Linear(inputs, outputs)
        self.norm = RMSNorm(outputs) if norm else nn.Identity()

    def forward(self, x):
        return self.norm(self.proj(x))


class TimestepEmbedder(nn.Module):
    def __init__(self, size, frequencies=256):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, size), nn.SiLU(), nn.Linear(size, size))
        self.half = frequencies // 2

    def forward(self, t):
        speeds = torch.exp(-math.log(10) * torch.arange(self.half, device=t.device) / self.half)
        angles = t[:, None].float() * speeds
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    def __init__(self, classes, size):
        super().__init__()
        self.embedding_table = nn.Embedding(classes, size)

    def forward(self, labels):
        return self.embedding_table(labels)


def rotary(head, height, width, extent=(16.0, 16.0)):
    """Complex [height * width, head / 2], for positions from 0 to `extent` (x, y)."""
    speeds = 1.0 / 10000.0 ** (torch.arange(0, head, 4)[: head // 4].float() / head)
    x, y = torch.linspace(0, extent[0], width), torch.linspace(0, extent[1], height)
    y, x = (v.reshape(-1) for v in torch.meshgrid(y, x, indexing="ij"))
    angles = torch.stack([torch.outer(x, speeds), torch.outer(y, speeds)], -1).flatten(1)
    return torch.polar(torch.ones_like(angles), angles)


def turned(x, table):
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table[None, :, None]).flatten(3).type_as(x)


class RAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm, self.k_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, pos, mask):
        return self.attend(x, pos, mask)

    def attend(self, x, pos=None, mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        if pos is not None:
            q, k = turned(q, pos), turned(k, pos)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        hidden_dim = int(2 * hidden_dim / 3)
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class FlattenDiTBlock(nn.Module):
    """c, then what the attention takes besides x: (pos, mask), or for text (y first) its own order."""

    def __init__(self, hidden_size, groups, attention=RAttention, mlp=FeedForward):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(hidden_size), RMSNorm(hidden_size)
        self.attn = attention(hidden_size, num_heads=groups)
        self.mlp = mlp(hidden_size, 4 * hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.Linear(hidden_size, 6 * hidden_size))

    def blocks(self, x, c, *attended, **options):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, *attended, **options)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)

    def forward(self, x, c, pos, mask=None):
        return self.blocks(x, c, pos, mask=mask)


def unfold(x, size):
    return F.unfold(x, kernel_size=size, stride=size).transpose(1, 2)


def fold(x, batch, image, size):
    """Pixels [B * L, S, C] to [B, C, H, W]."""
    x = x.transpose(1, 2).reshape(batch, -1, x.shape[1] * x.shape[2])
    return F.fold(x.transpose(1, 2).contiguous(), image, kernel_size=size, stride=size)


class PixNerDiT(nn.Module):
    """Class-to-image."""

    def __init__(
        self, in_channels=3, num_groups=4, hidden_size=32, hidden_size_x=16, nerf_mlpratio=2, num_blocks=4,
        num_cond_blocks=2, patch_size=8, num_classes=10,
    ):  # fmt: skip
        super().__init__()
        self.in_channels, self.patch_size, self.hidden_size = in_channels, patch_size, hidden_size
        self.num_groups, self.num_blocks, self.num_cond_blocks = num_groups, num_blocks, num_cond_blocks
        self.x_embedder = Embedder(in_channels, hidden_size_x)
        self.s_embedder = Embed(in_channels * patch_size**2, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes + 1, hidden_size)
        self.final_layer = FinalLayer(hidden_size_x, in_channels)
        self.blocks = nn.ModuleList(FlattenDiTBlock(hidden_size, num_groups) for _ in range(num_cond_blocks))
        self.blocks.extend(
            NerfBlock(hidden_size, hidden_size_x, nerf_mlpratio) for _ in range(num_blocks - num_cond_blocks)
        )
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)

    def fetch_pos(self, height, width, device):
        return rotary(self.hidden_size // self.num_groups, height, width).to(device)

    def forward(self, x, t, y, s=None, mask=None):
        batch, image, size = len(x), x.shape[2:], self.patch_size
        pos = self.fetch_pos(image[0] // size, image[1] // size, x.device)
        x = unfold(x, size)
        t = self.t_embedder(t.view(-1)).view(batch, -1, self.hidden_size)
        c = F.silu(t + self.y_embedder(y).view(batch, 1, self.hidden_size))
        if s is None:
            s = self.s_embedder(x)
            for block in self.blocks[: self.num_cond_blocks]:
                s = block(s, c, pos, mask)
            s = F.silu(t + s)
        x = x.reshape(batch * s.shape[1], self.in_channels, size**2).transpose(1, 2)
        x, s = self.x_embedder(x), s.view(-1, self.hidden_size)
        for block in self.blocks[self.num_cond_blocks :]:
            x = block(x, s)
        return fold(self.final_layer(x), batch, image, size)
