"""What a chunk of patches costs the pixel decoder's products, by its size: the model behind `chunk_size`, on a CPU."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import provenance
from benchmarks.files import publish
from benchmarks.timing import Budget, interleave
from pixnerd_kernels import backends
from pixnerd_kernels.ops.pixel_decoder import cpu

#: D, and what a block's generator makes of it, M * D1 * D2.
HEADS = {"XL/16": (1152, 2 * 64 * 128), "Radiance": (3072, 3 * 64 * 256)}
ROWS = (32, 64, 96, 128, 192, 256)
#: The products of a training step's chunk, by the times that each is needed.
TRAINING = {"generate": 2, "weight_gradient": 1, "hidden_gradient": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--head", nargs="+", choices=list(HEADS), default=list(HEADS))
    add("--rows", nargs="+", type=int, default=list(ROWS), metavar="N", help="patches of a chunk")
    add("--rounds", type=int, default=7)
    add("--out", type=Path, metavar="DIR", help="write chunks.json and chunks.md")


def run(arguments: argparse.Namespace) -> int:
    """Measure and fit: 0 is success, 2 a bad argument."""
    rows = sorted(set(arguments.rows))
    if len(rows) < 3 or rows[0] < 1:
        print("error: --rows: expected at least three sizes of a chunk, to fit two numbers", file=sys.stderr)
        return 2
    try:
        backends.native()
    except NotImplementedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    origin = provenance.collect(sys.argv[1:])
    provenance.announce(origin)
    results = []
    for head in arguments.head:
        results += measure(head, *HEADS[head], rows, arguments.rounds)
    document = {"schema": 1, "kind": "chunks", "provenance": origin, "results": results}
    publish(document, markdown(document), arguments.out, "chunks")
    return 0


def measure(head: str, states: int, generated: int, rows: list[int], rounds: int) -> list[dict[str, Any]]:
    """For each product of one block: seconds of every chunk, and the fit. The last entry is a training step's sum."""
    weight = torch.randn(generated, states)
    tasks: dict[str, Callable[[], object]] = {}
    total = torch.zeros(generated, states)
    for n in rows:
        hidden, made, d_hidden = torch.randn(n, states), torch.randn(n, generated), torch.empty(n, states)
        tasks[f"generate {n}"] = lambda h=hidden, m=made: cpu.generate(h, weight, None, m)
        tasks[f"weight_gradient {n}"] = lambda h=hidden, m=made: cpu.weight_gradient(total, m, h, True)
        tasks[f"hidden_gradient {n}"] = lambda d=d_hidden, m=made: cpu.hidden_gradient(d, m, weight, False)
    samples = interleave(tasks, Budget(seconds=0, least=rounds, most=rounds, warm_up=0))
    seconds = {name: [samples[f"{name} {n}"].median for n in rows] for name in TRAINING}
    seconds["a training step's chunk"] = np.sum(
        [count * np.array(seconds[name]) for name, count in TRAINING.items()], axis=0
    ).tolist()
    work = 2 * states * generated
    return [
        {
            "head": head,
            "product": name,
            "rows": rows,
            "seconds": times,
            **fit(rows, times),
            "flops_a_row": work * (sum(TRAINING.values()) if name not in TRAINING else 1),
        }
        for name, times in seconds.items()
    ]


def fit(rows: list[int], seconds: list[float]) -> dict[str, float]:
    """`chunk_s` and `row_s` of seconds = chunk_s + row_s * rows, by least squares of relative errors, and the largest
    of these."""
    columns = np.stack([np.ones(len(rows)), np.array(rows, dtype=float)], axis=1)
    times = np.array(seconds)
    chunk, row = np.linalg.lstsq(columns / times[:, None], np.ones(len(rows)), rcond=None)[0]
    misses = np.abs(columns @ [chunk, row] / times - 1)
    return {"chunk_s": float(chunk), "row_s": float(row), "largest_error": float(misses.max())}


def markdown(document: dict[str, Any]) -> str:
    """The fits as a table."""
    lines = [
        "| head | product | ms a chunk | ms a patch | GFLOP/s of the latter | a chunk costs as much as | error |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for entry in document["results"]:
        chunk, row = entry["chunk_s"], entry["row_s"]
        lines.append(
            f"| {entry['head']} | {entry['product']} | {1e3 * chunk:.3g} | {1e3 * row:.3g} | "
            f"{entry['flops_a_row'] / row / 1e9:.0f} | {chunk / row:.0f} patches | {entry['largest_error']:.0%} |"
        )
    where = document["provenance"]
    rows = ", ".join(map(str, document["results"][0]["rows"]))
    note = (
        f"Time = ms a chunk + ms a patch x patches, fitted to medians at {rows} patches, with the largest error; one "
        f"block, float32. `{where['command']}` on {provenance.summary(where)}."
    )
    return "\n".join([*lines, "", note]) + "\n"
