"""Who computes a case: plain PyTorch, torch.compile of the same formula, or this package."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.registry import Case, Shape, Tensors, upstream_names
from benchmarks.shapes import Results, together
from benchmarks.tangents import PREFIX

#: Computes a case's results from its inputs.
Compute = Callable[[Tensors], Results]


@dataclass(frozen=True)
class Provider:
    """`prepare` gives the computation of a case at a shape.

    `recompute` says whether backward computes hidden activations again, which its FLOPs then count.
    """

    prepare: Callable[[Case, Shape], Compute]
    recompute: bool


def _eager(case: Case, shape: Shape) -> Compute:
    return lambda tensors: case.op.eager(shape, tensors, case.dtype)


def _compile(case: Case, shape: Shape) -> Compute:
    torch._dynamo.reset()
    compiled: Compute = torch.compile(_eager(case, shape), fullgraph=True, dynamic=False)
    return compiled


def _ours(case: Case, shape: Shape) -> Compute:
    return lambda tensors: case.op.ours(shape, tensors, case.dtype)


PROVIDERS: dict[str, Provider] = {
    "eager": Provider(_eager, recompute=False),
    "compile": Provider(_compile, recompute=False),
    "ours": Provider(_ours, recompute=True),
}


def _liger(case: Case, shape: Shape) -> Compute:
    return lambda tensors: case.op.liger(shape, tensors)  # type: ignore[attr-defined]


#: Other libraries' kernels, and the module that each needs. They run on a GPU, where an op has a method of their name.
RIVALS: dict[str, Provider] = {"liger": Provider(_liger, recompute=True)}
_MODULES = {"liger": "liger_kernel"}


def rivals(case: Case) -> list[str]:
    """The rivals that are installed and can compute a case again and again."""
    spared = getattr(case.op, "forward_only_rivals", ()) if case.training else ()
    return [
        name
        for name in RIVALS
        if hasattr(case.op, name) and name not in spared and importlib.util.find_spec(_MODULES[name])
    ]


def select_providers(names: Sequence[str]) -> list[str]:
    """The named providers; empty means all.

    Raises:
        ValueError: a name is unknown; the message lists the known ones.
    """
    if unknown := [name for name in names if name not in PROVIDERS]:
        raise ValueError(f"unknown provider {', '.join(map(repr, unknown))}; known: {', '.join(PROVIDERS)}")
    return list(dict.fromkeys(names)) or list(PROVIDERS)


def call(case: Case, compute: Compute, made: Tensors) -> Callable[[], tuple[Tensor, ...]]:
    """One timed call: the results alone, or for training the results and the gradient of every leaf.

    The returned function makes no copies: it runs on the tensors that `case.make` made.
    """
    named = upstream_names(case.op) if case.training else []
    inputs = {name: tensor.detach() for name, tensor in made.items() if name not in named}
    if not case.training:
        return lambda: together(compute(inputs))
    leaves = [tensor.requires_grad_() for name, tensor in inputs.items() if not name.startswith(PREFIX)]
    grads = [made[name] for name in named]

    def run() -> tuple[Tensor, ...]:
        out = together(compute(inputs))
        found = torch.autograd.grad(out[: len(grads)], leaves, grads)
        return *(tensor.detach() for tensor in out), *found

    return run
