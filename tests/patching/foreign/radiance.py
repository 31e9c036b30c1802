"""Chroma1-Radiance's pixel head as ComfyUI has it: layers from a namespace that may cast weights on the fly."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .official import Embedder, fold, unfold


class CastLinear(nn.Linear):
    """A linear layer that casts its weights to the input's dtype at every call, and may change them on the way."""

    comfy_cast_weights = True
    weight_function = ()
    bias_function = ()

    def forward(self, x):
        weight, bias = self.weight.to(x.device, x.dtype), self.bias.to(x.device, x.dtype)
        for function in self.weight_function:
            weight = function(weight)
        for function in self.bias_function:
            bias = function(bias)
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
