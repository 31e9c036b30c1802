"""The product inside a SwiGLU feed-forward layer."""

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
)
from pixnerd_kernels.ops.native import fresh
from pixnerd_kernels.ops.swiglu import reference

_passed = Passed()


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up, with silu(z) = z / (1 + exp(-z)).

    Args:
        gate: [..., F]; without `up` [..., 2 F], which holds gate and up side by side as one matrix makes them. It is
            read in place, and its gradient is written packed.
        up: gate's shape and dtype.

    Returns:
        [..., F] in gate's dtype, contiguous. float32 and float64 compute in their own dtype, bfloat16 and float16 in
        float32 with one rounding.

    Gradients flow to both. Saved for backward: the inputs. Tangents under torch.func.jvp are computed with the value
    in one pass, and inputs alone are saved. Derivatives of higher order, dual numbers by hand of what requires
    gradients and the other transforms of torch.func run on the reference. Under autocast the inputs are cast to the
    autocast dtype first.

    Raises:
        TypeError, ValueError: every problem with the arguments at once.
        NotImplementedError: a forced backend (`use_backend`) cannot run; lists every reason.

    Source: the official PixNerd's feed-forward layer (arXiv 2002.05202).
    """
    gate, up = autocast(gate, up)
    direct = plain(gate, up)
    _passed.check(direct, _check, gate, up)
    forced = backends.forced_backend()
    shape = gate.shape
    if len(shape) != 2:
        gate, up = _flat(gate), None if up is None else _flat(up)
    out: Tensor
    if up is None:
        out = call_op("swiglu_packed", direct, _SwigluPacked, _packed_forward, gate, forced)
    else:
        out = call_op("swiglu", direct, _Swiglu, _forward, gate, up, forced)
    return out if len(shape) == 2 else out.view(*shape[:-1], out.shape[1])


def _check(gate: Any, up: Any) -> None:
    problems = Problems("swiglu")
    rank = max(gate.dim(), 1) if isinstance(gate, Tensor) else 1
    readable = problems.tensor("gate", gate, rank, "[..., F]")
    if up is None:
        if readable and gate.shape[-1] % 2:
            problems.add("gate", "[..., 2 F], an even number of channels, where up is None", gate)
    elif problems.tensor("up", up, rank, "[..., F]") and readable and up.shape != gate.shape:
        problems.add("up", f"the shape of gate {list(gate.shape)}", up)
    problems.same_dtype("gate", gate, [("up", up)])
    problems.same_device("gate", gate, [("up", up)])
    problems.raise_if_any()


def _flat(tensor: Tensor) -> Tensor:
    rows = 1
    for size in tensor.shape[:-1]:
        rows *= size
    return tensor.reshape(rows, tensor.shape[-1])


def _backend(gate: Tensor, forced: str) -> Any:
    """The module whose forward and backward run the op."""
    return module("swiglu", backends.select("swiglu", gate.device, gate.dtype, forced))


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    half = x.shape[1] // 2
    return x[:, :half], x[:, half:]


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _forward(gate: Tensor, up: Tensor, forced: str) -> Tensor:
    out: Tensor = _backend(gate, forced).forward(gate, up)
    return out


def _backward(grad: Tensor, gate: Tensor, up: Tensor, forced: str) -> list[Tensor]:
    d_gate, d_up = fresh(_empty(gate)), fresh(_empty(up))
    _backend(gate, forced).backward(grad, gate, up, d_gate, d_up)
    return [d_gate, d_up]


def _packed_forward(x: Tensor, forced: str) -> Tensor:
    backend = _backend(x, forced)
    # Where a backend takes packed tensors itself, there are no views to make.
    run_packed = getattr(backend, "packed_forward", None)
    out: Tensor = run_packed(x) if run_packed else backend.forward(*_halves(x))
    return out


def _packed_backward(grad: Tensor, x: Tensor, forced: str) -> Tensor:
    backend = _backend(x, forced)
    if run_packed := getattr(backend, "packed_backward", None):
        packed: Tensor = run_packed(grad, x)
        return packed
    dx = fresh(_empty(x))
    backend.backward(grad, *_halves(x), *_halves(dx))
    return dx


def _backward_formula(grad: Tensor, gate: Tensor, up: Tensor, forced: str) -> list[Tensor]:
    return list(reference.gradients(grad, gate, up))


def _packed_backward_formula(grad: Tensor, x: Tensor, forced: str) -> Tensor:
    return torch.cat(reference.gradients(grad, *_halves(x)), dim=1)


def _jvp(gate, up, gate_tangent, up_tangent, forced):  # type: ignore[no-untyped-def]
    check_tangents(("gate", "up"), (gate, up), (gate_tangent, up_tangent))
    return _backend(gate, forced).jvp(gate, up, gate_tangent, up_tangent)


def _packed_jvp(x: Tensor, x_tangent: Tensor, forced: str) -> Any:
    check_tangents("x", (x,), (x_tangent,))
    return _jvp(*_halves(x), *_halves(x_tangent), forced)


def _with_tangents(jvp, arguments, tangents):  # type: ignore[no-untyped-def]
    return jvp(*arguments[:2], *tangents[:2], *arguments[2:])


def _packed_with_tangents(jvp, arguments, tangents):  # type: ignore[no-untyped-def]
    return jvp(arguments[0], tangents[0], arguments[1])


def _value_gradients(grad, needs, gate, up, *arguments):  # type: ignore[no-untyped-def]
    return gradients("swiglu_backward", _backward, grad, gate, up, arguments[-1])


def _packed_value_gradients(grad, needs, x, *arguments):  # type: ignore[no-untyped-def]
    return (gradients("swiglu_packed_backward", _packed_backward, grad, x, arguments[-1]),)


register("swiglu(Tensor gate, Tensor up, str forced) -> Tensor", _forward, lambda gate, *rest: _empty(gate))
register(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up, str forced) -> Tensor[]",
    _backward,
    lambda grad, gate, up, forced: [_empty(gate), _empty(up)],
)
register(
    "swiglu_packed(Tensor x, str forced) -> Tensor",
    _packed_forward,
    lambda x, forced: x.new_empty(x.shape[0], x.shape[1] // 2),
)
register(
    "swiglu_packed_backward(Tensor grad, Tensor x, str forced) -> Tensor",
    _packed_backward,
    lambda grad, x, forced: _empty(x),
)
register(
    "swiglu_jvp(Tensor gate, Tensor up, Tensor? gate_tangent, Tensor? up_tangent, str forced) -> (Tensor, Tensor)",
    _jvp,
    lambda gate, *rest: (_empty(gate), _empty(gate)),
)
register(
    "swiglu_packed_jvp(Tensor x, Tensor x_tangent, str forced) -> (Tensor, Tensor)",
    _packed_jvp,
    lambda x, *rest: tuple(x.new_empty(x.shape[0], x.shape[1] // 2) for _ in range(2)),
)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, forced, direct=False):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate, up)
        ctx.forced = forced
        return below_autograd("swiglu", _forward, direct, gate, up, forced)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        found = gradients("swiglu_backward", _backward, grad, *ctx.saved_tensors, ctx.forced)
        return *found, None, None


class _SwigluPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forced, direct=False):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.forced = forced
        return below_autograd("swiglu_packed", _packed_forward, direct, x, forced)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        found = gradients("swiglu_packed_backward", _packed_backward, grad, *ctx.saved_tensors, ctx.forced)
        return found, None, None


register_autograd("swiglu", _Swiglu.apply, by_reference(_forward), _with_tangents)
register_autograd("swiglu_packed", _SwigluPacked.apply, by_reference(_packed_forward), _packed_with_tangents)
register_gradients("swiglu_backward", _backward_formula)
register_gradients("swiglu_packed_backward", _packed_backward_formula)
register_jvp("swiglu", by_reference(_jvp), _value_gradients)
register_jvp("swiglu_packed", by_reference(_packed_jvp), _packed_value_gradients)
