"""The text-to-image PixNerd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnerd_kernels.checks import Problems
from pixnerd_kernels.models.base import PixNerdBase
from pixnerd_kernels.models.config import PixNerdT2IConfig
from pixnerd_kernels.nn import (
    Attention,
    DiTBlock,
    JointAttention,
    PackedSwiGLU,
    PixelDecoder,
    RMSNorm,
    TimestepEmbedding,
    rotary_table,
)


class PixNerdT2I(PixNerdBase):
    """Noisy image, time and text features to velocity.

        text = refine(norm(linear(y)) + positions)      blocks of their own, without rotation
        image queries attend to image keys (rotated) and text keys (not rotated) together
        velocity: as in `PixNerd`, but only w1 of a neural field is normalised, there is no norm after the
        fields, and a pixel's coordinates are encoded by `coordinate_encoding`'s "rope"

    Args:
        config: sizes; `models.T2I_CONFIGS` holds the named ones.

    It takes features of a text encoder, [B, text_tokens, text_width]; the official model those of Qwen3-1.7B,
    padded to 128 tokens, padding included. The features of an empty prompt stand for "no text".
    The weights start as in the official code: the output layer at zero, so a fresh model returns zeros.

    Source: PixNerd (arXiv 2507.23268) and its official text-to-image models.
    """

    config: PixNerdT2IConfig

    def __init__(self, config: PixNerdT2IConfig) -> None:
        super().__init__()
        self.config = config
        size, heads = config.hidden_size, config.num_heads
        self.patch_embed = nn.Linear(config.in_channels * config.patch_size**2, size)
        self.time_embed = TimestepEmbedding(size)
        self.text_embed = nn.Linear(config.text_width, size)
        self.text_norm = RMSNorm(size)
        self.text_positions = nn.Parameter(torch.randn(1, config.text_tokens, size))
        self.text_blocks = nn.ModuleList(
            DiTBlock(size, heads, Attention, PackedSwiGLU) for _ in range(config.num_text_blocks)
        )
        self.blocks = nn.ModuleList(
            DiTBlock(size, heads, JointAttention, PackedSwiGLU) for _ in range(config.num_blocks)
        )
        self.decoder = PixelDecoder(
            config.in_channels,
            size,
            config.field_channels,
            config.field_ratio,
            config.num_field_blocks,
            config.patch_size,
            config.max_freqs,
            "rope",
            extent=config.extent,
            normalize=("w1",),
            final_norm=False,
        )
        self._initialise()

    def _transform(self, tokens: Tensor, time: Tensor, y: Tensor, rows: int, columns: int) -> Tensor:
        condition = F.silu(time)
        text = self.text_norm(self.text_embed(y.to(self.text_embed.weight.dtype)))
        text = text + self.text_positions.to(text.dtype)
        for block in self.text_blocks:
            text = block(text, condition)
        head_size = self.config.hidden_size // self.config.num_heads
        # The official model swaps height and width here.
        rotary = rotary_table(rows, columns, head_size, (rows, columns), device=tokens.device)
        for block in self.blocks:
            tokens = block(tokens, condition, rotary, text)
        return tokens

    def _check_condition(self, problems: Problems, y: Tensor, batch: int | None) -> None:
        tokens, width = self.config.text_tokens, self.config.text_width
        if problems.tensor("y", y, 3, f"[B, {tokens}, {width}]") and batch is not None:
            expected = (batch, tokens, width)
            if y.shape != expected:
                problems.add("y", f"the shape {list(expected)}, padded text features for each image", y)
