"""The neural-field block: RMSNorm, two or three generated matrices, activation and residual in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pixnerd_kernels import backends
from pixnerd_kernels.checks import check_tangents
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
from pixnerd_kernels.ops.native import fresh
from pixnerd_kernels.ops.neural_field_mlp import reference
from pixnerd_kernels.ops.neural_field_mlp.arguments import (
    ACTIVATIONS,
    WEIGHTS,
    FieldParams,
    check,
    check_packed,
    matrices,
    option_key,
    split,
    split_params,
)

__all__ = [
    "ACTIVATIONS",
    "WEIGHTS",
    "FieldParams",
    "neural_field_mlp",
    "neural_field_mlp_packed",
    "select_backend",
    "split_params",
]

#: Channels that a Triton program keeps on the chip at most; beyond, CUDA tensors run on the reference.
TRITON_CHANNELS = 256

_passed, _packed_passed = Passed(), Passed()


def neural_field_mlp(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    w_gate: Tensor | None = None,
    norm_weight: Tensor | None = None,
    normalize: Sequence[str] = WEIGHTS,
    activation: str = "silu",
    residual: bool = True,
    norm_eps: float = 1e-6,
    weight_eps: float = 1e-12,
) -> Tensor:
    r"""One neural-field block: a small MLP per patch, whose weights are data, on every pixel of that patch.

        y = x + act(n(x) @ ŵ1) @ ŵ2                         plain
        y = x + (act(n(x) @ ŵ_gate) * (n(x) @ ŵ1)) @ ŵ2     gated

    with n(x) = x * rsqrt(mean(x²) + norm_eps) * norm_weight and ŵ = w / max(||w||, weight_eps) over dim -2.

    Args:
        x: [N, S, D1], N patches of S pixels with D1 channels.
        w1: [N, D1, D2]. w2: [N, D2, D1]. Strided views into one packed tensor are read in place.
        w_gate: [N, D1, D2] for the gated form.
        norm_weight: [D1], any floating dtype; None leaves the RMSNorm out.
        normalize: the weights to normalise, names out of "w1", "w2", "w_gate" (ignored where w_gate is absent).
        activation: "silu", "gelu" (tanh form) or "relu".
        residual: whether to add x.
        norm_eps, weight_eps: dimensionless, as in the formulas.

    Returns:
        y [N, S, D1] in x's dtype, contiguous. float32 and float64 accumulate in their own dtype, bfloat16 and
        float16 in float32. N = 0 gives an empty result.

    Gradients flow to x, every weight and norm_weight. Saved for backward: x and the raw weights, nothing else;
    backward recomputes the rest. Deterministic: the same input gives the same bits. Tangents (forward mode) of all but
    norm_weight are computed with the value in one pass. Derivatives of higher order and the other transforms of
    torch.func run on the reference. Under autocast the inputs are cast to the autocast dtype first, but for
    norm_weight.

    Raises:
        TypeError, ValueError: every problem with the arguments at once.
        NotImplementedError: a forced backend (`use_backend`) cannot run; lists every reason.

    Source: PixNerd (arXiv 2507.23268), section 3, and its official NerfBlock; the gated form is Chroma1-Radiance's.
    """
    x, w1, w2, w_gate = autocast(x, w1, w2, w_gate)
    if direct := plain(x, w1, w2, w_gate, norm_weight):
        direct += option_key(normalize, activation, residual, norm_eps, weight_eps)
    options = (normalize, activation, residual, norm_eps, weight_eps)
    _passed.check(direct, check, x, w1, w2, w_gate, norm_weight, *options)
    flags = [name in normalize for name in WEIGHTS]
    arguments = (
        x,
        w1,
        w2,
        w_gate,
        norm_weight,
        flags,
        activation,
        residual,
        float(norm_eps),
        float(weight_eps),
    )
    out: Tensor = call_op(
        "neural_field_mlp", direct, _NeuralFieldMLP, _forward, *arguments, backends.forced_backend()
    )
    return out


def neural_field_mlp_packed(
    x: Tensor,
    params: Tensor,
    *,
    hidden: int,
    gated: bool = False,
    norm_weight: Tensor | None = None,
    normalize: Sequence[str] = WEIGHTS,
    activation: str = "silu",
    residual: bool = True,
    norm_eps: float = 1e-6,
    weight_eps: float = 1e-12,
) -> Tensor:
    """`neural_field_mlp` on the packed parameters themselves; their gradient is written packed, without a copy.

    Args:
        x: [N, S, D1].
        params: [N, 2 * D1 * hidden], or [N, 3 * D1 * hidden] when gated, in `split_params`' order; x's dtype.
        hidden: D2.
        gated: whether params holds w_gate, w1, w2 in place of w1, w2.
        norm_weight, normalize, activation, residual, norm_eps, weight_eps: as in `neural_field_mlp`.

    Returns:
        y [N, S, D1] in x's dtype, contiguous.

    Raises:
        TypeError, ValueError, NotImplementedError: as `neural_field_mlp`.
    """
    x, params = autocast(x, params)
    if direct := plain(x, params, norm_weight):
        direct += option_key(normalize, activation, residual, norm_eps, weight_eps)
        direct += (type(hidden), hidden, type(gated), gated)
    options = (normalize, activation, residual, norm_eps, weight_eps)
    _packed_passed.check(direct, check_packed, x, params, hidden, gated, norm_weight, *options)
    flags = [name in normalize for name in WEIGHTS]
    arguments = (
        x,
        params,
        norm_weight,
        hidden,
        gated,
        flags,
        activation,
        residual,
        float(norm_eps),
        float(weight_eps),
    )
    out: Tensor = call_op(
        "neural_field_mlp_packed",
        direct,
        _NeuralFieldMLPPacked,
        _packed_forward,
        *arguments,
        backends.forced_backend(),
    )
    return out


def select_backend(op: str, x: Tensor, channels: int, forced: str) -> str:
    """`backends.select` for an op that runs fields of so many channels on x's device and in its dtype."""
    name = backends.select(op, x.device, x.dtype, forced)
    if name == "triton" and channels > TRITON_CHANNELS:
        if forced:
            raise NotImplementedError(
                f"{op} cannot run on the forced backend 'triton':\n"
                f"  - x has {channels} channels, the Triton kernel takes {TRITON_CHANNELS} at most"
            )
        return "reference"
    return name


def _backend(x: Tensor, forced: str) -> Any:
    """The module whose forward and backward run the op."""
    return module("neural_field_mlp", select_backend("neural_field_mlp", x, x.shape[2], forced))


# The op itself. Schemas end in the same options in all four ops; `forced` names the forced backend or is empty,
# and travels to backward as an argument so that both passes take the same one.
_OPTIONS = "bool[] normalize, str activation, bool residual, float norm_eps, float weight_eps, str forced"
_OPTION_COUNT = _OPTIONS.count(",") + 1
_WEIGHTS = "Tensor w1, Tensor w2, Tensor? w_gate, Tensor? norm_weight"
_PACKED = "Tensor params, Tensor? norm_weight, int hidden, bool gated"
_TANGENTS = "Tensor? x_tangent, Tensor? w1_tangent, Tensor? w2_tangent, Tensor? w_gate_tangent"
_PACKED_TANGENTS = "Tensor? x_tangent, Tensor? params_tangent"


def _forward(x, w1, w2, w_gate, norm_weight, *options):  # type: ignore[no-untyped-def]
    *options, forced = options
    # Autocast has cast the inputs already; inside the op it would round the reference's intermediates.
    with torch._C._DisableAutocast():
        return _backend(x, forced).forward(x, w1, w2, w_gate, norm_weight, *options)


def _gradients(grad, x, w1, w2, w_gate, norm_weight, need_x, need_weights, *options):  # type: ignore[no-untyped-def]
    *options, forced = options
    weights = (w1, w2, w_gate)
    targets = [None if w is None or not need_weights else fresh(_empty(w)) for w in weights]
    dx, d_norm = _run_backward(grad, x, weights, norm_weight, need_x, targets, options, forced)
    return dx, *targets, d_norm


def _backward(grad, x, *arguments):  # type: ignore[no-untyped-def]
    return [_or_empty(t, x) for t in _gradients(grad, x, *arguments)]


def _packed_forward(x, params, norm_weight, hidden, gated, *options):  # type: ignore[no-untyped-def]
    return _forward(x, *matrices(params, x.shape[2], hidden, gated), norm_weight, *options)


def _packed_gradients(grad, x, params, norm_weight, hidden, gated, need_x, need_weights, *options):  # type: ignore[no-untyped-def]
    *options, forced = options
    d_params = fresh(_empty(params)) if need_weights else None
    targets = [None] * 3 if d_params is None else matrices(d_params, x.shape[2], hidden, gated)
    weights = matrices(params, x.shape[2], hidden, gated)
    dx, d_norm = _run_backward(grad, x, weights, norm_weight, need_x, targets, options, forced)
    return dx, d_params, d_norm


def _packed_backward(grad, x, *arguments):  # type: ignore[no-untyped-def]
    return [_or_empty(t, x) for t in _packed_gradients(grad, x, *arguments)]


def _jvp(x, w1, w2, w_gate, norm_weight, x_tangent, w1_tangent, w2_tangent, w_gate_tangent, *options):  # type: ignore[no-untyped-def]
    *options, forced = options
    tangents = (x_tangent, w1_tangent, w2_tangent, w_gate_tangent)
    with torch._C._DisableAutocast():
        return _backend(x, forced).jvp(x, w1, w2, w_gate, norm_weight, *tangents, *options)


def _packed_jvp(x, params, norm_weight, hidden, gated, x_tangent, params_tangent, *options):  # type: ignore[no-untyped-def]
    weights = matrices(params, x.shape[2], hidden, gated)
    tangents = [None] * 3
    if params_tangent is not None:
        check_tangents(["params"], [params], [params_tangent])
        tangents = matrices(params_tangent, x.shape[2], hidden, gated)
    return _jvp(x, *weights, norm_weight, x_tangent, *tangents, *options)


def _run_backward(grad, x, weights, norm_weight, need_x, targets, options, forced):  # type: ignore[no-untyped-def]
    """Run the chosen backend's backward; weight gradients are written into `targets` (None: not wanted)."""
    backend = _backend(x, forced)
    if backend is reference:
        with torch._C._DisableAutocast():
            dx, *d_weights, d_norm = reference.backward(grad, x, *weights, norm_weight, *options)
        for target, gradient in zip(targets, d_weights, strict=True):
            if target is not None:
                target.copy_(gradient)
        return (dx.contiguous() if need_x else None), d_norm
    return backend.backward(grad, x, *weights, norm_weight, need_x, targets, *options)


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Ops return tensors: an absent gradient is an empty one."""
    return like.new_empty(0) if tensor is None else tensor


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _fake_gradient(tensor: Tensor | None, like: Tensor, wanted: bool = True) -> Tensor:
    return _empty(tensor) if tensor is not None and wanted else like.new_empty(0)


def _fake_forward(x, *rest):  # type: ignore[no-untyped-def]
    return _empty(x)


def _fake_jvp(x, *rest):  # type: ignore[no-untyped-def]
    return _empty(x), _empty(x)


def _fake_backward(grad, x, w1, w2, w_gate, norm_weight, need_x, need_weights, *options):  # type: ignore[no-untyped-def]
    weights = [_fake_gradient(w, x, need_weights) for w in (w1, w2, w_gate)]
    return [_fake_gradient(x, x, need_x), *weights, _fake_gradient(norm_weight, x)]


def _fake_packed_backward(grad, x, params, norm_weight, hidden, gated, need_x, need_weights, *options):  # type: ignore[no-untyped-def]
    return [
        _fake_gradient(x, x, need_x),
        _fake_gradient(params, x, need_weights),
        _fake_gradient(norm_weight, x),
    ]


# What derivatives other than a kernel's own go through: plain PyTorch, out of place.


def _backward_formula(grad, x, w1, w2, w_gate, norm_weight, need_x, need_weights, *options):  # type: ignore[no-untyped-def]
    *options, _ = options
    with torch._C._DisableAutocast():
        dx, *weights, d_norm = reference.backward(grad, x, w1, w2, w_gate, norm_weight, *options)
    kept = [dx if need_x else None, *(weights if need_weights else [None] * 3), d_norm]
    return [_or_empty(t, x) for t in kept]


def _packed_formula(x, params, norm_weight, hidden, gated, *options):  # type: ignore[no-untyped-def]
    return _forward(x, *split(params, x.shape[2], hidden, gated), norm_weight, *options[:-1], "reference")


def _packed_backward_formula(grad, x, params, norm_weight, hidden, gated, need_x, need_weights, *options):  # type: ignore[no-untyped-def]
    weights = split(params, x.shape[2], hidden, gated)
    dx, d1, d2, d_gate, d_norm = _backward_formula(
        grad, x, *weights, norm_weight, need_x, need_weights, *options
    )
    if not need_weights:
        return [dx, x.new_empty(0), d_norm]
    packed = [d_gate, d1, d2] if gated else [d1, d2]
    return [dx, torch.cat([d.reshape(len(d), x.shape[2] * hidden) for d in packed], dim=1), d_norm]


def _jvp_formula(*arguments):  # type: ignore[no-untyped-def]
    return _jvp(*arguments[:-1], "reference")


def _packed_jvp_formula(x, params, norm_weight, hidden, gated, x_tangent, params_tangent, *options):  # type: ignore[no-untyped-def]
    weights, tangents = split(params, x.shape[2], hidden, gated), (None, None, None)
    if params_tangent is not None:
        tangents = split(params_tangent, x.shape[2], hidden, gated)
    return _jvp_formula(x, *weights, norm_weight, x_tangent, *tangents, *options)


# In forward mode, kernels know tangents of all but the norm's weight, and of weights all together.


def _with_tangents(jvp, arguments, tangents):  # type: ignore[no-untyped-def]
    x, w1, w2, w_gate, norm_weight, *options = arguments
    if tangents[4] is not None:
        return None
    weights = [w1, w2, w_gate]
    along = list(tangents[1:4])
    if any(tangent is not None for tangent in along):
        along = [
            torch.zeros_like(w) if tangent is None and w is not None else tangent
            for w, tangent in zip(weights, along, strict=True)
        ]
    return jvp(x, *weights, norm_weight, tangents[0], *along, *options)


def _packed_with_tangents(jvp, arguments, tangents):  # type: ignore[no-untyped-def]
    if tangents[2] is not None:
        return None
    return jvp(*arguments[:5], *tangents[:2], *arguments[5:])


def _value_gradients(grad, needs, *arguments):  # type: ignore[no-untyped-def]
    call = (*arguments[:5], needs[0], any(needs[1:4]), *arguments[9:])
    return gradients("neural_field_mlp_backward", _gradients, grad, *call)


def _packed_value_gradients(grad, needs, *arguments):  # type: ignore[no-untyped-def]
    call = (*arguments[:5], needs[0], needs[1], *arguments[7:])
    return gradients("neural_field_mlp_packed_backward", _packed_gradients, grad, *call)


_NEEDS = "bool need_x, bool need_weights"
register(f"neural_field_mlp(Tensor x, {_WEIGHTS}, {_OPTIONS}) -> Tensor", _forward, _fake_forward)
register(
    f"neural_field_mlp_backward(Tensor grad, Tensor x, {_WEIGHTS}, {_NEEDS}, {_OPTIONS}) -> Tensor[]",
    _backward,
    _fake_backward,
)
register(
    f"neural_field_mlp_packed(Tensor x, {_PACKED}, {_OPTIONS}) -> Tensor", _packed_forward, _fake_forward
)
register(
    f"neural_field_mlp_packed_backward(Tensor grad, Tensor x, {_PACKED}, {_NEEDS}, {_OPTIONS}) -> Tensor[]",
    _packed_backward,
    _fake_packed_backward,
)
register(
    f"neural_field_mlp_jvp(Tensor x, {_WEIGHTS}, {_TANGENTS}, {_OPTIONS}) -> (Tensor, Tensor)",
    _jvp,
    _fake_jvp,
)
register(
    f"neural_field_mlp_packed_jvp(Tensor x, {_PACKED}, {_PACKED_TANGENTS}, {_OPTIONS}) -> (Tensor, Tensor)",
    _packed_jvp,
    _fake_jvp,
)


class _NeuralFieldMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, w2, w_gate, norm_weight, *options):  # type: ignore[no-untyped-def]
        *options, direct = options if len(options) == _OPTION_COUNT + 1 else (*options, False)
        ctx.save_for_backward(x, w1, w2, w_gate, norm_weight)
        ctx.options = options
        arguments = (x, w1, w2, w_gate, norm_weight, *options)
        return below_autograd("neural_field_mlp", _forward, direct, *arguments)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        needs = ctx.needs_input_grad
        arguments = (grad, *ctx.saved_tensors, needs[0], any(needs[1:4]), *ctx.options)
        return wanted(gradients("neural_field_mlp_backward", _gradients, *arguments), needs)


class _NeuralFieldMLPPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, params, norm_weight, hidden, gated, *options):  # type: ignore[no-untyped-def]
        *options, direct = options if len(options) == _OPTION_COUNT + 1 else (*options, False)
        ctx.save_for_backward(x, params, norm_weight)
        ctx.options = (hidden, gated, options)
        arguments = (x, params, norm_weight, hidden, gated, *options)
        return below_autograd("neural_field_mlp_packed", _packed_forward, direct, *arguments)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        hidden, gated, options = ctx.options
        needs = ctx.needs_input_grad
        arguments = (grad, *ctx.saved_tensors, hidden, gated, needs[0], needs[1], *options)
        return wanted(gradients("neural_field_mlp_packed_backward", _packed_gradients, *arguments), needs)


register_autograd("neural_field_mlp", _NeuralFieldMLP.apply, by_reference(_forward), _with_tangents)
register_autograd(
    "neural_field_mlp_packed", _NeuralFieldMLPPacked.apply, _packed_formula, _packed_with_tangents
)
register_gradients("neural_field_mlp_backward", _backward_formula)
register_gradients("neural_field_mlp_packed_backward", _packed_backward_formula)
register_jvp("neural_field_mlp", _jvp_formula, _value_gradients)
register_jvp("neural_field_mlp_packed", _packed_jvp_formula, _packed_value_gradients)
