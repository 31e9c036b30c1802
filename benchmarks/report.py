"""One static HTML page, PNG plots and Markdown from the JSON of the other commands, whichever exist."""

from __future__ import annotations

import argparse
import base64
import html
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import plot, provenance, tables
from benchmarks.files import load, save


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="result JSONs, or folders that are searched for them",
    )
    add("--out", type=Path, default=Path("demo/report"), metavar="DIR", help="default: demo/report")
    add(
        "--into",
        type=Path,
        metavar="FILE",
        help="fill FILE between <!-- claims --> and <!-- /claims --> with the comparison's tables",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write report.html and a PNG for each document that has times; 2 where an input is no result."""
    from benchmarks.claims import tables as claims_tables

    try:
        found = _documents(arguments.inputs)
        if not found:
            raise ValueError(f"no result JSON in {', '.join(map(str, arguments.inputs))}")
        claims = [document for _, document in found if document.get("kind") == "claims"]
        if arguments.into:
            if len(claims) != 1:
                raise ValueError(
                    f"--into: expected one document of claims among the inputs, got {len(claims)}"
                )
            _fill(arguments.into, claims_tables.readme(claims[0]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    body = []
    for index, (path, document) in enumerate(found):
        text, draw = _rendering(document)
        body.append(f"<h1>{html.escape(path.stem)}</h1>")
        picture = arguments.out / f"{index}-{path.stem}.png"
        try:
            draw(document, picture)
            data = base64.b64encode(picture.read_bytes()).decode()
            body.append(f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">')
        except (ImportError, KeyError, ValueError) as error:
            print(f"no plot of {path}: {error}", file=sys.stderr)
        body.append(to_html(text))
        save(arguments.out / f"{index}-{path.stem}.md", text)
    save(arguments.out / "report.html", _PAGE.format(body="\n".join(body)))
    print(f"wrote {arguments.out / 'report.html'}")
    return 0


def _documents(inputs: list[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Files must be results; in folders, other JSON files are passed over."""
    found = []
    for given in inputs:
        if not given.is_dir():
            found.append((given, load(given)))
            continue
        for path in sorted(given.rglob("*.json")):
            try:
                found.append((path, load(path)))
            except ValueError:
                continue
    return found


def _rendering(document: dict[str, Any]) -> tuple[str, Callable[[dict[str, Any], Path], None]]:
    """A document's Markdown, and what draws it: by its kind, which results of `ops` and `decoder` do not have."""
    from benchmarks import chunks, compare, curves, gpu, model, products
    from benchmarks.claims import tables as claims_tables

    kinds: dict[str, tuple[Callable[[dict[str, Any]], str], Callable[[dict[str, Any], Path], None]]] = {
        "claims": (claims_tables.markdown, _claims_plot),
        "curves": (curves.markdown, plot.curves),
        "comparison": (compare.table, plot.ratios),
        "model": (model.markdown, plot.stacks),
        "gpu": (gpu.markdown, plot.gpu),
        "chunks": (chunks.markdown, plot.chunks),
        "products": (products.markdown, plot.products),
    }
    render, draw = kinds.get(document.get("kind", ""), (tables.markdown, plot.bars))
    try:
        return render(document), draw
    except KeyError:
        return _medians(document), draw


def _medians(document: dict[str, Any]) -> str:
    """Documents of another shape show their cases' medians."""
    lines = ["| case | provider | ms |", "|---|---|---:|"]
    for result in document["results"]:
        for name, entry in result.get("providers", {}).items():
            if "median_s" in entry:
                lines.append(f"| {result.get('case', '')} | {name} | {1e3 * entry['median_s']:.3g} |")
    return "\n".join([*lines, "", provenance.summary(document["provenance"]), ""])


def _fill(path: Path, text: str) -> None:
    content = path.read_text()
    marked = re.compile(r"(<!-- claims -->\n).*?(<!-- /claims -->)", re.DOTALL)
    if len(marked.findall(content)) != 1:
        raise ValueError(f"{path}: expected one <!-- claims --> ... <!-- /claims -->")
    save(path, marked.sub(lambda match: match[1] + text + match[2], content))


def _claims_plot(document: dict[str, Any], path: Path) -> None:
    """Seconds of a guided step, model by model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from benchmarks.claims import costs
    from benchmarks.claims import tables as claims_tables

    rows = [row for row in claims_tables.rows(costs.by_case(document)) if row.step]
    if not rows:
        raise ValueError("no model has all its networks measured")
    figure = Figure(figsize=(8, 0.4 * len(rows) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [f"{row.model.label}, {row.provider}" for row in rows]
    colours = ["#d9622b" if row.provider.startswith("ours") else "#5b8db8" for row in rows]
    bars = axes.barh(names, [row.step.seconds for row in rows if row.step], color=colours)
    axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("seconds of a guided step; lower is better")
    figure.supxlabel(provenance.summary(document["provenance"]), fontsize=6, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def to_html(text: str) -> str:
    """The Markdown that our tables use: headings, tables, paragraphs, bold and code."""
    parts = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.splitlines()
        if lines[0].startswith("|"):
            rows = [[_inline(cell.strip()) for cell in line.strip("|").split("|")] for line in lines]
            head = "".join(f"<th>{cell}</th>" for cell in rows[0])
            body = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in row)}</tr>" for row in rows[2:])
            parts.append(f"<table><tr>{head}</tr>{body}</table>")
        elif lines[0].startswith("## "):
            parts.append(f"<h2>{_inline(lines[0][3:])}</h2>")
        else:
            parts.append(f"<p>{_inline(block)}</p>")
    return "\n".join(parts)


def _inline(text: str) -> str:
    text = html.escape(text, quote=False)
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Benchmarks</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
td, th {{ padding: .2em .6em; border-bottom: 1px solid #ddd; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }}
img {{ max-width: 100%; }}
</style>
{body}
</html>
"""
