"""The model on a GPU: time on the device and by the clock, memory, kernels and profile of every way to run it."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import device_time, provenance
from benchmarks.baselines.pixnerd import PlainPixNerd
from benchmarks.files import save
from benchmarks.gpu import gpu
from benchmarks.halves import halves
from benchmarks.model_gpu_tables import table
from benchmarks.model_profile import kernel_table, kernels
from benchmarks.model_truth import Forward, Truth, clean
from benchmarks.worker import failure
from pixnerd_kernels.diffusion.graphs import CompiledVelocity, GraphedVelocity
from pixnerd_kernels.models import PixNerdConfig

#: Those that need least come first: an end before the last keeps the most. "compile-graph" is the compiled plain model
#: captured as a CUDA graph, which spares it the second compilation of "reduce-overhead", torch's mode for the same.
FORWARDS = ("eager", "ours", "ours-graph", "compile", "compile-graph", "ours-compile", "reduce-overhead")
TRAINING = ("eager", "ours", "compile", "ours-compile")
#: A provider that runs what another prepared, and is left out where that failed.
_ON_TOP = {"ours-graph": "ours", "compile-graph": "compile"}


def hand_over(parameters: Iterable[Tensor], gradients: Iterable[Tensor]) -> None:
    """Give the parameters their gradients as `backward` would: in the parameter's layout, which the fused AdamW wants.

    torch.compile leaves some of them transposed.
    """
    for parameter, gradient in zip(parameters, gradients, strict=True):
        alike = gradient.stride() == parameter.stride()
        parameter.grad = gradient if alike else torch.empty_like(parameter).copy_(gradient)


def default_providers(training: bool) -> list[str]:
    """All that run by themselves: "reduce-overhead" compiles for as long again, and has to be asked for."""
    return list(TRAINING) if training else [name for name in FORWARDS if name != "reduce-overhead"]


class Bench:
    """A setting and the ways to run it, each made when it is asked for.

    Args:
        setting: of `benchmarks.model`. training: calls are steps of AdamW, not forwards.
    """

    def __init__(self, setting: Any, training: bool) -> None:
        self.setting = setting
        self.training = training

    @cached_property
    def compiled(self) -> Forward:
        compiled: Forward = torch.compile(self.setting.plain, fullgraph=True, dynamic=False)
        return compiled

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        # A learning rate of zero keeps the weights the same for every provider; the arithmetic is the same.
        parameters = list(self.setting.parameters.values())
        return torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)

    def forward(self, name: str) -> Forward:
        """The model as a function, warm: compiled and run once, but not captured yet."""
        plain, ours = self.setting.plain, self.setting.model
        warm: Forward = {
            "eager": lambda: plain,
            "ours": lambda: ours,
            "ours-graph": lambda: ours,
            "compile": lambda: self.compiled,
            "compile-graph": lambda: self.compiled,
            "ours-compile": lambda: torch.compile(ours, fullgraph=True, dynamic=False),
            "reduce-overhead": lambda: CompiledVelocity(plain, "reduce-overhead"),
        }[name]()
        self._run(warm)
        return GraphedVelocity(warm) if name in _ON_TOP else warm

    def _run(self, forward: Forward) -> object:
        if self.training:
            return self.gradients(forward)
        return forward(self.setting.x, self.setting.t, self.setting.y)

    def gradients(self, forward: Forward) -> tuple[Tensor, ...]:
        setting = self.setting
        loss = F.mse_loss(forward(setting.x, setting.t, setting.y), setting.target)
        return torch.autograd.grad(loss, list(setting.parameters.values()))

    def call(self, forward: Forward) -> Callable[[], object]:
        """What is timed."""
        if not self.training:
            return lambda: self._run(forward)

        def step() -> None:
            hand_over(self.setting.parameters.values(), self.gradients(forward))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        return step


def model_flops(config: PixNerdConfig, size: int, training: bool) -> int:
    """FLOPs of the plain model's matrix products for one image, counted without computing them."""
    with torch.device("meta"):
        plain = PlainPixNerd(config)
        x, t = torch.empty(1, config.in_channels, size, size), torch.empty(1)
        y = torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        out = plain(x, t, y)
        if training:
            torch.autograd.grad(out.square().mean(), list(plain.parameters()))
    return int(counter.get_total_flops())


def run(arguments: argparse.Namespace, setting: Any, config: PixNerdConfig) -> int:
    """Measure; 1 where ours is wrong or failed."""
    with torch.set_grad_enabled(arguments.training):
        return _run(arguments, setting, config)


def _run(arguments: argparse.Namespace, setting: Any, config: PixNerdConfig) -> int:
    begin = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - begin:5.1f} s] {text}", flush=True)

    device, dtype = setting.x.device, setting.x.dtype
    result: dict[str, Any] = {
        "config": arguments.config,
        "blocks": config.num_blocks,
        "size": arguments.size,
        "batch": arguments.batch,
        "dtype": str(dtype).removeprefix("torch."),
        "pass": "training step" if arguments.training else "forward",
        "flops": arguments.batch * model_flops(config, arguments.size, arguments.training),
        "parameter_bytes": sum(p.nbytes for p in setting.parameters.values()),
        "providers": {},
    }
    document = {"schema": 1, "kind": "model", "provenance": _origin(), "results": [result]}

    def keep() -> None:
        if arguments.json:
            save(arguments.json, document)

    say("checking against float64")
    bench = Bench(setting, arguments.training)
    truth = Truth(bench)
    result["allowed"] = truth.allowed
    matmul = device_time.Matmul(device, dtype)
    matmul()
    result["matmul"] = {"label": matmul.label}
    calls: dict[str, Callable[[], object]] = {}
    for name in arguments.provider:
        say(name)
        entry = result["providers"][name] = {"status": "ok"}
        below = result["providers"].get(_ON_TOP.get(name, ""), entry)
        try:
            if below["status"] in ("error", "out of memory"):
                raise RuntimeError(f"{_ON_TOP[name]} failed")
            calls[name] = _prepare(name, bench, truth, entry)
            times = device_time.measure({name: calls[name]}, 3)
            entry.update(times[name].summary(), interleaved=False)
        except Exception as error:
            calls.pop(name, None)
            entry.update(failure(error))
            say(f"  {entry['status']}: {entry['reason'][:600]}")
        else:
            say(
                f"  {entry['status']}, error {entry['error']:.1e} (allowed {truth.allowed:.1e}), first call "
                f"{entry['first_call_s']:.1f} s, device {entry['device_s'] * 1e3:.3f} ms, latency "
                f"{entry['latency_s'] * 1e3:.3f} ms"
            )
        keep()
        clean()
    say(f"timing {', '.join(calls)} in {arguments.rounds} rounds")
    try:
        samples = device_time.measure({**calls, "matmul": matmul}, arguments.rounds)
    except Exception as error:  # what each measured alone is kept
        result["reason"] = failure(error)["reason"]
        say(result["reason"])
    else:
        _summarise(result, samples, matmul)
    keep()
    print(table(result))
    for name in ("ours", "compile"):
        if profiled := result["providers"].get(name, {}).get("profile"):
            print(f"{name}, by kernel:\n{kernel_table(profiled)}")
    if arguments.profile and not arguments.training:
        say("the two halves")
        try:
            result["stacks"] = stacks(setting, arguments.rounds)
            print("\n".join(f"  {name}: {parts}" for name, parts in result["stacks"].items()))
        except Exception as error:
            result["stacks_reason"] = failure(error)["reason"]
            say(result["stacks_reason"])
    keep()
    say("done")
    if arguments.json:
        print(f"wrote {arguments.json}")
    own = [entry for name, entry in result["providers"].items() if name.startswith("ours")]
    return int(any(entry["status"] != "ok" for entry in own))


def _origin() -> dict[str, Any]:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {**provenance.collect(sys.argv[1:]), "triton": triton, "gpu": gpu()}


def _prepare(name: str, bench: Bench, truth: Truth, entry: dict[str, Any]) -> Callable[[], object]:
    """Compile, check, and find memory and kernels of one provider; what is timed."""
    start = time.perf_counter()
    forward = bench.forward(name)
    torch.cuda.synchronize()
    entry["first_call_s"] = time.perf_counter() - start
    call = bench.call(forward)
    if bench.training:
        call()  # makes the optimizer's state
    # Of the second and third call: a graph's memory is that of its recording, which the first of them does.
    entry["peak"] = device_time.peak_memory(call, times=2)
    entry["error"] = truth.error(forward)
    if not entry["error"] <= truth.allowed:
        # torch.compile may miss the rule by a little. All of them are timed, and marked.
        entry["status"] = "wrong" if name.startswith("ours") else "inexact"
        entry["reason"] = f"error {entry['error']:.2e}, allowed {truth.allowed:.2e}"
    try:
        entry["profile"] = kernels(call)
    except Exception as error:
        entry["profile_reason"] = failure(error)["reason"]
    return call


def _summarise(result: dict[str, Any], samples: dict[str, device_time.Times], matmul: Any) -> None:
    """Times, rates and ratios of interleaved rounds; `median_s` is the device's."""
    ceiling = matmul.work / samples["matmul"].summary()["device_s"]
    result["matmul"]["flops_per_s"] = ceiling
    for name, entry in result["providers"].items():
        if name not in samples:
            continue
        entry.update(samples[name].summary(), interleaved=True)
        entry["median_s"] = entry["device_s"]
        entry["flops_per_s"] = result["flops"] / entry["device_s"]
        entry["share_of_matmul"] = entry["flops_per_s"] / ceiling
        for other in samples:
            if other not in (name, "matmul"):
                entry.setdefault("time_of_others", {})[other] = {
                    clock: samples[other].ratio(samples[name], clock)
                    for clock in ("device", "latency", "repeated")
                }


def stacks(setting: Any, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of the head and of the transformer's parts, eager and ours: the halves are timed, the parts are shares of
    their kernels' time."""
    calls = halves(setting.model, setting.plain, setting.x, setting.t, setting.y)
    for call in calls.values():
        call()
    times = device_time.measure(calls, rounds)
    seconds = {name: entry.summary()["device_s"] for name, entry in times.items()}
    found = {}
    for name in ("eager", "ours"):
        shares = kernels(calls[f"transformer, {name}"])["shares"]
        body = seconds[f"transformer, {name}"]
        found[name] = {
            "matrix products": body * shares["product"],
            "attention": body * shares["attention"],
            "norms, gates, copies": body * (shares["other"] + shares["copy"]),
            "pixel head": seconds[f"head, {name}"],
        }
    return found
