"""Time and memory of an official-structure model before and after `pixnerd_kernels.patch`, with the same weights."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import pixnerd_kernels
from benchmarks import provenance
from benchmarks.memory import allocation_peak
from benchmarks.timing import Budget, interleave

#: What is put in: nothing, the field blocks, all blocks' ops, and the whole head besides.
BLOCKS = ("neural_field_mlp_packed",)
TRANSFORMER = ("modulated_rms_norm", "swiglu", "qk_norm_rope", "gated_residual_rms_norm")
VARIANTS: dict[str, tuple[str, ...]] = {
    "before": (),
    "blocks": BLOCKS,
    "all": (*BLOCKS, *TRANSFORMER, "pixel_decoder"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--width", type=int, default=1152, help="D, channels of a token; default: XL/16's")
    add("--blocks", type=int, default=2, help="DiT blocks; default: 2, so that the head is most of the time")
    add("--field-blocks", type=int, default=4)
    add("--size", type=int, default=256, help="pixels of an edge; default: 256")
    add("--batch", type=int, default=1)
    add("--training", action="store_true", help="forward and backward, not the forward alone")
    add(
        "--meanflow",
        action="store_true",
        help="the tangent along image and time beside the forward, as part of a target, and backward",
    )
    add("--rounds", type=int, default=7)
    add("--json", type=Path, metavar="FILE", help="write the results")


def official(width: int, blocks: int, field_blocks: int) -> nn.Module:
    """The stand-in for the official model, which the tests hold to recorded tensors, with random weights."""
    from tests.patching import foreign

    torch.manual_seed(0)
    model: nn.Module = foreign.PixNerDiT(
        num_groups=16, hidden_size=width, hidden_size_x=64, nerf_mlpratio=2, num_blocks=blocks + field_blocks,
        num_cond_blocks=blocks, patch_size=16, num_classes=1000,
    )  # fmt: skip
    nn.init.normal_(model.final_layer.linear.weight, std=0.02)  # type: ignore[union-attr, arg-type]
    return model


def run(arguments: argparse.Namespace) -> int:
    """Measure: 0 is success, 1 results that differ."""
    origin = provenance.collect(sys.argv[1:])
    provenance.announce(origin)
    before = official(arguments.width, arguments.blocks, arguments.field_blocks)
    models = {name: before if name == "before" else copy.deepcopy(before) for name in VARIANTS}
    for name, ops in VARIANTS.items():
        left = pixnerd_kernels.patch(models[name], ops=ops).left
        if left:
            print(f"WRONG: {name}: left {', '.join(entry.label for entry in left)}: {left[0].reason}")
            return 1
    x = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    given = (x, torch.rand(arguments.batch), torch.arange(arguments.batch))
    kind = "meanflow" if arguments.meanflow else "training" if arguments.training else "forward"
    tasks = {name: _task(model, given, kind) for name, model in models.items()}
    results = {
        name: torch.cat([t.flatten()[:65536] for t in task()]).double() for name, task in tasks.items()
    }
    truth = results["before"]
    errors = {name: ((out - truth).norm() / truth.norm()).item() for name, out in results.items()}
    limit = 1e-4 if kind == "forward" else 1e-3
    if not all(error <= limit for error in errors.values()):
        print(f"WRONG: relative differences {errors}, allowed {limit}")
        return 1
    peaks = {name: allocation_peak(task).peak for name, task in tasks.items()}
    budget = Budget(seconds=0, least=arguments.rounds, most=arguments.rounds, warm_up=0)
    samples = interleave(tasks, budget)
    document: dict[str, Any] = {
        "provenance": origin,
        "shape": {
            key: getattr(arguments, key) for key in ("width", "blocks", "field_blocks", "size", "batch")
        },
        "pass": _PASSES[kind],
        "errors": errors,
        "peak": peaks,
        "seconds": {name: entry.seconds for name, entry in samples.items()},
        "median_s": {name: entry.median for name, entry in samples.items()},
        "before_over": {name: samples["before"].ratio(entry) for name, entry in samples.items()},
    }
    print(_table(document))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
        print(f"wrote {arguments.json}")
    return 0


#: What is measured, by name.
_PASSES = {
    "forward": "forward",
    "training": "forward + backward",
    "meanflow": "forward with a tangent + backward",
}


def _task(model: nn.Module, given: tuple[Tensor, ...], kind: str) -> Callable[[], tuple[Tensor, ...]]:
    """The image; or the gradients of every parameter, after a forward or a MeanFlow step's (arXiv 2505.13447)."""
    if kind == "forward":
        return torch.no_grad()(lambda: (model(*given),))
    parameters = list(model.parameters())
    if kind == "training":
        return lambda: torch.autograd.grad(model(*given).square().mean(), parameters)
    x, t, y = given
    velocity = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))  # the same for every model

    def step() -> tuple[Tensor, ...]:
        # torch's flash kernels have no tangents.
        with sdpa_kernel(SDPBackend.MATH):
            u, tangent = torch.func.jvp(lambda x, t: model(x, t, y), (x, t), (velocity, torch.ones_like(t)))
        target = velocity - t.view(-1, 1, 1, 1) * tangent.detach()
        return torch.autograd.grad((u - target).square().mean(), parameters)

    return step


def _table(document: dict[str, Any]) -> str:
    shape = document["shape"]
    lines = [
        f"official structure, D={shape['width']}, {shape['blocks']} DiT and {shape['field_blocks']} field blocks, "
        f"{shape['size']}x{shape['size']}, batch {shape['batch']}, float32, {document['pass']}",
        f"  {'patched':8} {'median s':>9} {'speedup':>8} {'peak MB':>8} {'difference':>11}",
    ]
    for name, seconds in document["median_s"].items():
        lines.append(
            f"  {name:8} {seconds:9.3f} {document['before_over'][name]:7.2f}x {document['peak'][name] / 1e6:8.0f} "
            f"{document['errors'][name]:11.1e}"
        )
    return "\n".join(lines)
