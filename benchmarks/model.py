"""Time of the whole class-to-image model: the official formulas eager and compiled, and ours, with the same weights.

On a GPU `benchmarks.model_gpu` measures; what is here is for a CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import model_gpu, model_gpu_tables, provenance
from benchmarks.baselines.networks import FastRandom
from benchmarks.baselines.pixnerd import PlainPixNerd
from benchmarks.files import save
from benchmarks.halves import halves
from benchmarks.memory import allocation_peak
from benchmarks.model_profile import launches, profile, profile_table
from benchmarks.timing import Budget, interleave, yardsticks
from pixnerd_kernels.models import CONFIGS, PixNerd, PixNerdConfig
from pixnerd_kernels.models.official import official_name

PROVIDERS = ("eager", "compile", "ours")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", choices=list(CONFIGS), default="XL/16")
    add("--blocks", type=int, help="DiT blocks, in place of the configuration's")
    add("--size", type=int, default=256, help="pixels of an edge; default: 256")
    add("--batch", type=int, default=1)
    add(
        "--training", action="store_true", help="forward, backward and a step of AdamW, not the forward alone"
    )
    add(
        "--provider",
        nargs="+",
        choices=list(dict.fromkeys([*PROVIDERS, *model_gpu.FORWARDS])),
        default=[],
        help=f"default: {', '.join(PROVIDERS)}; GPU: all but reduce-overhead",
    )
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, bfloat16 on a GPU")
    add("--rounds", type=int, default=7)
    add(
        "--profile",
        action="store_true",
        help="where our forward's time goes, and the launches of each step; GPU: the head and the transformer apart",
    )
    add("--json", type=Path, metavar="FILE", help="write the results")


class Setting:
    """A model with weights that are not zero, its inputs, and the same model in plain PyTorch on the same weights."""

    def __init__(
        self,
        config: PixNerdConfig,
        size: int,
        batch: int,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        # Both are the official model, whatever coordinates the configuration is trained with.
        config = replace(config, encoding="dct")
        torch.manual_seed(0)
        with torch.device(device):
            with FastRandom():
                self.model = PixNerd(config).to(dtype)
                torch.nn.init.normal_(self.model.decoder.linear.weight, std=0.02)
            self.x = torch.randn(batch, config.in_channels, size, size, dtype=dtype)
            self.t = torch.rand(batch)
            self.y = torch.arange(batch) % config.num_classes
        self.target = torch.randn_like(self.x)
        self.parameters = {official_name(n, config): p for n, p in self.model.named_parameters()}
        with torch.device("meta"):
            self.plain = PlainPixNerd(config)
        # The very same parameters: a step of either trains both.
        self.plain.load_state_dict(self.parameters, assign=True)

    def eager(self) -> Tensor:
        out: Tensor = self.plain(self.x, self.t, self.y)
        return out

    def ours(self) -> Tensor:
        out: Tensor = self.model(self.x, self.t, self.y)
        return out

    def forwards(self, names: list[str]) -> dict[str, Callable[[], Tensor]]:
        compiled = torch.compile(self.eager, dynamic=False)
        every = {"eager": self.eager, "compile": compiled, "ours": self.ours}
        return {name: every[name] for name in names}


def _errors(outputs: Mapping[str, Tensor]) -> dict[str, float]:
    """||out - first|| / ||first||, where the first is eager's unless it was left out."""
    reference = next(iter(outputs.values())).double()
    return {
        name: ((out.double() - reference).norm() / reference.norm()).item() for name, out in outputs.items()
    }


def _training(
    setting: Setting, forward: Callable[[], Tensor]
) -> tuple[Callable[[], None], Callable[[], Any]]:
    """A step of training; and its forward and backward alone, which return the gradients."""
    parameters = list(setting.parameters.values())

    def gradients() -> tuple[Tensor, ...]:
        loss = (forward() - setting.target).square().mean()
        return torch.autograd.grad(loss, parameters)

    def step() -> None:
        model_gpu.hand_over(parameters, gradients())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # A learning rate of zero keeps the weights the same for every provider; the arithmetic is the same.
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)
    return step, gradients


def run(arguments: argparse.Namespace) -> int:
    """Measure: 0 is success, 1 results that differ or fail, 2 a bad argument."""
    config = CONFIGS[arguments.config]
    if arguments.blocks:
        config = replace(config, num_blocks=arguments.blocks)
    try:
        device, dtype = _place(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if device == "cuda":
        setting = Setting(config, arguments.size, arguments.batch, device, dtype)
        return model_gpu.run(arguments, setting, replace(config, encoding="dct"))
    with torch.set_grad_enabled(arguments.training):
        return _run(arguments, config)


def _place(arguments: argparse.Namespace) -> tuple[str, torch.dtype]:
    """Device and dtype; fills in the providers.

    Raises:
        ValueError: the arguments do not go together.
    """
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device == "cuda" else "float32"))
    if device == "cpu" and dtype != torch.float32:
        raise ValueError("--dtype: expected float32 on a CPU, whose results are held against eager's")
    known = PROVIDERS if device == "cpu" else model_gpu.TRAINING if arguments.training else model_gpu.FORWARDS
    if unknown := [name for name in arguments.provider if name not in known]:
        kind = "training" if arguments.training else "forwards"
        raise ValueError(f"--provider: {', '.join(unknown)} cannot run {kind} on {device}")
    arguments.provider = [name for name in known if name in arguments.provider] or (
        list(PROVIDERS) if device == "cpu" else model_gpu.default_providers(arguments.training)
    )
    return device, dtype


def _run(arguments: argparse.Namespace, config: PixNerdConfig) -> int:
    origin = provenance.collect(sys.argv[1:])
    provenance.announce(origin)
    names = arguments.provider
    setting = Setting(config, arguments.size, arguments.batch)
    result: dict[str, Any] = {
        "config": arguments.config,
        "blocks": config.num_blocks,
        "size": arguments.size,
        "batch": arguments.batch,
        "pass": "training step" if arguments.training else "forward",
    }
    document = {"schema": 1, "kind": "model", "provenance": origin, "results": [result]}
    forwards = setting.forwards(names)
    if arguments.training:
        steps = {name: _training(setting, forward) for name, forward in forwards.items()}
        outputs = {name: torch.cat([g.flatten()[:4096] for g in run()]) for name, (_, run) in steps.items()}
        tasks: dict[str, Callable[[], object]] = {name: step for name, (step, _) in steps.items()}
        result["peak"] = {name: allocation_peak(run).peak for name, (_, run) in steps.items()}
        limit = 1e-3
    else:
        outputs = {name: forward() for name, forward in forwards.items()}
        tasks = dict(forwards)
        result["peak"] = {name: allocation_peak(lambda f=f: (f(),)).peak for name, f in forwards.items()}  # type: ignore[misc]
        limit = 1e-4
    result["errors"] = _errors(outputs)
    if not all(error <= limit for error in result["errors"].values()):
        print(f"WRONG: relative differences {result['errors']}, allowed {limit}")
        return 1
    limits = {y.name: y for y in yardsticks(copy_mib=1) if y.name != "copy"}
    budget = Budget(seconds=0, least=arguments.rounds, most=arguments.rounds, warm_up=0)
    samples = interleave({**tasks, **{name: y.run for name, y in limits.items()}}, budget)
    result["seconds"] = {name: entry.seconds for name, entry in samples.items()}
    result["median_s"] = {name: entry.median for name, entry in samples.items()}
    for name, limit_of in limits.items():
        result[f"{name}_flops_per_s"] = limit_of.work / samples[name].median
    if "ours" in names:
        result["time_over_ours"] = {name: samples[name].ratio(samples["ours"]) for name in names}
    print(_table(result))
    if arguments.profile:
        result["profile"] = profile(setting.ours, config, arguments.size, arguments.batch)
        print(profile_table(result["profile"]))
        result["stacks"] = _stacks(setting, config, arguments)
        result["launches"] = launches(
            lambda blocks: Setting(replace(CONFIGS["tiny/4"], num_blocks=blocks), 16, 1)
        )
        print(_launches(result["launches"]))
    if arguments.json:
        save(arguments.json, document)
        print(f"wrote {arguments.json}")
    return 0


def _stacks(
    setting: Setting, config: PixNerdConfig, arguments: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Seconds of the head and of the transformer's parts, eager and ours: the halves are timed, the parts are shares
    of their profile."""
    calls = halves(setting.model, setting.plain, setting.x, setting.t, setting.y)
    rounds = Budget(seconds=0, least=arguments.rounds, most=arguments.rounds, warm_up=0)
    samples = interleave(calls, rounds)
    stacks = {}
    for name in ("eager", "ours"):
        body = f"transformer, {name}"
        shares = profile(calls[body], config, arguments.size, arguments.batch)["shares"]
        seconds = samples[body].median
        stacks[name] = {
            "matrix products": seconds * shares["product"],
            "attention": seconds * shares["attention"],
            "norms, gates, copies": seconds * shares["other"],
            "pixel head": samples[f"head, {name}"].median,
        }
    return stacks


def markdown(document: dict[str, Any]) -> str:
    """Times, ratios and memory, and where a forward's time goes."""
    where = document["provenance"]
    if "gpu" in where:
        return _gpu_markdown(document)
    lines = ["| model | pass | provider | s | ours is faster by | peak MB |", "|---|---|---|---:|---:|---:|"]
    parts = []
    for result in document["results"]:
        label = f"{result['config']}, {result['size']}x{result['size']}, batch {result['batch']}"
        for name in result["errors"]:
            ratio = result.get("time_over_ours", {}).get(name)
            lines.append(
                f"| {label} | {result['pass']} | {name} | {result['median_s'][name]:.3g} | "
                f"{'' if ratio is None or name == 'ours' else f'{ratio:.2f}x'} | {result['peak'][name] / 1e6:.0f} |"
            )
        if stacks := result.get("stacks"):
            names = list(stacks["ours"])
            rows = [
                f"| {name} | " + " | ".join(f"{stack[n]:.3g}" for n in names) + " |"
                for name, stack in stacks.items()
            ]
            parts.append(
                "\n".join([f"| seconds | {' | '.join(names)} |", "|---|" + "---:|" * len(names), *rows])
            )
        if "launches" in result:
            parts.append(_launches(result["launches"]))
    note = f"`{where['command']}` on {provenance.summary(where)}; float32."
    return "\n\n".join(["\n".join(lines), *parts, note]) + "\n"


def _gpu_markdown(document: dict[str, Any]) -> str:
    where = document["provenance"]
    parts = [model_gpu_tables.markdown(result) for result in document["results"]]
    note = f"`{where['command']}` on {provenance.summary(where)}."
    return "\n\n".join([*parts, note]) + "\n"


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['config']} ({result['blocks']} blocks), {result['size']}x{result['size']}, batch "
        f"{result['batch']}, float32, {result['pass']}; a 2048^3 matmul ran at "
        f"{result['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s in the same rounds"
        + (
            f", multiply-adds on registers at {peak / 1e9:.0f}"
            if (peak := result.get("peak_flops_per_s"))
            else ""
        ),
        f"  {'':8} {'median s':>9} {'over ours':>10} {'peak MB':>9} {'difference':>11}",
    ]
    for name in result["errors"]:
        ratio = result.get("time_over_ours", {}).get(name)
        lines.append(
            f"  {name:8} {result['median_s'][name]:9.3f} {'-' if ratio is None else f'{ratio:.2f}x':>10} "
            f"{result['peak'][name] / 1e6:9.0f} {result['errors'][name]:11.1e}"
        )
    return "\n".join(lines)


def _launches(counts: dict[str, dict[str, int]]) -> str:
    cells = [f"{name} {entry['block']} a block, {entry['rest']} elsewhere" for name, entry in counts.items()]
    return "ops that compute (each at least one launch on a GPU): " + "; ".join(cells)
