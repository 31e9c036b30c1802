"""From packed projections to the queries, keys and values that attention takes, in one pass."""

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
from pixnerd_kernels.ops.qk_norm_rope.shapes import new_results

_passed = Passed()


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor | None = None,
    text_kv: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """RMS-normalise queries and keys over their channels, rotate them, and lay all out for attention.

        n(x) = x * rsqrt(mean(x²) + eps) * weight
        q = rotate(n(q)),   k = [rotate(n(k)), n(text k)],   v = [v, text v]

    `rotate` turns the neighbouring channels (a, b) of a token by its angles: (a cos - b sin, a sin + b cos).

    Args:
        qkv: [B, L, 3, heads, d], the packed projection of L image tokens; any strides.
        q_weight, k_weight: [d], any floating dtype.
        rope: [L, d / 2, 2], cosine and sine of every token's angles (`rotary_table`); None does not rotate. It gets no
            gradient.
        text_kv: [B, M, 2, heads, d], keys and values of M text tokens, written behind the image's. Text keys are
            normalised with k_weight and not rotated.
        eps: in units of qkv squared.

    Returns:
        q [B, L, heads, d], k and v [B, L + M, heads, d] in qkv's dtype, contiguous. float32 and float64 compute in
        their own dtype, bfloat16 and float16 in float32 with one rounding.

    Gradients flow to qkv, text_kv and the weights; that of qkv is written packed. Saved for backward: the inputs.
    Deterministic: the sums over tokens are added up in a fixed order. Tangents along qkv and text_kv under
    torch.func.jvp are computed with the values in one pass, and inputs alone are saved. Derivatives of higher order,
    tangents along weights, dual numbers by hand of what requires gradients and the other transforms of torch.func run
    on the reference. Under autocast qkv and text_kv are cast to the autocast dtype first.

    Raises:
        TypeError, ValueError: every problem with the arguments at once.
        NotImplementedError: a forced backend (`use_backend`) cannot run; lists every reason.

    Source: the official PixNerd's attention: class-to-image, and with text_kv text-to-image.
    """
    qkv, text_kv = autocast(qkv, text_kv)
    if direct := plain(qkv, q_weight, k_weight, rope, text_kv):
        direct += (rope is not None and rope.requires_grad, type(eps), eps)
    _passed.check(direct, _check, qkv, q_weight, k_weight, rope, text_kv, eps)
    forced = backends.forced_backend()
    arguments = (qkv, q_weight, k_weight, rope, text_kv, float(eps), forced)
    q, k, v = call_op("qk_norm_rope", direct, _QkNormRope, _forward, *arguments)
    return q, k, v


def _check(qkv: Any, q_weight: Any, k_weight: Any, rope: Any, text_kv: Any, eps: object) -> None:
    problems = Problems("qk_norm_rope")
    others = [("q_weight", q_weight), ("k_weight", k_weight), ("rope", rope), ("text_kv", text_kv)]
    readable = problems.tensor("qkv", qkv, 5, "[B, L, 3, heads, d]")
    if readable and (qkv.shape[2] != 3 or qkv.shape[4] == 0):
        problems.add("qkv", "[B, L, 3, heads, d] with at least one channel", qkv)
        readable = False
    for name, weight in others[:2]:
        fits = problems.tensor(name, weight, 1, "[d]") and readable
        if fits and weight.shape[0] != qkv.shape[4]:
            problems.add(name, f"[{qkv.shape[4]}], one weight for each channel of a head", weight)
    if rope is not None and problems.tensor("rope", rope, 3, "[L, d / 2, 2]"):
        _check_rope(problems, rope, qkv if readable else None)
    if text_kv is not None and problems.tensor("text_kv", text_kv, 5, "[B, M, 2, heads, d]") and readable:
        expected = (qkv.shape[0], text_kv.shape[1], 2, *qkv.shape[3:])
        if tuple(text_kv.shape) != expected:
            problems.add("text_kv", f"{list(expected)}", text_kv)
    problems.same_dtype("qkv", qkv, [("text_kv", text_kv)])
    problems.same_device("qkv", qkv, others)
    problems.number("eps", eps)
    problems.raise_if_any()


def _check_rope(problems: Problems, rope: Tensor, qkv: Tensor | None) -> None:
    if qkv is not None:
        if qkv.shape[4] % 2:
            problems.add("qkv", "an even number of channels where there is a table", qkv)
        elif tuple(rope.shape) != (qkv.shape[1], qkv.shape[4] // 2, 2):
            problems.add("rope", f"{[qkv.shape[1], qkv.shape[4] // 2, 2]}", rope)
    if rope.requires_grad:
        problems.add("rope", "a table without a gradient", rope)


def _backend(qkv: Tensor, forced: str) -> Any:
    """The module whose forward and backward run the op."""
    return module("qk_norm_rope", backends.select("qk_norm_rope", qkv.device, qkv.dtype, forced))


def _forward(qkv, q_weight, k_weight, rope, text_kv, eps, forced):  # type: ignore[no-untyped-def]
    with torch._C._DisableAutocast():
        return _backend(qkv, forced).forward(qkv, q_weight, k_weight, rope, text_kv, eps)


def _gradients(grad_q, grad_k, grad_v, qkv, q_weight, k_weight, rope, text_kv, eps, forced):  # type: ignore[no-untyped-def]
    with torch._C._DisableAutocast():
        return _backend(qkv, forced).backward(
            grad_q, grad_k, grad_v, qkv, q_weight, k_weight, rope, text_kv, eps
        )


def _backward(grad_q, grad_k, grad_v, qkv, *arguments):  # type: ignore[no-untyped-def]
    found = _gradients(grad_q, grad_k, grad_v, qkv, *arguments)
    return [qkv.new_empty(0) if g is None else g for g in found]


def _jvp(qkv, q_weight, k_weight, rope, text_kv, qkv_tangent, text_kv_tangent, eps, forced):  # type: ignore[no-untyped-def]
    tangents = (qkv_tangent, text_kv_tangent)
    check_tangents(("qkv", "text_kv"), (qkv, text_kv), tangents)
    with torch._C._DisableAutocast():
        return _backend(qkv, forced).jvp(qkv, q_weight, k_weight, rope, text_kv, *tangents, eps)


def _with_tangents(jvp, arguments, tangents):  # type: ignore[no-untyped-def]
    qkv, q_weight, k_weight, rope, text_kv = tangents[:5]
    if any(tangent is not None for tangent in (q_weight, k_weight, rope)):
        return None
    return jvp(*arguments[:5], qkv, text_kv, *arguments[5:])


def _value_gradients(grads, needs, *arguments):  # type: ignore[no-untyped-def]
    inputs = (*arguments[:5], *arguments[7:])
    if any(grad is None for grad in grads):
        results = new_results(arguments[0], arguments[4])
        grads = [r.zero_() if grad is None else grad for grad, r in zip(grads, results, strict=True)]
    dx, *weights, d_text = gradients("qk_norm_rope_backward", _gradients, *grads, *inputs)
    return dx, *weights, None, d_text


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _fake_forward(qkv, q_weight, k_weight, rope, text_kv, eps, forced):  # type: ignore[no-untyped-def]
    return tuple(new_results(qkv, text_kv))


def _fake_backward(grad_q, grad_k, grad_v, qkv, q_weight, k_weight, rope, text_kv, eps, forced):  # type: ignore[no-untyped-def]
    d_text = qkv.new_empty(0) if text_kv is None else _empty(text_kv)
    return [_empty(qkv), _empty(q_weight), _empty(k_weight), d_text]


def _fake_jvp(qkv, q_weight, k_weight, rope, text_kv, *rest):  # type: ignore[no-untyped-def]
    return (*new_results(qkv, text_kv), *new_results(qkv, text_kv))


_INPUTS = "Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor? rope, Tensor? text_kv, float eps, str forced"
register(f"qk_norm_rope({_INPUTS}) -> (Tensor, Tensor, Tensor)", _forward, _fake_forward)
register(
    f"qk_norm_rope_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, {_INPUTS}) -> Tensor[]",
    _backward,
    _fake_backward,
)
register(
    f"qk_norm_rope_jvp({_INPUTS.replace('float eps', 'Tensor? qkv_tangent, Tensor? text_kv_tangent, float eps')}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _jvp,
    _fake_jvp,
)


class _QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, rope, text_kv, eps, forced, direct=False):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(qkv, q_weight, k_weight, rope, text_kv)
        ctx.options = (eps, forced)
        arguments = (qkv, q_weight, k_weight, rope, text_kv, eps, forced)
        return below_autograd("qk_norm_rope", _forward, direct, *arguments)

    @staticmethod
    def backward(ctx, grad_q, grad_k, grad_v):  # type: ignore[no-untyped-def]
        d_qkv, d_q_weight, d_k_weight, d_text = gradients(
            "qk_norm_rope_backward", _gradients, grad_q, grad_k, grad_v, *ctx.saved_tensors, *ctx.options
        )
        return wanted((d_qkv, d_q_weight, d_k_weight, None, d_text), ctx.needs_input_grad)


register_autograd("qk_norm_rope", _QkNormRope.apply, by_reference(_forward), _with_tangents)
register_gradients("qk_norm_rope_backward", by_reference(_backward))
register_jvp("qk_norm_rope", by_reference(_jvp), _value_gradients)
