"""The torch.library namespace that all ops share, and the one way an op is registered in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("pixnerd", "DEF")


def register(schema: str, implementation: Callable, fake: Callable) -> None:
    """Define ``pixnerd::<schema>``: one implementation for every device, and its fake for tracing.

    The implementation chooses the backend. Gradients need `register_autograd`; backward ops, `refuse_gradients`.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pixnerd::{name}", fake, lib=LIBRARY)


def register_autograd(name: str, apply: Callable) -> None:
    """Register a torch.autograd.Function's `apply` as the op's Autograd kernel.

    The function's forward calls the op again below autograd. This costs half of what
    `torch.library.custom_op` with `register_autograd` does per call.
    """
    LIBRARY.impl(name, apply, "Autograd")


class _OnceDifferentiable(torch.autograd.Function):
    """A backward op whose results are in the graph, so that differentiating them is an error and not a zero."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *args: Any) -> Any:
        ctx.name = name
        with torch._C._AutoDispatchBelowAutograd():
            out = getattr(torch.ops.pixnerd, name)(*args[:count])
        return tuple(out) if isinstance(out, list) else out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        op = ctx.name.removesuffix("_backward")
        raise RuntimeError(f"pixnerd::{op} can be differentiated once only: it has no second derivative")


def refuse_gradients(name: str) -> None:
    """Make the gradients that backward op `name` returns raise RuntimeError when they are differentiated."""

    def kernel(*args: Any) -> Any:
        # Autograd does not look into lists: their tensors follow the arguments.
        listed = [
            item
            for arg in args
            if isinstance(arg, (list, tuple))
            for item in arg
            if isinstance(item, torch.Tensor)
        ]
        out = _OnceDifferentiable.apply(name, len(args), *args, *listed)
        return list(out) if isinstance(out, tuple) else out

    LIBRARY.impl(name, kernel, "Autograd")
