"""Measure launch plans of the neural field on this GPU and write the fastest into the op's tuned.json."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.check import Truth
from benchmarks.gpu import CASES, made, milliseconds
from benchmarks.providers import PROVIDERS, call
from benchmarks.registry import Case, NeuralFieldMLP, Shape
from pixnerd_kernels.ops.gpu import tuned


def plans(case: Case, shape: Shape) -> Iterator[Any]:
    """Every plan worth trying: whole hidden dimensions in pieces, and single pieces at a time."""
    from pixnerd_kernels.ops.gpu.launch import padded
    from pixnerd_kernels.ops.neural_field_mlp.triton.policy import Plan

    whole = padded(shape["D2"])
    for tile, piece, warps, stages in itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2)):
        if tile > padded(shape["S"]) or piece > whole:
            continue
        for pieces in sorted({1, 2, -(-shape["D2"] // piece)}):
            if pieces <= 8 and piece * pieces < shape["D2"] + piece:
                yield Plan(tile, piece, pieces, warps, stages)


def timed(case: Case, shape: Shape, plan: Any, device: torch.device) -> Callable[[], object]:
    """The pass that the plan is for: the forward, or the backward alone."""
    tensors = made(case, shape, device)
    inputs = {name: tensor for name, tensor in tensors.items() if name != "grad"}
    compute = PROVIDERS["ours"].prepare(case, shape)
    if not case.training:
        return lambda: _under(plan, lambda: compute(inputs))
    for tensor in inputs.values():
        tensor.requires_grad_()
    out = compute(inputs)
    leaves = tuple(inputs.values())
    return lambda: _under(plan, lambda: torch.autograd.grad(out, leaves, tensors["grad"], retain_graph=True))


def _under(plan: Any, function: Callable[[], object]) -> object:
    with tuned.override(plan):
        return function()


def is_right(case: Case, plan: Any, device: torch.device) -> bool:
    """Whether the plan's results keep the accuracy rule; an invalid plan may compile to a kernel that does nothing."""
    tensors = made(case, case.smoke, device)
    function = call(case, PROVIDERS["ours"].prepare(case, case.smoke), tensors)
    out: Any = _under(plan, function)
    return all(error.ok for error in Truth(case, case.smoke, tensors).errors(out))


def tune(case: Case, rounds: int, device: torch.device) -> dict[str, Any]:
    """Measure every plan of a case that compiles and is right; the fastest is written down."""
    from pixnerd_kernels.ops.gpu.launch import target_of
    from pixnerd_kernels.ops.neural_field_mlp.triton import policy

    target = target_of(device)
    shape = case.shape
    problem = policy.Problem(
        case.training, isinstance(case.op, NeuralFieldMLP) and case.op.gated, case.dtype,
        shape["N"], shape["S"], shape["D1"], shape["D2"],
    )  # fmt: skip
    chosen = policy.choose(problem, target)
    found = []
    for plan in dict.fromkeys([chosen, *plans(case, shape)]):
        try:
            if not is_right(case, plan, device):
                continue
            times = milliseconds({"plan": timed(case, shape, plan, device)}, rounds)["plan"]
        except Exception as error:
            print(f"  {plan}: {type(error).__name__}", file=sys.stderr)
            continue
        found.append((float(np.median(times)), plan))
        print(f"  {found[-1][0]:8.3f} ms  {plan}", flush=True)
    if not found:
        return {"case": case.name, "problem": problem.key, "error": "no plan runs"}
    best = min(found, key=lambda pair: pair[0])
    tuned.save(policy.TUNED, target.name, problem.key, best[1].entry())
    before = next((ms for ms, plan in found if plan == chosen), None)
    return {
        "case": case.name,
        "problem": problem.key,
        "ms": best[0],
        "before_ms": before,
        "plan": best[1].entry(),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--case", nargs="+", metavar="NAME", help="cases of `benchmarks gpu`; default: the neural field's"
    )
    parser.add_argument("--rounds", type=int, default=7)


def run(arguments: argparse.Namespace) -> int:
    """Tune; 2 without a GPU."""
    if not torch.cuda.is_available():
        print("error: no CUDA device", file=sys.stderr)
        return 2
    # Packed weights differ in their addresses alone.
    fields = [
        name for name, case in CASES.items() if isinstance(case.op, NeuralFieldMLP) and not case.op.packed
    ]
    if unknown := set(arguments.case or []) - set(fields):
        print(
            f"error: unknown case {', '.join(sorted(unknown))}; known: {', '.join(fields)}", file=sys.stderr
        )
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    for name in arguments.case or fields:
        print(name, flush=True)
        print(json.dumps(tune(CASES[name], arguments.rounds, device)), flush=True)
    return 0
