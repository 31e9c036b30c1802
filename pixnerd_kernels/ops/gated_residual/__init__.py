"""x + gate * y, alone and together with the norm that reads it."""

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
from pixnerd_kernels.ops.modulated_rms_norm import check_batch_rows, check_modulation

_passed, _norm_passed = Passed(), Passed()


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y, the residual connection of a DiT block.

    Args:
        x, y: [B, L, D].
        gate: [B, 1, D], the same for all L tokens of an image.

    Returns:
        [B, L, D] in x's dtype, contiguous. float32 and float64 compute in their own dtype, bfloat16 and float16 in
        float32 with one rounding. B = 0 or L = 0 gives an empty result.

    Gradients flow to all three; x's is the incoming one itself. Saved for backward: y and gate. Deterministic: the
    sum over tokens is added up in a fixed order. Tangents under torch.func.jvp are computed with the value in one
    pass, and inputs alone are saved. Derivatives of higher order, dual numbers by hand of what requires gradients and
    the other transforms of torch.func run on the reference. Under autocast all are cast to the autocast dtype first.

    Raises:
        TypeError, ValueError: every problem with the arguments at once.
        NotImplementedError: a forced backend (`use_backend`) cannot run; lists every reason.

    Source: the official PixNerd's DiT block.
    """
    x, y, gate = autocast(x, y, gate)
    direct = plain(x, y, gate)
    _passed.check(direct, _check, x, y, gate)
    forced = backends.forced_backend()
    out: Tensor
    out = call_op("gated_residual", direct, _GatedResidual, _forward, x, y, gate, forced)
    return out


def gated_residual_rms_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`gated_residual` and the `modulated_rms_norm` of its result, in one pass.

    Args:
        x, y, gate: as in `gated_residual`.
        weight, shift, scale, eps: as in `modulated_rms_norm`.

    Returns:
        (z, n), both [B, L, D] in x's dtype, contiguous: z = x + gate * y and n = modulated_rms_norm(z, ...), taken of
        z before it is rounded.

    Saved for backward: z, y, gate, weight and scale (with tangents x instead of z). Backward normalises that z, which
    half precision has rounded: the gradient of weight is as inexact, in float32 too. The rest as in the two ops that
    this one joins.

    Raises:
        TypeError, ValueError, NotImplementedError: as in the two ops.
    """
    x, y, gate, shift, scale = autocast(x, y, gate, shift, scale)
    if direct := plain(x, y, gate, weight, shift, scale):
        direct += (type(eps), eps)
    _norm_passed.check(direct, _check_norm, x, y, gate, weight, shift, scale, eps)
    forced = backends.forced_backend()
    arguments = (x, y, gate, weight, shift, scale, float(eps), forced)
    z, n = call_op("gated_residual_rms_norm", direct, _GatedResidualNorm, _norm_forward, *arguments)
    return z, n


def _check(x: Any, y: Any, gate: Any) -> None:
    problems = Problems("gated_residual")
    _check_residual(problems, x, y, gate)
    problems.raise_if_any()


def _check_norm(x: Any, y: Any, gate: Any, weight: Any, shift: Any, scale: Any, eps: Any) -> None:
    problems = Problems("gated_residual_rms_norm")
    _check_residual(problems, x, y, gate, check_x=False)
    check_modulation(problems, x, weight, shift, scale, eps)
    problems.raise_if_any()


def _check_residual(problems: Problems, x: object, y: object, gate: object, check_x: bool = True) -> None:
    readable = isinstance(x, Tensor) and x.dim() == 3
    if check_x:
        readable = problems.tensor("x", x, 3, "[B, L, D]")
    if problems.tensor("y", y, 3, "[B, L, D]") and readable and y.shape != x.shape:  # type: ignore[attr-defined]
        problems.add("y", f"the shape of x {list(x.shape)}", y)  # type: ignore[attr-defined]
    check_batch_rows(problems, x if readable else None, [("gate", gate)])
    problems.same_dtype("x", x, [("y", y), ("gate", gate)])
    problems.same_device("x", x, [("y", y), ("gate", gate)])


def _backend(x: Tensor, forced: str) -> Any:
    """The module that runs both ops, forward and backward."""
    return module("gated_residual", backends.select("gated_residual", x.device, x.dtype, forced))


def _forward(x, y, gate, forced):  # type: ignore[no-untyped-def]
    with torch._C._DisableAutocast():
        return _backend(x, forced).forward(x, y, gate)


def _backward(grad, y, gate, forced):  # type: ignore[no-untyped-def]
    with torch._C._DisableAutocast():
        return list(_backend(y, forced).backward(grad, y, gate))


def _norm_forward(x, *arguments):  # type: ignore[no-untyped-def]
    *arguments, forced = arguments
    with torch._C._DisableAutocast():
        return _backend(x, forced).norm_forward(x, *arguments)


def _norm_gradients(grad_z, grad, z, *arguments):  # type: ignore[no-untyped-def]
    *arguments, forced = arguments
    with torch._C._DisableAutocast():
        return _backend(z, forced).norm_backward(grad_z, grad, z, *arguments)


def _norm_backward(grad_z, grad, z, *arguments):  # type: ignore[no-untyped-def]
    return [z.new_empty(0) if g is None else g for g in _norm_gradients(grad_z, grad, z, *arguments)]


def _jvp(x, y, gate, *arguments):  # type: ignore[no-untyped-def]
    *tangents, forced = arguments
    check_tangents(("x", "y", "gate"), (x, y, gate), tangents)
    with torch._C._DisableAutocast():
        return _backend(x, forced).jvp(x, y, gate, *tangents)


def _norm_jvp(x, y, gate, weight, shift, scale, *arguments):  # type: ignore[no-untyped-def]
    *tangents, eps, forced = arguments
    check_tangents(("x", "y", "gate", "shift", "scale"), (x, y, gate, shift, scale), tangents)
    with torch._C._DisableAutocast():
        return _backend(x, forced).norm_jvp(x, y, gate, weight, shift, scale, tangents, eps)


def _with_tangents(jvp, arguments, tangents):  # type: ignore[no-untyped-def]
    return jvp(*arguments[:3], *tangents[:3], *arguments[3:])


def _norm_with_tangents(jvp, arguments, tangents):  # type: ignore[no-untyped-def]
    x, y, gate, weight, shift, scale = tangents[:6]
    return None if weight is not None else jvp(*arguments[:6], x, y, gate, shift, scale, *arguments[6:])


def _value_gradients(grad, needs, x, y, gate, *arguments):  # type: ignore[no-untyped-def]
    if not any(needs[1:3]):
        return (grad,)
    return grad, *gradients("gated_residual_backward", _backward, grad, y, gate, arguments[-1])


def _norm_value_gradients(grads, needs, x, y, gate, weight, shift, scale, *arguments):  # type: ignore[no-untyped-def]
    eps, forced = arguments[-2:]
    grad_z, grad = (torch.zeros_like(x) if grad is None else grad for grad in grads)
    z = torch.ops.pixnerd.gated_residual(x, y, gate, forced)
    call = (grad_z, grad, z, y, gate, weight, shift is not None, scale, eps, forced)
    return gradients("gated_residual_rms_norm_backward", _norm_gradients, *call)


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _fake_norm_backward(grad_z, grad, z, y, gate, weight, shifted, scale, eps, forced):  # type: ignore[no-untyped-def]
    row = (z.shape[0], 1, z.shape[2])
    rows = [z.new_empty(row) if present else z.new_empty(0) for present in (shifted, scale is not None)]
    return [_empty(z), _empty(z), z.new_empty(row), _empty(weight), *rows]


register(
    "gated_residual(Tensor x, Tensor y, Tensor gate, str forced) -> Tensor",
    _forward,
    lambda x, *rest: _empty(x),
)
register(
    "gated_residual_backward(Tensor grad, Tensor y, Tensor gate, str forced) -> Tensor[]",
    _backward,
    lambda grad, y, gate, forced: [_empty(y), _empty(gate)],
)
register(
    "gated_residual_rms_norm(Tensor x, Tensor y, Tensor gate, Tensor weight, Tensor? shift, Tensor? scale, float eps, "
    "str forced) -> (Tensor, Tensor)",
    _norm_forward,
    lambda x, *rest: (_empty(x), _empty(x)),
)
register(
    "gated_residual_rms_norm_backward(Tensor grad_z, Tensor grad, Tensor z, Tensor y, Tensor gate, Tensor weight, "
    "bool shifted, Tensor? scale, float eps, str forced) -> Tensor[]",
    _norm_backward,
    _fake_norm_backward,
)
register(
    "gated_residual_jvp(Tensor x, Tensor y, Tensor gate, Tensor? x_tangent, Tensor? y_tangent, Tensor? gate_tangent, "
    "str forced) -> (Tensor, Tensor)",
    _jvp,
    lambda x, *rest: (_empty(x), _empty(x)),
)
register(
    "gated_residual_rms_norm_jvp(Tensor x, Tensor y, Tensor gate, Tensor weight, Tensor? shift, Tensor? scale, "
    "Tensor? x_tangent, Tensor? y_tangent, Tensor? gate_tangent, Tensor? shift_tangent, Tensor? scale_tangent, "
    "float eps, str forced) -> (Tensor, Tensor, Tensor, Tensor)",
    _norm_jvp,
    lambda x, *rest: tuple(_empty(x) for _ in range(4)),
)


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, gate, forced, direct=False):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(y, gate)
        ctx.forced = forced
        return below_autograd("gated_residual", _forward, direct, x, y, gate, forced)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        if not any(ctx.needs_input_grad[1:3]):
            return grad, None, None, None, None
        dy, d_gate = gradients("gated_residual_backward", _backward, grad, *ctx.saved_tensors, ctx.forced)
        return grad, dy, d_gate, None, None


class _GatedResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, gate, weight, shift, scale, eps, forced, direct=False):  # type: ignore[no-untyped-def]
        arguments = (x, y, gate, weight, shift, scale, eps, forced)
        z, n = below_autograd("gated_residual_rms_norm", _norm_forward, direct, *arguments)
        ctx.save_for_backward(z, y, gate, weight, scale)
        ctx.options = (shift is not None, eps, forced)
        return z, n

    @staticmethod
    def backward(ctx, grad_z, grad):  # type: ignore[no-untyped-def]
        z, y, gate, weight, scale = ctx.saved_tensors
        shifted, eps, forced = ctx.options
        arguments = (grad_z, grad, z, y, gate, weight, shifted, scale, eps, forced)
        found = gradients("gated_residual_rms_norm_backward", _norm_gradients, *arguments)
        return wanted(found, ctx.needs_input_grad)


register_autograd("gated_residual", _GatedResidual.apply, by_reference(_forward), _with_tangents)
register_autograd(
    "gated_residual_rms_norm", _GatedResidualNorm.apply, by_reference(_norm_forward), _norm_with_tangents
)
register_gradients("gated_residual_backward", by_reference(_backward))
register_gradients("gated_residual_rms_norm_backward", by_reference(_norm_backward))
register_jvp("gated_residual", by_reference(_jvp), _value_gradients)
register_jvp("gated_residual_rms_norm", by_reference(_norm_jvp), _norm_value_gradients)
