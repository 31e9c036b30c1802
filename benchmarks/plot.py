"""Bar charts of results, with the conditions under the plot."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from benchmarks.provenance import summary

_COLOURS = {"eager": "#9aa5b1", "compile": "#5b8db8", "ours": "#d9622b"}


def bars(document: dict[str, Any], path: Path) -> None:
    """Time per provider, one panel per case family and malloc setting, one group of bars per pass.

    Raises:
        ValueError: no result has a time to plot.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in document["results"]:
        if any("median_s" in entry for entry in result["providers"].values()):
            family = result["case"].removesuffix("-forward").removesuffix("-training")
            panels.setdefault((family, result["malloc"]), []).append(result)
    if not panels:
        raise ValueError("nothing to plot: no provider of any case was timed")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.6 * columns, 3.6 * rows + 0.9), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, ((family, malloc), results) in zip(axes.flat, panels.items(), strict=False):
        _panel(axis, results)
        sizes = " ".join(f"{key}={value}" for key, value in results[0]["shape"].items())
        axis.set_title(f"{family}, malloc {malloc}\n{sizes} {results[0]['dtype']}", fontsize=9)
    entries = [entry for result in document["results"] for entry in result["providers"].values()]
    inexact = any(entry["status"] == "inexact" for entry in entries)
    conditions = (
        "Median of interleaved runs, whiskers p20 to p80; lower is better. "
        f"{'Hatched: misses the accuracy rule. ' if inexact else ''}"
        f"{summary(document['provenance'])}. {document['provenance']['command']}"
    )
    figure.supxlabel(textwrap.fill(conditions, 95 if columns == 2 else 70), fontsize=7, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panel(axis: Any, results: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for result in results for name in result["providers"]))
    width = 0.8 / len(names)
    labelled: set[str] = set()
    scale, unit = 1e3, "ms"
    if max(entry.get("median_s", 0) for result in results for entry in result["providers"].values()) < 1e-3:
        scale, unit = 1e6, "µs"
    for index, name in enumerate(names):
        for group, result in enumerate(results):
            entry = result["providers"].get(name, {})
            if "median_s" not in entry:
                continue
            median, low, high = (entry[key] * scale for key in ("median_s", "p20_s", "p80_s"))
            position = group + (index - (len(names) - 1) / 2) * width
            axis.bar(
                position,
                median,
                width * 0.92,
                color=_COLOURS.get(name, f"C{index}"),
                label=None if name in labelled else name,
                hatch="///" if entry["status"] == "inexact" else None,
                edgecolor="white",
                yerr=[[median - low], [high - median]],
                error_kw={"lw": 0.8, "ecolor": "#333333"},
            )
            labelled.add(name)
            axis.annotate(
                f"{median:.3g}", (position, high), (0, 2), textcoords="offset points", ha="center", fontsize=8
            )
    axis.set_xticks(range(len(results)), [result["pass"] for result in results])
    axis.set_ylabel(unit)
    axis.set_ylim(bottom=0)
    axis.margins(y=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="upper left")
