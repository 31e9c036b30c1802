"""The official PixNerDiT's forward, with its pixel head as one op: class-to-image, text-to-image, heavy decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnerd_kernels.ops import DecoderBlockParams, DecoderParams, pixel_decoder
from pixnerd_kernels.patching.probe import Candidate, Form, Inputs, probe_dtype
from pixnerd_kernels.patching.rules.base import (
    Left,
    eps_at,
    generating_layer,
    is_linear,
    norm_eps,
    norm_weight,
    observed,
    unreadable,
)
from pixnerd_kernels.patching.rules.head import encode, fields, frequencies
from pixnerd_kernels.patching.rules.neural_field import FieldFormula
from pixnerd_kernels.patching.rules.rms_norm import rms_norm
from pixnerd_kernels.patching.swap import Replacement, arguments

_CHILDREN = ("x_embedder", "s_embedder", "t_embedder", "y_embedder", "final_layer", "blocks")
#: (normalised weights, encoding, extent of the positions): published and possible heads.
_HEADS = (
    (("w1", "w2"), "dct", None),
    (("w1",), "rope", None),
    (("w1",), "rope", 16.0),
    (("w1", "w2"), "dct_integer", None),
)


@dataclass(frozen=True)
class OfficialHead(Replacement):
    """The module's own transformer, and `pixel_decoder` in place of embedder, field blocks and final layer."""

    op: ClassVar[str] = "pixel_decoder"
    #: Index of the first neural-field block.
    first: int
    weight: str
    normalize: tuple[str, ...]
    encoding: str
    extent: float | None
    norm_eps: float | None

    def accepts(self, module: Any, *args: Any) -> bool:
        image, rest = args[0], args[3:]
        height, width = _patch(module)
        layers = [generating_layer(block.param_generator1) for block in module.blocks[self.first :]]
        usable = all(layer is not None and layer.weight.device == image.device for layer in layers)
        fits = image.dim() == 4 and not image.shape[2] % height and not image.shape[3] % width
        return (
            fits
            and usable
            and all(given is None for given in rest)
            and not any(map(observed, self._bypassed(module)))
        )

    def _bypassed(self, module: Any) -> list[nn.Module]:
        heads = [module.x_embedder, module.final_layer, *module.blocks[self.first :]]
        return [child for head in heads for child in head.modules()]

    def run(self, module: Any, *args: Any) -> Tensor:
        image, t, y = args[:3]
        hidden = (
            self.text_states(module, image, t, y)
            if _reads_text(module)
            else self.class_states(module, image, t, y)
        )
        final = module.final_layer
        blocks = []
        for block in module.blocks[self.first :]:
            layer = generating_layer(block.param_generator1)
            assert layer is not None
            blocks.append(DecoderBlockParams(layer.weight, layer.bias, getattr(block.norm, self.weight)))  # type: ignore[arg-type]
        embedder = module.x_embedder.embedder[0]
        norm = getattr(final.norm, self.weight) if hasattr(final, "norm") else None
        params = DecoderParams(
            embedder.weight, embedder.bias, blocks, norm,
            final.linear.weight, final.linear.bias, normalize=self.normalize, encoding=self.encoding,
            encoding_extent=self.extent, norm_eps=eps_at(self.norm_eps, hidden.dtype),
        )  # fmt: skip
        scale = tuple(size / module.patch_size for size in _patch(module))
        return pixel_decoder(
            image.to(hidden.dtype), hidden, params, patch_size=module.patch_size, decoder_scale=scale
        )

    def class_states(self, module: Any, image: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Hidden states [B, L, D] of the class-to-image transformer."""
        batch, size, width = len(image), module.patch_size, module.hidden_size
        pos = module.fetch_pos(image.shape[2] // size, image.shape[3] // size, image.device)
        t = module.t_embedder(t.view(-1)).view(batch, -1, width)
        condition = F.silu(t + module.y_embedder(y).view(batch, 1, width))
        s = module.s_embedder(F.unfold(image, size, stride=size).transpose(1, 2))
        for block in module.blocks[: self.first]:
            s = block(s, condition, pos, None)
        return F.silu(t + s)

    def text_states(self, module: Any, image: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Hidden states [B, L, D] of the text-to-image transformer, which sees the image at its own resolution."""
        batch, size, width = len(image), module.patch_size, module.hidden_size
        if hasattr(module, "decoder_patch_scaling_h"):
            scales = (module.decoder_patch_scaling_h, module.decoder_patch_scaling_w)
            small = [int(n / scale) for n, scale in zip(image.shape[2:], scales, strict=True)]
            image = F.interpolate(image, small)
        pos = module.fetch_pos(image.shape[2] // size, image.shape[3] // size, image.device)
        t = module.t_embedder(t.view(-1)).view(batch, -1, width)
        y = module.y_embedder(y).view(batch, -1, width)
        y, condition = y + module.y_pos_embedding.to(y.dtype), F.silu(t)
        for block in module.text_refine_blocks:
            y = block(y, condition)
        s = module.s_embedder(F.unfold(image, size, stride=size).transpose(1, 2))
        for block in module.blocks[: self.first]:
            s = block(s, y, condition, pos)
        return F.silu(t + s)


def _reads_text(module: Any) -> bool:
    return hasattr(module, "text_refine_blocks")


_SCALES = ("decoder_patch_scaling_h", "decoder_patch_scaling_w")


def _patch(module: Any, scales: Mapping[str, float] | None = None) -> tuple[int, int]:
    """Height and width of a decoded patch, at other scales than the module's where they are given."""
    height, width = (
        int(module.patch_size * (scales or {}).get(name, getattr(module, name, 1.0))) for name in _SCALES
    )
    return height, width


def _telling_scales(module: Any) -> dict[str, float]:
    """Scales of the decoder at which a probe tells its forms apart, where its own are none.

    Positions over an extent of 16 are those of a patch of 16 x 16 pixels, which may grow later.
    """
    told = _patch(module) not in [(extent, extent) for _, _, extent in _HEADS]
    if told or not all(hasattr(module, name) for name in _SCALES):
        return {}
    return {name: 2.0 * getattr(module, name) for name in _SCALES}


@dataclass(frozen=True)
class _Formula:
    """The image, from the last transformer block's result and the embedded time on."""

    generators: tuple[nn.Linear, ...]
    patch: tuple[int, int]
    hidden: int
    normalize: tuple[str, ...]
    encoding: str
    extent: float | None
    eps: float
    final_norm: bool

    def __call__(
        self, image: Tensor, s: Tensor, t: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor
    ) -> Tensor:
        batch = len(image)
        norms, last = rest[: len(self.generators)], rest[len(self.generators) :]
        table = encode(self.encoding, self.patch, frequencies(weight, image.shape[1]), image, self.extent)
        states = F.silu(t.view(batch, -1, s.shape[2]) + s)
        field = FieldFormula(self.hidden, False, self.normalize, self.eps)
        x = fields(
            image, states, self.patch, table, weight, bias, zip(self.generators, norms, strict=True), field
        )
        if self.final_norm:
            x, last = rms_norm(x, last[0], self.eps), last[1:]
        x = F.linear(x, *last)
        x = x.transpose(1, 2).reshape(batch, s.shape[1], -1).transpose(1, 2)
        return F.fold(x, image.shape[2:], self.patch, stride=self.patch)


class OfficialHeadRule:
    op = OfficialHead.op

    def match(self, module: nn.Module) -> Candidate | Left | None:
        children = dict(module.named_children())
        if not set(_CHILDREN) <= children.keys():
            return None
        given: Any = module
        blocks = list(given.blocks)
        first = next((i for i, block in enumerate(blocks) if hasattr(block, "param_generator1")), len(blocks))
        generators = [getattr(block, "param_generator1", module) for block in blocks[first:]]
        layers = [generating_layer(generator) for generator in generators]
        if kinds := unreadable(generators):
            return Left(f"its generating layers are or hold {kinds}, which the op cannot read")
        norms = {norm_weight(getattr(block, "norm", module)) for block in blocks[first:]}
        final, embedder = given.final_layer, generating_layer(getattr(given.x_embedder, "embedder", module))
        strangers = {name for name, _ in final.named_children()} - {"norm", "linear"}
        known = (
            embedder is not None and embedder.bias is not None and hasattr(final, "linear") and not strangers
        )
        if not known or first == 0 or not layers or None in layers or len(norms) != 1 or None in norms:
            return Left(
                "its head is not an embedder, blocks of a generating layer and a norm, and a linear layer"
            )
        if not is_linear(final.linear) or not isinstance(getattr(given, "patch_size", None), int):
            return Left("its final layer is not a linear layer, or it has no patch_size")
        return self._candidate(given, first, layers, norms.pop() or "")

    def _candidate(self, module: Any, first: int, layers: Sequence[Any], weight: str) -> Candidate | Left:
        names = [p.name for p in arguments(type(module).forward)]
        required = [p for p in arguments(type(module).forward) if p.default is p.empty]
        if len(required) != 3:
            return Left("its forward takes other arguments than an image, times and classes or text")
        embedder, final, fields_ = (
            module.x_embedder.embedder[0],
            module.final_layer,
            range(first, len(module.blocks)),
        )
        colours, channels = final.linear.out_features, final.linear.in_features
        hidden, eps = layers[0].out_features // (2 * channels), norm_eps(module.blocks[first].norm)
        parameter = "x_embedder.embedder.0.weight"
        at = eps_at(eps, probe_dtype(module, parameter))
        scales = _telling_scales(module)
        patch = _patch(module, scales)

        def inputs(rng: torch.Generator) -> Inputs:
            image = torch.randn(2, colours, patch[0], 2 * patch[1], generator=rng)
            y: Tensor
            if _reads_text(module):
                y = torch.randn(
                    2, module.y_pos_embedding.shape[1], module.y_embedder.proj.in_features, generator=rng
                )
            else:
                y = torch.randint(module.y_embedder.embedding_table.num_embeddings, (2,), generator=rng)
            return dict(zip(names, (image, torch.rand(2, generator=rng), y), strict=False))

        last = ["final_layer.norm." + weight] if hasattr(final, "norm") else []
        last += ["final_layer.linear.weight"] + (
            ["final_layer.linear.bias"] if final.linear.bias is not None else []
        )
        boundary = f"blocks.{first - 1}"
        tensors = (
            names[0], f"{boundary}()", "t_embedder()", "x_embedder.embedder.0.weight", "x_embedder.embedder.0.bias",
            *(f"blocks.{index}.norm.{weight}" for index in fields_), *last,
        )  # fmt: skip
        forms = []
        for normalize, encoding, extent in _HEADS:
            if extent and patch == (extent, extent):  # the same numbers as without, at this and every call
                continue
            span = f" over {extent:g}" if extent else ""
            formula = _Formula(
                tuple(layers), patch, hidden, normalize, encoding, extent, at, hasattr(final, "norm")
            )
            head = OfficialHead(first, weight, normalize, encoding, extent, eps)
            function = f"{', '.join(normalize)} normalised, encoding {encoding}{span}"
            forms.append(Form(function, formula, tensors, head))
        assert embedder is not None
        return Candidate(tuple(forms), inputs, ("t_embedder",), parameter, boundary=boundary, settings=scales)
