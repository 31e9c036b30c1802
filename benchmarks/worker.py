"""Measures one case in one process; `ops` starts this module once per case and malloc setting."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import breakdown
from benchmarks.check import Error, Truth
from benchmarks.memory import allocation_peak, resident_growth
from benchmarks.model_profile import computing_ops
from benchmarks.providers import PROVIDERS, call
from benchmarks.registry import CASES, Case, Shape
from benchmarks.timing import Budget, Samples, interleave, yardsticks
from pixnerd_kernels import backends

Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Job:
    """What one process does. `malloc` only labels the result: the setting is in the process's environment."""

    case: str
    providers: tuple[str, ...]
    budget: Budget
    #: Baselines that are timed although they miss the accuracy rule, and marked inexact.
    accept: tuple[str, ...] = ()
    size: str = "full"
    malloc: str = "default"
    threads: int = 0
    resident: bool = False
    breakdown: bool = False
    #: Entries that replace those of the case's shape.
    shape: dict[str, int] = field(default_factory=dict, hash=False)

    @staticmethod
    def from_json(text: str) -> Job:
        fields = json.loads(text)
        budget = Budget(**fields.pop("budget"))
        fields.update(providers=tuple(fields["providers"]), accept=tuple(fields["accept"]))
        return Job(budget=budget, **fields)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python ran out of memory."""
    text = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)
    )


def run_job(job: Job) -> dict[str, Any]:
    """Measure a job's case: check every provider, then time the right ones together, then their memory."""
    if job.threads:
        torch.set_num_threads(job.threads)
    case = CASES[job.case]
    shape = {**case.size(job.size), **job.shape}
    result: dict[str, Any] = {
        "case": case.name,
        "op": case.op.name,
        "pass": "forward+backward" if case.training else "forward",
        "size": job.size,
        "shape": dict(shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "malloc": job.malloc,
        "threads": torch.get_num_threads(),
        "backend": backends.select(case.op.name, torch.device("cpu"), case.dtype, backends.forced_backend()),
        "bound": case.op.bound,
        "bytes": case.bytes(shape),
        "status": "ok",
        "providers": {name: {"status": "ok"} for name in job.providers},
    }
    try:
        _measure(job, case, shape, result)
    except Exception as error:
        result.update(failure(error))
    statuses = [provider["status"] for provider in result["providers"].values()]
    for status in ("wrong", "error", "out of memory", "inexact"):
        if result["status"] == "ok" and status in statuses:
            result["status"] = status
    return result


def failure(error: Exception) -> dict[str, str]:
    """How a result says that it failed."""
    status = "out of memory" if out_of_memory(error) else "error"
    return {"status": status, "reason": f"{type(error).__name__}: {error}".strip()[:2000]}


def _progress(text: str) -> None:
    print(f"    {text}", file=sys.stderr, flush=True)


def _measure(job: Job, case: Case, shape: Shape, result: dict[str, Any]) -> None:
    made = case.make(shape)
    _progress("checking against float64")
    calls = _checked_calls(job, case, shape, Truth(case, shape, made), made, result)
    references = yardsticks()
    tasks: dict[str, Callable[[], object]] = {**calls, **{y.name: y.run for y in references}}
    _progress(f"timing {', '.join(tasks)}")
    samples = interleave(tasks, job.budget)
    result["rounds"] = len(samples["matmul"].seconds)
    result["yardsticks"] = {
        y.name: {"label": y.label, "work": y.work, **_times(samples[y.name])} for y in references
    }
    for name in calls:
        entry = result["providers"][name]
        flops = case.flops(shape, PROVIDERS[name].recompute)
        entry.update(_times(samples[name]))
        entry["flops"] = flops
        entry["flops_per_s"] = flops / samples[name].median
        entry["bytes_per_s"] = result["bytes"] / samples[name].median
        for yardstick, work in (("matmul", flops), ("copy", result["bytes"])):
            total = next(y.work for y in references if y.name == yardstick)
            entry[f"share_of_{yardstick}"] = samples[yardstick].ratio(samples[name]) * work / total
        if "ours" in calls:
            entry["time_over_ours"] = samples[name].ratio(samples["ours"])
    _progress("measuring memory, counting ops")
    for name, function in calls.items():
        allocated = allocation_peak(function)
        entry = result["providers"][name]
        # Compiled code calls no ops.
        entry["ops"] = None if name == "compile" else computing_ops(function)
        entry["memory"] = {
            "peak": allocated.peak,
            "without_results": allocated.transient,
            "resident": resident_growth(case.name, job.size, name) if job.resident else None,
        }
    if job.breakdown:
        _progress("measuring the breakdown")
        result["breakdown"] = breakdown.measure(case, shape, made, job.budget)


def _times(samples: Samples) -> dict[str, float]:
    return {
        "median_s": samples.median,
        "p20_s": samples.quantile(0.2),
        "p80_s": samples.quantile(0.8),
        "page_faults": sorted(samples.faults)[len(samples.faults) // 2],
    }


def _checked_calls(
    job: Job, case: Case, shape: Shape, truth: Truth, made: dict[str, Tensor], result: dict[str, Any]
) -> dict[str, Call]:
    """The calls whose results are right; what is wrong with the others goes into the result."""
    calls: dict[str, Call] = {}
    for name in job.providers:
        entry = result["providers"][name]
        try:
            function = call(case, PROVIDERS[name].prepare(case, shape), made)
            errors = truth.errors(function())
        except Exception as error:
            entry.update(failure(error))
            continue
        entry["errors"] = [asdict(error) for error in errors]
        wrong: list[Error] = [error for error in errors if not error.ok]
        if wrong:
            entry.update(status="wrong", reason="; ".join(map(str, wrong)))
            if name in job.accept and all(math.isfinite(error.error) for error in wrong):
                entry["status"] = "inexact"
        if entry["status"] != "wrong":
            calls[name] = function
    return calls


def main() -> None:
    """argv: a job as JSON, and the file that its result is written to."""
    job = Job.from_json(sys.argv[1])
    result = run_job(job)
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
