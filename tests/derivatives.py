"""Derivatives of every kind that PyTorch takes: an op's against those of its formula in plain PyTorch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tolerance import assert_within
from torch import Tensor
from torch.autograd import forward_ad

#: A function of tensors, the tensors, a direction for each, and an incoming gradient for each result.
Function = Callable[..., tuple[Tensor, ...]]
Kind = Callable[[Function, Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def _gradients(
    out: Sequence[Tensor], leaves: Sequence[Tensor], upstream: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Of those results that depend on the leaves, differentiable again; zeros where none does."""
    reached = [(o, g) for o, g in zip(out, upstream, strict=True) if o.requires_grad]
    if not reached:
        return [torch.zeros_like(leaf) for leaf in leaves]
    options = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad([o for o, _ in reached], leaves, [g for _, g in reached], **options)


def _total(function: Function, upstream: Sequence[Tensor]) -> Callable[..., Tensor]:
    return lambda *tensors: sum((o * g).sum() for o, g in zip(function(*tensors), upstream, strict=True))


def jvp_along(
    function: Callable[[dict[str, Tensor]], Any], tensors: Mapping[str, Tensor], moving: Mapping[str, Tensor]
) -> tuple[Any, Any]:
    """torch.func.jvp of a function of tensors by name, those that do not move as constants."""
    return torch.func.jvp(
        lambda *values: function({**tensors, **dict(zip(moving, values, strict=True))}),
        tuple(tensors[name] for name in moving),
        tuple(moving.values()),
    )


def value_and_tangent(
    function: Callable[[dict[str, Tensor]], Tensor],
    tensors: Mapping[str, Tensor],
    moving: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """y and dy of `jvp_along`."""
    y, dy = jvp_along(function, tensors, moving)
    return {"y": y, "dy": dy}


def _two(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    return [torch.stack(pair, -1) for pair in zip(tensors, others, strict=True)]


def tangents(function, tensors, along, upstream):
    out, tangents = torch.func.jvp(function, tuple(tensors), tuple(along))
    return [*out, *tangents]


def dual_numbers(function, tensors, along, upstream):
    with forward_ad.dual_level():
        out = function(*map(forward_ad.make_dual, tensors, along))
        return [part for o in out for part in forward_ad.unpack_dual(o)]


def gradients_of_tangents(function, tensors, along, upstream):
    """As MeanFlow and consistency models train."""
    leaves = _leaves(tensors)
    out, tangents = torch.func.jvp(function, tuple(leaves), tuple(along))
    return [*_gradients(out, leaves, upstream), *_gradients(tangents, leaves, upstream)]


def functional_gradients(function, tensors, along, upstream):
    everything = tuple(range(len(tensors)))
    return torch.func.grad(_total(function, upstream), everything)(*tensors)


def hessian_products(function, tensors, along, upstream):
    """Tangents of gradients."""
    everything = tuple(range(len(tensors)))
    gradient = torch.func.grad(_total(function, upstream), everything)
    return torch.func.jvp(gradient, tuple(tensors), tuple(along))[1]


def tangents_of_own_gradients(function, tensors, along, upstream):
    """Of a forward and its backward pass within one level of dual numbers; the same as `hessian_products`."""
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(leaf, v) for leaf, v in zip(_leaves(tensors), along, strict=True)]
        gradients = torch.autograd.grad(_total(function, upstream)(*duals), duals)
        found = map(forward_ad.unpack_dual, gradients)
        return [torch.zeros_like(part.primal) if part.tangent is None else part.tangent for part in found]


def mapped(function, tensors, along, upstream):
    return torch.func.vmap(function, in_dims=-1, out_dims=-1)(*_two(tensors, along))


def gradients_of_examples(function, tensors, along, upstream):
    everything = tuple(range(len(tensors)))
    gradient = torch.func.grad(_total(function, upstream), everything)
    return torch.func.vmap(gradient, in_dims=-1)(*_two(tensors, along))


def gradients_at_once(function, tensors, along, upstream):
    """Of several incoming gradients, after one forward."""
    leaves = _leaves(tensors)
    several = [torch.stack([g, -2 * g]) for g in upstream]
    return torch.autograd.grad(function(*leaves), leaves, several, is_grads_batched=True)


def tangents_of_gradients(function, tensors, along, upstream):
    """Of a backward pass alone, whose incoming gradients have tangents after a forward that knew of none."""
    leaves = _leaves(tensors)
    out = function(*leaves)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(g, 2 * g + 1) for g in upstream]
        return [forward_ad.unpack_dual(g).tangent for g in torch.autograd.grad(out, leaves, duals)]


def gradients_of_those_tangents(function, tensors, along, upstream):
    """The same: gradients are linear in the incoming ones. PyTorch's own layers have no tangents there."""
    leaves = _leaves(tensors)
    return torch.autograd.grad(function(*leaves), leaves, [2 * g + 1 for g in upstream])


def second_gradients(function, tensors, along, upstream):
    """As a gradient penalty needs; incoming gradients have one, too."""
    leaves, upstream = _leaves(tensors), _leaves(upstream)
    first = _gradients(function(*leaves), leaves, upstream)
    return _gradients(first, [*leaves, *upstream], along)


def third_gradients(function, tensors, along, upstream):
    leaves = _leaves(tensors)
    second = _gradients(_gradients(function(*leaves), leaves, upstream), leaves, along)
    return _gradients(second, leaves, along)


KINDS: dict[str, Kind] = {
    kind.__name__: kind
    for kind in (
        tangents,
        dual_numbers,
        gradients_of_tangents,
        functional_gradients,
        hessian_products,
        tangents_of_own_gradients,
        mapped,
        gradients_of_examples,
        gradients_at_once,
        tangents_of_gradients,
        second_gradients,
        third_gradients,
    )
}
#: How plain PyTorch computes the same where it is another way.
PLAIN: dict[str, Kind] = {
    "tangents_of_gradients": gradients_of_those_tangents,
    "tangents_of_own_gradients": hessian_products,  # torch's silu has no tangents of its gradients otherwise
}
#: Kinds whose forward, and the first gradient of most, are the kernels' own.
BY_KERNELS = ("gradients_at_once", "tangents_of_gradients", "second_gradients", "third_gradients")


def assert_derivatives(
    kind: str,
    op: Callable[..., Sequence[Tensor]],
    plain: Callable[..., Sequence[Tensor]],
    tensors: Mapping[str, Tensor],
    relative: float | None = None,
) -> None:
    """The op's derivatives lie within the tolerance. Both functions take the tensors by name.

    relative: both are computed in float64 and agree so well. For whole models, where the errors of float32 hang on
    a few numbers: of two equally good models either may have twice the other's.
    """
    draw = torch.Generator().manual_seed(3)

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=draw, dtype=torch.float64, device="cpu").to(like)

    along, upstream = [drawn(tensor) for tensor in tensors.values()], [drawn(o) for o in plain(**tensors)]

    def found(
        take: Kind, function: Callable[..., Sequence[Tensor]], dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        def positional(*values: Tensor) -> tuple[Tensor, ...]:
            return tuple(function(**dict(zip(tensors, values, strict=True))))

        def cast(values: Sequence[Tensor]) -> list[Tensor]:
            return [value.detach().clone() if dtype is None else value.to(dtype) for value in values]

        arguments = cast(list(tensors.values())), cast(along), cast(upstream)
        return {str(i): t.detach() for i, t in enumerate(take(positional, *arguments))}

    own, other = KINDS[kind], PLAIN.get(kind, KINDS[kind])
    if relative is not None:
        pairs = found(own, op, torch.float64), found(other, plain, torch.float64)
        for name, expected in pairs[1].items():
            error = torch.linalg.vector_norm(pairs[0][name] - expected)
            assert error <= relative * torch.linalg.vector_norm(expected), name
        return
    assert_within(found(own, op), found(other, plain), found(other, plain, torch.float64))
