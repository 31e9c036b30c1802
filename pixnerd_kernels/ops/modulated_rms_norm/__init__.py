"""RMSNorm, shifted and scaled per image: what stands before every attention and MLP of a DiT block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pixnerd_kernels import backends
from pixnerd_kernels.checks import Problems, check_tangents
from pixnerd_kernels.ops.dtypes import autocast
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
    register_jvp,
    wanted,
)

_passed = Passed()


def modulated_rms_norm(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """x * rsqrt(mean(x²) + eps) * weight * (1 + scale) + shift, with the mean over the last dimension.

    Args:
        x: [B, L, D]; without shift and scale [..., D].
        weight: [D], any floating dtype.
        shift, scale: [B, 1, D] in x's dtype, the same for all L tokens of an image; None leaves the term out.
        eps: in units of x squared.

    Returns:
        A contiguous tensor of x's shape and dtype. float32 and float64 accumulate in their own dtype, bfloat16 and
        float16 in float32 with one rounding. B = 0 or L = 0 gives an empty result.

    Gradients flow to x, weight, shift and scale. Saved for backward: x, weight and scale. Deterministic: the sums
    over tokens are added up in a fixed order. Tangents along x, shift and scale under torch.func.jvp are computed with
    the value in one pass, and inputs alone are saved. Derivatives of higher order, tangents along weight, dual numbers
    by hand of what requires gradients and the other transforms of torch.func run on the reference. Under autocast x,
    shift and scale are cast to the autocast dtype first (weight is not).

    Raises:
        TypeError, ValueError: every problem with the arguments at once.
        NotImplementedError: a forced backend (`use_backend`) cannot run; lists every reason.

    Source: the official PixNerd's RMSNorm and modulation (DiT, arXiv 2212.09748).
    """
    x, shift, scale = autocast(x, shift, scale)
    if direct := plain(x, weight, shift, scale):
        direct += (type(eps), eps)
    _passed.check(direct, _check, x, weight, shift, scale, eps)
    shape = x.shape
    if len(shape) != 3:
        x = x.reshape(1, -1, shape[-1])
    forced = backends.forced_backend()
    arguments = (x, weight, shift, scale, float(eps), forced)
    out: Tensor = call_op("modulated_rms_norm", direct, _ModulatedRMSNorm, _forward, *arguments)
    return out if len(shape) == 3 else out.view(shape)


def _check(x: object, weight: object, shift: object, scale: object, eps: object) -> None:
    problems = Problems("modulated_rms_norm")
    if shift is None and scale is None and isinstance(x, Tensor) and x.dim() != 3:
        _check_rows(problems, x, weight, eps)
    else:
        check_modulation(problems, x, weight, shift, scale, eps)
    problems.raise_if_any()


def _check_rows(problems: Problems, x: Tensor, weight: object, eps: object) -> None:
    problems.tensor("x", x, max(x.dim(), 1), "[..., D]")
    _check_weight(problems, x, weight, eps)


def _check_weight(problems: Problems, x: object, weight: object, eps: object) -> None:
    fits = problems.tensor("weight", weight, 1, "[D]") and isinstance(x, Tensor) and x.dim() > 0
    if fits and weight.shape[0] != x.shape[-1]:  # type: ignore[attr-defined]
        problems.add("weight", f"[{x.shape[-1]}], one weight for each channel of x", weight)  # type: ignore[attr-defined]
    if isinstance(x, Tensor) and x.dim() > 0 and x.shape[-1] == 0:
        problems.add("x", "at least one channel", x)
    problems.number("eps", eps)
    problems.same_device("x", x, [("weight", weight)])


def check_modulation(
    problems: Problems, x: object, weight: object, shift: object, scale: object, eps: object
) -> None:
    """Check x [B, L, D] and what normalises and modulates it."""
    readable = problems.tensor("x", x, 3, "[B, L, D]")
    rows = [(name, value) for name, value in (("shift", shift), ("scale", scale)) if value is not None]
    check_batch_rows(problems, x if readable else None, rows)
    problems.same_dtype("x", x, rows)
    problems.same_device("x", x, rows)
    _check_weight(problems, x, weight, eps)


def check_batch_rows(problems: Problems, x: object, rows: list[tuple[str, Any]]) -> None:
    """Check that each of `rows` is [B, 1, D] for x [B, L, D] (None: x is unreadable)."""
    for name, value in rows:
        if problems.tensor(name, value, 3, "[B, 1, D]") and isinstance(x, Tensor):
            expected = (x.shape[0], 1, x.shape[2])
            if tuple(value.shape) != expected:
                problems.add(name, f"{list(expected)}, one row for each image of x", value)


def _backend(x: Tensor, forced: str) -> Any:
    """The module whose forward and backward run the op."""
    return module("modulated_rms_norm", backends.select("modulated_rms_norm", x.device, x.dtype, forced))


def _forward(x, weight, shift, scale, eps, forced):  # type: ignore[no-untyped-def]
    with torch._C._DisableAutocast():
        return _backend(x, forced).forward(x, weight, shift, scale, eps)


def _gradients(grad, x, weight, shifted, scale, eps, forced):  # type: ignore[no-untyped-def]
    with torch._C._DisableAutocast():
        return _backend(x, forced).backward(grad, x, weight, shifted, scale, eps)


def _backward(grad, x, *arguments):  # type: ignore[no-untyped-def]
    return [x.new_empty(0) if g is None else g for g in _gradients(grad, x, *arguments)]


def _jvp(x, weight, shift, scale, x_tangent, shift_tangent, scale_tangent, eps, forced):  # type: ignore[no-untyped-def]
    tangents = (x_tangent, shift_tangent, scale_tangent)
    check_tangents(("x", "shift", "scale"), (x, shift, scale), tangents)
    with torch._C._DisableAutocast():
        return _backend(x, forced).jvp(x, weight, shift, scale, *tangents, eps)


def _with_tangents(jvp, arguments, tangents):  # type: ignore[no-untyped-def]
    x, weight, shift, scale = tangents[:4]
    return None if weight is not None else jvp(*arguments[:4], x, shift, scale, *arguments[4:])


def _value_gradients(grad, needs, x, weight, shift, scale, *arguments):  # type: ignore[no-untyped-def]
    call = (grad, x, weight, shift is not None, scale, *arguments[3:])
    return gradients("modulated_rms_norm_backward", _gradients, *call)


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _fake_backward(grad, x, weight, shifted, scale, eps, forced):  # type: ignore[no-untyped-def]
    row = (x.shape[0], 1, x.shape[2])
    rows = [x.new_empty(row) if present else x.new_empty(0) for present in (shifted, scale is not None)]
    return [_empty(x), _empty(weight), *rows]


register(
    "modulated_rms_norm(Tensor x, Tensor weight, Tensor? shift, Tensor? scale, float eps, str forced) -> Tensor",
    _forward,
    lambda x, *rest: _empty(x),
)
register(
    "modulated_rms_norm_backward("
    "Tensor grad, Tensor x, Tensor weight, bool shifted, Tensor? scale, float eps, str forced) -> Tensor[]",
    _backward,
    _fake_backward,
)
register(
    "modulated_rms_norm_jvp(Tensor x, Tensor weight, Tensor? shift, Tensor? scale, Tensor? x_tangent, "
    "Tensor? shift_tangent, Tensor? scale_tangent, float eps, str forced) -> (Tensor, Tensor)",
    _jvp,
    lambda x, *rest: (_empty(x), _empty(x)),
)


class _ModulatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, shift, scale, eps, forced, direct=False):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight, scale)
        ctx.options = (shift is not None, eps, forced)
        return below_autograd("modulated_rms_norm", _forward, direct, x, weight, shift, scale, eps, forced)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight, scale = ctx.saved_tensors
        shifted, eps, forced = ctx.options
        found = gradients(
            "modulated_rms_norm_backward", _gradients, grad, x, weight, shifted, scale, eps, forced
        )
        return wanted(found, ctx.needs_input_grad)


register_autograd("modulated_rms_norm", _ModulatedRMSNorm.apply, by_reference(_forward), _with_tangents)
register_gradients("modulated_rms_norm_backward", by_reference(_backward))
register_jvp("modulated_rms_norm", by_reference(_jvp), _value_gradients)
