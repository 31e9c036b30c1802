"""ADM's UNet and its guidance classifier, and the two UNets of Relay Diffusion, made of diffusers' blocks.

Sources: ADM (arXiv 2105.05233) and openai/guided-diffusion; RDM (arXiv 2309.03350) and THUDM/RelayDiffusion.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor, nn

#: Edges of the feature maps that have attention, in pixels.
ATTENTION = (32, 16, 8)


def _unet(
    size: int, channels: Sequence[int], layers: int, embedding: int, out: int, classes: int | None
) -> UNet2DModel:
    edges = [size >> level for level in range(len(channels))]
    attended = [edge in ATTENTION for edge in edges]
    return UNet2DModel(
        sample_size=size,
        in_channels=3,
        out_channels=out,
        layers_per_block=layers,
        block_out_channels=tuple(channels),
        down_block_types=["AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attended],
        up_block_types=["AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attended)],
        attention_head_dim=64,
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=classes,
        time_embedding_dim=embedding,
        freq_shift=0,
    )


class ADM(nn.Module):
    """Image x [B, 3, H, H], time t [B], class y [B] to `out` channels (6: mean and variance).

    Args:
        size: H. width: channels before the multipliers; the time embedding has 4 * width.
        multipliers: of the width, level by level. layers: residual blocks in a level.
    """

    def __init__(
        self, size: int, width: int, multipliers: Sequence[float], layers: int = 2, out: int = 6
    ) -> None:
        super().__init__()
        channels = [int(width * factor) for factor in multipliers]
        self.unet = _unet(size, channels, layers, 4 * width, out, classes=1000)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.unet(x, t, y).sample


class AttentionPool(nn.Module):
    """[B, C, H, H] to [B, out]: the mean token attends to all tokens, as in CLIP."""

    def __init__(self, size: int, channels: int, head: int, out: int) -> None:
        super().__init__()
        self.heads = channels // head
        self.position = nn.Parameter(torch.randn(size**2 + 1, channels) / channels**0.5)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + self.position
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))[:, 0]


class GuidanceClassifier(nn.Module):
    """The gradient that ADM-G adds: d log p(y | x, t) / dx, [B, 3, H, H].

    The classifier is the downward half of a UNet (width 128, 2 residual blocks a level) and an attention pool.
    """

    def __init__(self, size: int = 256, width: int = 128, layers: int = 2, classes: int = 1000) -> None:
        super().__init__()
        channels = [width * factor for factor in (1, 1, 2, 2, 4, 4)]
        whole = _unet(size, channels, layers, 4 * width, 3, classes=None)
        self.conv_in, self.down, self.middle = whole.conv_in, whole.down_blocks, whole.mid_block
        self.waves, self.time = whole.time_proj, whole.time_embedding
        self.norm = nn.GroupNorm(32, channels[-1])
        self.pool = AttentionPool(size >> (len(channels) - 1), channels[-1], 64, classes)

    def logits(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time(self.waves(t).to(x.dtype))
        x = self.conv_in(x)
        for block in self.down:
            x, _ = block(x, time)
        return self.pool(F.silu(self.norm(self.middle(x, time))))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            # A view, because torch's FLOP counter hooks the inputs of modules, which may not be leaves then.
            chosen = self.logits(x.view_as(x), t).log_softmax(-1).gather(1, y[:, None])
            return torch.autograd.grad(chosen.sum(), x)[0]
