"""Charts of results, with the conditions under the plot."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
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


def curves(document: dict[str, Any], path: Path) -> None:
    """A row for each sweep: time, and peak memory, against what is swept; both axes are logarithmic.

    Raises:
        ValueError: no point has a time.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from benchmarks.curves import SWEEPS

    sweeps: dict[str, list[dict[str, Any]]] = {}
    for result in document["results"]:
        if any("median_s" in entry for entry in result["providers"].values()):
            sweeps.setdefault(result["sweep"], []).append(result)
    if not sweeps:
        raise ValueError("nothing to plot: no point was timed")
    figure = Figure(figsize=(9, 2.7 * len(sweeps) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(sweeps), 2, squeeze=False)
    for (time_axis, memory_axis), (name, points) in zip(rows, sweeps.items(), strict=True):
        _lines(time_axis, points, "ms", lambda entry: entry.get("median_s", float("nan")) * 1e3)
        _lines(
            memory_axis,
            points,
            "peak MB",
            lambda entry: entry.get("memory", {}).get("peak", float("nan")) / 1e6,
        )
        for axis in (time_axis, memory_axis):
            axis.set_xlabel(SWEEPS[name].label, fontsize=8)
        time_axis.set_title(f"{name}: {points[0]['case']}, {points[0]['dtype']}", fontsize=9, loc="left")
    conditions = (
        "Medians of interleaved runs; memory by torch's allocations in one call, results included; lower is better. "
        f"{summary(document['provenance'])}. {document['provenance']['command']}"
    )
    figure.supxlabel(textwrap.fill(conditions, 130), fontsize=7, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _lines(
    axis: Any, points: list[dict[str, Any]], unit: str, value: Callable[[dict[str, Any]], float]
) -> None:
    names = list(dict.fromkeys(name for point in points for name in point["providers"]))
    at = [point["value"] for point in points]
    for index, name in enumerate(names):
        heights = [value(point["providers"].get(name, {})) for point in points]
        axis.plot(at, heights, "o-", color=_COLOURS.get(name, f"C{index}"), label=name, markersize=4)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(at, [str(x) for x in at])
    axis.set_ylabel(unit)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)


def stacks(document: dict[str, Any], path: Path) -> None:
    """Where a forward's time goes, eager above ours.

    Raises:
        ValueError: no result was profiled.
    """
    found = [result for result in document["results"] if "stacks" in result]
    if not found:
        raise ValueError("nothing to plot: measure with --profile")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = _figure(8, 1.6 * len(found) + 0.9, len(found), document)
    for axis, result in zip(axes, found, strict=True):
        names = list(result["stacks"])[::-1]
        left = [0.0] * len(names)
        for part in result["stacks"]["ours"]:
            widths = [result["stacks"][name][part] for name in names]
            bars = axis.barh(names, widths, left=left, label=part)
            labels = [
                f"{width:.2g}" if width > 0.03 * sum(result["stacks"][names[-1]].values()) else ""
                for width in widths
            ]
            axis.bar_label(bars, labels, label_type="center", fontsize=8)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.set_title(
            f"{result['config']}, {result['size']}x{result['size']}, batch {result['batch']}, "
            f"{result.get('dtype', 'float32')}: forward",
            fontsize=9,
        )
        axis.set_xlabel("s")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.35))
    figure.savefig(path, dpi=130)


def ratios(document: dict[str, Any], path: Path) -> None:
    """The base commit's time over this tree's, case by case, with the range of the rounds.

    Raises:
        ValueError: no case ran on both.
    """
    found = [result for result in document["results"] if "base_over_now" in result]
    if not found:
        raise ValueError("nothing to plot: no case ran on both commits")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, (axis,) = _figure(8, 0.35 * len(found) + 1.4, 1, document)
    names = [f"{result['case']}, {result['malloc']}" for result in found]
    middle = [result["base_over_now"] for result in found]
    low = [result["base_over_now"] - result["least_ratio"] for result in found]
    high = [result["largest_ratio"] - result["base_over_now"] for result in found]
    axis.barh(names, middle, xerr=[low, high], color="#d9622b", error_kw={"lw": 0.8})
    axis.axvline(1, color="#333333", lw=0.8)
    axis.invert_yaxis()
    axis.set_xlabel(f"time of {document['base'][:10]} over this tree's; above 1 this tree is faster")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def gpu(document: dict[str, Any], path: Path) -> None:
    """Device time of every case over ours, on a logarithmic scale, with ours' share of the roofline.

    Raises:
        ValueError: no case has a time of ours and another's.
    """
    found = [result for result in document["results"] if "median_s" in result["providers"].get("ours", {})]
    if not any(len(result["providers"]) > 1 for result in found):
        raise ValueError("nothing to plot: no case has a time of ours and another's")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, (axis,) = _figure(9, 0.42 * len(found) + 1.6, 1, document)
    for offset, name in ((-0.2, "eager"), (0.2, "compile")):
        timed = [
            (row, r["providers"]) for row, r in enumerate(found) if "median_s" in r["providers"].get(name, {})
        ]
        ratios = [each[name]["median_s"] / each["ours"]["median_s"] for _, each in timed]
        bars = axis.barh(
            [row + offset for row, _ in timed], [ratio - 1 for ratio in ratios], 0.38, left=1,
            color=_COLOURS[name], label=f"{name} over ours",
        )  # fmt: skip
        axis.bar_label(bars, [f"{ratio:.2g}x" for ratio in ratios], padding=3, fontsize=7)
    shares = [f"{100 * result['providers']['ours']['share_of_roofline']:.0f}%" for result in found]
    names = [
        f"{result['case']} ({share} of the roofline)" for result, share in zip(found, shares, strict=True)
    ]
    axis.set_yticks(range(len(found)), names, fontsize=8)
    axis.set_xscale("log")
    ticks = [tick for tick in (0.5, 1, 2, 3, 5, 10, 20, 50) if tick < axis.get_xlim()[1]]
    axis.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axis.minorticks_off()
    axis.axvline(1, color="#333333", lw=0.8)
    axis.invert_yaxis()
    axis.set_xlabel("device time over ours; above 1 ours is faster")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def chunks(document: dict[str, Any], path: Path) -> None:
    """Milliseconds a patch against the patches of a chunk: measured, and the fitted line's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    heads = list(dict.fromkeys(result["head"] for result in document["results"]))
    figure, axes = _figure(7, 3 * len(heads) + 0.6, len(heads), document)
    for axis, head in zip(axes, heads, strict=True):
        for result in (entry for entry in document["results"] if entry["head"] == head):
            rows = result["rows"]
            (line,) = axis.plot(
                rows, [1e3 * s / n for s, n in zip(result["seconds"], rows, strict=True)], "o", ms=4
            )
            fitted = [1e3 * (result["chunk_s"] / n + result["row_s"]) for n in rows]
            axis.plot(rows, fitted, color=line.get_color(), lw=1, label=result["product"])
        axis.set_title(f"{head}, one block", fontsize=9)
        axis.set_xlabel("patches of a chunk")
        axis.set_ylabel("ms a patch")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=130)


def products(document: dict[str, Any], path: Path) -> None:
    """Each library's GFLOP/s on every product, under the processor's limit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results = document["results"]
    names = list(dict.fromkeys(name for entry in results for name in entry["flops_per_s"]))
    figure, (axis,) = _figure(9, 0.55 * len(results) + 1.2, 1, document)
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        timed = [(row, e["flops_per_s"][name]) for row, e in enumerate(results) if name in e["flops_per_s"]]
        places = [row + (index - (len(names) - 1) / 2) * height for row, _ in timed]
        axis.barh(places, [speed / 1e9 for _, speed in timed], height, label=name)
    for row, entry in enumerate(results):
        axis.plot([entry["limit"] / 1e9] * 2, [row - 0.45, row + 0.45], color="#333333", lw=1.2)
    axis.set_yticks(range(len(results)), [f"{e['layer']}, {e['pass']}" for e in results], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("GFLOP/s; the line is multiply-adds on registers")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False, loc="lower left")
    figure.savefig(path, dpi=130)


def _figure(width: float, height: float, rows: int, document: dict[str, Any]) -> tuple[Any, Any]:
    """A figure with axes below each other and the conditions under them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    conditions = f"{summary(document['provenance'])}. {document['provenance']['command']}"
    figure.supxlabel(textwrap.fill(conditions, 14 * int(width)), fontsize=7, color="#555555")
    return figure, figure.subplots(rows, 1, squeeze=False)[:, 0]
