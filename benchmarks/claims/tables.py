"""The comparison as Markdown: the paper's Table 1 with our columns, the ratios, and the parts below a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.baselines.networks import NETWORKS
from benchmarks.claims.costs import Cost, Results, Row, by_case, gpu_batches, on_gpu, row, view
from benchmarks.claims.jobs import PROVIDERS
from benchmarks.claims.models import EQUAL_STEPS, MODELS, Model
from benchmarks.claims.parts import SOLVERS
from benchmarks.provenance import summary


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and the others numbers."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)])


def _seconds(cost: Cost | None, extra: float = 0.0) -> str:
    if cost is None:
        return "not measured"
    value = cost.seconds + extra
    text = f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return text + ("†" if cost.doubled else "") + ("‡" if cost.by_flops else "")


def _gigabytes(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e9:.2f}"


def rows(results: Results) -> list[Row]:
    """Every model, once for each provider that measured all of its networks that were run."""
    found = []
    for model in MODELS.values():
        measured = [results[name].get("providers", {}) for name in model.networks() if name in results]
        providers = [p for p in PROVIDERS if measured and all(p in entry for entry in measured)] or ["eager"]
        found += [row(results, model, provider) for provider in providers]
    return found


def _label(entry: Row) -> str:
    return f"{entry.model.label}, {entry.provider}"


def main_table(results: Results) -> str:
    head = [
        "model", "params M", "GFLOP a step", "paper: s/step", "here: s/forward", "s/step, guided", "paper: s/image",
        f"s/image, {EQUAL_STEPS} steps", "s/image, its sampler", "paper: GB", "peak GB",
    ]  # fmt: skip
    lines = []
    for entry in (entry for entry in rows(results) if entry.step):
        paper, image = entry.model.paper, _seconds(entry.image)
        if entry.noise_s and entry.image:
            image += f" ({_seconds(entry.image, entry.noise_s)} with its noise loop)"
        lines.append(
            [
                _label(entry),
                f"{entry.parameters / 1e6:.1f}" if entry.parameters else "-",
                f"{entry.step_gflop:.0f}",
                f"{paper.step_s}" if paper else "-",
                _seconds(entry.forward),
                _seconds(entry.step),
                f"{paper.image_s}" if paper else "-",
                _seconds(entry.equal),
                image,
                f"{paper.inference_gb}" if paper else "-",
                _gigabytes(entry.peak),
            ]
        )
    return table(head, lines)


def ratios(results: Results, pixnerds: Sequence[str] = ()) -> str:
    """PixNerd against each other model: how many times as long the other takes; all PixNerds, or those labelled."""
    head = [
        "PixNerd against", "paper: step", "paper: image", "here: FLOPs of a step", "step, guided",
        f"image, {EQUAL_STEPS} steps", "image, each one's sampler",
    ]  # fmt: skip
    measured = [entry for entry in rows(results) if entry.step]
    lines = []
    own = [entry for entry in measured if entry.model.label.startswith("PixNerd")]
    for pixnerd in (entry for entry in own if not pixnerds or _label(entry) in pixnerds):
        for other in (entry for entry in measured if not entry.model.label.startswith("PixNerd")):
            step, image = paper_ratios(other.model, pixnerd.model)
            lines.append(
                [
                    f"{_label(pixnerd)}: {_label(other)}", step, image,
                    f"{other.step_gflop / pixnerd.step_gflop:.1f}x",
                    _ratio(other.step, pixnerd.step),
                    _ratio(other.equal, pixnerd.equal),
                    _ratio(other.image, pixnerd.image),
                ]
            )  # fmt: skip
    return table(head, lines)


def paper_ratios(other: Model, pixnerd: Model) -> tuple[str, str]:
    """Of a step and of an image, in the paper's Table 1; the one that the claim is about is marked."""
    theirs, own = other.paper, pixnerd.paper
    if not theirs or not own:
        return "-", "-"
    step, image = f"{theirs.step_s / own.step_s:.1f}x", f"{theirs.image_s / own.image_s:.1f}x"
    if (pixnerd.label, other.label) == ("PixNerd-L/16", "ADM-G 256"):
        return f"**{step}**", f"**{image} (the paper's 8x)**"
    return step, image


def _ratio(other: Cost | None, own: Cost | None) -> str:
    if other is None or own is None:
        return "-"
    marks = ("†" if other.doubled or own.doubled else "") + ("‡" if other.by_flops or own.by_flops else "")
    return f"{other.seconds / own.seconds:.2g}x{marks}"


def networks(results: Results) -> str:
    """What was run, as it was run."""
    lines = []
    gpu = on_gpu(results)
    for name, result in results.items():
        for provider, entry in result.get("providers", {}).items():
            status = entry.get("status", result["status"])
            if status != "ok":
                lines.append([f"{name}, {provider}", *[""] * (8 if gpu else 7), status])
            for batch, measured in entry.get("batches", {}).items():
                memory = measured.get("memory", {})
                rate = (
                    result.get("gflop", 0) * int(batch) / measured["median_s"]
                    if "median_s" in measured
                    else 0
                )
                lines.append(
                    [
                        f"{name}, {provider}",
                        batch,
                        f"{measured['median_s']:.3g}" if "median_s" in measured else measured["status"],
                        *([f"{measured['device_s']:.3g}" if "device_s" in measured else "-"] if gpu else []),
                        f"{measured.get('runs', '-')}{' (traced)' if measured.get('traced') else ''}",
                        f"{result.get('gflop', 0) * int(batch):.1f}",
                        f"{rate:.0f}",
                        f"{rate / min(speeds):.0%}" if (speeds := result.get("matmul_gflops")) else "-",
                        f"{_gigabytes(memory.get('peak'))} / {_gigabytes(memory.get('resident'))}",
                        NETWORKS[name].note if name in NETWORKS else "",
                    ]
                )  # fmt: skip
    head = [
        "network",
        "images",
        "s",
        *(["device s"] if gpu else []),
        "runs",
        "GFLOP",
        "GFLOP/s",
        "of a matmul's",
        "activations GB, traced / resident",
        "note",
    ]
    return table(head, lines)


def halves(results: Results) -> str:
    """Head against transformer at every size."""
    lines = []
    for name, result in results.items():
        for size, entries in result.get("halves", {}).items():
            for provider in ("eager", "ours"):
                parts = [entries.get(f"{part}, {provider}") for part in ("transformer", "head")]
                if "all" in entries or None in parts:
                    if "all" in entries:
                        lines.append([f"{name.removeprefix('halves-')}, {size} px", entries["all"]["status"]])
                        break
                    continue
                whole = sum(part["median_s"] for part in parts)
                cells = [f"{name.removeprefix('halves-')}, {size} px, {provider}"]
                cells += [f"{part['median_s']:.3g}" for part in parts]
                cells.append(f"{100 * parts[1]['median_s'] / whole:.0f}%")
                cells.append(f"{100 * parts[1]['gflop'] / sum(part['gflop'] for part in parts):.0f}%")
                cells += [_gigabytes(part["memory"]["peak"]) for part in parts]
                lines.append(cells)
    head = [
        "model", "transformer s", "head s", "head's share", "its share of FLOPs", "transformer peak GB", "head peak GB",
    ]  # fmt: skip
    return table(head, lines)


def ablations(results: Results) -> str:
    """The head's settings, and solvers by their evaluations on L/16."""
    result = results.get("ablations", {})
    lines = [
        [f"{group}: {setting}", f"{entry['median_s'] * 1e3:.3g}", f"{entry['memory']['peak'] / 1e6:.1f}"]
        for group, settings in result.get("ablations", {}).items()
        for setting, entry in settings.items()
        if "median_s" in entry
    ]
    return table(["head of L/16 (ours), one image of 256 x 256", "ms", "peak MB"], lines)


def solvers(results: Results) -> str:
    from benchmarks.claims.costs import network_cost

    lines = []
    for name in SOLVERS:
        counts = results.get("ablations", {}).get("solvers", {}).get(name)
        if counts is None:
            continue
        costs = [network_cost(results, "PixNerd-L/16", images, "ours") for images in (2, 1)]
        total = None
        if costs[0] and costs[1]:
            total = costs[0].times(counts["guided"]) + costs[1].times(counts["single"])
        lines.append([name, str(counts["guided"]), str(counts["single"]), _seconds(total)])
    return table(["solver, PixNerd-L/16 (ours)", "guided", "unguided", "s/image, extrapolated"], lines)


def failures(document: dict[str, Any]) -> list[str]:
    """Cases that have no result, with the reason, and the models that lack one."""
    lines = []
    for result in document["results"]:
        reasons = {result.get("reason", "")} | {
            e.get("reason", "") for e in result.get("providers", {}).values()
        }
        if result["status"] != "ok":
            lines.append(f"- {result['case']} is {result['status']}: {'; '.join(filter(None, reasons))}")
    measured = rows(by_case(document))
    if missing := [f"{entry.model.label}, {entry.provider}" for entry in measured if not entry.step]:
        lines.append(f"- not every network of these has a time: {'; '.join(missing)}")
    return lines


NOTES = f"""\
Seconds per forward and step are measured medians; seconds per image are **extrapolated**: evaluations times the
measured forward, nothing else of the sampler. A step is one evaluation with its guidance: two images for
classifier-free guidance, the UNet and the classifier's gradient for ADM-G. Where a model has several stages, its
forward is the last stage's, its step the mean over all, and {EQUAL_STEPS} steps are shared evenly among them. PixNerd's
own sampler leaves the second half of guidance away outside its interval. † two forwards of one image stand for
one of two. ‡ not run: the next smaller stage's time by the ratio of FLOPs. The models run one after the other, each
in a process of its own that also times a large matmul before and after: the share of its speed (of the slower one)
tells the model from what else the machine was doing.
Peak memory is the weights of all the model's networks and the largest peak of torch's allocations in one call; on
a CPU from the profiler's events, and checked against the growth of the process's peak resident set in the same
call (in the table of networks). The paper states neither GPU nor batch for its figures, and they are of
torch.compile on a GPU. All weights are random; the other models run eager unless they say compile."""


GPU_NOTES = """\
On a GPU seconds are those of calls one after the other with one synchronisation at the end, as a sampler makes them: at
one or two images Python's launches decide them, unless a CUDA graph replays them ("-graph"). The device's time alone is
between two events, the device waiting until the host has enqueued the call. Compiled networks ran at the batch sizes
of a step."""


def markdown(document: dict[str, Any]) -> str:
    """All tables with their conditions."""
    results = by_case(document)
    gpu = on_gpu(results)
    where = document["provenance"]
    sections = [
        "## The paper's Table 1, measured here",
        main_table(results),
        NOTES,
        *([GPU_NOTES] if gpu else []),
        "## PixNerd against the others: their time over PixNerd's",
        ratios(results),
    ]
    if gpu:
        sections += ["## The same of the device's time alone", ratios(view(results, "device_s"))]
    for images in gpu_batches(results):
        sections += [
            f"## The same of an image's share of {images} at a time",
            ratios(view(results, images=images)),
        ]
    sections += ["## The networks", networks(results)]
    noise = results.get("block-noise", {})
    if "drawn" in noise:
        seconds = noise["providers"]["eager"]["median_s"]
        sections.append(
            f"PixelFlow's block noise: {seconds:.3g} s an image for {noise['blocks']} draws in a Python loop, "
            f"extrapolated from {noise['drawn']}."
        )
    if any("halves" in result for result in results.values()):
        sections += ["## Head against transformer, one image", halves(results)]
    if "ablations" in results:
        sections += ["## What settings cost (quality needs training and is not measured)", ablations(results)]
        sections.append(solvers(results))
    if lines := failures(document):
        sections += ["## Not measured", "\n".join(lines)]
    devices = {f"{r['device']}, {r['dtype']}" for r in document["results"] if "device" in r}
    dates = {(r["provenance"]["commit"] or "")[:10] for r in document["results"] if "provenance" in r}
    commits = f"; commits {', '.join(sorted(dates))}" if len(dates) > 1 else ""
    sections.append(f"`{where['command']}` on {summary(where)}; {'; '.join(sorted(devices))}{commits}.")
    return "\n\n".join(sections) + "\n"


def readme(document: dict[str, Any]) -> str:
    """The first table, the ratios of L/16, and the conditions: what a README shows."""
    results = by_case(document)
    where = document["provenance"]
    shown = ratios(results, ("PixNerd-L/16, eager", "PixNerd-L/16, ours"))
    return "\n\n".join([main_table(results), shown, NOTES, f"`{where['command']}` on {summary(where)}.", ""])
