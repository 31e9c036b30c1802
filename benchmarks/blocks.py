"""The ops of a transformer block as the benchmarks see them, at the sizes of XL/16 and one 256x256 image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import pixnerd_kernels
from benchmarks import formulas
from benchmarks.baselines import pixnerd
from benchmarks.shapes import Results, Shape, Tensors
from pixnerd_kernels.nn import rotary_table


def _elements(shape: Shape) -> int:
    return shape["B"] * shape["L"] * shape["D"]


@dataclass(frozen=True)
class ModulatedRMSNorm:
    """x [B, L, D], weight [D], shift and scale [B, 1, D]."""

    name: str = "modulated_rms_norm"
    bound: str = "copy"
    results: int = 1

    def inputs(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        row = (shape["B"], 1, shape["D"])
        return {"x": self.output(shape), "weight": (shape["D"],), "shift": row, "scale": row}

    def output(self, shape: Shape) -> tuple[int, ...]:
        return shape["B"], shape["L"], shape["D"]

    def eager(self, shape: Shape, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        n = formulas.rms_norm(tensors["x"], tensors["weight"])
        return n * (1 + tensors["scale"]) + tensors["shift"]

    def ours(self, shape: Shape, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        return pixnerd_kernels.modulated_rms_norm(**tensors)

    def liger(self, shape: Shape, tensors: Tensors) -> Tensor:
        from liger_kernel.transformers.functional import liger_modulated_rms_norm

        # Not in place: that would overwrite the gradient that the next call reads.
        scale, shift = tensors["scale"].squeeze(1), tensors["shift"].squeeze(1)
        out: Tensor = liger_modulated_rms_norm(tensors["x"], tensors["weight"], scale, shift, in_place=False)
        return out

    def flops(self, shape: Shape, training: bool, recompute: bool) -> int:
        """Per element: square, add, three products and a sum; backward about twice that, and the norm again."""
        return (6 + (12 + 3 * recompute if training else 0)) * _elements(shape)

    def tangent_flops(self, shape: Shape, recompute: bool) -> int:
        """Per element: product and sum of x and its tangent, two terms of n's, three products and two sums."""
        return 9 * _elements(shape)


@dataclass(frozen=True)
class GatedResidualNorm:
    """x and y [B, L, D], gate, shift and scale [B, 1, D], weight [D]."""

    name: str = "gated_residual"
    bound: str = "copy"
    results: int = 2

    def inputs(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        full, row = self.output(shape), (shape["B"], 1, shape["D"])
        return {"x": full, "y": full, "gate": row, "weight": (shape["D"],), "shift": row, "scale": row}

    def output(self, shape: Shape) -> tuple[int, ...]:
        return shape["B"], shape["L"], shape["D"]

    def eager(self, shape: Shape, tensors: Tensors, dtype: torch.dtype) -> Results:
        z = tensors["x"] + tensors["gate"] * tensors["y"]
        return z, formulas.rms_norm(z, tensors["weight"]) * (1 + tensors["scale"]) + tensors["shift"]

    def ours(self, shape: Shape, tensors: Tensors, dtype: torch.dtype) -> Results:
        return pixnerd_kernels.gated_residual_rms_norm(**tensors)

    def flops(self, shape: Shape, training: bool, recompute: bool) -> int:
        """As the norm, and the product and the sum of the residual."""
        return (8 + (16 + 3 * recompute if training else 0)) * _elements(shape)

    def tangent_flops(self, shape: Shape, recompute: bool) -> int:
        """Per element: as the norm, and two products and two sums of the residual."""
        return 13 * _elements(shape)


@dataclass(frozen=True)
class QkNormRope:
    """qkv [B, H * W, 3, heads, d] to dense q, k and v."""

    name: str = "qk_norm_rope"
    bound: str = "copy"
    results: int = 3

    def inputs(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        channels = (shape["d"],)
        qkv = (shape["B"], shape["H"] * shape["W"], 3, shape["heads"], shape["d"])
        return {"qkv": qkv, "q_weight": channels, "k_weight": channels}

    def output(self, shape: Shape) -> tuple[int, ...]:
        return shape["B"], shape["H"] * shape["W"], shape["heads"], shape["d"]

    def eager(self, shape: Shape, tensors: Tensors, dtype: torch.dtype) -> Results:
        q, k, v = tensors["qkv"].unbind(2)
        turn = pixnerd.rotary_table(shape["H"], shape["W"], shape["d"], like=q)
        q = pixnerd.rotate(formulas.rms_norm(q, tensors["q_weight"]), turn)
        return q, pixnerd.rotate(formulas.rms_norm(k, tensors["k_weight"]), turn), v.contiguous()

    def ours(self, shape: Shape, tensors: Tensors, dtype: torch.dtype) -> Results:
        rope = rotary_table(shape["H"], shape["W"], shape["d"], device=tensors["qkv"].device)
        return pixnerd_kernels.qk_norm_rope(**tensors, rope=rope)

    def flops(self, shape: Shape, training: bool, recompute: bool) -> int:
        """Per element of q and k: square, add, two products, and three for the rotation."""
        elements = 2 * shape["B"] * shape["H"] * shape["W"] * shape["heads"] * shape["d"]
        return (7 + (14 + 3 * recompute if training else 0)) * elements

    def tangent_flops(self, shape: Shape, recompute: bool) -> int:
        """Per element: of q and k product and sum of both, two terms of n's, a product, and three for the rotation."""
        return 8 * 2 * shape["B"] * shape["H"] * shape["W"] * shape["heads"] * shape["d"]


@dataclass(frozen=True)
class Swiglu:
    """gate and up [B, L, D], where D is the hidden width."""

    name: str = "swiglu"
    bound: str = "copy"
    results: int = 1
    #: Liger's backward writes over gate and up, which the next timed call reads.
    forward_only_rivals: tuple[str, ...] = ("liger",)

    def inputs(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        return {"gate": self.output(shape), "up": self.output(shape)}

    def output(self, shape: Shape) -> tuple[int, ...]:
        return shape["B"], shape["L"], shape["D"]

    def eager(self, shape: Shape, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        return F.silu(tensors["gate"]) * tensors["up"]

    def ours(self, shape: Shape, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        return pixnerd_kernels.swiglu(tensors["gate"], tensors["up"])

    def liger(self, shape: Shape, tensors: Tensors) -> Tensor:
        from liger_kernel.transformers.functional import liger_swiglu

        out: Tensor = liger_swiglu(tensors["gate"], tensors["up"])
        return out

    def flops(self, shape: Shape, training: bool, recompute: bool) -> int:
        """Per element: the exponential as one, add, divide, two products; backward twice that."""
        return (5 + (10 + 3 * recompute if training else 0)) * _elements(shape)

    def tangent_flops(self, shape: Shape, recompute: bool) -> int:
        """Per element: four for silu's slope, three products and a sum."""
        return 8 * _elements(shape)
