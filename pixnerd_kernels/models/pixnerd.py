"""The class-to-image PixNerd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnerd_kernels.checks import Problems
from pixnerd_kernels.models.config import PixNerdConfig
from pixnerd_kernels.nn import (
    DiTBlock,
    PixelDecoder,
    TimestepEmbedding,
    patchify,
    rotary_table,
    scaled_patch,
)


class PixNerd(nn.Module):
    """Noisy image, time and class to velocity: a transformer over patches, and a neural field for each patch.

    Args:
        config: sizes; `models.CONFIGS` holds the named ones.

    The weights start as in the official code: the output layer at zero, so a fresh model returns zeros.

    Source: PixNerd (arXiv 2507.23268) and its official class-to-image model.
    """

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
        self._initialise()

    def _initialise(self) -> None:
        nn.init.xavier_uniform_(self.patch_embed.weight)
        nn.init.zeros_(self.patch_embed.bias)
        nn.init.normal_(self.class_embed.weight, std=0.02)
        nn.init.normal_(self.time_embed.linear1.weight, std=0.02)
        nn.init.normal_(self.time_embed.linear2.weight, std=0.02)
        nn.init.zeros_(self.decoder.linear.weight)
        nn.init.zeros_(self.decoder.linear.bias)

    @property
    def null_class(self) -> int:
        """The id that stands for "no class"."""
        return self.config.num_classes

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, decoder_scale: tuple[float, float] = (1.0, 1.0)
    ) -> Tensor:
        """The velocity at x.

        Args:
            x: [B, C, H, W] noisy image at the output resolution, the model's dtype.
            t: [B] times in [0, 1]; 1 is the data.
            y: [B] integer class ids; `null_class` is "no class".
            decoder_scale: (sh, sw). Each patch decodes int(P * sh) x int(P * sw) pixels, which H and W must
                be multiples of; the transformer sees a nearest-resized copy at P pixels a patch, the
                resolution of training. Decoding finer than trained needs max_freqs below P (higher
                frequencies alias), and is best when training drew random scales too.

        Returns:
            [B, C, H, W] in the model's dtype (autocast's under autocast).

        Raises:
            TypeError, ValueError: every problem with the arguments at once. Class ids are read on a CPU only,
                where that costs no synchronisation.
        """
        self._check(x, t, y, decoder_scale)
        height, width = scaled_patch(self.config.patch_size, decoder_scale)
        rows, columns = x.shape[2] // height, x.shape[3] // width
        time = self.time_embed(t)[:, None]
        condition = F.silu(time + self.class_embed(y)[:, None])
        head_size = self.config.hidden_size // self.config.num_heads
        rotary = rotary_table(rows, columns, head_size, device=x.device)
        tokens = self.patch_embed(self._encoder_patches(x, rows, columns))
        for block in self.blocks:
            tokens = block(tokens, condition, rotary)
        velocity: Tensor = self.decoder(x, F.silu(time + tokens), decoder_scale)
        return velocity

    def _encoder_patches(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """[B, L, C * P * P] in the order (channel, row, column)."""
        patch = self.config.patch_size
        size = (rows * patch, columns * patch)
        if x.shape[2:] != size:
            x = F.interpolate(x, size)
        return patchify(x, patch, patch).transpose(-1, -2).flatten(2)

    def _check(self, x: Tensor, t: Tensor, y: Tensor, decoder_scale: tuple[float, float]) -> None:
        problems = Problems("PixNerd")
        readable = problems.tensor("x", x, 4, "[B, C, H, W]")
        problems.tensor("t", t, 1, "[B]")
        if not isinstance(decoder_scale, (tuple, list)) or len(decoder_scale) != 2:
            problems.add_type("decoder_scale", "a pair (sh, sw)", decoder_scale)
            problems.raise_if_any()
        for scale in decoder_scale:
            problems.number("decoder_scale", scale)
        problems.raise_if_any()
        height, width = scaled_patch(self.config.patch_size, decoder_scale)
        if not height or not width:
            problems.add("decoder_scale", "at least one pixel a patch", decoder_scale)
        elif readable:
            if x.shape[1] != self.config.in_channels:
                problems.add("x", f"{self.config.in_channels} channels", x)
            if x.shape[2] % height or x.shape[3] % width or 0 in x.shape:
                problems.add("x", f"H and W divisible by the decoded patch of {height} x {width} pixels", x)
            for name, value in (("t", t), ("y", y)):
                if isinstance(value, Tensor) and value.shape != x.shape[:1]:
                    problems.add(name, f"the shape [{x.shape[0]}], one for each image", value)
        if not isinstance(y, Tensor) or y.dtype not in (torch.int64, torch.int32):
            problems.add_type("y", "an integer tensor [B]", y)
        elif y.device.type == "cpu" and not torch.compiler.is_compiling() and y.numel():
            low, high = int(y.min()), int(y.max())
            if low < 0 or high > self.null_class:
                expected = f"classes 0 to {self.null_class - 1} ({self.null_class} is no class)"
                problems.add("y", expected, low if low < 0 else high)
        problems.raise_if_any()

    def to_official(self) -> dict[str, Tensor]:
        """This model's weights under the official checkpoint's names; see `models.to_official`."""
        from pixnerd_kernels.models.official import to_official

        return to_official(self)
