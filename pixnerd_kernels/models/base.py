"""What the class-to-image and the text-to-image model share: everything but the condition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnerd_kernels.checks import FLOATS, Problems
from pixnerd_kernels.models.config import PixNerdConfig, PixNerdT2IConfig
from pixnerd_kernels.nn import PixelDecoder, TimestepEmbedding, patchify, scaled_patch


class PixNerdBase(nn.Module):
    """Noisy image, time and condition to velocity: a transformer over patches, then a neural field for each.

    A subclass makes the modules named here, and says what the condition is: `_transform` and
    `_check_condition`.
    """

    config: PixNerdConfig | PixNerdT2IConfig
    patch_embed: nn.Linear
    time_embed: TimestepEmbedding
    decoder: PixelDecoder

    def _initialise(self, *tables: Tensor) -> None:
        """As in the official code: the output layer at zero, `tables` normal."""
        nn.init.xavier_uniform_(self.patch_embed.weight)
        nn.init.zeros_(self.patch_embed.bias)
        for weight in (*tables, self.time_embed.linear1.weight, self.time_embed.linear2.weight):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.decoder.linear.weight)
        nn.init.zeros_(self.decoder.linear.bias)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, decoder_scale: tuple[float, float] = (1.0, 1.0)
    ) -> Tensor:
        """The velocity at x.

        Args:
            x: [B, C, H, W] noisy image at the output resolution, the model's dtype.
            t: [B] times in [0, 1]; 1 is the data.
            y: the condition. `PixNerd`: [B] integer class ids; `null_class` is "no class". `PixNerdT2I`:
                [B, text_tokens, text_width] text features in any floating dtype.
            decoder_scale: (sh, sw). Each patch decodes int(P * sh) x int(P * sw) pixels, which H and W must
                be multiples of; the transformer sees a nearest-resized copy at P pixels a patch, the
                resolution of training. Decoding finer than trained needs a coordinate encoding without
                frequencies that alias (see the configurations' max_freqs, extent and encoding), and training
                that drew random scales too: the fields are asked for places between their pixels.

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
        tokens = self.patch_embed(self._encoder_patches(x, rows, columns))
        tokens = self._transform(tokens, time, y, rows, columns)
        velocity: Tensor = self.decoder(x, F.silu(time + tokens), decoder_scale)
        return velocity

    def _transform(self, tokens: Tensor, time: Tensor, y: Tensor, rows: int, columns: int) -> Tensor:
        """The transformer: tokens [B, rows * columns, D], time [B, 1, D] -> [B, rows * columns, D]."""
        raise NotImplementedError

    def _check_condition(self, problems: Problems, y: Tensor, batch: int | None) -> None:
        """Add what is wrong with y; batch is None where x does not tell it."""
        raise NotImplementedError

    def _encoder_patches(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """[B, L, C * P * P] in the order (channel, row, column)."""
        patch = self.config.patch_size
        size = (rows * patch, columns * patch)
        if x.shape[2:] != size:
            x = F.interpolate(x, size)
        return patchify(x, patch, patch).transpose(-1, -2).flatten(2)

    def _check(self, x: Tensor, t: Tensor, y: Tensor, decoder_scale: tuple[float, float]) -> None:
        problems = Problems(type(self).__name__)
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
            self._check_dtype(problems, x)
            if x.shape[1] != self.config.in_channels:
                problems.add("x", f"{self.config.in_channels} channels", x)
            if not x.shape[0]:
                problems.add("x", "at least one image", x)
            elif x.shape[2] % height or x.shape[3] % width or 0 in x.shape[1:]:
                problems.add("x", f"H and W divisible by the decoded patch of {height} x {width} pixels", x)
            if isinstance(t, Tensor) and t.shape != x.shape[:1]:
                problems.add("t", f"the shape [{x.shape[0]}], one for each image", t)
        self._check_condition(problems, y, x.shape[0] if readable else None)
        problems.raise_if_any()

    def _check_dtype(self, problems: Problems, x: Tensor) -> None:
        dtype, device = self.patch_embed.weight.dtype, x.device.type
        if device in ("cpu", "cuda") and dtype in FLOATS and not torch.is_autocast_enabled(device):
            problems.same_dtype("the model", self.patch_embed.weight, [("x", x)])

    def to_official(self) -> dict[str, Tensor]:
        """This model's weights under the official checkpoint's names; see `models.to_official`."""
        from pixnerd_kernels.models.official import to_official

        return to_official(self)
