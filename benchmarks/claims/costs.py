"""From measured networks to what a step and an image cost, and how far that is extrapolated."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from benchmarks.baselines.networks import NETWORKS, count
from benchmarks.claims.models import EQUAL_STEPS, Model, Stage

Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Cost:
    """Seconds; `doubled` where two forwards stand for one of two images, `by_flops` where a network was not run
    and its time is another resolution's by the ratio of FLOPs."""

    seconds: float
    doubled: bool = False
    by_flops: bool = False

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.seconds + other.seconds, self.doubled | other.doubled, self.by_flops | other.by_flops
        )

    def times(self, factor: float) -> Cost:
        return Cost(self.seconds * factor, self.doubled, self.by_flops)


@dataclass(frozen=True)
class Row:
    """A model under one provider: None where a network it needs has no time."""

    model: Model
    provider: str
    forward: Cost | None
    step: Cost | None
    image: Cost | None
    equal: Cost | None
    noise_s: float
    peak: int | None
    resident: int | None
    parameters: int | None
    step_gflop: float


def by_case(document: dict[str, Any]) -> Results:
    """The last result of each case that has times."""
    return {r["case"]: r for r in document["results"] if r["status"] in ("ok", "wrong") or r.get("providers")}


def view(results: Results, clock: str = "median_s", images: int | None = None) -> Results:
    """The results with another clock's seconds in `median_s`'s place; with `images`, each image's share of a batch of
    so many stands for the one or two images of a step."""
    seen = copy.deepcopy(results)
    for result in seen.values():
        for entry in result.get("providers", {}).values():
            batches = entry.get("batches", {})
            if images is not None:
                seconds = batches.get(str(images), {}).get(clock)
                numbers = (1, 2) if seconds is not None else ()
                entry["batches"] = {str(n): {"median_s": n * seconds / images} for n in numbers}
                continue
            for measured in batches.values():
                seconds = measured.pop(clock, None)
                measured.pop("median_s", None)
                if seconds is not None:
                    measured["median_s"] = seconds
    return seen


def gpu_batches(results: Results) -> list[int]:
    """The batch sizes above a step's that were timed on a GPU."""
    found = {
        int(batch)
        for result in results.values()
        for entry in result.get("providers", {}).values()
        for batch, measured in entry.get("batches", {}).items()
        if "device_s" in measured
    }
    return sorted(batch for batch in found if batch > 2)


def on_gpu(results: Results) -> bool:
    """Whether there are times of a device."""
    return any(
        "device_s" in measured
        for result in results.values()
        for entry in result.get("providers", {}).values()
        for measured in entry.get("batches", {}).values()
    )


def _entry(results: Results, network: str, provider: str) -> dict[str, Any]:
    """What a provider measured."""
    found: dict[str, Any] = results.get(network, {}).get("providers", {}).get(provider, {})
    return found


def network_cost(results: Results, network: str, images: int, provider: str) -> Cost | None:
    """One call with so many images."""
    batches = _entry(results, network, provider).get("batches", {})
    measured = batches.get(str(images), {}).get("median_s")
    if measured is not None:
        return Cost(measured)
    one = batches.get("1", {}).get("median_s")
    if one is not None:
        return Cost(one * images, doubled=images > 1)
    if network == "PixelFlow-256" and network not in results:
        below = network_cost(results, "PixelFlow-128", images, provider)
        ratio = (NETWORKS[network].gflop or 0) / (NETWORKS["PixelFlow-128"].gflop or 1)
        return below and Cost(below.seconds * ratio, below.doubled, by_flops=True)
    return None


def _sum(costs: list[Cost | None]) -> Cost | None:
    total = Cost(0.0)
    for cost in costs:
        if cost is None:
            return None
        total = total + cost
    return total


def _stages(results: Results, stages: tuple[Stage, ...], provider: str, counts: list[float]) -> Cost | None:
    parts = []
    for stage, number in zip(stages, counts, strict=True):
        for name, images in stage.networks:
            cost = network_cost(results, name, images, provider)
            parts.append(cost and cost.times(number))
    return _sum(parts)


def row(results: Results, model: Model, provider: str) -> Row:
    """A model's costs; equal steps are shared evenly among its stages."""
    steps = model.step_stages()
    share = [stage.evaluations / sum(s.evaluations for s in steps) for stage in steps]
    once = _sum([network_cost(results, name, 1, provider) for name in model.once])
    image = _sum([_stages(results, model.stages, provider, [s.evaluations for s in model.stages]), once])
    equal = _sum([_stages(results, steps, provider, [EQUAL_STEPS / len(steps)] * len(steps)), once])
    first = [network_cost(results, name, 1, provider) for name, _ in model.stages[-1].networks]
    peak, resident, parameters = _memory(results, model, provider)
    flops = sum(
        part * images * _gflop(results, name)
        for stage, part in zip(steps, share, strict=True)
        for name, images in stage.networks
    )
    noise = _entry(results, "block-noise", "eager").get("median_s", 0.0) if model.noise_blocks else 0.0
    return Row(
        model, provider, _sum(first), _stages(results, steps, provider, share), image, equal, noise, peak,
        resident, parameters, flops,
    )  # fmt: skip


def _gflop(results: Results, name: str) -> float:
    """Counted; a network that was not run is counted here."""
    found: float | None = results.get(name, {}).get("gflop")
    return count(name).total if found is None else found


def _memory(results: Results, model: Model, provider: str) -> tuple[int | None, int | None, int | None]:
    """(weights of all its networks + the largest peak of one of their calls, the same by resident set, weights).

    The call has the most images that a step gives the network and that were measured.
    """
    weights, parameters, peaks, residents = 0, 0, [], []
    counted: set[str] = set()
    for name in model.networks():
        batches = _entry(results, name, provider).get("batches", {})
        largest = max((images for s in model.stages for n, images in s.networks if n == name), default=1)
        memory = batches.get(str(largest), batches.get("1", {})).get("memory")
        if memory is None:
            return None, None, None
        peaks.append(memory["peak"])
        residents.append(memory["resident"])
        # PixelFlow's stages are one network.
        if name.partition("-")[0] == "PixelFlow" and "PixelFlow" in counted:
            continue
        counted.add(name.partition("-")[0])
        weights += results[name].get("bytes", 0)
        parameters += results[name].get("parameters", 0)
    resident = None if None in residents else weights + max(residents)
    return weights + max(peaks), resident, parameters
