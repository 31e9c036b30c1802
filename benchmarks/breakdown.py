"""Where an op's time goes: the block with pieces taken away, and the decoder's steps timed as they run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch

import pixnerd_kernels
from benchmarks.heads import PixelDecoder
from benchmarks.providers import PROVIDERS, Compute, call
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
    """The plain block with separate weights, and the pixel decoder."""
    plain = isinstance(case.op, NeuralFieldMLP) and not (case.op.gated or case.op.packed)
    return plain or isinstance(case.op, PixelDecoder)


def measure(case: Case, shape: Shape, made: Tensors, budget: Budget) -> list[dict[str, Any]]:
    """Rows of label and median_s; `variants` add saved_s, `steps` share and, where there are FLOPs, flops_per_s."""
    if isinstance(case.op, PixelDecoder):
        return steps(case, shape, made)
    return variants(case, shape, made, budget)


#: What the decoder's CPU backend runs for each chunk of patches.
_STEPS = {
    "generate": "generated weights = states @ generatorsᵀ",
    "weight_gradient": "generators' gradients",
    "hidden_gradient": "gradient of the states",
    "forward": "embedding, fields and output layer",
    "backward": "the same backwards, with the forward again",
}


def steps(case: Case, shape: Shape, made: Tensors, calls: int = 7) -> list[dict[str, Any]]:
    """The decoder's steps, summed over chunks and blocks within a call; medians over calls."""
    from pixnerd_kernels.ops.pixel_decoder import cpu

    taken: list[dict[str, float]] = []

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            out = function(*arguments)
            taken[-1][name] = taken[-1].get(name, 0.0) + time.perf_counter() - start
            return out

        return run

    function = call(case, PROVIDERS["ours"].prepare(case, shape), made)
    with mock.patch.multiple(cpu, **{name: timed(name, getattr(cpu, name)) for name in _STEPS}):
        for _ in range(calls + 1):
            taken.append({})
            start = time.perf_counter()
            function()
            taken[-1]["everything else"] = time.perf_counter() - start - sum(taken[-1].values())
    flops = _step_flops(case, shape)
    rows = []
    whole = float(np.median([sum(entry.values()) for entry in taken[1:]]))
    for name in taken[-1]:
        median = float(np.median([entry[name] for entry in taken[1:]]))
        row = {"label": _STEPS.get(name, name), "median_s": median, "share": median / whole}
        rows.append(row | ({"flops_per_s": flops[name] / median} if name in flops else {}))
    return rows


def _step_flops(case: Case, shape: Shape) -> dict[str, int]:
    """FLOPs of each step's matrix products in one call."""
    op = case.op
    assert isinstance(op, PixelDecoder)
    fields = {**shape, "D": 0}
    product = op.flops(shape, False, True) - op.flops(fields, False, True)
    again = case.training and not op.save_weights
    return {
        "generate": product * (2 if again else 1),
        "weight_gradient": product,
        "hidden_gradient": product,
        "forward": op.flops(fields, False, True),
        "backward": op.flops(fields, True, True) - op.flops(fields, False, True),
    }


def variants(case: Case, shape: Shape, made: Tensors, budget: Budget) -> list[dict[str, Any]]:
    """saved_s is the full op's time minus the row's, median over rounds."""
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
    sizes = [
        *[case.op.output(shape)] * case.op.results,
        *(case.op.inputs(shape).values() if case.training else ()),
    ]
    return lambda: [torch.zeros(size, dtype=case.dtype) for size in sizes]
