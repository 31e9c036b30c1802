"""Time of the whole class-to-image model: the official formulas eager and compiled, and ours, with the same weights."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import provenance
from benchmarks.baselines.pixnerd import PlainPixNerd
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
    add("--provider", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    add("--rounds", type=int, default=7)
    add("--profile", action="store_true", help="where our forward's time goes, and the launches of each step")
    add("--json", type=Path, metavar="FILE", help="write the results")


class Setting:
    """A model with weights that are not zero, its inputs, and the same model in plain PyTorch on the same weights."""

    def __init__(self, config: PixNerdConfig, size: int, batch: int) -> None:
        # Both are the official model, whatever coordinates the configuration is trained with.
        config = replace(config, encoding="dct")
        torch.manual_seed(0)
        self.model = PixNerd(config)
        torch.nn.init.normal_(self.model.decoder.linear.weight, std=0.02)
        self.parameters = {official_name(n, config): p for n, p in self.model.named_parameters()}
        self.x = torch.randn(batch, config.in_channels, size, size)
        self.t = torch.rand(batch)
        self.y = torch.arange(batch) % config.num_classes
        self.target = torch.randn_like(self.x)
        with torch.device("meta"):
            self.plain = PlainPixNerd(config)

    def eager(self) -> Tensor:
        out: Tensor = torch.func.functional_call(self.plain, self.parameters, (self.x, self.t, self.y))
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
        for parameter, gradient in zip(parameters, gradients(), strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # A learning rate of zero keeps the weights the same for every provider; the arithmetic is the same.
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)
    return step, gradients


def run(arguments: argparse.Namespace) -> int:
    """Measure: 0 is success, 1 results that differ."""
    with torch.set_grad_enabled(arguments.training):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    config = CONFIGS[arguments.config]
    if arguments.blocks:
        config = replace(config, num_blocks=arguments.blocks)
    origin = provenance.collect(sys.argv[1:])
    print(provenance.summary(origin), flush=True)
    if busy := provenance.busy(origin):
        print(f"warning: {busy}", flush=True)
    names = [name for name in PROVIDERS if name in arguments.provider]
    setting = Setting(config, arguments.size, arguments.batch)
    document: dict[str, Any] = {
        "provenance": origin,
        "config": arguments.config,
        "blocks": config.num_blocks,
        "size": arguments.size,
        "batch": arguments.batch,
        "pass": "training step" if arguments.training else "forward",
    }
    forwards = setting.forwards(names)
    if arguments.training:
        steps = {name: _training(setting, forward) for name, forward in forwards.items()}
        outputs = {name: torch.cat([g.flatten()[:4096] for g in run()]) for name, (_, run) in steps.items()}
        tasks: dict[str, Callable[[], object]] = {name: step for name, (step, _) in steps.items()}
        document["peak"] = {name: allocation_peak(run).peak for name, (_, run) in steps.items()}
        limit = 1e-3
    else:
        outputs = {name: forward() for name, forward in forwards.items()}
        tasks = dict(forwards)
        document["peak"] = {name: allocation_peak(lambda f=f: (f(),)).peak for name, f in forwards.items()}  # type: ignore[misc]
        limit = 1e-4
    document["errors"] = _errors(outputs)
    if not all(error <= limit for error in document["errors"].values()):
        print(f"WRONG: relative differences {document['errors']}, allowed {limit}")
        return 1
    matmul = yardsticks(copy_mib=1)[0]
    budget = Budget(seconds=0, least=arguments.rounds, most=arguments.rounds, warm_up=0)
    samples = interleave({**tasks, "matmul": matmul.run}, budget)
    document["seconds"] = {name: entry.seconds for name, entry in samples.items()}
    document["median_s"] = {name: entry.median for name, entry in samples.items()}
    document["matmul_flops_per_s"] = matmul.work / samples["matmul"].median
    if "ours" in names:
        document["time_over_ours"] = {name: samples[name].ratio(samples["ours"]) for name in names}
    print(_table(document, names))
    if arguments.profile:
        document["profile"] = profile(setting.ours, config, arguments.size, arguments.batch)
        print(profile_table(document["profile"]))
        document["launches"] = launches(
            lambda blocks: Setting(replace(CONFIGS["tiny/4"], num_blocks=blocks), 16, 1)
        )
        print(_launches(document["launches"]))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
        print(f"wrote {arguments.json}")
    return 0


def _table(document: dict[str, Any], names: list[str]) -> str:
    lines = [
        f"{document['config']} ({document['blocks']} blocks), {document['size']}x{document['size']}, batch "
        f"{document['batch']}, float32, {document['pass']}; a 2048^3 matmul ran at "
        f"{document['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s in the same rounds",
        f"  {'':8} {'median s':>9} {'over ours':>10} {'peak MB':>9} {'difference':>11}",
    ]
    for name in names:
        ratio = document.get("time_over_ours", {}).get(name)
        lines.append(
            f"  {name:8} {document['median_s'][name]:9.3f} {'-' if ratio is None else f'{ratio:.2f}x':>10} "
            f"{document['peak'][name] / 1e6:9.0f} {document['errors'][name]:11.1e}"
        )
    return "\n".join(lines)


def _launches(counts: dict[str, dict[str, int]]) -> str:
    cells = [f"{name} {entry['block']} a block, {entry['rest']} elsewhere" for name, entry in counts.items()]
    return "ops that compute (each at least one launch on a GPU): " + "; ".join(cells)
