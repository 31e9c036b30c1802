"""Chroma1-Radiance's whole pixel head, where the model exposes it as a method (ComfyUI's `forward_nerf`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnerd_kernels.ops import DecoderBlockParams, DecoderParams, pixel_decoder
from pixnerd_kernels.ops.neural_field_mlp import WEIGHTS
from pixnerd_kernels.patching.probe import Candidate, Form, Inputs, probe_dtype
from pixnerd_kernels.patching.rules.base import (
    Left,
    eps_at,
    generating_layer,
    is_linear,
    norm_eps,
    norm_weight,
    observed,
    plain_dtype,
    unreadable,
)
from pixnerd_kernels.patching.rules.head import encode, fields, frequencies
from pixnerd_kernels.patching.rules.neural_field import FieldFormula
from pixnerd_kernels.patching.swap import Replacement, arguments

_EMBEDDER, _BLOCKS = "nerf_image_embedder", "nerf_blocks"
_FINAL = ("nerf_final_layer_conv", "nerf_final_layer")
_ENCODINGS = ("dct_integer", "dct")


@dataclass(frozen=True)
class RadianceHead(Replacement):
    """image [B, C, H, W] and hidden [B, L, D] through `pixel_decoder`, and on through the module's final layer.

    Patches are decoded in chunks, so that `nerf_tile_size` has nothing left to do.
    """

    op: ClassVar[str] = "pixel_decoder"
    method: ClassVar[str] = "forward_nerf"
    final: str
    weight: str
    encoding: str
    norm_eps: float | None

    def accepts(self, module: Any, *args: Any) -> bool:
        if len(args) != 3:
            return False
        image, hidden, params = args
        size = params.patch_size
        fits = image.dim() == 4 and hidden.dim() == 3 and image.dtype == hidden.dtype
        fits = fits and not image.shape[2] % size and not image.shape[3] % size
        layers = [block.param_generator for block in module.nerf_blocks]
        usable = all(is_linear(layer) and plain_dtype(hidden, layer.weight) for layer in layers)
        return fits and usable and not any(map(observed, _bypassed(module)))

    def run(self, module: Any, *args: Any) -> Tensor:
        image, hidden, params = args
        embedder = module.nerf_image_embedder.embedder[0]
        blocks = [
            DecoderBlockParams(
                block.param_generator.weight, block.param_generator.bias, getattr(block.norm, self.weight)
            )
            for block in module.nerf_blocks
        ]
        decoder = DecoderParams(
            embedder.weight, embedder.bias, blocks, None, None,
            gated=True, encoding=self.encoding, norm_eps=eps_at(self.norm_eps, hidden.dtype),
        )  # fmt: skip
        features = pixel_decoder(image, hidden, decoder, patch_size=params.patch_size)
        out: Tensor = getattr(module, self.final)(features)
        return out


def _bypassed(module: Any) -> Iterator[nn.Module]:
    """The modules that the op runs in place of."""
    yield from module.nerf_image_embedder.modules()
    for block in module.nerf_blocks:
        yield from block.modules()


@dataclass(frozen=True)
class _Formula:
    """The features [B, D1, H, W], from image, hidden, the embedder's weight and bias, and every block's norm."""

    generators: tuple[nn.Linear, ...]
    final: str
    size: int
    hidden: int
    encoding: str
    eps: float

    def __call__(
        self, image: Tensor, hidden: Tensor, last: Tensor, weight: Tensor, bias: Tensor, *norms: Tensor
    ) -> dict[str, Tensor]:
        """`last` is what the final layer gave."""
        batch, channels, height, width = image.shape
        patch = (self.size, self.size)
        table = encode(self.encoding, patch, frequencies(weight, channels), image)
        field = FieldFormula(self.hidden, True, WEIGHTS, self.eps)
        blocks = zip(self.generators, norms, strict=True)
        x = fields(image, hidden, patch, table, weight, bias, blocks, field)
        x = x.transpose(1, 2).reshape(batch, hidden.shape[1], -1).transpose(1, 2)
        features = F.fold(x, (height, width), self.size, stride=self.size)
        return {f"{self.final}<": features, "output": last}


class RadianceHeadRule:
    op = RadianceHead.op

    def match(self, module: nn.Module) -> Candidate | Left | None:
        if not callable(getattr(type(module), RadianceHead.method, None)):
            return None
        if len(arguments(getattr(type(module), RadianceHead.method))) != 3:
            return Left("its forward_nerf takes other arguments than image, hidden states and parameters")
        children = dict(module.named_children())
        finals = [name for name in _FINAL if name in children]
        if _EMBEDDER not in children or _BLOCKS not in children or len(finals) != 1:
            return Left(f"it has forward_nerf, but not {_EMBEDDER}, {_BLOCKS} and one of {', '.join(_FINAL)}")
        params = getattr(module, "params", None)
        size = getattr(params, "patch_size", None)
        embedder = generating_layer(getattr(children[_EMBEDDER], "embedder", module))
        blocks = list(children[_BLOCKS].children())
        layers = [getattr(block, "param_generator", module) for block in blocks]
        if kinds := unreadable(layers):
            return Left(f"its generating layers are or hold {kinds}, which would all be unpacked at once")
        generators = [generating_layer(layer) for layer in layers]
        norms = {norm_weight(getattr(block, "norm", module)) for block in blocks}
        if (
            not isinstance(size, int)
            or embedder is None
            or None in generators
            or len(norms) != 1
            or None in norms
        ):
            return Left("its head is not an embedder and gated blocks of a linear layer and a norm")
        return self._candidate(module, params, size, embedder, blocks, finals[0])

    def _candidate(
        self, module: Any, params: object, size: int, embedder: Any, blocks: list[Any], final: str
    ) -> Candidate | Left:
        generators = tuple(block.param_generator for block in blocks)
        weight = norm_weight(blocks[0].norm) or ""
        channels, eps = getattr(blocks[0].norm, weight).shape[0], norm_eps(blocks[0].norm)
        dtypes = {layer.weight.dtype for layer in generators}
        if dtypes - {torch.float32, torch.bfloat16, torch.float16, torch.float64} or len(dtypes) > 1:
            names = ", ".join(sorted(map(str, dtypes)))
            return Left(
                f"its generating layers hold {names}: cast at each call, they would all be held at once"
            )
        parameter = f"{_BLOCKS}.0.param_generator.weight"
        at = eps_at(eps, probe_dtype(module, parameter))
        hidden = generators[0].out_features // (3 * channels)
        colours = embedder.in_features - _frequencies(module) ** 2
        given = [p.name for p in arguments(type(module).forward_nerf)]

        def inputs(rng: torch.Generator) -> Inputs:
            image = torch.randn(2, colours, size, 2 * size, generator=rng)
            states = torch.randn(2, 2, generators[0].in_features, generator=rng)
            return dict(zip(given, (image, states, params), strict=True))

        tensors = (
            given[0], given[1], f"{final}()", f"{_EMBEDDER}.embedder.0.weight", f"{_EMBEDDER}.embedder.0.bias",
            *(f"{_BLOCKS}.{index}.norm.{weight}" for index in range(len(blocks))),
        )  # fmt: skip
        forms = tuple(
            Form(
                f"gated blocks, encoding {encoding}",
                _Formula(generators, final, size, hidden, encoding, at),
                tensors,
                RadianceHead(final, weight, encoding, eps),
            )
            for encoding in _ENCODINGS
        )
        return Candidate(forms, inputs, (), parameter, (final,), method=RadianceHead.method)


def _frequencies(module: Any) -> int:
    return int(module.nerf_image_embedder.max_freqs)
