"""The shapes that compiled kernels rely on.

Exported programs and graph passes call the op without the public function's checks: what would make a kernel read out
of bounds is checked once more before it runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pixnerd_kernels import checks
from pixnerd_kernels.checks import describe


def check_weights(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w_gate: Tensor | None,
    norm_weight: Tensor | None,
    half: bool = False,
) -> None:
    """x [N, S, D1]; w1, w_gate [N, D1, D2]; w2 [N, D2, D1], of one dtype and device; norm_weight [D1].

    half: weights may be of a half type where x is float32.
    """
    mixed = half and x.dtype == torch.float32 and w1.dtype in (torch.bfloat16, torch.float16)
    dtype = w1.dtype if mixed else x.dtype
    patches, _, channels = x.shape
    hidden = w1.shape[-1]
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("w1", w1, (patches, channels, hidden)),
        ("w2", w2, (patches, hidden, channels)),
        ("w_gate", w_gate, (patches, channels, hidden)),
    ]
    for name, weight, shape in expected:
        if weight is not None and (
            weight.shape != shape or weight.dtype != dtype or weight.device != x.device
        ):
            raise ValueError(f"{name}: expected {list(shape)} {dtype} on {x.device}, got {describe(weight)}")
    if norm_weight is not None and norm_weight.shape != (channels,):
        raise ValueError(f"norm_weight: expected [{channels}], got {describe(norm_weight)}")


def check_gradient(grad: Tensor, x: Tensor) -> None:
    """The gradient of the output has its shape and dtype."""
    if grad.shape != x.shape or grad.dtype != x.dtype:
        raise ValueError(f"grad: expected {list(x.shape)} {x.dtype}, got {describe(grad)}")


def check_tangents(tensors: Sequence[Tensor | None], tangents: Sequence[Tensor | None]) -> None:
    """Tangents of x, w1, w2 and w_gate have the shape, dtype and device of theirs; the weights have all or none, and
    something has one."""
    checks.check_tangents(("x", "w1", "w2", "w_gate"), tensors, tangents)
    _, *weights = (
        tangent is None for tensor, tangent in zip(tensors, tangents, strict=True) if tensor is not None
    )
    if all(tangent is None for tangent in tangents):
        raise ValueError("neural_field_mlp_jvp: expected a tangent of x or of the weights, got none")
    if any(weights) and not all(weights):
        raise ValueError("tangents of w1, w2 and w_gate: expected all or none of them")
