"""An op's value together with its tangent, as MeanFlow (arXiv 2505.13447) and consistency models train on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import Results, Shape, Tensors

#: How the names of tangents begin among a case's tensors.
PREFIX = "tangent of "


@dataclass(frozen=True)
class Tangent:
    """`torch.func.jvp` of another op along the inputs `moving`: its value, and its tangent without a graph.

    In training gradients are those of the value: the tangent is part of a target.
    """

    op: Any
    moving: tuple[str, ...]
    results: int = 2
    differentiable: int = 1

    @property
    def name(self) -> str:
        return str(self.op.name)

    @property
    def bound(self) -> str:
        return str(self.op.bound)

    def inputs(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        sizes: dict[str, tuple[int, ...]] = self.op.inputs(shape)
        return sizes | {PREFIX + name: sizes[name] for name in self.moving}

    def output(self, shape: Shape) -> tuple[int, ...]:
        size: tuple[int, ...] = self.op.output(shape)
        return size

    def eager(self, shape: Shape, tensors: Tensors, dtype: torch.dtype) -> Results:
        return self._both(self.op.eager, shape, tensors, dtype)

    def ours(self, shape: Shape, tensors: Tensors, dtype: torch.dtype) -> Results:
        return self._both(self.op.ours, shape, tensors, dtype)

    def _both(self, compute: Any, shape: Shape, tensors: Tensors, dtype: torch.dtype) -> Results:
        inputs = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}

        def run(*values: Tensor) -> Tensor:
            moved = dict(zip(self.moving, values, strict=True))
            out: Tensor = compute(shape, {**inputs, **moved}, dtype)
            return out

        values = tuple(tensors[name] for name in self.moving)
        value, tangent = torch.func.jvp(run, values, tuple(tensors[PREFIX + name] for name in self.moving))
        return value, tangent.detach()

    def flops(self, shape: Shape, training: bool, recompute: bool) -> int:
        return int(self.op.flops(shape, training, recompute) + self.op.tangent_flops(shape, recompute))
