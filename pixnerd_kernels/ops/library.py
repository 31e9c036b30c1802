"""The torch.library namespace that all ops share, and the one way an op is registered in it."""

from __future__ import annotations

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("pixnerd", "DEF")


def register(schema: str, implementation: Callable, fake: Callable) -> None:
    """Define ``pixnerd::<schema>``: one implementation for every device, and its fake for tracing.

    The implementation chooses the backend; without an autograd registration (see `register_autograd`) the op
    refuses gradients.
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
