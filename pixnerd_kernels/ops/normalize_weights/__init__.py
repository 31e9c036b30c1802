"""Column normalisation of generated weights, for those who want that piece of `neural_field_mlp` alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pixnerd_kernels import backends
from pixnerd_kernels.checks import FLOATS, Problems
from pixnerd_kernels.ops.library import (
    Passed,
    below_autograd,
    by_reference,
    call_op,
    gradients,
    module,
    plain,
    register,
    register_autograd,
    register_gradients,
)

_passed = Passed()


def normalize_weights(w: Tensor, dim: int = -2, eps: float = 1e-12) -> Tensor:
    """w / max(||w||, eps), with the L2 norm taken over `dim`; the same as torch.nn.functional.normalize.

    Args:
        w: floating tensor of any rank from 1.
        dim: the dimension that each norm sums over; -2 normalises the columns of [..., rows, columns].
        eps: lower bound of the norm, in w's units.

    Returns:
        A contiguous tensor of w's shape and dtype. float32 and float64 accumulate in their own dtype, bfloat16 and
        float16 in float32. Saved for backward: w. Derivatives of higher order, forward mode and the transforms of
        torch.func run on the reference.

    Raises:
        TypeError, ValueError: every problem with the arguments at once.
        NotImplementedError: a forced backend (`use_backend`) cannot run; lists every reason.
    """
    if direct := plain(w):
        direct += (type(dim), dim, type(eps), eps)
    _passed.check(direct, _check, w, dim, eps)
    forced = backends.forced_backend()
    arguments = (w, dim % w.dim(), float(eps), forced)
    out: Tensor = call_op("normalize_weights", direct, _NormalizeWeights, _forward, *arguments)
    return out


def _check(w: object, dim: object, eps: object) -> None:
    problems = Problems("normalize_weights")
    rank = w.dim() if isinstance(w, Tensor) else 0
    if not isinstance(w, Tensor) or w.dtype not in FLOATS:
        problems.add_type("w", "a float32, float64, bfloat16 or float16 tensor", w)
    elif w.layout != torch.strided:
        problems.add_type("w", "a dense (strided) tensor", w.layout)
    elif rank == 0:
        problems.add("w", "at least one dimension", w)
    if isinstance(dim, bool) or not isinstance(dim, int):
        problems.add_type("dim", "an integer", dim)
    elif rank and not -rank <= dim < rank:
        problems.add("dim", f"a dimension of w, {-rank} to {rank - 1}", dim)
    problems.number("eps", eps)
    problems.raise_if_any()


def _backend(w: Tensor, forced: str) -> Any:
    """The module whose forward and backward run the op."""
    return module("normalize_weights", backends.select("normalize_weights", w.device, w.dtype, forced))


def _forward(w: Tensor, dim: int, eps: float, forced: str) -> Tensor:
    out: Tensor = _backend(w, forced).forward(w, dim, eps)
    return out


def _backward(grad: Tensor, w: Tensor, dim: int, eps: float, forced: str) -> Tensor:
    out: Tensor = _backend(w, forced).backward(grad, w, dim, eps)
    return out


register(
    "normalize_weights(Tensor w, int dim, float eps, str forced) -> Tensor",
    _forward,
    lambda w, dim, eps, forced: torch.empty_like(w, memory_format=torch.contiguous_format),
)
register(
    "normalize_weights_backward(Tensor grad, Tensor w, int dim, float eps, str forced) -> Tensor",
    _backward,
    lambda grad, w, dim, eps, forced: torch.empty_like(w, memory_format=torch.contiguous_format),
)


class _NormalizeWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, dim, eps, forced, direct=False):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(w)
        ctx.options = (dim, eps, forced)
        return below_autograd("normalize_weights", _forward, direct, w, dim, eps, forced)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (w,) = ctx.saved_tensors
        found = gradients("normalize_weights_backward", _backward, grad, w, *ctx.options)
        return found, None, None, None, None


register_autograd("normalize_weights", _NormalizeWeights.apply, by_reference(_forward))
register_gradients("normalize_weights_backward", by_reference(_backward))
