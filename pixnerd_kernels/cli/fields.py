"""A photograph as neural fields: one small MLP for every patch, its weights optimised directly.

    colour(u, v) = (x + MLP_patch(x)) @ output + offset_patch,   x = encoding(u, v) (@ embed)

with the MLP `neural_field_mlp_packed` (one block or more), and a learned linear output layer for all patches.

Three choices make the fields meet without seams and stay smooth between the pixels:

- A field is fitted to its patch and to a ring of `OVERLAP` pixels of its neighbours (and to their first row and
  column), so that its own area is interpolated on all sides, never extrapolated.
- The encoding's domain is wider still, by `MARGIN` pixels: cosines have no slope at either end of their domain,
  which would flatten every field at its border.
- The encoding stops well below one half-wave per pixel. The MLP's harmonics reach the pixels' own detail, but
  hardly beyond, which would be noise between them. Its columns all have weight 1 ("dct_paper"): with the
  1 / (1 + f g) of "dct" the same fit takes several times the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pixnerd_kernels import coordinate_encoding, neural_field_mlp_packed, split_params
from pixnerd_kernels.cli import plain

OVERLAP = 1
MARGIN = 2

Block = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of the fields. patch: pixels a side; channels: D1; hidden: D2; frequencies: K a side."""

    patch: int
    channels: int
    hidden: int
    blocks: int
    frequencies: int


def fused_block(x: Tensor, params: Tensor, norm_weight: Tensor, hidden: int) -> Tensor:
    """One block through the fused op."""
    return neural_field_mlp_packed(x, params, hidden=hidden, norm_weight=norm_weight, activation="gelu")


def eager_block(x: Tensor, params: Tensor, norm_weight: Tensor, hidden: int) -> Tensor:
    """The same block in eager PyTorch."""
    w1, w2, _ = split_params(params, x.shape[2], hidden)
    return plain.neural_field_mlp(x, w1, w2, norm_weight=norm_weight, activation="gelu")


def encoding(shape: Shape, factor: int, overlap: int, device: torch.device) -> Tensor:
    """The encoding of a patch sampled every 1 / factor pixels: [rows, rows, K^2].

    Rows run from -overlap to patch + overlap in pixels, both ends included.
    """
    count = factor * (shape.patch + 2 * MARGIN) + 1
    table = coordinate_encoding(count, count, shape.frequencies, "dct_paper", device=device)
    inner = slice(factor * (MARGIN - overlap), factor * (MARGIN + shape.patch + overlap) + 1)
    return table.view(count, count, -1)[inner, inner]


class PatchFields:
    """The fields of one image [H, W, 3] in [0, 1], H and W multiples of the patch, and their optimiser."""

    def __init__(
        self, image: Tensor, shape: Shape, steps: int, lr: float, block: Block = fused_block
    ) -> None:
        self.shape, self.block, self.image = shape, block, image
        self.rows, self.columns = (side // shape.patch for side in image.shape[:2])
        self.count = self.rows * self.columns
        self.target = self._targets()
        device, channels = image.device, shape.channels
        table = encoding(shape, 1, OVERLAP, device)
        self.samples = table.reshape(-1, table.shape[-1])
        self.norm_weight = torch.ones(channels, device=device)
        size = 2 * channels * shape.hidden
        self.params = [
            torch.randn(self.count, size, device=device).requires_grad_() for _ in range(shape.blocks)
        ]
        # Small: the loss then follows the MLPs' output closely, and a fit takes a third of the steps.
        self.output = (0.03 / math.sqrt(channels) * torch.randn(channels, 3, device=device)).requires_grad_()
        self.offset = self.target.mean(1, keepdim=True).requires_grad_()
        shared = [self.output, self.offset]
        self.embed: Tensor | None = None
        if channels != shape.frequencies**2:
            wide = torch.randn(shape.frequencies**2, channels, device=device) / shape.frequencies
            self.embed = wide.requires_grad_()
            shared.append(self.embed)
        self.optimizer = torch.optim.Adam(
            [{"params": self.params, "lr": lr}, {"params": shared, "lr": lr / 10}],
            betas=(0.9, 0.98),
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min(1.0, (step + 1) / 10) * (1 + math.cos(math.pi * step / steps)) / 2,
        )

    def _targets(self) -> Tensor:
        """Every patch with its overlap, [N, (P + 1 + 2 OVERLAP)^2, 3]; the image's own border is repeated."""
        patch, side = self.shape.patch, self.shape.patch + 1 + 2 * OVERLAP
        planes = self.image.permute(2, 0, 1)[None]
        before, after = OVERLAP, OVERLAP + 1
        planes = torch.nn.functional.pad(planes, (before, after, before, after), mode="replicate")
        tiles = planes[0].unfold(1, side, patch).unfold(2, side, patch)
        return tiles.permute(1, 2, 3, 4, 0).reshape(self.count, side * side, 3)

    def colours(self, samples: Tensor, chosen: slice = slice(None)) -> Tensor:
        """Colours of the chosen fields at encoded positions [S, K^2]: [N, S, 3]."""
        x = samples if self.embed is None else samples @ self.embed
        x = x.expand(len(self.offset[chosen]), -1, -1)
        for params in self.params:
            x = self.block(x, params[chosen], self.norm_weight, self.shape.hidden)
        return x @ self.output + self.offset[chosen]

    def step(self) -> Tensor:
        """One optimisation step; returns the mean squared error before it."""
        error = torch.nn.functional.mse_loss(self.colours(self.samples), self.target)
        self.optimizer.zero_grad()
        # Each field's own error, whatever their number: Adam's eps is not scale-free.
        (error * self.count).backward()
        self.optimizer.step()
        self.schedule.step()
        return error.detach()

    @torch.no_grad()
    def decode(self, factor: int) -> Tensor:
        """The image at `factor` times its resolution, [factor H, factor W, 3]: sample j at pixel j / factor."""
        table = encoding(self.shape, factor, 0, self.image.device)[:-1, :-1]
        side = table.shape[0]
        samples = table.reshape(side * side, -1)
        rows = []
        for row in range(self.rows):
            chosen = slice(row * self.columns, (row + 1) * self.columns)
            tiles = self.colours(samples, chosen).view(self.columns, side, side, 3)
            rows.append(tiles.transpose(0, 1).reshape(side, -1, 3))
        return torch.cat(rows).clamp(0, 1)


def psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB for values in [0, 1]; 99 stands for a perfect match."""
    return 99.0 if mean_squared_error == 0 else -10 * math.log10(mean_squared_error)
