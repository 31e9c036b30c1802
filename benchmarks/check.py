"""Whether a provider's result is right: the house rule, norm-wise per tensor against float64.

    ||out - ref64|| <= 2 ||plain - ref64|| + 4 eps(dtype) ||ref64||

with `plain` the official formula in plain PyTorch at the case's dtype.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.providers import call
from benchmarks.registry import Case, Shape, Tensors


@dataclass(frozen=True)
class Error:
    """One tensor's distance from float64 and what the rule allows, both relative to the tensor's norm."""

    tensor: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """False for NaN too."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"{self.tensor}: error {self.error:.2e}, allowed {self.allowed:.2e}"


class Truth:
    """The float64 result of a case and how far plain PyTorch is from it, computed once for all providers."""

    def __init__(self, case: Case, shape: Shape, made: Tensors) -> None:
        self.case = case
        exact = dataclasses.replace(case, dtype=torch.float64)
        wide = {name: tensor.double() for name, tensor in made.items()}
        self.names = ["output"] if case.op.results == 1 else [f"output {i}" for i in range(case.op.results)]
        if case.training:
            self.names += [f"gradient of {name}" for name in case.leaves(shape)]
        self.tensors = call(exact, lambda t: case.op.eager(shape, t, torch.float64), wide)()
        plain = call(case, lambda t: case.op.eager(shape, t, case.dtype), made)()
        self.plain = [_distance(a, b) for a, b in zip(plain, self.tensors, strict=True)]

    def errors(self, results: tuple[Tensor, ...]) -> list[Error]:
        """One entry per tensor; a wrong count, shape or dtype is an infinite error."""
        epsilon = torch.finfo(self.case.dtype).eps
        found = []
        for index, (name, reference) in enumerate(zip(self.names, self.tensors, strict=True)):
            norm = reference.norm().item() or 1.0
            allowed = (2 * self.plain[index] + 4 * epsilon * norm) / norm
            error = float("inf")
            if len(results) == len(self.tensors):
                out = results[index]
                if out.shape == reference.shape and out.dtype == self.case.dtype:
                    error = _distance(out, reference) / norm
            found.append(Error(name, error, allowed))
        return found


def _distance(out: Tensor, reference: Tensor) -> float:
    return (out.double() - reference).norm().item()
