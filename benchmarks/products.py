"""The products of a transformer's layers on a CPU, by library: how near the processor's limit any of them comes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import provenance
from benchmarks.files import publish
from benchmarks.timing import Budget, interleave, multiply_adds
from pixnerd_kernels.models import CONFIGS
from pixnerd_kernels.ops.linear.cpu import matmul

PASSES = ("forward", "gradient of x", "gradient of the weight")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", choices=list(CONFIGS), default="XL/16")
    add("--rows", type=int, default=256, help="tokens of all images; default: 256")
    add("--rounds", type=int, default=15)
    add("--out", type=Path, metavar="DIR", help="write products.json and products.md")


def layers(config: str) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a block's layers that see every token."""
    size = CONFIGS[config].hidden_size
    inner = int(8 * size / 3)
    return {
        "qkv": (3 * size, size),
        "proj": (size, size),
        "w1, w3": (inner, size),
        "w2": (size, inner),
    }


def run(arguments: argparse.Namespace) -> int:
    """Measure: 0 is success, 1 results that differ, 2 where there is nothing to compare."""
    peak = multiply_adds()
    onednn = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
    if not onednn or not peak:
        missing = (
            "the compiled core"
            if onednn
            else "oneDNN's linear layer (mkldnn::_linear_pointwise) in this torch"
        )
        print(f"error: {missing} is missing", file=sys.stderr)
        return 2
    origin = provenance.collect(sys.argv[1:])
    provenance.announce(origin)
    results = []
    for layer, (outputs, inputs) in layers(arguments.config).items():
        for step, calls in products(arguments.rows, outputs, inputs).items():
            if wrong := differing(calls):
                print(f"WRONG: {layer}, {step}: {', '.join(wrong)}")
                return 1
            tasks = {**calls, "peak": peak[0].run}
            budget = Budget(seconds=0, least=arguments.rounds, most=arguments.rounds, warm_up=0.1)
            samples = interleave(tasks, budget)
            work = 2 * arguments.rows * outputs * inputs
            speeds = {name: work / samples[name].median for name in calls}
            limit = peak[0].work / samples["peak"].median
            shape = {"rows": arguments.rows, "outputs": outputs, "inputs": inputs}
            results.append({"layer": layer, "pass": step, **shape, "flops_per_s": speeds, "limit": limit})
    document = {"schema": 1, "kind": "products", "provenance": origin, "results": results}
    publish(document, markdown(document), arguments.out, "products")
    return 0


def products(rows: int, outputs: int, inputs: int) -> dict[str, dict[str, Callable[[], torch.Tensor]]]:
    """Of x [rows, inputs] and a weight [outputs, inputs]: each pass by each library, into new memory."""
    onednn = torch.ops.mkldnn._linear_pointwise
    x, weight, grad = (torch.randn(n, m) for n, m in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def core(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out = torch.empty(a.shape[0], b.shape[1])
        matmul(a, b, out)
        return out

    found: dict[str, dict[str, Callable[[], torch.Tensor]]] = {}
    for step, (a, b) in zip(PASSES, ((x, weight.t()), (grad, weight), (grad.t(), x)), strict=True):
        found[step] = {
            "torch.mm": lambda a=a, b=b: torch.mm(a, b),
            "oneDNN": lambda a=a, b=b: onednn(a, b.t(), None, "none", [], ""),
            "the core": lambda a=a, b=b: core(a, b),
        }
    found["forward"]["oneDNN, packed before"] = lambda: onednn(x, packed, None, "none", [], "")
    return found


def differing(calls: dict[str, Callable[[], torch.Tensor]]) -> list[str]:
    """Which libraries' results differ from the first one's by more than rounding."""
    truth = next(iter(calls.values()))().double()
    return [name for name, call in calls.items() if (call().double() - truth).norm() > 1e-5 * truth.norm()]


def markdown(document: dict[str, Any]) -> str:
    """GFLOP/s, and the share of the limit."""
    results = document["results"]
    names = list(dict.fromkeys(name for entry in results for name in entry["flops_per_s"]))
    lines = [
        f"| layer | pass | {' | '.join(names)} | multiply-adds on registers |",
        "|---|---|" + "---:|" * (len(names) + 1),
    ]
    for entry in results:
        cells = [
            f"{speed / 1e9:.0f} ({speed / entry['limit']:.0%})"
            if (speed := entry["flops_per_s"].get(name))
            else ""
            for name in names
        ]
        shape = f"[{entry['rows']}, {entry['inputs']}] to {entry['outputs']}"
        lines.append(
            f"| {entry['layer']}, {shape} | {entry['pass']} | {' | '.join(cells)} | {entry['limit'] / 1e9:.0f} |"
        )
    where = document["provenance"]
    note = (
        f"GFLOP/s and the share of the limit in the same rounds, medians, float32. `{where['command']}` on "
        f"{provenance.summary(where)}."
    )
    return "\n".join([*lines, "", note]) + "\n"
