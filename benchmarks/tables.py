"""Results as aligned text for the terminal and as Markdown for the README."""

from __future__ import annotations

from typing import Any

from benchmarks.provenance import summary

COLUMNS = (
    "provider", "median ms", "p20-p80 ms", "over ours", "GFLOP/s", "of matmul", "GB/s", "of copy",
    "faults", "peak MB", "- results", "RSS MB",
)  # fmt: skip

LEGEND = """\
over ours    the provider's time over ours, median of the ratios within rounds
GFLOP/s      matrix products, or element operations where an op has none; what backward recomputes counts for
             the provider that recomputes (ours)
of matmul    GFLOP/s against a float32 matmul, and of copy GB/s against a copy, timed in the same rounds
GB/s         every input read once and every output written once in each pass, over the time
faults       minor page faults per call
peak MB      torch's allocations in one call beyond what was live before; "- results" leaves out outputs and
             gradients
RSS MB       growth of a fresh process's peak resident set; unlike peak MB it sees the core's own scratch"""


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _mb(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e6:.3g}" if nbytes < 1e8 else f"{nbytes / 1e6:.0f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}%" if share >= 0.095 else f"{100 * share:.1f}%"


def row(name: str, entry: dict[str, Any]) -> list[str]:
    """The cells of one provider, in the order of COLUMNS."""
    if entry["status"] == "inexact":
        name += " (inexact)"
    elif entry["status"] != "ok":
        return [name, entry["status"].upper() if entry["status"] == "wrong" else entry["status"]]
    if "median_s" not in entry:
        return [name, "not measured"]
    memory = entry.get("memory", {})
    ratio = entry.get("time_over_ours")
    return [
        name,
        _ms(entry["median_s"]),
        f"{_ms(entry['p20_s'])}-{_ms(entry['p80_s'])}",
        "-" if ratio is None else f"{ratio:.2f}x",
        f"{entry['flops_per_s'] / 1e9:.3g}",
        _percent(entry["share_of_matmul"]),
        f"{entry['bytes_per_s'] / 1e9:.3g}",
        _percent(entry["share_of_copy"]),
        f"{entry['page_faults']:.0f}",
        _mb(memory.get("peak")),
        _mb(memory.get("without_results")),
        _mb(memory.get("resident")),
    ]


def title(result: dict[str, Any]) -> str:
    sizes = " ".join(f"{key}={value}" for key, value in result["shape"].items())
    setting = f"malloc {result['malloc']}  backend {result['backend'] or 'unknown'}"
    return f"{result['case']}  {sizes}  {result['dtype']}  {setting}"


def notes(result: dict[str, Any]) -> list[str]:
    """What the cells leave out: failures in full, the yardsticks, the memory ratio."""
    lines = [f"{result['status']}: {result['reason']}"] if "reason" in result else []
    for name, entry in result["providers"].items():
        if "reason" in entry:
            lines.append(f"{name} is {entry['status']}: {entry['reason']}")
    for name, yardstick in result.get("yardsticks", {}).items():
        rate = yardstick["work"] / yardstick["median_s"] / 1e9
        unit = "GB/s" if name == "copy" else "GFLOP/s"
        lines.append(f"{yardstick['label']}: {_ms(yardstick['median_s'])} ms, {rate:.4g} {unit}")
    counts = {name: entry["ops"] for name, entry in result["providers"].items() if entry.get("ops")}
    if counts:
        cells = ", ".join(f"{name} {count}" for name, count in counts.items())
        lines.append(f"ops that compute, each at least one launch on a GPU: {cells}")
    lines += [f"{label}: {_percent(share)}" for label, share in memory_shares(result).items()]
    return lines


def memory_shares(result: dict[str, Any]) -> dict[str, float]:
    """Ours over eager, for each way of measuring that has both."""
    labels = {
        "peak": "peak extra memory, ours of eager's (allocations)",
        "without_results": "the same without outputs and gradients",
        "resident": "peak extra memory, ours of eager's (resident set)",
    }
    ours, eager = (result["providers"].get(name, {}).get("memory", {}) for name in ("ours", "eager"))
    return {
        label: ours[key] / eager[key]
        for key, label in labels.items()
        if ours.get(key) is not None and eager.get(key)
    }


def text(result: dict[str, Any]) -> str:
    """One result as an aligned table with its notes."""
    rows = [list(COLUMNS), *(row(name, entry) for name, entry in result["providers"].items())]
    widths = [max(len(cells[i]) for cells in rows if i < len(cells)) for i in range(len(COLUMNS))]
    lines = [title(result)]
    for cells in rows:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=False))
        ]
        lines.append("  " + "  ".join(padded).rstrip())
    lines += [f"  {line}" for line in notes(result)]
    if "breakdown" in result:
        lines.append(_breakdown(result["breakdown"]))
    return "\n".join(lines)


def _breakdown(rows: list[dict[str, Any]]) -> str:
    if any("share" in entry for entry in rows):
        return _steps(rows)
    width = max(len(row["label"]) for row in rows)
    lines = [f"  {'what is left'.ljust(width)}   median ms   below the full op"]
    for entry in rows:
        saved = f"{entry['saved_s'] * 1e3:+.2f} ms"
        lines.append(f"  {entry['label'].ljust(width)}  {_ms(entry['median_s']):>10}  {saved:>18}")
    return "\n".join(lines)


def _steps(rows: list[dict[str, Any]]) -> str:
    width = max(len(row["label"]) for row in rows)
    lines = [f"  {'step'.ljust(width)}  median ms   share   GFLOP/s"]
    for entry in rows:
        speed = f"{entry['flops_per_s'] / 1e9:.0f}" if "flops_per_s" in entry else ""
        lines.append(
            f"  {entry['label'].ljust(width)}  {_ms(entry['median_s']):>9}  {_percent(entry['share']):>6}  {speed:>8}"
        )
    return "\n".join(lines)


def markdown(document: dict[str, Any]) -> str:
    """All results as one Markdown table with the conditions under it."""
    head = [
        "case",
        "malloc",
        "provider",
        "ms (p20-p80)",
        "ours is faster by",
        "GFLOP/s",
        "of matmul",
        "peak MB",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|" + "---:|" * 5]
    for result in document["results"]:
        sizes = ", ".join(f"{key}={value}" for key, value in result["shape"].items())
        for name, entry in result["providers"].items():
            cells = dict(zip(COLUMNS, row(name, entry), strict=False))
            first = [f"{result['case']} ({sizes}, {result['dtype']})", result["malloc"], cells["provider"]]
            if "over ours" not in cells:
                rest = [cells["median ms"], "", "", "", ""]
            else:
                rest = [
                    f"{cells['median ms']} ({cells['p20-p80 ms']})",
                    "" if name == "ours" else cells["over ours"],
                    cells["GFLOP/s"], cells["of matmul"], cells["peak MB"],
                ]  # fmt: skip
            lines.append("| " + " | ".join([*first, *rest]) + " |")
    provenance = document["provenance"]
    return "\n".join([*lines, "", f"`{provenance['command']}` on {summary(provenance)}.", ""])
