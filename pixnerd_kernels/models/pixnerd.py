"""The class-to-image PixNerd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnerd_kernels.checks import Problems
from pixnerd_kernels.models.base import PixNerdBase
from pixnerd_kernels.models.config import PixNerdConfig
from pixnerd_kernels.nn import DiTBlock, PixelDecoder, TimestepEmbedding, rotary_table
from pixnerd_kernels.ops.library import watched


class PixNerd(PixNerdBase):
    """Noisy image, time and class to velocity: a transformer over patches, and a neural field for each patch.

    Args:
        config: sizes; `models.CONFIGS` holds the named ones.

    The weights start as in the official code: the output layer at zero, so a fresh model returns zeros.

    Source: PixNerd (arXiv 2507.23268) and its official class-to-image model.
    """

    config: PixNerdConfig

    def __init__(self, config: PixNerdConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.patch_embed = nn.Linear(config.in_channels * config.patch_size**2, size)
        self.time_embed = TimestepEmbedding(size)
        self.class_embed = nn.Embedding(config.num_classes + 1, size)
        self.blocks = nn.ModuleList(DiTBlock(size, config.num_heads) for _ in range(config.num_blocks))
        self.decoder = PixelDecoder(
            config.in_channels,
            size,
            config.field_channels,
            config.field_ratio,
            config.num_field_blocks,
            config.patch_size,
            config.max_freqs,
            config.encoding,
        )
        self._initialise(self.class_embed.weight)

    @property
    def null_class(self) -> int:
        """The id that stands for "no class"."""
        return self.config.num_classes

    def _transform(self, tokens: Tensor, time: Tensor, y: Tensor, rows: int, columns: int) -> Tensor:
        condition = F.silu(time + self.class_embed(y)[:, None])
        head_size = self.config.hidden_size // self.config.num_heads
        rotary = rotary_table(rows, columns, head_size, device=tokens.device)
        for block in self.blocks:
            tokens = block(tokens, condition, rotary)
        return tokens

    def _check_condition(self, problems: Problems, y: Tensor, batch: int | None) -> None:
        if batch is not None and isinstance(y, Tensor) and y.shape != (batch,):
            problems.add("y", f"the shape [{batch}], one for each image", y)
        if not isinstance(y, Tensor) or y.dtype not in (torch.int64, torch.int32):
            problems.add_type("y", "an integer tensor [B]", y)
        elif y.device.type == "cpu" and not watched() and y.numel():
            low, high = int(y.min()), int(y.max())
            if low < 0 or high > self.null_class:
                expected = f"classes 0 to {self.null_class - 1} ({self.null_class} is no class)"
                problems.add("y", expected, low if low < 0 else high)
