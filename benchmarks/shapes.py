"""How the benchmarks name sizes and tensors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

Shape = Mapping[str, int]
Tensors = Mapping[str, Tensor]
