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

    The implementation chooses the backend. Gradients need `register_autograd`; backward ops, `register_gradients`;
    ops of tangents, `register_jvp`.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pixnerd::{name}", fake, lib=LIBRARY)


def register_autograd(
    name: str, apply: Callable, formula: Callable, with_tangents: Callable | None = None
) -> None:
    """Register a torch.autograd.Function's `apply` as the op's Autograd kernel.

    The function's forward calls the op again below autograd. This costs half of what
    `torch.library.custom_op` with `register_autograd` does per call.

    formula: the op in plain PyTorch, out of place. The transforms of torch.func, which a kernel knows nothing of, go
    through it.

    with_tangents: the op in forward mode, `with_tangents(jvp, args, tangents)` for arguments without their tangents and
    these (None where there is none); `jvp(*arguments)` runs the op ``<name>_jvp``, see `register_jvp`, and returns its
    values with their tangents. It returns None where that op cannot; then, and without it, the formula has them.
    """

    def kernel(*args: Any) -> Any:
        if not _transformed(args):
            return apply(*args)
        if with_tangents is not None and (level := _forward_mode(args)):
            values, tangents = _take_apart(args)
            if _kernels_may_take(level, _tensors((values, tangents))) and _same_dtypes(values, tangents):
                found = with_tangents(functools.partial(_jvp, f"{name}_jvp", level), values, tangents)
                if found is not None:
                    return found
        return formula(*args)

    LIBRARY.impl(name, kernel, "Autograd")
    for batched in _BATCHED:
        LIBRARY.impl(name, formula, batched)


_EAGER, _FUNCTIONAL = 1, 2


def _forward_mode(args: Any) -> int:
    """Whether forward mode is all that is active, of a `_transformed` call: as dual numbers are made by hand, or as
    torch.func.jvp makes them."""
    if not torch._C._are_functorch_transforms_active():
        return _EAGER
    return _FUNCTIONAL if forward_mode_alone() and _any_tangent(args) else 0


def forward_mode_alone() -> bool:
    """Whether torch.func.jvp is the one transform that is active."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return [level.key() for level in stack] == [torch._C._functorch.TransformType.Jvp]


def _kernels_may_take(level: int, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether an op of tangents does for values and tangents of this level.

    Not where a backward at the same level would have tangents of its own: they reach it through what the forward saves,
    which here has none. torch.func.jvp's parameters have their graph one level below.
    """
    if any(torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors):
        return False
    if level == _FUNCTIONAL and torch.is_inference_mode_enabled():
        return False
    recorded = level == _FUNCTIONAL or torch.is_grad_enabled()
    return not (recorded and any(tensor.requires_grad for tensor in tensors))


def _same_dtypes(values: Any, tangents: Any) -> bool:
    """Whether every tangent has its value's dtype; PyTorch's own functions promote what has not."""
    pairs = zip(tree_leaves(values), tree_leaves(tangents), strict=True)
    return all(tangent is None or tangent.dtype == value.dtype for value, tangent in pairs)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _take_apart(args: Any) -> tuple[Any, Any]:
    """Arguments without their tangents, and these in the same places; None where there is none."""
    leaves, structure = tree_flatten(args)
    parts = [
        forward_ad.unpack_dual(leaf, level=_LEVEL) if isinstance(leaf, torch.Tensor) else (leaf, None)
        for leaf in leaves
    ]
    values, tangents = zip(*parts, strict=True)
    return tree_unflatten(values, structure), tree_unflatten(tangents, structure)


def _jvp(name: str, level: int, *args: Any) -> Any:
    """The values that an op of tangents returns, with their tangents: one, or several in a tuple."""
    op = getattr(torch.ops.pixnerd, name)
    if level == _EAGER:
        found = op(*args)
    else:  # from the transform's level to the one below, where gradients are recorded if at all
        with torch._C._AutoDispatchBelowAutograd():
            found = op(*args)
    values, tangents = _halves(found)
    duals = tuple(forward_ad.make_dual(*pair, level=_LEVEL) for pair in zip(values, tangents, strict=True))
    return duals[0] if len(duals) == 1 else duals


def _halves(found: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Values and tangents of what an op of tangents returns, or what belongs to them."""
    count = len(found) // 2
    return found[:count], found[count:]


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
    return forward_ad._current_level >= 0 and _any_tangent(values)


def _any_tangent(values: Any) -> bool:
    return any(
        forward_ad.unpack_dual(tensor, level=_LEVEL).tangent is not None for tensor in _tensors(values)
    )


#: PyTorch has one level of dual numbers; torch.func.jvp's of a graph that is traced again does not say so.
_LEVEL = 0


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


def _run_and_save(ctx: Any, name: str, formula: Callable, structure: TreeSpec, leaves: Sequence[Any]) -> Any:
    """An op below autograd, and what its backward needs: its formula, and its arguments as tree_flatten has them, since
    autograd does not look into lists."""
    ctx.formula, ctx.structure = formula, structure
    ctx.others = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    ctx.save_for_backward(*(leaf if isinstance(leaf, torch.Tensor) else None for leaf in leaves))
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.pixnerd, name)(*tree_unflatten(leaves, structure))


def _saved(ctx: Any) -> list[Any]:
    """The leaves that `_run_and_save` saved."""
    pairs = zip(ctx.saved_tensors, ctx.others, strict=True)
    return [other if tensor is None else tensor for tensor, other in pairs]


class _Gradients(torch.autograd.Function):
    """A backward op that can be differentiated, by its formula."""

    @staticmethod
    def forward(ctx: Any, name: str, formula: Callable, structure: TreeSpec, *leaves: Any) -> Any:
        out = _run_and_save(ctx, name, formula, structure, leaves)
        return tuple(out) if isinstance(out, list) else out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None, None, *_by_formula(ctx, grads, ctx.needs_input_grad[3:])


def _by_formula(ctx: Any, grads: Sequence[Any], needs: Sequence[bool]) -> Iterator[torch.Tensor | None]:
    """Gradients of an op's leaves by its formula, from those of its results (None: zero)."""
    again = torch.is_grad_enabled()
    with torch.enable_grad(), torch._C._DisableAutocast():
        # Views, so that a tensor that is two arguments gets the gradient of each.
        leaves = [leaf.view_as(leaf) if need else leaf for leaf, need in zip(_saved(ctx), needs, strict=True)]
        out = ctx.formula(*tree_unflatten(leaves, ctx.structure))
        outs = [out] if isinstance(out, torch.Tensor) else out
        reached = [
            (result, grad)
            for result, grad in zip(outs, grads, strict=True)
            if result.requires_grad and grad is not None
        ]
        inputs = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
        found: Iterator[torch.Tensor] = map(torch.zeros_like, inputs)  # of what depends on nothing
        if reached:
            options = {"create_graph": again, "allow_unused": True, "materialize_grads": True}
            results, incoming = zip(*reached, strict=True)
            found = iter(torch.autograd.grad(results, inputs, incoming, **options))
    return (next(found) if need else None for need in needs)


class _Jvp(torch.autograd.Function):
    """An op of tangents that can be differentiated: its values by their own backward, its tangents by its formula."""

    @staticmethod
    def forward(
        ctx: Any, name: str, formula: Callable, gradients: Callable, structure: TreeSpec, *leaves: Any
    ) -> Any:
        ctx.gradients = gradients
        ctx.set_materialize_grads(False)
        return _run_and_save(ctx, name, formula, structure, leaves)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        needs = ctx.needs_input_grad[4:]
        of_values, of_tangents = _halves(grads)
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        # Where tangents are part of a target, the values' own backward will do.
        if all(grad is None for grad in of_tangents):
            arguments = tree_unflatten(_saved(ctx), ctx.structure)
            found = ctx.gradients(of_values[0] if len(of_values) == 1 else of_values, needs, *arguments)
            return None, None, None, None, *wanted(found, needs)
        return None, None, None, None, *_by_formula(ctx, grads, needs)


def register_jvp(name: str, formula: Callable, gradients: Callable) -> None:
    """Make what the op ``<name>_jvp`` returns differentiable: its values, and behind them a tangent of each.

    formula: the op in plain PyTorch, out of place; gradients of its tangents and transforms go through it. gradients:
    `gradients(grad, needs, *args)`, those of its first tensors, in the order of tree_flatten, from the value's alone;
    grad is a tuple where there are several values, and None for those that get none.
    """
    name = f"{name}_jvp"

    def kernel(*args: Any) -> Any:
        if _transformed(args):
            return formula(*args)
        leaves, structure = tree_flatten(args)
        return _Jvp.apply(name, formula, gradients, structure, *leaves)

    LIBRARY.impl(name, kernel, "Autograd")
    for batched in _BATCHED:
        LIBRARY.impl(name, formula, batched)


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
