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
    """`torch.func.jvp` of another op along the inputs `moving`: its values, and their tangents without a graph.

    In training gradients are those of the values: the tangents are part of a target.
    """

    op: Any
    moving: tuple[str, ...]

    @property
    def differentiable(self) -> int:
        return int(self.op.results)

    @property
    def results(self) -> int:
        return 2 * self.differentiable

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

        def run(*values: Tensor) -> tuple[Tensor, ...]:
            moved = dict(zip(self.moving, values, strict=True))
            out: Results = compute(shape, {**inputs, **moved}, dtype)
            return (out,) if isinstance(out, Tensor) else tuple(out)

        values = tuple(tensors[name] for name in self.moving)
        found, along = torch.func.jvp(run, values, tuple(tensors[PREFIX + name] for name in self.moving))
        return (*found, *(tangent.detach() for tangent in along))

    def flops(self, shape: Shape, training: bool, recompute: bool) -> int:
        return int(self.op.flops(shape, training, recompute) + self.op.tangent_flops(shape, recompute))
