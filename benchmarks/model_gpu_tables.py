"""A GPU's measurements of the whole model as tables, with what the targets say of them."""

from __future__ import annotations

from typing import Any

#: The targets: configuration, batch and what is held against the compiled plain model or the matmul.
_SPEEDUP, _CEILING, _LATENCY = 1.5, 0.55, 2.0


def _conditions(result: dict[str, Any]) -> str:
    ceiling = result["matmul"].get("flops_per_s")
    rate = f"; a {result['matmul']['label']} ran at {ceiling / 1e12:.0f} TFLOP/s" if ceiling else ""
    return (
        f"{result['config']} ({result['blocks']} blocks), {result['size']}x{result['size']}, batch "
        f"{result['batch']}, {result['dtype']}, {result['pass']}, {result['flops'] / 1e12:.2f} TFLOP{rate}"
    )


def _cells(result: dict[str, Any], name: str) -> list[str]:
    entry = result["providers"][name]
    if "device_s" not in entry:
        return [name, *[""] * 8, f"{entry['status']}: {entry.get('reason', '')[:160]}"]
    kernels_of = entry.get("profile", {}).get("kernels")
    flops = result["flops"] / entry["device_s"]
    marks = [
        entry["status"] if entry["status"] != "ok" else "",
        "" if entry["interleaved"] else "timed alone",
    ]
    if entry["ahead"] < 1:
        marks.append(f"host ahead in {entry['ahead']:.0%} of rounds")
    return [
        name,
        f"{entry['device_s'] * 1e3:.3f} ({entry['device_p20_s'] * 1e3:.3f}-{entry['device_p80_s'] * 1e3:.3f})",
        f"{flops / 1e12:.1f}",
        f"{entry['share_of_matmul']:.1%}" if "share_of_matmul" in entry else "-",
        f"{entry['latency_s'] * 1e3:.3f}",
        f"{entry['repeated_s'] * 1e3:.3f}",
        f"{entry['host_s'] * 1e3:.3f}",
        "-" if kernels_of is None else str(kernels_of),
        f"{entry['peak'] / 1e6:.0f}",
        ", ".join(filter(None, marks)),
    ]


_HEAD = (
    "provider", "device ms (p20-p80)", "TFLOP/s", "of matmul", "latency ms", "back to back ms", "host ms", "kernels",
    "peak MB", "",
)  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """For a terminal: the providers, and what the targets say."""
    rows = [list(_HEAD), *(_cells(result, name) for name in result["providers"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    ]
    return "\n".join([_conditions(result), *(line.rstrip() for line in lines), *targets(result)])


def targets(result: dict[str, Any]) -> list[str]:
    """Ours against the compiled plain model and the matmul, with the targets where they are for this setting."""
    lines = []
    aimed = (result["config"], result["pass"]) == ("XL/16", "forward")
    many, one = aimed and result["batch"] == 64, aimed and result["batch"] == 1
    for name, entry in result["providers"].items():
        if not name.startswith("ours") or "time_of_others" not in entry:
            continue
        for other, ratios in entry["time_of_others"].items():
            if other.startswith("ours"):
                continue
            line = f"{name} against {other}: device {ratios['device']:.2f}x, latency {ratios['latency']:.2f}x"
            line += f", back to back {ratios['repeated']:.2f}x"
            if other == "compile" and many:
                line += f" [target: device {_SPEEDUP}x, {_verdict(ratios['device'], _SPEEDUP)}]"
            if other == "compile" and one:
                line += f" [target: latency {_LATENCY}x, {_verdict(ratios['latency'], _LATENCY)}]"
            lines.append(line)
        if many:
            share = entry["share_of_matmul"]
            lines.append(
                f"{name}: {share:.1%} of the matmul [target: {_CEILING:.0%}, {_verdict(share, _CEILING)}]"
            )
    return lines


def _verdict(value: float, target: float) -> str:
    return "met" if value >= target else "missed"


def markdown(result: dict[str, Any]) -> str:
    """One result as a Markdown table under its conditions."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|---|" + "---:|" * (len(_HEAD) - 2) + "---|"]
    lines += ["| " + " | ".join(_cells(result, name)) + " |" for name in result["providers"]]
    parts = [_conditions(result) + ".", "\n".join(lines)]
    if found := targets(result):
        parts.append("\n\n".join(found))
    return "\n\n".join(parts)
