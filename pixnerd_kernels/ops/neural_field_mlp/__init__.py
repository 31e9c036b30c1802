"""The neural-field block: RMSNorm, two or three generated matrices, activation and residual in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pixnerd_kernels import backends
from pixnerd_kernels.checks import Problems
from pixnerd_kernels.ops.dtypes import autocast
from pixnerd_kernels.ops.library import (
    Passed,
    below_autograd,
    call_op,
    gradients,
    module,
    plain,
    refuse_gradients,
    register,
    register_autograd,
    wanted,
)
from pixnerd_kernels.ops.native import fresh
from pixnerd_kernels.ops.neural_field_mlp import reference

ACTIVATIONS = ("silu", "gelu", "relu")
WEIGHTS = ("w1", "w2", "w_gate")

#: Channels that a Triton program keeps on the chip at most; beyond, CUDA tensors run on the reference.
TRITON_CHANNELS = 256

_passed, _packed_passed = Passed(), Passed()


class FieldParams(NamedTuple):
    """Generated weights of N neural fields, as views into one packed tensor.

    w1 [N, D1, D2], w2 [N, D2, D1], w_gate [N, D1, D2] or None.
    """

    w1: Tensor
    w2: Tensor
    w_gate: Tensor | None


def split_params(params: Tensor, channels: int, hidden: int, gated: bool = False) -> FieldParams:
    """Views of the matrices in a packed parameter tensor, as the generating linear layer writes it.

    Args:
        params: [N, 2 * channels * hidden], or [N, 3 * channels * hidden] when gated. The packed order is w1, w2,
            and for gated blocks w_gate, w1, w2.
        channels: D1. hidden: D2.

    Raises:
        TypeError, ValueError: every problem with the arguments at once.
    """
    problems = Problems("split_params")
    readable = problems.tensor("params", params, 2, "[N, parameters]")
    sizes = [problems.count("channels", channels), problems.count("hidden", hidden)]
    _check_flag(problems, "gated", gated)
    if readable and all(sizes):
        _check_packed_width(problems, params, channels, hidden, gated)
    problems.raise_if_any()
    return _split(params, channels, hidden, gated)


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
    backward recomputes the rest. Deterministic: the same input gives the same bits. Differentiating twice raises
    RuntimeError. Under autocast the inputs are cast to the autocast dtype first (norm_weight is not).

    Raises:
        TypeError, ValueError: every problem with the arguments at once.
        NotImplementedError: a forced backend (`use_backend`) cannot run; lists every reason.

    Source: PixNerd (arXiv 2507.23268), section 3, and its official NerfBlock; the gated form is Chroma1-Radiance's.
    """
    x, w1, w2, w_gate = autocast(x, w1, w2, w_gate)
    if direct := plain(x, w1, w2, w_gate, norm_weight):
        direct += _option_key(normalize, activation, residual, norm_eps, weight_eps)
    options = (normalize, activation, residual, norm_eps, weight_eps)
    _passed.check(direct, _check, x, w1, w2, w_gate, norm_weight, *options)
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


def _check(
    x: Any, w1: Any, w2: Any, w_gate: Any, norm_weight: Any,
    normalize: Any, activation: Any, residual: Any, norm_eps: Any, weight_eps: Any,
) -> None:  # fmt: skip
    problems = Problems("neural_field_mlp")
    others = [("w1", w1), ("w2", w2)] + ([] if w_gate is None else [("w_gate", w_gate)])
    readable = problems.tensor("x", x, 3, "[N, S, D1]")
    readable &= problems.tensor("w1", w1, 3, "[N, D1, D2]")
    readable &= problems.tensor("w2", w2, 3, "[N, D2, D1]")
    if w_gate is not None:
        readable &= problems.tensor("w_gate", w_gate, 3, "[N, D1, D2]")
    if readable:
        patches, _, channels = x.shape
        hidden = w1.shape[2]
        for name, weight in others:
            expected = (patches, hidden, channels) if name == "w2" else (patches, channels, hidden)
            if tuple(weight.shape) != expected:
                problems.add(name, f"the shape {list(expected)} that fits x and w1", weight)
        if hidden == 0:
            problems.add("w1", "at least one hidden unit", w1)
    problems.same_dtype("x", x, others)
    problems.same_device("x", x, [*others, ("norm_weight", norm_weight)])
    _check_options(problems, x, norm_weight, normalize, activation, residual, norm_eps, weight_eps)
    problems.raise_if_any()


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
        direct += _option_key(normalize, activation, residual, norm_eps, weight_eps)
        direct += (type(hidden), hidden, type(gated), gated)
    options = (normalize, activation, residual, norm_eps, weight_eps)
    _packed_passed.check(direct, _check_packed, x, params, hidden, gated, norm_weight, *options)
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


def _check_packed(
    x: Any, params: Any, hidden: Any, gated: Any, norm_weight: Any,
    normalize: Any, activation: Any, residual: Any, norm_eps: Any, weight_eps: Any,
) -> None:  # fmt: skip
    problems = Problems("neural_field_mlp_packed")
    readable = problems.tensor("x", x, 3, "[N, S, D1]")
    readable &= problems.tensor("params", params, 2, "[N, parameters]")
    readable &= problems.count("hidden", hidden)
    _check_flag(problems, "gated", gated)
    if readable:
        if params.shape[0] != x.shape[0]:
            problems.add("params", f"{x.shape[0]} rows, one for each patch of x", params)
        _check_packed_width(problems, params, x.shape[2], hidden, gated)
    problems.same_dtype("x", x, [("params", params)])
    problems.same_device("x", x, [("params", params), ("norm_weight", norm_weight)])
    _check_options(problems, x, norm_weight, normalize, activation, residual, norm_eps, weight_eps)
    problems.raise_if_any()


def _option_key(
    normalize: Sequence[str], activation: str, residual: bool, norm_eps: float, weight_eps: float
) -> tuple[Any, ...]:
    """What the checks of the options depend on."""
    names = tuple(normalize) if type(normalize) is list else normalize
    return names, activation, type(residual), residual, type(norm_eps), norm_eps, type(weight_eps), weight_eps


def _check_flag(problems: Problems, argument: str, value: object) -> None:
    if not isinstance(value, bool):
        problems.add_type(argument, "True or False", value)


def _check_packed_width(problems: Problems, params: Tensor, channels: int, hidden: int, gated: bool) -> None:
    matrices = 3 if gated else 2
    if params.shape[1] != matrices * channels * hidden:
        expected = f"{matrices} * {channels} * {hidden} = {matrices * channels * hidden} columns"
        problems.add("params", expected, params)


def _check_options(
    problems: Problems,
    x: object,
    norm_weight: object,
    normalize: Sequence[str],
    activation: str,
    residual: bool,
    norm_eps: float,
    weight_eps: float,
) -> None:
    """Check what both public functions share."""
    if norm_weight is not None and problems.tensor("norm_weight", norm_weight, 1, "[D1]"):
        assert isinstance(norm_weight, Tensor)
        if isinstance(x, Tensor) and x.dim() == 3 and norm_weight.shape[0] != x.shape[2]:
            problems.add("norm_weight", f"[{x.shape[2]}], one weight for each channel of x", norm_weight)
    if isinstance(x, Tensor) and x.dim() == 3 and x.shape[2] == 0:
        problems.add("x", "at least one channel", x)
    problems.choice("activation", activation, ACTIVATIONS)
    if isinstance(normalize, str) or not isinstance(normalize, Sequence):
        problems.add_type("normalize", "a sequence of names out of " + ", ".join(WEIGHTS), normalize)
        normalize = ()
    for name in normalize:
        problems.choice("normalize", name, WEIGHTS)
    _check_flag(problems, "residual", residual)
    problems.number("norm_eps", norm_eps)
    problems.number("weight_eps", weight_eps)


def _split(params: Tensor, channels: int, hidden: int, gated: bool) -> FieldParams:
    patches, size = params.shape[0], channels * hidden
    w_gate = None
    if gated:
        w_gate = params[:, :size].view(patches, channels, hidden)
        params = params[:, size:]
    w1 = params[:, :size].view(patches, channels, hidden)
    return FieldParams(w1, params[:, size : 2 * size].view(patches, hidden, channels), w_gate)


def _matrices(params: Tensor, channels: int, hidden: int, gated: bool) -> list[Tensor | None]:
    """`_split` below autograd: w1, w2, w_gate with one operation for each and not two."""
    (row, step), start = params.stride(), params.storage_offset()
    size = channels * hidden
    wide, high = (params.shape[0], channels, hidden), (params.shape[0], hidden, channels)
    first = size * step if gated else 0
    return [
        params.as_strided(wide, (row, hidden * step, step), start + first),
        params.as_strided(high, (row, channels * step, step), start + first + size * step),
        params.as_strided(wide, (row, hidden * step, step), start) if gated else None,
    ]


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
    return _forward(x, *_matrices(params, x.shape[2], hidden, gated), norm_weight, *options)


def _packed_gradients(grad, x, params, norm_weight, hidden, gated, need_x, need_weights, *options):  # type: ignore[no-untyped-def]
    *options, forced = options
    d_params = fresh(_empty(params)) if need_weights else None
    targets = [None] * 3 if d_params is None else _matrices(d_params, x.shape[2], hidden, gated)
    weights = _matrices(params, x.shape[2], hidden, gated)
    dx, d_norm = _run_backward(grad, x, weights, norm_weight, need_x, targets, options, forced)
    return dx, d_params, d_norm


def _packed_backward(grad, x, *arguments):  # type: ignore[no-untyped-def]
    return [_or_empty(t, x) for t in _packed_gradients(grad, x, *arguments)]


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


def _fake_backward(grad, x, w1, w2, w_gate, norm_weight, need_x, need_weights, *options):  # type: ignore[no-untyped-def]
    weights = [_fake_gradient(w, x, need_weights) for w in (w1, w2, w_gate)]
    return [_fake_gradient(x, x, need_x), *weights, _fake_gradient(norm_weight, x)]


def _fake_packed_backward(grad, x, params, norm_weight, hidden, gated, need_x, need_weights, *options):  # type: ignore[no-untyped-def]
    return [
        _fake_gradient(x, x, need_x),
        _fake_gradient(params, x, need_weights),
        _fake_gradient(norm_weight, x),
    ]


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


register_autograd("neural_field_mlp", _NeuralFieldMLP.apply)
register_autograd("neural_field_mlp_packed", _NeuralFieldMLPPacked.apply)
refuse_gradients("neural_field_mlp_backward")
refuse_gradients("neural_field_mlp_packed_backward")
