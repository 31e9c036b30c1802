"""Stand-ins for foreign models, with the public ones' attribute names, signatures and formulas.

The official class-to-image and text-to-image PixNerd (also with the rescalable decoder), and Chroma1-Radiance's pixel
head as ComfyUI has it: layers from an `operations` namespace that may cast weights on the fly.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class TextNerfBlock(NerfBlock):
    mlps = ("fc1",)


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


class FeedForward(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        hidden_dim = int(2 * hidden_dim / 3)
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class PackedFeedForward(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.w3 = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


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


# Chroma1-Radiance


class CastLinear(nn.Linear):
    """A linear layer that casts its weights to the input's dtype at every call, and may change them on the way."""

    comfy_cast_weights = True
    weight_function = ()

    def forward(self, x):
        weight, bias = self.weight.to(x.device, x.dtype), self.bias.to(x.device, x.dtype)
        for function in self.weight_function:
            weight = function(weight)
        return F.linear(x, weight, bias)


class CastConv2d(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight.to(x.device, x.dtype), self.bias.to(x.device, x.dtype))


#: ComfyUI's namespaces: layers as they are, and layers that cast by hand.
plain_operations = SimpleNamespace(Linear=nn.Linear, Conv2d=nn.Conv2d)
cast_operations = SimpleNamespace(Linear=CastLinear, Conv2d=CastConv2d)


class ScaleNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor):
        wide = x.float()
        wide = wide * torch.rsqrt(torch.mean(wide**2, dim=-1, keepdim=True) + 1e-6)
        return wide.to(x.dtype) * self.scale.to(x.device, x.dtype)


class RadianceEmbedder(Embedder):
    def __init__(self, in_channels, channels, max_freqs, operations, dtype=torch.float32):
        super().__init__(in_channels, channels, max_freqs)
        self.embedder = nn.Sequential(operations.Linear(in_channels + max_freqs**2, channels))
        self.dtype = dtype

    def encode(self, height, width, like):
        x, y = torch.linspace(0, 1, width), torch.linspace(0, 1, height)
        y, x = (v.reshape(-1, 1, 1) for v in torch.meshgrid(y, x, indexing="ij"))
        f = torch.arange(self.max_freqs).float()
        table = torch.cos(x * f[None, :, None] * torch.pi) * torch.cos(y * f[None, None, :] * torch.pi)
        return (table / (1 + f[None, :, None] * f[None, None, :])).view(1, height * width, -1).to(like)

    def forward(self, inputs):
        return super().forward(inputs.to(self.dtype)).to(inputs.dtype)


class NerfGLUBlock(nn.Module):
    def __init__(self, hidden_size_s, hidden_size_x, mlp_ratio, operations=plain_operations):
        super().__init__()
        self.param_generator = operations.Linear(hidden_size_s, 3 * hidden_size_x**2 * mlp_ratio)
        self.norm = ScaleNorm(hidden_size_x)
        self.mlp_ratio = mlp_ratio

    def forward(self, x, s):
        size = x.shape[2]
        inner = size * self.mlp_ratio
        gate, value, out = self.param_generator(s).chunk(3, dim=-1)
        gate, value = (F.normalize(w.view(len(x), size, inner), dim=-2) for w in (gate, value))
        out = F.normalize(out.view(len(x), inner, size), dim=-2)
        n = self.norm(x)
        return torch.bmm(F.silu(torch.bmm(n, gate)) * torch.bmm(n, value), out) + x


class RadianceFinalLayer(nn.Module):
    def __init__(self, channels, out_channels, operations):
        super().__init__()
        self.norm = ScaleNorm(channels)
        self.linear = operations.Linear(channels, out_channels)

    def forward(self, x):
        return self.linear(self.norm(x.movedim(1, -1))).movedim(-1, 1)


class RadianceFinalLayerConv(nn.Module):
    def __init__(self, channels, out_channels, operations):
        super().__init__()
        self.norm = ScaleNorm(channels)
        self.conv = operations.Conv2d(channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x):
        return self.conv(self.norm(x.movedim(1, -1)).movedim(-1, 1))


class ChromaRadiance(nn.Module):
    """The pixel head of ComfyUI's ChromaRadiance; the transformer before it is left out."""

    def __init__(
        self, hidden_size_s, hidden_size_x, mlp_ratio, num_blocks, patch_size, final, in_channels=3, max_freqs=8,
        nerf_tile_size=32, operations=plain_operations,
    ):  # fmt: skip
        super().__init__()
        self.params = SimpleNamespace(
            patch_size=patch_size, hidden_size=hidden_size_s, nerf_hidden_size=hidden_size_x,
            nerf_mlp_ratio=mlp_ratio, nerf_depth=num_blocks, nerf_max_freqs=max_freqs, in_channels=in_channels,
            nerf_tile_size=nerf_tile_size, nerf_final_head_type=final, nerf_embedder_dtype=torch.float32,
        )  # fmt: skip
        self.nerf_image_embedder = RadianceEmbedder(in_channels, hidden_size_x, max_freqs, operations)
        self.nerf_blocks = nn.ModuleList(
            NerfGLUBlock(hidden_size_s, hidden_size_x, mlp_ratio, operations) for _ in range(num_blocks)
        )
        if final == "conv":
            self.nerf_final_layer_conv = RadianceFinalLayerConv(hidden_size_x, in_channels, operations)
        else:
            self.nerf_final_layer = RadianceFinalLayer(hidden_size_x, in_channels, operations)

    @property
    def _nerf_final_layer(self):
        conv = self.params.nerf_final_head_type == "conv"
        return self.nerf_final_layer_conv if conv else self.nerf_final_layer

    def forward_nerf(self, img_orig, img_out, params):
        batch, channels, size = len(img_orig), img_orig.shape[1], params.patch_size
        patches = img_out.shape[1]
        hidden = img_out.reshape(batch * patches, params.hidden_size)
        pixels = unfold(img_orig, size).reshape(batch * patches, channels, size**2).transpose(1, 2)
        tile = params.nerf_tile_size
        if tile > 0 and patches > tile:
            x = torch.cat(
                [self.fields(p, h) for p, h in zip(pixels.split(tile), hidden.split(tile), strict=True)]
            )
        else:
            x = self.fields(pixels, hidden)
        return self._nerf_final_layer(fold(x, batch, img_orig.shape[2:], size))

    def fields(self, pixels, hidden):
        x = self.nerf_image_embedder(pixels)
        for block in self.nerf_blocks:
            x = block(x, hidden)
        return x

    def forward(self, image, hidden):
        """In place of the transformer: hidden states are given."""
        return self.forward_nerf(image, hidden, self.params)
