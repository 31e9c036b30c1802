"""The torch.library namespace that all ops share, the one way an op is registered in it, and the short way to call it.

A trip through PyTorch's dispatcher costs the host more than a kernel of moderate size runs, and a differentiable op
takes three. Where nobody but the op itself would see the call (`plain`), its implementation is called directly.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

LIBRARY = torch.library.Library("pixnerd", "DEF")

#: vmap's tensors, and those of gradients that are computed several at a time.
_BATCHED = ("FuncTorchBatched", "Batched")
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


def register(schema: str, implementation: Callable, fake: Callable) -> None:
    """Define ``pixnerd::<schema>``: one implementation for every device, and its fake for tracing.

    The implementation chooses the backend. Gradients need `register_autograd`; backward ops, `register_gradients`.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pixnerd::{name}", fake, lib=LIBRARY)


def register_autograd(name: str, apply: Callable, formula: Callable) -> None:
    """Register a torch.autograd.Function's `apply` as the op's Autograd kernel.

    The function's forward calls the op again below autograd. This costs half of what
    `torch.library.custom_op` with `register_autograd` does per call.

    formula: the op in plain PyTorch, out of place. Tangents (forward mode) and the transforms of torch.func, which a
    kernel knows nothing of, go through it.
    """

    def kernel(*args: Any) -> Any:
        return formula(*args) if _transformed(args) else apply(*args)

    LIBRARY.impl(name, kernel, "Autograd")
    for batched in _BATCHED:
        LIBRARY.impl(name, formula, batched)


def by_reference(implementation: Callable) -> Callable:
    """The formula of an op whose reference works out of place: what it computes where that backend is forced."""

    def formula(*args: Any) -> Any:
        return implementation(*args[:-1], "reference")

    return formula


def _transformed(args: Any) -> bool:
    """Whether a transform of torch.func is active, or a tensor has a tangent."""
    if torch._C._are_functorch_transforms_active():
        return True
    return has_tangents(args)


def has_tangents(values: Any) -> bool:
    """Whether any tensor among them, or in a list of them, has a tangent in the current level of dual numbers."""
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(value).tangent is not None
        for value in tree_leaves(values)
        if isinstance(value, torch.Tensor)
    )


def watched() -> bool:
    """Whether a compiler, a mode, a transform, a tracer or a profiler wants to see which ops are called."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or torch._C._autograd._profiler_enabled()
        or forward_ad._current_level >= 0
        or (torch._C._len_torch_function_stack() and _function_modes())
    )


def _function_modes() -> bool:
    """Whether there is any torch function mode but a default device, which concerns no op that takes tensors."""
    stack = range(torch._C._len_torch_function_stack())
    return any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in stack)


def _ordinary(tensor: torch.Tensor) -> bool:
    """Whether a kernel may read the tensor's memory: no subclass, sparse, meta, lazily negated or zero tensor, nor the
    batched ones of vmap and of gradients computed several at a time, which have no memory."""
    return (
        type(tensor) in _PLAIN
        and tensor.layout is torch.strided
        and torch._C._has_storage(tensor)
        and not (tensor.is_neg() or tensor.is_meta or tensor._is_zerotensor())
    )


def plain(*tensors: Any) -> tuple[Any, ...] | None:
    """Shapes, dtypes and devices of tensors (None stays None), where a call with them does not need the dispatcher.

    None where it does: somebody watches, or a tensor is no ordinary one.
    """
    if watched():
        return None
    found: list[Any] = []
    for tensor in tensors:
        if tensor is None:
            found.append(None)
        elif _ordinary(tensor):
            found += (tensor.shape, tensor.dtype, tensor.device)
        else:
            return None
    return tuple(found)


class Passed:
    """Calls of a function that have passed its checks, by all that these depend on."""

    def __init__(self) -> None:
        self._calls: set[tuple[Any, ...]] = set()

    def __contains__(self, call: tuple[Any, ...]) -> bool:
        try:
            return call in self._calls
        except TypeError:  # not hashable: the checks will say so
            return False

    def check(self, call: tuple[Any, ...] | None, check: Callable[..., None], *args: Any) -> None:
        """Call `check` with the arguments, unless such a call has passed it before; None is no call like another."""
        if call is None or call not in self:
            check(*args)
            if call is not None:
                self.add(call)

    def add(self, call: tuple[Any, ...]) -> None:
        if len(self._calls) >= 4096:  # shapes that never end must not fill the memory
            self._calls.clear()
        with contextlib.suppress(TypeError):
            self._calls.add(call)


def run(function: type[torch.autograd.Function], implementation: Callable, *args: Any) -> Any:
    """The op of `plain` tensors: its implementation, below autograd where a gradient is wanted."""
    if torch.is_grad_enabled():
        for arg in args:
            if type(arg) in _PLAIN and arg.requires_grad:
                # Function.apply itself would only look for functorch's transforms: there are none.
                return super(torch.autograd.Function, function).apply(*args, True)  # type: ignore[misc]
    return implementation(*args)


def call_op(
    name: str,
    call: tuple[Any, ...] | None,
    function: type[torch.autograd.Function],
    implementation: Callable,
    *args: Any,
) -> Any:
    """The op `name`, through the dispatcher unless the call is `plain`: then directly, by `run`."""
    if call is None:
        return getattr(torch.ops.pixnerd, name)(*args)
    return run(function, implementation, *args)


def below_autograd(name: str, implementation: Callable, direct: bool, *args: Any) -> Any:
    """What a Function's forward computes: by the op's implementation if it was called by `run`, else by the op."""
    if direct:
        return implementation(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.pixnerd, name)(*args)


def gradients(name: str, implementation: Callable, *args: Any) -> Any:
    """What a Function's backward computes, by the op `name` or directly by its implementation."""
    if not torch.is_grad_enabled() and not watched():
        for arg in args:
            if isinstance(arg, torch.Tensor) and not _ordinary(arg):
                break
        else:
            return implementation(*args)
    return getattr(torch.ops.pixnerd, name)(*args)


def wanted(found: Sequence[Any], needs: Sequence[bool]) -> tuple[Any, ...]:
    """What a Function's backward returns: the gradients that are needed, and None for every other argument."""
    kept = [gradient if need else None for gradient, need in zip(found, needs, strict=False)]
    return (*kept, *(None,) * (len(needs) - len(kept)))


@functools.cache
def module(op: str, backend: str) -> Any:
    """The module that runs an op on a backend."""
    return importlib.import_module(f"pixnerd_kernels.ops.{op}.{backend}")


class _Gradients(torch.autograd.Function):
    """A backward op that can be differentiated, by its formula. It takes the op's arguments flattened: autograd does
    not look into lists."""

    @staticmethod
    def forward(ctx: Any, name: str, formula: Callable, structure: TreeSpec, *leaves: Any) -> Any:
        ctx.formula, ctx.structure = formula, structure
        ctx.others = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        ctx.save_for_backward(*(leaf if isinstance(leaf, torch.Tensor) else None for leaf in leaves))
        with torch._C._AutoDispatchBelowAutograd():
            out = getattr(torch.ops.pixnerd, name)(*tree_unflatten(leaves, structure))
        return tuple(out) if isinstance(out, list) else out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        again = torch.is_grad_enabled()
        needs = ctx.needs_input_grad[3:]
        with torch.enable_grad(), torch._C._DisableAutocast():
            # Views, so that a tensor that is two arguments gets the gradient of each.
            leaves = [
                other if tensor is None else tensor.view_as(tensor) if need else tensor
                for tensor, other, need in zip(ctx.saved_tensors, ctx.others, needs, strict=True)
            ]
            out = ctx.formula(*tree_unflatten(leaves, ctx.structure))
            outs = [out] if isinstance(out, torch.Tensor) else out
            reached = [
                (result, grad) for result, grad in zip(outs, grads, strict=True) if result.requires_grad
            ]
            inputs = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
            found: Iterator[torch.Tensor] = map(torch.zeros_like, inputs)  # of what depends on nothing
            if reached:
                options = {"create_graph": again, "allow_unused": True, "materialize_grads": True}
                results, incoming = zip(*reached, strict=True)
                found = iter(torch.autograd.grad(results, inputs, incoming, **options))
        return None, None, None, *(next(found) if need else None for need in needs)


def register_gradients(name: str, formula: Callable) -> None:
    """Make the gradients that backward op `name` returns differentiable, any number of times, by its formula.

    formula: the op in plain PyTorch, out of place.
    """

    def kernel(*args: Any) -> Any:
        if _transformed(args):
            return formula(*args)
        if not torch.is_grad_enabled():
            with torch._C._AutoDispatchBelowAutograd():
                return getattr(torch.ops.pixnerd, name)(*args)
        leaves, structure = tree_flatten(args)
        out = _Gradients.apply(name, formula, structure, *leaves)
        return list(out) if isinstance(out, tuple) else out

    LIBRARY.impl(name, kernel, "Autograd")
    for batched in _BATCHED:
        LIBRARY.impl(name, formula, batched)
