"""The cases: op, shape, dtype, forward or forward+backward, with FLOPs and bytes by formula."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

import pixnerd_kernels
from benchmarks import blocks, formulas, heads, tangents
from benchmarks.shapes import Results, Shape, Tensors, gradient_names


class Op(Protocol):
    """One op as the benchmarks see it: its inputs, two ways to compute it, and what it costs."""

    @property
    def name(self) -> str: ...

    #: The yardstick that bounds it: "matmul" (arithmetic) or "copy" (memory traffic).
    @property
    def bound(self) -> str: ...

    def inputs(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Shapes of the differentiable inputs by name."""

    def output(self, shape: Shape) -> tuple[int, ...]:
        """The shape of each result."""

    #: Results, which `eager` and `ours` return as a tuple where there are several.
    @property
    def results(self) -> int: ...

    def eager(self, shape: Shape, tensors: Tensors, dtype: torch.dtype) -> Results:
        """The official formula; `dtype` matters to ops without inputs."""

    def ours(self, shape: Shape, tensors: Tensors, dtype: torch.dtype) -> Results: ...

    def flops(self, shape: Shape, training: bool, recompute: bool) -> int:
        """`recompute`: backward computes the hidden activations again in place of saving them."""


def upstream_names(op: Op) -> list[str]:
    """The names of the gradients that come in: one for each result, or for those that have some."""
    return gradient_names(getattr(op, "differentiable", op.results))


@dataclass(frozen=True)
class NeuralFieldMLP:
    """N patches of S pixels, D1 channels, D2 hidden; `packed` takes the generated weights as one tensor."""

    gated: bool = False
    packed: bool = False
    name: str = "neural_field_mlp"
    bound: str = "matmul"
    results: int = 1

    def _weights(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        n, d1, d2 = shape["N"], shape["D1"], shape["D2"]
        gate = {"w_gate": (n, d1, d2)} if self.gated else {}
        return {**gate, "w1": (n, d1, d2), "w2": (n, d2, d1)}

    def inputs(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        weights = self._weights(shape)
        if self.packed:
            weights = {"params": (shape["N"], len(weights) * shape["D1"] * shape["D2"])}
        x = (shape["N"], shape["S"], shape["D1"])
        return {"x": x, **weights, "norm_weight": (shape["D1"],)}

    def output(self, shape: Shape) -> tuple[int, ...]:
        return shape["N"], shape["S"], shape["D1"]

    def eager(self, shape: Shape, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        if self.packed:
            weights = self._weights(shape)
            chunks = tensors["params"].chunk(len(weights), dim=-1)
            views = [chunk.view(size) for chunk, size in zip(chunks, weights.values(), strict=True)]
            tensors = {**tensors, **dict(zip(weights, views, strict=True))}
        x, w1, w2, norm_weight = (tensors[name] for name in ("x", "w1", "w2", "norm_weight"))
        if self.gated:
            return formulas.gated_neural_field(x, tensors["w_gate"], w1, w2, norm_weight)
        return formulas.neural_field(x, w1, w2, norm_weight)

    def ours(self, shape: Shape, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        x, norm_weight = tensors["x"], tensors["norm_weight"]
        if self.packed:
            return pixnerd_kernels.neural_field_mlp_packed(
                x, tensors["params"], hidden=shape["D2"], gated=self.gated, norm_weight=norm_weight
            )
        gate = tensors.get("w_gate")
        return pixnerd_kernels.neural_field_mlp(
            x, tensors["w1"], tensors["w2"], w_gate=gate, norm_weight=norm_weight
        )

    def flops(self, shape: Shape, training: bool, recompute: bool) -> int:
        """Matrix products only. Backward has two for each of forward's, and recomputes all but the last."""
        forward = 3 if self.gated else 2
        products = forward
        if training:
            products += 2 * forward + (forward - 1 if recompute else 0)
        return products * 2 * shape["N"] * shape["S"] * shape["D1"] * shape["D2"]

    def tangent_flops(self, shape: Shape, recompute: bool) -> int:
        """Of the tangent along x and the weights: each product has two factors that move."""
        return 2 * self.flops(shape, training=False, recompute=False)


@dataclass(frozen=True)
class NormalizeWeights:
    """Columns of N matrices [D1, D2]."""

    name: str = "normalize_weights"
    bound: str = "copy"
    results: int = 1

    def inputs(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        return {"w": self.output(shape)}

    def output(self, shape: Shape) -> tuple[int, ...]:
        return shape["N"], shape["D1"], shape["D2"]

    def eager(self, shape: Shape, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        return torch.nn.functional.normalize(tensors["w"], dim=-2)

    def ours(self, shape: Shape, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        return pixnerd_kernels.normalize_weights(tensors["w"])

    def flops(self, shape: Shape, training: bool, recompute: bool) -> int:
        """Per element: square, add, scale; backward the dot product, the norm again, and the projection."""
        backward = 5 + (2 if recompute else 0)
        return (3 + (backward if training else 0)) * shape["N"] * shape["D1"] * shape["D2"]


@dataclass(frozen=True)
class CoordinateEncoding:
    """The class-to-image table of H x W pixels and K frequencies per axis."""

    name: str = "coordinate_encoding"
    bound: str = "copy"
    results: int = 1

    def inputs(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        return {}

    def output(self, shape: Shape) -> tuple[int, ...]:
        return shape["H"] * shape["W"], shape["K"] ** 2

    def eager(self, shape: Shape, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        return formulas.dct_encoding(shape["H"], shape["W"], shape["K"], dtype)

    def ours(self, shape: Shape, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        return pixnerd_kernels.coordinate_encoding(shape["H"], shape["W"], shape["K"], dtype=dtype)

    def flops(self, shape: Shape, training: bool, recompute: bool) -> int:
        """Per entry: the product of the axes and the weight; the cosines are not counted."""
        return 2 * shape["H"] * shape["W"] * shape["K"] ** 2


@dataclass(frozen=True)
class Case:
    """One row of the benchmark. `shape` is the size that is reported, `smoke` the one that tests run."""

    name: str
    op: Op
    training: bool
    shape: Shape = field(hash=False)
    smoke: Shape = field(hash=False)
    dtype: torch.dtype = torch.float32
    #: Reported under both malloc settings and with the process's peak memory.
    headline: bool = False

    def size(self, name: str) -> Shape:
        """The shape called "full" or "smoke"."""
        return {"full": self.shape, "smoke": self.smoke}[name]

    def sizes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs, and for training of the results' gradients, by name."""
        gradients = upstream_names(self.op) if self.training else []
        return self.op.inputs(shape) | dict.fromkeys(gradients, self.op.output(shape))

    def make(self, shape: Shape) -> dict[str, Tensor]:
        """Seeded tensors of `sizes`."""
        generator = torch.Generator().manual_seed(0)
        sizes = self.sizes(shape)
        return {name: torch.randn(size, generator=generator).to(self.dtype) for name, size in sizes.items()}

    def leaves(self, shape: Shape) -> list[str]:
        """The inputs whose gradients are asked for in training: all but tangents."""
        return [name for name in self.op.inputs(shape) if not name.startswith(tangents.PREFIX)]

    def flops(self, shape: Shape, recompute: bool) -> int:
        return self.op.flops(shape, self.training, recompute)

    def bytes(self, shape: Shape) -> int:
        """The least traffic possible: every input read and every output written once in each pass."""
        sizes = {name: torch.Size(size).numel() for name, size in self.op.inputs(shape).items()}
        result = torch.Size(self.op.output(shape)).numel()
        elements = sum(sizes.values()) + self.op.results * result
        if self.training:
            elements += len(upstream_names(self.op)) * result + 2 * sum(sizes[n] for n in self.leaves(shape))
        return elements * self.dtype.itemsize


def _both(name: str, op: Op, shape: Shape, smoke: Shape, **options: object) -> list[Case]:
    """A forward and a forward+backward case."""
    passes = {"forward": False, "training": True}
    return [Case(f"{name}-{key}", op, training, shape, smoke, **options) for key, training in passes.items()]  # type: ignore[arg-type]


_HEAD = {"N": 256, "S": 256, "D1": 64, "D2": 128}
_CHROMA = {"N": 64, "S": 256, "D1": 64, "D2": 256}
_ODD = {"N": 1024, "S": 20, "D1": 12, "D2": 24}
_HEAD_SMOKE = {"N": 4, "S": 32, "D1": 16, "D2": 32}
_TOKENS = {"B": 1, "L": 256, "D": 1152}
_TOKENS_SMOKE = {"B": 2, "L": 20, "D": 24}
_HEADS = {"B": 1, "H": 16, "W": 16, "heads": 16, "d": 72}
_HEADS_SMOKE = {"B": 2, "H": 3, "W": 4, "heads": 2, "d": 24}
_ODD_SMOKE = {"N": 3, "S": 20, "D1": 12, "D2": 24}
_XL = {"B": 1, "H": 256, "P": 16, "D": 1152, "D1": 64, "D2": 128, "K": 4}
_L = {**_XL, "D": 1024, "K": 2}
_RADIANCE = {**_XL, "H": 1024, "D": 3072, "D2": 256}
_DECODER_SMOKE = {"B": 2, "H": 8, "P": 4, "D": 24, "D1": 16, "D2": 32, "K": 2}

_ALL: list[Case] = [
    *_both("neural_field_mlp-plain", NeuralFieldMLP(), _HEAD, _HEAD_SMOKE, headline=True),
    *_both("neural_field_mlp-packed", NeuralFieldMLP(packed=True), _HEAD, _HEAD_SMOKE),
    *_both("neural_field_mlp-gated", NeuralFieldMLP(gated=True), _CHROMA, _HEAD_SMOKE),
    *_both(
        "neural_field_mlp-tangent",
        tangents.Tangent(NeuralFieldMLP(), ("x", "w1", "w2")),
        _HEAD,
        _HEAD_SMOKE,
    ),
    *_both("neural_field_mlp-odd", NeuralFieldMLP(), _ODD, _ODD_SMOKE),
    *_both("neural_field_mlp-bf16", NeuralFieldMLP(), _HEAD, _HEAD_SMOKE, dtype=torch.bfloat16),
    *_both(
        "normalize_weights", NormalizeWeights(), {"N": 256, "D1": 64, "D2": 128}, {"N": 3, "D1": 12, "D2": 24}
    ),
    *_both("modulated_rms_norm", blocks.ModulatedRMSNorm(), _TOKENS, _TOKENS_SMOKE),
    *_both("gated_residual_rms_norm", blocks.GatedResidualNorm(), _TOKENS, _TOKENS_SMOKE),
    *_both("qk_norm_rope", blocks.QkNormRope(), _HEADS, _HEADS_SMOKE),
    *_both("swiglu", blocks.Swiglu(), {**_TOKENS, "D": 3072}, _TOKENS_SMOKE),
    *_both(
        "modulated_rms_norm-tangent",
        tangents.Tangent(blocks.ModulatedRMSNorm(), ("x", "shift", "scale")),
        _TOKENS,
        _TOKENS_SMOKE,
    ),
    *_both(
        "gated_residual_rms_norm-tangent",
        tangents.Tangent(blocks.GatedResidualNorm(), ("x", "y", "gate", "shift", "scale")),
        _TOKENS,
        _TOKENS_SMOKE,
    ),
    *_both("qk_norm_rope-tangent", tangents.Tangent(blocks.QkNormRope(), ("qkv",)), _HEADS, _HEADS_SMOKE),
    *_both(
        "swiglu-tangent",
        tangents.Tangent(blocks.Swiglu(), ("gate", "up")),
        {**_TOKENS, "D": 3072},
        _TOKENS_SMOKE,
    ),
    Case(
        "coordinate_encoding-forward",
        CoordinateEncoding(),
        False,
        {"H": 16, "W": 16, "K": 8},
        {"H": 4, "W": 5, "K": 4},
    ),
]
_DECODERS: list[Case] = [
    *_both("pixel_decoder-xl-256", heads.PixelDecoder(), _XL, _DECODER_SMOKE),
    Case("pixel_decoder-xl-256-saving", heads.PixelDecoder(save_weights=True), True, _XL, _DECODER_SMOKE),
    *_both("pixel_decoder-xl-bf16", heads.PixelDecoder(), _XL, _DECODER_SMOKE, dtype=torch.bfloat16),
    Case(
        "pixel_decoder-xl-bf16-saving",
        heads.PixelDecoder(save_weights=True),
        True,
        _XL,
        _DECODER_SMOKE,
        dtype=torch.bfloat16,
    ),
    *_both(
        "pixel_decoder-xl-256-tangent",
        tangents.Tangent(heads.PixelDecoder(), ("image", "hidden")),
        _XL,
        _DECODER_SMOKE,
    ),
    *_both("pixel_decoder-xl-512", heads.PixelDecoder(), {**_XL, "H": 512}, _DECODER_SMOKE),
    *_both("pixel_decoder-l-256", heads.PixelDecoder(), _L, _DECODER_SMOKE),
    *_both("pixel_decoder-l-512", heads.PixelDecoder(), {**_L, "H": 512}, _DECODER_SMOKE),
    Case(
        "pixel_decoder-radiance-1024-forward",
        heads.PixelDecoder(gated=True),
        False,
        _RADIANCE,
        _DECODER_SMOKE,
    ),
]
CASES: dict[str, Case] = {case.name: case for case in [*_ALL, *_DECODERS]}


def select_cases(patterns: Sequence[str]) -> list[Case]:
    """The cases that the patterns name: a case, an op (all its cases), or a shell pattern; empty means all
    but the decoders, which have a command of their own.

    Raises:
        ValueError: a pattern matches nothing; the message lists the known cases.
    """
    if not patterns:
        return list(_ALL)
    chosen: dict[str, Case] = {}
    unknown = []
    for pattern in patterns:
        found = {n: c for n, c in CASES.items() if pattern == c.op.name or fnmatch.fnmatchcase(n, pattern)}
        chosen.update(found)
        if not found:
            unknown.append(pattern)
    if unknown:
        raise ValueError(f"unknown case {', '.join(map(repr, unknown))}; known: {', '.join(CASES)}")
    return list(chosen.values())
