"""Measures one job in one process; `claims` starts this module once per job, which also frees its memory."""

from __future__ import annotations

import copy
import dataclasses
import sys
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pixnerd_kernels
from benchmarks import worker as ops_worker
from benchmarks.baselines.networks import NETWORKS, FastRandom, count
from benchmarks.claims import parts
from benchmarks.claims.jobs import PIXNERDS, Job, compiled_batches
from benchmarks.claims.measure import Call, matmul_gflops, measure
from benchmarks.memory import allocation_peak
from pixnerd_kernels.diffusion.graphs import GraphedVelocity
from pixnerd_kernels.models import CONFIGS, PixNerd, PixNerdConfig, to_official

#: A PixNerd of a few milliseconds, to see that everything runs.
SMOKE = PixNerdConfig(64, 2, 2, 2, field_channels=16, num_classes=10)


def run_job(job: Job) -> dict[str, Any]:
    """The job's result; what fails is in it, not raised."""
    if job.threads:
        torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "case": job.name,
        "status": "ok",
        "device": _device_name(job),
        "dtype": job.dtype,
        "threads": torch.get_num_threads(),
        "providers": {},
    }
    try:
        if job.device == "cpu":
            allocation_peak(lambda: (torch.ones(1),))  # the profiler's own memory is not the first call's
        speed = partial(matmul_gflops, torch.device(job.device), getattr(torch, job.dtype))
        before = speed()
        for part in _results(job):
            _merge(result, part)
        result["matmul_gflops"] = [before, speed()]
    except Exception as error:
        result.update(ops_worker.failure(error))
    statuses = {entry.get("status", "ok") for entry in result["providers"].values()}
    for status in ("wrong", "error", "out of memory"):
        if result["status"] == "ok" and status in statuses:
            result["status"] = status
    return result


def _merge(result: dict[str, Any], part: dict[str, Any]) -> None:
    """Add a part as it comes, so that running out of memory in a larger one keeps the smaller ones."""
    for key, value in part.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            _merge(result[key], value)
        else:
            result[key] = value


def _device_name(job: Job) -> str:
    return torch.cuda.get_device_name() if job.device == "cuda" else job.device


def _results(job: Job) -> Iterator[dict[str, Any]]:
    if job.name in PIXNERDS:
        return _pixnerd(job)
    if job.name in NETWORKS:
        return _network(job)
    config = (
        CONFIGS[job.name.removeprefix("halves-").removeprefix("PixNerd-")] if "halves" in job.name else None
    )
    if config is not None:
        return parts.halves(job, SMOKE if job.smoke else config)
    if job.name == "ablations":
        return parts.ablations(job, SMOKE if job.smoke else CONFIGS["L/16"])
    return parts.block_noise(job)


def _say(text: str) -> None:
    print(f"    {text}", file=sys.stderr, flush=True)


def inputs(job: Job, name: str, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    network = NETWORKS[name]
    if job.smoke:
        network = dataclasses.replace(network, shape=(network.shape[0], network.smoke, network.smoke))
    with torch.device(job.device):
        return network.inputs(batch, getattr(torch, job.dtype))


def _baseline(job: Job) -> nn.Module:
    with torch.device(job.device), FastRandom():
        module = NETWORKS[job.name].build()
    # What was made of NumPy arrays is not on the default device.
    return module.eval().requires_grad_(False).to(torch.device(job.device), getattr(torch, job.dtype))


def _network(job: Job) -> Iterator[dict[str, Any]]:
    """A baseline: eager, and compiled where asked for."""
    _say("building")
    module = _baseline(job)
    yield _counts(job)
    compiled = torch.compile(module, dynamic=False)
    modules: dict[str, Callable[..., Tensor]] = {
        "eager": module, "compile": compiled, "compile-graph": compiled,
    }  # fmt: skip
    modules = {name: run for name, run in modules.items() if name in job.providers}
    if job.device == "cuda":
        yield from _batches(job, modules)
        return
    for name, run in modules.items():
        yield from _batches(job, {name: run})


def _counts(job: Job) -> dict[str, Any]:
    counted = count(job.name)
    return {
        "parameters": counted.parameters,
        "gflop": counted.total,
        "bytes": _bytes(job, counted.parameters),
    }


def _bytes(job: Job, parameters: int) -> int:
    return parameters * getattr(torch, job.dtype).itemsize


def _batches(
    job: Job, modules: dict[str, Callable[..., Tensor]], inexact: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    modules = dict(modules)
    compiled = compiled_batches(job)
    for batch in job.batches:
        x, t, y = inputs(job, job.name, batch)
        calls: dict[str, Call] = {
            name: partial(_without_gradients, _graphed(name, module), x, t, y)
            for name, module in modules.items()
            if "compile" not in name or batch in compiled
        }
        if not calls:
            continue
        _say(f"batch {batch}: {', '.join(calls)}")
        try:
            entries = measure(calls, torch.device(job.device), job.effort)
        except Exception as error:
            failed = ops_worker.failure(error)
            if failed["status"] != "out of memory" or batch == job.batches[0]:
                raise
            yield {"providers": {name: {"batches": {str(batch): failed}} for name in calls}}
            continue
        for name, entry in entries.items():
            found: dict[str, Any] = {"batches": {str(batch): entry}}
            if "median_s" not in entry:
                if entry["status"] != "out of memory" or batch == job.batches[0]:
                    found.update(entry)
                    del modules[name]
                yield {"providers": {name: found}}
                continue
            if batch == job.batches[0]:
                found.update(median_s=entry["median_s"], p20_s=entry["p20_s"], p80_s=entry["p80_s"])
                if "time_over_ours" in entry:
                    found["time_over_ours"] = entry["time_over_ours"]
            yield {"providers": {name: {"status": "inexact" if name in inexact else "ok", **found}}}


def _graphed(name: str, module: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A provider's callable; a CUDA graph is a new one, so that its memory is seen when it is recorded."""
    return GraphedVelocity(module) if name.endswith("-graph") else module


def _without_gradients(module: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    with torch.no_grad():
        return module(*arguments)


def _models(job: Job) -> tuple[nn.Module, PixNerd]:
    """The plain model and ours with the same weights."""
    from benchmarks.baselines.pixnerd import PlainPixNerd

    dtype, config = getattr(torch, job.dtype), CONFIGS[job.name.removeprefix("PixNerd-")]
    if job.smoke:
        config = SMOKE
    with torch.device(job.device), FastRandom():
        ours = PixNerd(config).eval().requires_grad_(False).to(dtype)
        # Fresh models return zeros, which would hide a wrong result.
        nn.init.normal_(ours.decoder.linear.weight, std=0.02)
    with torch.device("meta"):
        plain = PlainPixNerd(config).eval().requires_grad_(False)
    plain.load_state_dict(to_official(ours), assign=True)
    return plain, ours


def _pixnerd(job: Job) -> Iterator[dict[str, Any]]:
    """Plain, compiled and ours on the same weights, checked against float64 first."""
    _say("building")
    plain, ours = _models(job)
    yield _counts(job) if not job.smoke else {"parameters": sum(p.numel() for p in ours.parameters())}
    torch._dynamo.reset()
    compiled = torch.compile(plain, fullgraph=True, dynamic=False)
    every: dict[str, Callable[..., Tensor]] = {
        "eager": plain,
        "compile": compiled,
        "compile-graph": compiled,
        "ours": ours,
        "ours-compile": torch.compile(ours, fullgraph=True, dynamic=False),
        "ours-graph": ours,
    }
    modules = {name: module for name, module in every.items() if name in job.providers}
    x, t, y = inputs(job, job.name, job.batches[0])
    _say("checking against float64")
    truth, allowed = _truth(plain, x, t, y)
    right, inexact = {}, set()
    for name, module in modules.items():
        start = time.perf_counter()
        try:
            out = _without_gradients(_graphed(name, module), x, t, y)
        except Exception as error:
            yield {"providers": {name: ops_worker.failure(error)}}
            continue
        difference = ((out.double() - truth).norm() / truth.norm()).item()
        entry: dict[str, Any] = {
            "status": "ok" if difference <= allowed else "wrong",
            "error": difference,
            "allowed": allowed,
            "first_call_s": time.perf_counter() - start,
        }
        if difference <= allowed:
            right[name] = module
        else:
            entry["reason"] = f"output: error {difference:.2e}, allowed {allowed:.2e}"
            if job.device == "cuda" and not name.startswith("ours"):
                # torch.compile may miss the rule by a little; it is timed and marked.
                entry["status"], right[name] = "inexact", module
                inexact.add(name)
        yield {"providers": {name: entry}}
    del truth
    yield from _batches(job, right, inexact)


def _truth(plain: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """The float64 output, and the relative error that the house rule allows: twice plain's, plus 4 eps."""
    exact = copy.deepcopy(plain).double()
    truth = _without_gradients(exact, x.double(), t.double(), y)
    plain_error = (_without_gradients(plain, x, t, y).double() - truth).norm() / truth.norm()
    return truth, (2 * plain_error + 4 * torch.finfo(x.dtype).eps).item()


def prepare(job: Job) -> None:
    """Compile what a job compiles, which leaves the code in inductor's cache on disk."""
    if "compile" not in job.providers and "ours-compile" not in job.providers:
        return
    if job.name in PIXNERDS:
        plain, ours = _models(job)
        modules: dict[str, nn.Module] = {"compile": plain, "ours-compile": ours}
    else:
        modules = {"compile": _baseline(job)}
    for name in [name for name in modules if name in job.providers]:
        run = torch.compile(modules[name], fullgraph=job.name in PIXNERDS, dynamic=False)
        for batch in compiled_batches(job):
            start = time.perf_counter()
            _without_gradients(run, *inputs(job, job.name, batch))
            _say(f"{job.name}, {name}, batch {batch}: compiled in {time.perf_counter() - start:.0f} s")


def main() -> None:
    """argv: a job as JSON, and the file that its result is written to; without one, `prepare`."""
    import json

    if len(sys.argv) == 2:
        prepare(Job.from_json(sys.argv[1]))
        return
    result = run_job(Job.from_json(sys.argv[1]))
    result["package"] = pixnerd_kernels.__version__
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
