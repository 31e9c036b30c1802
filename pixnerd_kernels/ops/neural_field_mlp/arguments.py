"""Arguments of the neural field: what they may be, and how a row of packed parameters holds its matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from pixnerd_kernels.checks import Problems

ACTIVATIONS = ("silu", "gelu", "relu")
WEIGHTS = ("w1", "w2", "w_gate")


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
    return split(params, channels, hidden, gated)


def check(
    x: Any, w1: Any, w2: Any, w_gate: Any, norm_weight: Any,
    normalize: Any, activation: Any, residual: Any, norm_eps: Any, weight_eps: Any,
) -> None:  # fmt: skip
    """The arguments of `neural_field_mlp`, every problem at once."""
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


def check_packed(
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


def option_key(
    normalize: Sequence[str], activation: str, residual: bool, norm_eps: float, weight_eps: float
) -> tuple[Any, ...]:
    """What the checks of the options depend on."""
    names = tuple(normalize) if type(normalize) is list else normalize
    return names, activation, type(residual), residual, type(norm_eps), norm_eps, type(weight_eps), weight_eps


def _check_flag(problems: Problems, argument: str, value: object) -> None:
    if not isinstance(value, bool):
        problems.add_type(argument, "True or False", value)


def _check_packed_width(problems: Problems, params: Tensor, channels: int, hidden: int, gated: bool) -> None:
    count = 3 if gated else 2
    if params.shape[1] != count * channels * hidden:
        expected = f"{count} * {channels} * {hidden} = {count * channels * hidden} columns"
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


def split(params: Tensor, channels: int, hidden: int, gated: bool) -> FieldParams:
    """`split_params` of what has passed its checks."""
    patches, size = params.shape[0], channels * hidden
    w_gate = None
    if gated:
        w_gate = params[:, :size].view(patches, channels, hidden)
        params = params[:, size:]
    w1 = params[:, :size].view(patches, channels, hidden)
    return FieldParams(w1, params[:, size : 2 * size].view(patches, hidden, channels), w_gate)


def matrices(params: Tensor, channels: int, hidden: int, gated: bool) -> list[Tensor | None]:
    """`split` below autograd: w1, w2, w_gate with one operation for each and not two."""
    (row, step), start = params.stride(), params.storage_offset()
    size = channels * hidden
    wide, high = (params.shape[0], channels, hidden), (params.shape[0], hidden, channels)
    first = size * step if gated else 0
    return [
        params.as_strided(wide, (row, hidden * step, step), start + first),
        params.as_strided(high, (row, channels * step, step), start + first + size * step),
        params.as_strided(wide, (row, hidden * step, step), start) if gated else None,
    ]
