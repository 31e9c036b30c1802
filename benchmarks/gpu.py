"""Time, memory and share of the roofline on a GPU: eager PyTorch, torch.compile and ours, checked against float64.

The roofline of a case is the larger of two times: its bytes, every input read and every output written once in each
pass, over the memory's rate; and the FLOPs of its products, those that backward recomputes included, over the tensor
cores' rate. Written down before any tuning, for the rates in RATES: the forward of 16384 patches of 256 pixels, D1=64,
D2=128 in bfloat16 moves 1.61 GB and computes 137 GFLOP: 0.54 ms and 0.17 ms on an H100, bound by memory. With the
backward it moves 4.3 GB and computes 481 GFLOP: 1.43 ms and 0.60 ms.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import blocks, provenance
from benchmarks.check import Truth
from benchmarks.device_time import cycles_per_second, device_seconds, host_seconds, peak_memory
from benchmarks.heads import PixelDecoder
from benchmarks.providers import PROVIDERS, RIVALS, call, rivals
from benchmarks.registry import Case, NeuralFieldMLP, NormalizeWeights, Shape
from benchmarks.tangents import Tangent
from pixnerd_kernels import backends

#: Bytes and bfloat16 FLOPs per second that well-written kernels reach, by part of the GPU's name; other GPUs are held
#: against a copy and a matmul that are timed in the same run.
RATES = {"H100": (3.0e12, 800e12), "H200": (4.3e12, 800e12)}
_HEAD = {"N": 16384, "S": 256, "D1": 64, "D2": 128}
_GATED = {"N": 4096, "S": 256, "D1": 64, "D2": 256}
_ODD = {"N": 65536, "S": 20, "D1": 12, "D2": 24}
_XL = {"B": 64, "H": 256, "P": 16, "D": 1152, "D1": 64, "D2": 128, "K": 4}
_TOKENS = {"B": 64, "L": 256, "D": 1152}
_HEADS = {"B": 64, "H": 16, "W": 16, "heads": 16, "d": 72}


def _cases() -> list[Case]:
    """The smaller shape is the one that is checked against float64."""
    cases = []
    for training in (False, True):
        end = "training" if training else "forward"
        for name, op, shape, dtype in (
            ("plain-bf16", NeuralFieldMLP(), _HEAD, torch.bfloat16),
            ("packed-bf16", NeuralFieldMLP(packed=True), _HEAD, torch.bfloat16),
            ("gated-bf16", NeuralFieldMLP(gated=True), _GATED, torch.bfloat16),
            ("plain-fp16", NeuralFieldMLP(), _HEAD, torch.float16),
            ("plain-fp32", NeuralFieldMLP(), {**_HEAD, "N": 4096}, torch.float32),
            ("odd-bf16", NeuralFieldMLP(), _ODD, torch.bfloat16),
            ("few-bf16", NeuralFieldMLP(), {**_HEAD, "N": 64}, torch.bfloat16),
            ("tangent-bf16", Tangent(NeuralFieldMLP(), ("x", "w1", "w2")), _HEAD, torch.bfloat16),
            ("weights-bf16", NormalizeWeights(), {"N": 16384, "D1": 64, "D2": 128}, torch.bfloat16),
        ):
            cases.append(Case(f"{name}-{end}", op, training, shape, {**shape, "N": 16}, dtype))  # type: ignore[arg-type]
        for name, op, shape, small in (
            ("decoder-xl-bf16", PixelDecoder(), _XL, {"B": 2, "H": 64}),
            ("decoder-xl-saving-bf16", PixelDecoder(save_weights=True), _XL, {"B": 2, "H": 64}),
            # Fewer images: eager holds the weights and their tangents of all at once.
            (
                "decoder-xl-tangent-bf16",
                Tangent(PixelDecoder(), ("image", "hidden")),
                {**_XL, "B": 16},
                {"B": 2, "H": 64},
            ),
            ("norm-bf16", blocks.ModulatedRMSNorm(), _TOKENS, {"B": 2}),
            ("residual-bf16", blocks.GatedResidualNorm(), _TOKENS, {"B": 2}),
            ("rope-bf16", blocks.QkNormRope(), _HEADS, {"B": 2}),
            ("swiglu-bf16", blocks.Swiglu(), {**_TOKENS, "D": 3072}, {"B": 2}),
            (
                "residual-tangent-bf16",
                Tangent(blocks.GatedResidualNorm(), ("x", "y", "gate", "shift", "scale")),
                _TOKENS,
                {"B": 2},
            ),
            ("rope-tangent-bf16", Tangent(blocks.QkNormRope(), ("qkv",)), _HEADS, {"B": 2}),
        ):
            if training or "saving" not in name:
                cases.append(Case(f"{name}-{end}", op, training, shape, {**shape, **small}, torch.bfloat16))  # type: ignore[arg-type]
    return cases


CASES = {case.name: case for case in _cases()}


@dataclass(frozen=True)
class Rates:
    """Bytes and bfloat16 FLOPs per second, and where they come from."""

    memory: float
    products: float
    source: str

    def roofline(self, case: Case, shape: Shape, recompute: bool) -> float:
        """The least seconds that one call can take."""
        products = 0.0
        if case.op.bound == "matmul":
            slower = 1 if case.dtype.itemsize == 2 else 16  # float32 without tensor cores
            products = case.flops(shape, recompute) * slower / self.products
        return max(case.bytes(shape) / self.memory, products)


def made(case: Case, shape: Shape, device: torch.device) -> dict[str, Tensor]:
    """`Case.make` on the device itself."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = case.sizes(shape)
    return {
        name: torch.randn(size, generator=generator, device=device, dtype=case.dtype)
        for name, size in sizes.items()
    }


#: Whoever can be asked to compute a case.
_EVERY = {**PROVIDERS, **RIVALS}


def _runs(case: Case, names: list[str]) -> list[str]:
    """Those of the named providers that can compute a case."""
    return [name for name in names if name in PROVIDERS or name in rivals(case)]


def wrong(case: Case, provider: str, device: torch.device) -> str:
    """What is wrong with a provider's results on a few patches of the case's shape, or an empty string."""
    tensors = made(case, case.smoke, device)
    function = call(case, _EVERY[provider].prepare(case, case.smoke), tensors)
    errors = Truth(case, case.smoke, tensors).errors(function())
    return "; ".join(str(error) for error in errors if not error.ok)


def milliseconds(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Device time of each function in each round, with the cache overwritten before every call.

    The GPU is kept waiting until the CPU has enqueued the call, so that none of the CPU's time is in it.
    """
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in functions}
    hosts = {}
    for name, function in functions.items():
        for _ in range(3):
            function()
        hosts[name] = host_seconds(function, 3)
    rate = cycles_per_second()
    for _ in range(rounds):
        for name, function in functions.items():
            seconds, ahead = device_seconds(function, hosts[name], rate, flush.zero_)
            if not ahead:
                print(f"{name}: the CPU's time shows in the device's", file=sys.stderr)
            times[name].append(1e3 * seconds)
    return times


def measured_rates(device: torch.device) -> Rates:
    """The GPU's own rates: a copy of 1 GiB and an 8192^3 bfloat16 matmul."""
    source = torch.ones(1 << 29, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    times = milliseconds({"copy": lambda: target.copy_(source), "matmul": lambda: a @ a}, 15)
    seconds = {name: float(np.median(values)) / 1e3 for name, values in times.items()}
    return Rates(
        2 * source.nbytes / seconds["copy"], 2 * 8192**3 / seconds["matmul"], "copy and matmul of this run"
    )


def rates_of(name: str, measured: Rates) -> Rates:
    """The written-down rates of this GPU, or the measured ones."""
    for part, (memory, products) in RATES.items():
        if part in name:
            return Rates(memory, products, f"written down for {part}")
    return measured


def gpu() -> dict[str, Any]:
    """The GPU, its driver and clocks."""
    fields = (
        "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    )
    told = {}
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"],
            capture_output=True, text=True, check=True, timeout=30,
        )  # fmt: skip
        told = dict(zip(fields.split(","), done.stdout.strip().split(", "), strict=False))
    except (OSError, subprocess.SubprocessError):
        pass
    properties = torch.cuda.get_device_properties(0)
    return {
        **told,
        "name": properties.name,
        "memory": properties.total_memory,
        "processors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def prepared(job: tuple[str, str]) -> str:
    """`wrong` of a case and provider, in a process of its own, which leaves what it compiled in the caches on disk."""
    name, provider = job
    case, device = CASES[name], torch.device("cuda", torch.cuda.current_device())
    problem = wrong(case, provider, device)
    if provider == "compile":
        call(case, _EVERY[provider].prepare(case, case.shape), made(case, case.shape, device))()
    torch.cuda.empty_cache()
    return problem


def prepare(jobs: list[tuple[str, str]], processes: int) -> dict[tuple[str, str], str]:
    """What `prepared` says of each job, several at a time, without the jobs that fail there, for want of memory say."""
    found = {}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for job, future in [(job, pool.submit(prepared, job)) for job in jobs]:
            try:
                found[job] = future.result()
            except Exception as error:
                print(f"{job}: {type(error).__name__}, prepared again when it is measured", file=sys.stderr)
    return found


def measure(
    case: Case,
    providers: list[str],
    rounds: int,
    rates: Rates,
    device: torch.device,
    known: dict[tuple[str, str], str] | None = None,
) -> dict[str, Any]:
    """One case: each right provider's time, memory, rates and share of the roofline. `known`: what `prepare` found."""
    result: dict[str, Any] = {
        "case": case.name,
        "shape": dict(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "pass": "forward+backward" if case.training else "forward",
        "backend": backends.select(case.op.name, device, case.dtype, backends.forced_backend()),
        "bytes": case.bytes(case.shape),
        "providers": {},
    }
    tensors = made(case, case.shape, device)
    functions: dict[str, Callable[[], object]] = {}
    for name in providers:
        entry = result["providers"][name] = {"status": "ok"}
        try:
            problem = (known or {}).get((case.name, name))
            if problem := wrong(case, name, device) if problem is None else problem:
                # torch.compile may miss the rule by a little; it is timed and marked. Ours may not.
                entry.update(status="inexact" if name != "ours" else "wrong", reason=problem)
                if name == "ours":
                    continue
            functions[name] = call(case, _EVERY[name].prepare(case, case.shape), tensors)
            entry["peak_memory"] = peak_memory(functions[name])
            entry["peak_memory"] = peak_memory(functions[name])  # the first call may compile
        except Exception as error:
            functions.pop(name, None)
            entry.update(status="error", reason=f"{type(error).__name__}: {error}"[:2000])
    hosts = {name: host_seconds(function) for name, function in functions.items()}
    for name, times in milliseconds(functions, rounds).items():
        seconds = float(np.median(times)) / 1e3
        recompute = _EVERY[name].recompute
        flops, ours = case.flops(case.shape, recompute), rates.roofline(case, case.shape, recompute=True)
        result["providers"][name].update(
            median_s=seconds,
            host_s=hosts[name],
            p20_s=float(np.quantile(times, 0.2)) / 1e3,
            p80_s=float(np.quantile(times, 0.8)) / 1e3,
            bytes_per_s=result["bytes"] / seconds,
            flops_per_s=flops / seconds,
            roofline_s=ours,
            share_of_roofline=ours / seconds,
        )
    del tensors, functions
    torch.cuda.empty_cache()
    return result


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| case | provider | ms (p20-p80) | over ours | GB/s | TFLOP/s | of roofline | peak MB | CPU ms | |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for result in results:
        ours = result["providers"].get("ours", {}).get("median_s")
        for name, entry in result["providers"].items():
            if "median_s" not in entry:
                lines.append(
                    f"| {result['case']} | {name} ||||||||{entry['status']}: {entry.get('reason', '')[:200]} |"
                )
                continue
            ratio = f"{entry['median_s'] / ours:.2f}x" if ours else ""
            lines.append(
                f"| {result['case']} | {name} "
                f"| {entry['median_s'] * 1e3:.3f} ({entry['p20_s'] * 1e3:.3f}-{entry['p80_s'] * 1e3:.3f}) "
                f"| {ratio} | {entry['bytes_per_s'] / 1e9:.0f} | {entry['flops_per_s'] / 1e12:.1f} "
                f"| {100 * entry['share_of_roofline']:.0f}% | {entry['peak_memory'] / 1e6:.0f} "
                f"| {entry['host_s'] * 1e3:.3f} | {entry['status']} |"
            )
    return "\n".join(lines) + "\n"


def markdown(document: dict[str, Any]) -> str:
    """The table, the rates that its shares refer to, and where it was measured."""
    where, rates = document["provenance"], document["rates"]
    card = where["gpu"]
    used, measured = (
        f"{rates[name]['memory'] / 1e12:.2f} TB/s and {rates[name]['products'] / 1e12:.0f} TFLOP/s"
        for name in ("used", "measured")
    )
    return (
        f"{table(document['results'])}\n"
        "Device time by events, the cache overwritten before every call and the CPU's time hidden; CPU ms is the time "
        "to enqueue one call. Peak memory is what one call allocates, results included. The roofline takes "
        f"{used} ({rates['used']['source']}); a copy and a matmul in this run reached {measured}.\n\n"
        f"`{where['command']}` on {provenance.summary(where)}; driver {card.get('driver_version')}, "
        f"CUDA {card['cuda']}, Python {where['python']}.\n"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--case", nargs="+", default=[], metavar="NAME", help="cases; default: all")
    add(
        "--provider", nargs="+", default=list(_EVERY), choices=list(_EVERY),
        help="default: all; liger (liger-kernel, where installed) has some of the cases",
    )  # fmt: skip
    add("--rounds", type=int, default=21)
    add("--jobs", type=int, default=1, help="processes that compile and check everything first")
    add("--out", type=Path, metavar="DIR", help="write gpu.json and gpu.md into DIR")
    add("--list", action="store_true", help="list the cases and stop")


def run(arguments: argparse.Namespace) -> int:
    """Measure; 2 without a GPU, 1 where ours is wrong or fails."""
    if arguments.list:
        print("\n".join(CASES))
        return 0
    if unknown := set(arguments.case) - set(CASES):
        print(f"error: unknown case {', '.join(sorted(unknown))}; known: {', '.join(CASES)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("error: no CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    measured = measured_rates(device)
    rates = rates_of(torch.cuda.get_device_properties(0).name, measured)
    document: dict[str, Any] = {
        "schema": 1,
        "kind": "gpu",
        "provenance": {**provenance.collect(sys.argv[1:]), "triton": _triton(), "gpu": gpu()},
        "rates": {"used": vars(rates), "measured": vars(measured)},
        "results": [],
    }
    names = arguments.case or list(CASES)
    known = {}
    if arguments.jobs > 1:
        known = prepare(
            [(name, provider) for name in names for provider in _runs(CASES[name], arguments.provider)],
            arguments.jobs,
        )
    for name in names:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        document["results"].append(
            measure(
                CASES[name], _runs(CASES[name], arguments.provider), arguments.rounds, rates, device, known
            )
        )
        if arguments.out:  # after every case: an interruption keeps what was measured
            arguments.out.mkdir(parents=True, exist_ok=True)
            (arguments.out / "gpu.json").write_text(json.dumps(document, indent=1) + "\n")
            (arguments.out / "gpu.md").write_text(markdown(document))
    print(table(document["results"]))
    entries = [r["providers"]["ours"] for r in document["results"] if "ours" in r["providers"]]
    return int(any(entry["status"] != "ok" for entry in entries))


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)
