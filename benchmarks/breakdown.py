"""Where the fused block's time goes: the op with pieces taken away, beside its products and results alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import pixnerd_kernels
from benchmarks.providers import Compute, call
from benchmarks.registry import Case, NeuralFieldMLP, Shape, Tensors
from benchmarks.timing import Budget, Samples, interleave, yardsticks

#: Label -> whether RMSNorm is in, and the op's options.
_VARIANTS: dict[str, tuple[bool, dict[str, Any]]] = {
    "the full op": (True, {}),
    "relu in place of silu": (True, {"activation": "relu"}),
    "without RMSNorm": (False, {}),
    "weights not normalised": (True, {"normalize": ()}),
    "without residual": (True, {"residual": False}),
    "without any of these, relu": (False, {"activation": "relu", "normalize": (), "residual": False}),
}


def supports(case: Case) -> bool:
    """Only the plain block with separate weights is taken apart."""
    return isinstance(case.op, NeuralFieldMLP) and not (case.op.gated or case.op.packed)


def measure(case: Case, shape: Shape, made: Tensors, budget: Budget) -> list[dict[str, Any]]:
    """Rows of label, median_s and saved_s (the full op's time minus the row's, median over rounds)."""
    tasks: dict[str, Callable[[], object]] = {}
    for label, (norm, options) in _VARIANTS.items():
        inputs = {name: tensor for name, tensor in made.items() if norm or name != "norm_weight"}
        tasks[label] = call(case, _variant(options), inputs)
    tasks["the products alone, torch.bmm into buffers"] = _products(case, shape, made)
    tasks["the results alone, allocated and written once"] = _results(case, shape)
    matmul = yardsticks(copy_mib=1)[0]
    samples = interleave({**tasks, "matmul": matmul.run}, budget)
    share = case.flops(shape, recompute=True) / matmul.work
    ideal = Samples([share * seconds for seconds in samples.pop("matmul").seconds], [])
    full = samples["the full op"]
    return [
        {
            "label": label,
            "median_s": row.median,
            "saved_s": float(np.median(np.subtract(full.seconds, row.seconds))),
        }
        for label, row in {**samples, f"the same FLOPs at the speed of a {matmul.label}": ideal}.items()
    ]


def _variant(options: dict[str, Any]) -> Compute:
    return lambda t: pixnerd_kernels.neural_field_mlp(
        t["x"], t["w1"], t["w2"], norm_weight=t.get("norm_weight"), **options
    )


def _products(case: Case, shape: Shape, made: Tensors) -> Callable[[], object]:
    """Exactly the products that the FLOPs count, with nothing between them."""
    x, w1, w2 = made["x"], made["w1"], made["w2"]
    hidden = x.new_empty(shape["N"], shape["S"], shape["D2"])
    out, dw1, dw2 = torch.empty_like(x), torch.empty_like(w1), torch.empty_like(w2)

    def forward() -> None:
        torch.bmm(x, w1, out=hidden)
        torch.bmm(hidden, w2, out=out)

    def training() -> None:
        forward()
        torch.bmm(x, w1, out=hidden)
        torch.bmm(hidden.mT, made["grad"], out=dw2)
        torch.bmm(made["grad"], w2.mT, out=hidden)
        torch.bmm(x.mT, hidden, out=dw1)
        torch.bmm(hidden, w1.mT, out=out)

    return training if case.training else forward


def _results(case: Case, shape: Shape) -> Callable[[], object]:
    """What malloc and the page faults of the results cost by themselves."""
    sizes = [case.op.output(shape), *(case.op.inputs(shape).values() if case.training else ())]
    return lambda: [torch.zeros(size, dtype=case.dtype) for size in sizes]
