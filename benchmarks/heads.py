"""The whole pixel decoder as the benchmarks see it: embedding, generators, neural fields and the output layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import formulas
from benchmarks.shapes import Shape, Tensors
from pixnerd_kernels import DecoderBlockParams, DecoderParams, coordinate_encoding, pixel_decoder

_COLOURS = 3
_FREQUENCIES = 8


@dataclass(frozen=True)
class PixelDecoder:
    """B images of H x H pixels, patches of P x P, hidden size D, K blocks of D1 x D2; `gated` returns features.

    `save_weights` keeps the generated weights for backward in place of generating them again.
    """

    gated: bool = False
    save_weights: bool = False
    name: str = "pixel_decoder"
    bound: str = "matmul"
    results: int = 1

    def inputs(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        d1, generated = shape["D1"], self._generated(shape)
        sizes: dict[str, tuple[int, ...]] = {
            "image": (shape["B"], _COLOURS, shape["H"], shape["H"]),
            "hidden": (shape["B"], (shape["H"] // shape["P"]) ** 2, shape["D"]),
            "embed_weight": (d1, _COLOURS + _FREQUENCIES**2),
            "embed_bias": (d1,),
            "norm_weight": (d1,),
        }
        if not self.gated:
            sizes |= {"linear_weight": (_COLOURS, d1), "linear_bias": (_COLOURS,)}
        for k in range(shape["K"]):
            sizes |= {
                f"generator.{k}": (generated, shape["D"]),
                f"bias.{k}": (generated,),
                f"norm.{k}": (d1,),
            }
        return sizes

    def output(self, shape: Shape) -> tuple[int, ...]:
        return shape["B"], shape["D1"] if self.gated else _COLOURS, shape["H"], shape["H"]

    def eager(self, shape: Shape, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        batch, size, rows, count = shape["B"], shape["P"], shape["H"] // shape["P"], self._patches(shape)
        # In place of unfold and fold, whose code torch.compile of torch 2.13 corrupts the heap with.
        x = tensors["image"].view(batch, _COLOURS, rows, size, rows, size)
        x = x.permute(0, 2, 4, 3, 5, 1).reshape(count, size * size, _COLOURS)
        kind = "dct_integer" if self.gated else "dct"
        encoding = coordinate_encoding(size, size, _FREQUENCIES, kind, device=x.device, dtype=dtype)
        x = torch.cat([x, encoding.expand(count, -1, -1)], -1)
        x = F.linear(x, tensors["embed_weight"], tensors["embed_bias"])
        states = tensors["hidden"].flatten(0, 1)
        wide, tall = (count, shape["D1"], shape["D2"]), (count, shape["D2"], shape["D1"])
        for k in range(shape["K"]):
            generated = F.linear(states, tensors[f"generator.{k}"], tensors[f"bias.{k}"])
            norm = tensors[f"norm.{k}"]
            if self.gated:
                gate, w1, w2 = generated.chunk(3, -1)
                x = formulas.gated_neural_field(x, gate.view(wide), w1.view(wide), w2.view(tall), norm)
            else:
                w1, w2 = generated.chunk(2, -1)
                x = formulas.neural_field(x, w1.view(wide), w2.view(tall), norm)
        x = formulas.rms_norm(x, tensors["norm_weight"])
        if not self.gated:
            x = F.linear(x, tensors["linear_weight"], tensors["linear_bias"])
        x = x.view(batch, rows, rows, size, size, x.shape[-1]).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(batch, x.shape[1], shape["H"], shape["H"])

    def ours(self, shape: Shape, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        blocks = [
            DecoderBlockParams(tensors[f"generator.{k}"], tensors[f"bias.{k}"], tensors[f"norm.{k}"])
            for k in range(shape["K"])
        ]
        params = DecoderParams(
            embed_weight=tensors["embed_weight"],
            embed_bias=tensors["embed_bias"],
            blocks=blocks,
            norm_weight=tensors["norm_weight"],
            linear_weight=tensors.get("linear_weight"),
            linear_bias=tensors.get("linear_bias"),
            gated=self.gated,
            encoding="dct_integer" if self.gated else "dct",
            max_freqs=_FREQUENCIES,
        )
        return pixel_decoder(
            tensors["image"],
            tensors["hidden"],
            params,
            patch_size=shape["P"],
            save_weights=self.save_weights,
        )

    def flops(self, shape: Shape, training: bool, recompute: bool) -> int:
        """Matrix products, of the embedding on pixel and encoding concatenated (ours: on the pixel alone)."""
        fields = 3 if self.gated else 2
        field_products, products = fields, 1
        if training:
            field_products += 2 * fields + (2 * fields - 1 if recompute else 0)
            products += 2 + (1 if recompute and not self.save_weights else 0)
        patches, pixels = self._patches(shape), shape["P"] ** 2
        field = 2 * patches * pixels * shape["D1"] * shape["D2"]
        generator = 2 * patches * shape["D"] * self._generated(shape)
        end = self._ends(shape, recompute) * (3 if training else 1)
        return shape["K"] * (products * generator + field_products * field) + end

    def tangent_flops(self, shape: Shape, recompute: bool) -> int:
        """Of the tangent along image and hidden: a product of two that move has two."""
        patches, pixels = self._patches(shape), shape["P"] ** 2
        field = 2 * (3 if self.gated else 2) * 2 * patches * pixels * shape["D1"] * shape["D2"]
        return shape["K"] * field + self.linear_flops(shape, recompute)

    def linear_flops(self, shape: Shape, recompute: bool) -> int:
        """Of a forward's linear layers: the generators, the embedding and the output layer."""
        generator = 2 * self._patches(shape) * shape["D"] * self._generated(shape)
        return shape["K"] * generator + self._ends(shape, recompute)

    def _ends(self, shape: Shape, recompute: bool) -> int:
        """Of the embedding and the output layer, once."""
        ends = _COLOURS + (0 if recompute else _FREQUENCIES**2) + (0 if self.gated else _COLOURS)
        return 2 * self._patches(shape) * shape["P"] ** 2 * shape["D1"] * ends

    def _generated(self, shape: Shape) -> int:
        return (3 if self.gated else 2) * shape["D1"] * shape["D2"]

    def _patches(self, shape: Shape) -> int:
        return shape["B"] * (shape["H"] // shape["P"]) ** 2
