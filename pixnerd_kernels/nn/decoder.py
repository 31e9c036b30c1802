"""The pixel head: a neural field for every patch, whose weights its hidden state generates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pixnerd_kernels.checks import Problems
from pixnerd_kernels.nn.layers import Linear, RMSNorm, fusable, untouched
from pixnerd_kernels.ops import (
    DecoderBlockParams,
    DecoderParams,
    coordinate_encoding,
    neural_field_mlp_packed,
    pixel_decoder,
)
from pixnerd_kernels.ops.pixel_decoder import scaled_patch


class NeuralFieldBlock(nn.Module):
    """Generates a small MLP per patch from its hidden state, and runs it on every pixel of that patch."""

    def __init__(
        self, hidden_size: int, channels: int, ratio: int, normalize: Sequence[str] = ("w1", "w2")
    ) -> None:
        super().__init__()
        self.normalize = tuple(normalize)
        self.inner = channels * ratio
        self.generator = nn.Linear(hidden_size, 2 * channels * self.inner)
        self.norm = RMSNorm(channels)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """x [N, pixels, D1], hidden [N, D] -> [N, pixels, D1]."""
        params = self.generator(hidden)
        x = x.to(params.dtype)
        if not fusable(self.norm):
            n = self.norm(x)
            return x + neural_field_mlp_packed(
                n, params, hidden=self.inner, normalize=self.normalize, residual=False
            )
        return neural_field_mlp_packed(
            x,
            params,
            hidden=self.inner,
            norm_weight=self.norm.weight,
            normalize=self.normalize,
            norm_eps=self.norm.eps,
        )


def patchify(image: Tensor, height: int, width: int) -> Tensor:
    """[B, C, H, W] -> [B, L, height * width, C], patches and pixels row by row."""
    batch, channels, rows, columns = image.shape
    grid = image.view(batch, channels, rows // height, height, columns // width, width)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, height * width, channels)


def unpatchify(patches: Tensor, height: int, width: int, rows: int, columns: int) -> Tensor:
    """The inverse of `patchify`: [B, L, height * width, C] -> [B, C, rows * height, columns * width]."""
    batch, _, _, channels = patches.shape
    grid = patches.view(batch, rows, columns, height, width, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, rows * height, columns * width)


class PixelDecoder(nn.Module):
    """The pixel head: noisy image and hidden states to velocity image, one neural field per patch.

        embed(p) = pixel Wpᵀ + (encoding Weᵀ + b)      the bracket is one table [pixels, D1] for all patches
        velocity(p) = linear(norm(block_n(... block_1(embed(p)))))

    Args:
        in_channels: C. hidden_size: D. channels: D1. ratio: D2 / D1. num_blocks: neural-field blocks.
        patch_size: P, pixels. max_freqs, encoding: `coordinate_encoding`'s max_freqs and kind.
        extent: for the encoding "rope", the positions that a patch of any size spans along each axis; None is
            the number of its pixels.
        normalize: as in `neural_field_mlp`. final_norm: whether there is the norm after the blocks.
        workspace, save_weights: as in `pixel_decoder`; attributes that may be changed at any time.

    Raises:
        TypeError, ValueError: every size that is no integer of at least 1, at once.

    Source: PixNerd (arXiv 2507.23268), section 3, whose linear layer on pixel and encoding concatenated is
    split into the two terms above.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_size: int,
        channels: int,
        ratio: int,
        num_blocks: int,
        patch_size: int,
        max_freqs: int = 8,
        encoding: str = "dct",
        extent: float | None = None,
        normalize: Sequence[str] = ("w1", "w2"),
        final_norm: bool = True,
        workspace: int | str | None = "auto",
        save_weights: bool = False,
    ) -> None:
        super().__init__()
        problems = Problems("PixelDecoder")
        for name, value in (
            ("in_channels", in_channels), ("hidden_size", hidden_size), ("channels", channels), ("ratio", ratio),
            ("num_blocks", num_blocks), ("patch_size", patch_size), ("max_freqs", max_freqs),
        ):  # fmt: skip
            problems.count(name, value)
        problems.raise_if_any()
        self.in_channels = in_channels
        self.patch_size = patch_size
        self.encoding = encoding
        self.max_freqs = max_freqs
        self.extent = extent
        self.workspace = workspace
        self.save_weights = save_weights
        self.embed = nn.Linear(in_channels + max_freqs**2, channels)
        self.blocks = nn.ModuleList(
            NeuralFieldBlock(hidden_size, channels, ratio, normalize) for _ in range(num_blocks)
        )
        self.norm = RMSNorm(channels) if final_norm else nn.Identity()
        self.linear = nn.Linear(channels, in_channels)

    def forward(
        self, image: Tensor, hidden: Tensor, decoder_scale: tuple[float, float] = (1.0, 1.0)
    ) -> Tensor:
        """image [B, C, H, W], hidden [B, L, D] (activated) -> velocity [B, C, H, W].

        One call of `pixel_decoder`, as long as every part is what the constructor made, all norms have one eps, and all
        blocks normalise the same weights. Where a part was replaced or wrapped, or has hooks or a `forward` of its own
        (adapters, checkpointing, `fully_shard` or `torch.compile` of a block), the parts are called one after the
        other, and memory grows with the image.
        """
        if not self._is_as_made():
            return self._part_by_part(image, hidden, decoder_scale)
        return pixel_decoder(
            image,
            hidden,
            self.params(),
            patch_size=self.patch_size,
            decoder_scale=decoder_scale,
            workspace=self.workspace,
            save_weights=self.save_weights,
        )

    def _is_as_made(self) -> bool:
        blocks = list(self.blocks)
        if any(type(block) is not NeuralFieldBlock for block in blocks):
            return False
        layers = [self.embed, self.linear, *(block.generator for block in blocks)]
        return (
            all(type(layer) in (nn.Linear, Linear) for layer in layers)
            and all(fusable(block.norm) for block in blocks)  # type: ignore[arg-type]
            and type(self.norm) in (RMSNorm, nn.Identity)
            and all(untouched(part) for part in (self.norm, *layers, *blocks))  # type: ignore[arg-type]
            and len({norm.eps for norm in self._norms()}) <= 1
            and len({tuple(block.normalize) for block in blocks}) <= 1  # type: ignore[arg-type]
        )

    def _norms(self) -> list[RMSNorm]:
        norms = [block.norm for block in self.blocks]
        return [norm for norm in (*norms, self.norm) if isinstance(norm, RMSNorm)]

    def _part_by_part(self, image: Tensor, hidden: Tensor, decoder_scale: tuple[float, float]) -> Tensor:
        height, width = scaled_patch(self.patch_size, decoder_scale)
        pixels = patchify(image, height, width).flatten(0, 1)
        scale = None if self.extent is None else (self.extent / width, self.extent / height)
        encoding = coordinate_encoding(
            height, width, self.max_freqs, self.encoding, scale=scale, device=image.device, dtype=image.dtype
        )
        x = self.embed(torch.cat([pixels, encoding.expand(len(pixels), -1, -1)], dim=-1))
        for block in self.blocks:
            x = block(x, hidden.flatten(0, 1))
        x = self.linear(self.norm(x)).unflatten(0, hidden.shape[:2])
        return unpatchify(x, height, width, image.shape[2] // height, image.shape[3] // width)

    def params(self) -> DecoderParams:
        """The parameters as `pixel_decoder` takes them.

        Raises:
            TypeError: a part was replaced by one that these parameters do not tell, or differs from its like.
        """
        if not self._is_as_made():
            raise TypeError(
                "PixelDecoder: a part was replaced, wrapped, hooked or set up unlike the others; its parameters are "
                "not all there is"
            )
        norm = self.norm if isinstance(self.norm, RMSNorm) else None
        blocks = [
            DecoderBlockParams(block.generator.weight, block.generator.bias, block.norm.weight)  # type: ignore[union-attr, arg-type]
            for block in self.blocks
        ]
        return DecoderParams(
            embed_weight=self.embed.weight,
            embed_bias=self.embed.bias,
            blocks=blocks,
            norm_weight=None if norm is None else norm.weight,
            linear_weight=self.linear.weight,
            linear_bias=self.linear.bias,
            normalize=self.blocks[0].normalize,  # type: ignore[arg-type]
            norm_eps=self._norms()[0].eps,
            encoding=self.encoding,
            max_freqs=self.max_freqs,
            encoding_extent=self.extent,
        )
