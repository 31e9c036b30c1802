"""How the benchmarks name sizes and tensors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

Shape = Mapping[str, int]
Tensors = Mapping[str, Tensor]
#: What an op returns: one tensor, or several.
Results = Tensor | tuple[Tensor, ...]


def together(results: Results) -> tuple[Tensor, ...]:
    """One result or several as a tuple."""
    return results if isinstance(results, tuple) else (results,)


def gradient_names(results: int) -> list[str]:
    """The names of the results' gradients among a case's tensors: "grad", and "grad 1" and so on."""
    return ["grad", *(f"grad {index}" for index in range(1, results))]
