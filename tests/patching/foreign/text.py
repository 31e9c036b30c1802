"""The official text-to-image PixNerd, also with the decoder that can be rescaled."""

import torch
import torch.nn.functional as F
from torch import nn

from .official import (
    Embed,
    Embedder,
    FinalLayer,
    FlattenDiTBlock,
    NerfBlock,
    RAttention,
    RMSNorm,
    TimestepEmbedder,
    fold,
    rotary,
    turned,
    unfold,
)


class TextNerfBlock(NerfBlock):
    mlps = ("fc1",)


class TextRefineAttention(RAttention):
    def forward(self, x):
        return self.attend(x)


class TextAttention(nn.Module):
    """Image queries attend to image keys (rotated) and text keys (not rotated)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv_x = nn.Linear(dim, 3 * dim, bias=False)
        self.kv_y = nn.Linear(dim, 2 * dim, bias=False)
        self.q_norm, self.k_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, y, pos):
        q, k, v = self.qkv_x(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = turned(self.q_norm(q), pos), turned(self.k_norm(k), pos)
        text_k, text_v = self.kv_y(y).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        k, v = torch.cat([k, self.k_norm(text_k)], 1), torch.cat([v, text_v], 1)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class PackedFeedForward(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.w3 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class TextDiTBlock(FlattenDiTBlock):
    def __init__(self, hidden_size, groups):
        super().__init__(hidden_size, groups, TextAttention, PackedFeedForward)

    def forward(self, x, y, c, pos):
        return self.blocks(x, c, y, pos)


class TextRefineBlock(FlattenDiTBlock):
    def __init__(self, hidden_size, groups):
        super().__init__(hidden_size, groups, TextRefineAttention, PackedFeedForward)

    def forward(self, x, c):
        return self.blocks(x, c)


class TextEmbedder(Embedder):
    """The real part of the rotary table in place of the cosine products."""

    def encode(self, height, width, like, scale=(1.0, 1.0)):
        extent = (height * scale[0], width * scale[1])
        return rotary(self.max_freqs**2 * 2, height, width, extent).real[None].to(like)


class HeavyEmbedder(TextEmbedder):
    def forward(self, inputs, patch_size_h, patch_size_w):
        scale = (16 / patch_size_h, 16 / patch_size_w)
        table = self.encode(patch_size_h, patch_size_w, inputs, scale).repeat(len(inputs), 1, 1)
        return self.embedder(torch.cat([inputs, table], dim=-1))


class TextPixNerDiT(nn.Module):
    """Text-to-image."""

    embedder = TextEmbedder

    def __init__(
        self, in_channels=3, num_groups=4, hidden_size=32, decoder_hidden_size=16, num_encoder_blocks=2,
        num_decoder_blocks=2, num_text_blocks=1, patch_size=8, txt_embed_dim=24, txt_max_length=7,
    ):  # fmt: skip
        super().__init__()
        self.in_channels, self.patch_size, self.hidden_size = in_channels, patch_size, hidden_size
        self.num_groups, self.num_encoder_blocks = num_groups, num_encoder_blocks
        self.num_decoder_blocks = num_decoder_blocks
        self.s_embedder = Embed(in_channels * patch_size**2, hidden_size)
        self.x_embedder = self.embedder(in_channels, decoder_hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = Embed(txt_embed_dim, hidden_size, norm=True)
        self.y_pos_embedding = nn.Parameter(torch.randn(1, txt_max_length, hidden_size))
        self.final_layer = FinalLayer(decoder_hidden_size, in_channels, norm=False)
        encoder = [TextDiTBlock(hidden_size, num_groups) for _ in range(num_encoder_blocks)]
        decoder = [TextNerfBlock(hidden_size, decoder_hidden_size, 2) for _ in range(num_decoder_blocks)]
        self.blocks = nn.ModuleList(encoder + decoder)
        self.text_refine_blocks = nn.ModuleList(
            TextRefineBlock(hidden_size, num_groups) for _ in range(num_text_blocks)
        )

    def fetch_pos(self, height, width, device):
        return rotary(self.hidden_size // self.num_groups, height, width, (height, width)).to(device)

    def states(self, x, t, y):
        """Hidden states [B, L, D], from an image at the encoder's resolution."""
        size = self.patch_size
        pos = self.fetch_pos(x.shape[2] // size, x.shape[3] // size, x.device)
        t = self.t_embedder(t.view(-1)).view(len(x), -1, self.hidden_size)
        y = self.y_embedder(y).view(len(x), -1, self.hidden_size) + self.y_pos_embedding.to(y.dtype)
        condition = F.silu(t)
        for block in self.text_refine_blocks:
            y = block(y, condition)
        s = self.s_embedder(unfold(x, size))
        for block in self.blocks[: self.num_encoder_blocks]:
            s = block(s, y, condition, pos)
        return F.silu(t + s)

    def decode(self, x, s, size, *sizes):
        batch, image = len(x), x.shape[2:]
        x = unfold(x, size).reshape(batch * s.shape[1], self.in_channels, -1).transpose(1, 2)
        x, s = self.x_embedder(x, *sizes), s.reshape(-1, self.hidden_size)
        for block in self.blocks[self.num_encoder_blocks :]:
            x = block(x, s)
        return fold(self.final_layer(x), batch, image, size)

    def forward(self, x, t, y):
        return self.decode(x, self.states(x, t, y), self.patch_size)


class HeavyPixNerDiT(TextPixNerDiT):
    """Text-to-image with a decoder patch of (P * sh) x (P * sw) pixels."""

    embedder = HeavyEmbedder
    decoder_patch_scaling_h = 1.0
    decoder_patch_scaling_w = 1.0

    def forward(self, x, t, y):
        scales = self.decoder_patch_scaling_h, self.decoder_patch_scaling_w
        small = F.interpolate(x, [int(n / scale) for n, scale in zip(x.shape[2:], scales, strict=True)])
        sizes = tuple(int(self.patch_size * scale) for scale in scales)
        return self.decode(x, self.states(small, t, y), sizes, *sizes)
