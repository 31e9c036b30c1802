"""Time and memory of the pixel decoder and the neural field against batch, resolution, patch size and width."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import ops, plot, provenance, tables
from benchmarks.files import measuring, save
from benchmarks.providers import select_providers
from benchmarks.timing import QUICK
from benchmarks.worker import Job


@dataclass(frozen=True)
class Sweep:
    """A case whose shape has `key` at each of `values`; `--quick` leaves the last one out."""

    case: str
    key: str
    label: str
    values: tuple[int, ...]


SWEEPS: dict[str, Sweep] = {
    "batch": Sweep("pixel_decoder-l-256-forward", "B", "images of 256 x 256", (1, 2, 4, 8)),
    "resolution": Sweep("pixel_decoder-l-256-forward", "H", "pixels of an edge", (256, 512, 1024)),
    "resolution-training": Sweep("pixel_decoder-l-256-training", "H", "pixels of an edge", (256, 512, 1024)),
    "patch": Sweep("pixel_decoder-l-256-forward", "P", "patch size, pixels of an edge", (8, 16, 32)),
    "hidden": Sweep("neural_field_mlp-plain-forward", "D2", "hidden channels D2", (64, 128, 256, 512)),
    "hidden-training": Sweep(
        "neural_field_mlp-plain-training", "D2", "hidden channels D2", (64, 128, 256, 512)
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--sweep", nargs="+", default=[], metavar="NAME", help=f"default: all of {', '.join(SWEEPS)}")
    add("--provider", nargs="+", default=["eager", "ours"], metavar="NAME", help="default: eager ours")
    add("--accept", nargs="+", default=[], metavar="NAME", help="as for `ops`")
    add("--quick", action="store_true", help="without the largest point of each sweep")
    add("--size", choices=["full", "smoke"], default="full", help="smoke: tiny shapes, to see that it works")
    add(
        "--out",
        type=Path,
        default=Path("demo"),
        metavar="DIR",
        help="curves.json, .md and .png; default: demo",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure every point in a process of its own; 1 where one is wrong or failed, 2 for a bad argument."""
    try:
        providers = select_providers(arguments.provider)
        if unknown := [name for name in arguments.sweep if name not in SWEEPS]:
            raise ValueError(f"unknown sweep {', '.join(map(repr, unknown))}; known: {', '.join(SWEEPS)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    document: dict[str, Any] = {
        "schema": 1,
        "kind": "curves",
        "provenance": provenance.collect(sys.argv[1:]),
        "results": [],
    }
    path = arguments.out / "curves.json"
    with measuring(document):
        for name, value, job in jobs(arguments.sweep or list(SWEEPS), tuple(providers), arguments):
            print(f"{name} {value}: {job.case}", file=sys.stderr, flush=True)
            result = ops.launch_process(job)
            document["results"].append({**result, "sweep": name, "value": value})
            print("\n" + tables.text(document["results"][-1]) + "\n", flush=True)
            save(path, document)
    save(path, document)
    save(path.with_suffix(".md"), markdown(document))
    try:
        plot.curves(document, path.with_suffix(".png"))
    except (ValueError, ImportError) as error:
        print(f"no plot: {error}", file=sys.stderr)
    print(markdown(document))
    if document["interrupted"]:
        return 130
    return int(any(result["status"] not in ("ok", "inexact") for result in document["results"]))


def jobs(
    names: list[str], providers: tuple[str, ...], arguments: argparse.Namespace
) -> Iterator[tuple[str, int, Job]]:
    """(sweep, value, job) of every point; at smoke size each key's value is what it is there, and twice that."""
    for name in names:
        sweep = SWEEPS[name]
        values = sweep.values[:-1] if arguments.quick else sweep.values
        if arguments.size == "smoke":
            values = tuple(factor * ops.select_cases([sweep.case])[0].smoke[sweep.key] for factor in (1, 2))
        for value in values:
            job = Job(
                sweep.case,
                providers,
                QUICK,
                accept=tuple(arguments.accept),
                size=arguments.size,
                shape={sweep.key: value},
            )
            yield name, value, job


def markdown(document: dict[str, Any]) -> str:
    """One row a point: time and peak memory of each provider."""
    providers = list(dict.fromkeys(name for result in document["results"] for name in result["providers"]))
    head = [
        "sweep",
        "value",
        *(f"{name} ms" for name in providers),
        *(f"{name} peak MB" for name in providers),
        "ours is faster by",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for result in document["results"]:
        entries = [result["providers"].get(name, {}) for name in providers]
        times = [f"{1e3 * e['median_s']:.3g}" if "median_s" in e else e.get("status", "-") for e in entries]
        peaks = [f"{e['memory']['peak'] / 1e6:.3g}" if "memory" in e else "-" for e in entries]
        ratios = [
            f"{entry['time_over_ours']:.2f}x ({name})"
            for name, entry in zip(providers, entries, strict=True)
            if name != "ours" and "time_over_ours" in entry
        ]
        label = f"{result['sweep']}: {result['case']}"
        lines.append(
            "| " + " | ".join([label, str(result["value"]), *times, *peaks, ", ".join(ratios)]) + " |"
        )
    where = document["provenance"]
    note = "Medians; peak memory by torch's allocations in one call, results included."
    return "\n".join([*lines, "", note, f"`{where['command']}` on {provenance.summary(where)}.", ""])
