"""SwiGLU feed-forward layers: gate and value from two linear layers, or side by side from one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnerd_kernels.nn.layers import feed_forward
from pixnerd_kernels.ops.swiglu import swiglu
from pixnerd_kernels.patching.probe import Candidate, Form, Formula, Inputs
from pixnerd_kernels.patching.rules.base import (
    Left,
    acts_as_linear,
    first_parameter,
    inert,
    own_tensors,
    positional,
)
from pixnerd_kernels.patching.swap import Replacement


@dataclass(frozen=True)
class FeedForward(Replacement):
    """out(silu(gate) * up) around the module's own layers."""

    op: ClassVar[str] = "swiglu"
    #: One layer for gate and value, or two.
    first: tuple[str, ...]
    last: str
    #: The second half, or the second layer, is the gate.
    swapped: bool

    def run(self, module: Any, *args: Any) -> Tensor:
        layers, last = [getattr(module, name) for name in self.first], getattr(module, self.last)
        if len(layers) == 2:
            gate, up = reversed(layers) if self.swapped else layers
            return feed_forward(args[0], gate, up, last)
        made = layers[0](args[0])
        out: Tensor = last(swiglu(*reversed(made.chunk(2, dim=-1))) if self.swapped else swiglu(made))
        return out


class SwiGLURule:
    op = FeedForward.op

    def match(self, module: nn.Module) -> Candidate | Left | None:
        children = dict(module.named_children())
        linear = {name: child for name, child in children.items() if acts_as_linear(child)}
        names = positional(module, 1)
        if names is None or own_tensors(module) or not all(map(inert, _others(children, linear))):
            return None
        parts = _parts(linear)
        if parts is None:
            return None
        first, last = parts
        size = int(linear[first[0]].in_features)  # type: ignore[arg-type]

        def inputs(rng: torch.Generator) -> Inputs:
            return {names[0]: torch.randn(2, 5, size, generator=rng)}

        tensors = (*(f"{name}()" for name in first), f"{last}()")
        forms = tuple(_forms(first, last, tensors))
        return Candidate(forms, inputs, first, first_parameter(module, last), (last,))


def _others(children: dict[str, nn.Module], linear: dict[str, nn.Module]) -> list[nn.Module]:
    return [child for name, child in children.items() if name not in linear]


def _parts(linear: dict[str, nn.Module]) -> tuple[tuple[str, ...], str] | None:
    """The layers in front and the one behind, told by their sizes."""
    sizes: dict[str, tuple[int, int]] = {
        name: (int(layer.in_features), int(layer.out_features))  # type: ignore[arg-type]
        for name, layer in linear.items()
    }
    for last, (inner, _) in sizes.items():
        first = tuple(name for name in sizes if name != last)
        widths = {sizes[name] for name in first}
        if len(widths) == 1 and len(first) in (1, 2):
            ((_, width),) = widths
            if width * len(first) == 2 * inner and (len(first) == 2 or width == 2 * inner):
                return first, last
    return None


def _forms(first: tuple[str, ...], last: str, tensors: tuple[str, ...]) -> Iterator[Form]:
    def formula(activation: Callable[[Tensor], Tensor], swapped: bool) -> Formula:
        def run(*values: Tensor) -> dict[str, Tensor]:
            """The layers in front and the one behind gave these values."""
            gate, up = values[:2] if len(first) == 2 else values[0].chunk(2, dim=-1)
            product = activation(up) * gate if swapped else activation(gate) * up
            return {"output": values[-1], f"{last}<": product}

        return run

    for swapped in (False, True):
        which = "second" if swapped else "first"
        block = FeedForward(first, last, swapped)
        yield Form(f"SiLU of the {which}", formula(F.silu, swapped), tensors, block)
        for name, other in (("relu", F.relu), ("gelu", F.gelu), ("sigmoid", torch.sigmoid)):
            yield Form(f"activation {name}", formula(other, swapped), tensors)
