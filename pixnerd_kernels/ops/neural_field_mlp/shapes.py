"""The shapes that compiled kernels rely on.

Exported programs and graph passes call the op without the public function's checks: what would make a kernel read out
of bounds is checked once more before it runs.
"""

from __future__ import annotations

from torch import Tensor

from pixnerd_kernels.checks import describe


def check_weights(
    x: Tensor, w1: Tensor, w2: Tensor, w_gate: Tensor | None, norm_weight: Tensor | None
) -> None:
    """x [N, S, D1]; w1, w_gate [N, D1, D2]; w2 [N, D2, D1], of one dtype and device; norm_weight [D1]."""
    patches, _, channels = x.shape
    hidden = w1.shape[-1]
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("w1", w1, (patches, channels, hidden)),
        ("w2", w2, (patches, hidden, channels)),
        ("w_gate", w_gate, (patches, channels, hidden)),
    ]
    for name, weight, shape in expected:
        if weight is not None and (
            weight.shape != shape or weight.dtype != x.dtype or weight.device != x.device
        ):
            raise ValueError(
                f"{name}: expected {list(shape)} {x.dtype} on {x.device}, got {describe(weight)}"
            )
    if norm_weight is not None and norm_weight.shape != (channels,):
        raise ValueError(f"norm_weight: expected [{channels}], got {describe(norm_weight)}")


def check_gradient(grad: Tensor, x: Tensor) -> None:
    """The gradient of the output has its shape and dtype."""
    if grad.shape != x.shape or grad.dtype != x.dtype:
        raise ValueError(f"grad: expected {list(x.shape)} {x.dtype}, got {describe(grad)}")
