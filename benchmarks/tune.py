"""Measure launch plans of the neural field and the pixel decoder on this GPU; the fastest go into tuned.json."""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.check import Truth
from benchmarks.gpu import CASES, made, milliseconds
from benchmarks.heads import PixelDecoder
from benchmarks.providers import PROVIDERS
from benchmarks.registry import Case, NeuralFieldMLP, Shape
from pixnerd_kernels.ops.gpu import tuned


def problem_of(case: Case) -> Any:
    """What a plan is chosen for."""
    from pixnerd_kernels.ops.neural_field_mlp.triton.policy import Problem

    shape, decoder = case.shape, isinstance(case.op, PixelDecoder)
    pixels = shape["P"] ** 2 if decoder else shape["S"]
    patches = shape["B"] * shape["H"] ** 2 // pixels if decoder else shape["N"]
    gated = isinstance(case.op, NeuralFieldMLP) and case.op.gated
    return Problem(case.training, gated, case.dtype, patches, pixels, shape["D1"], shape["D2"], decoder)


def plans(problem: Any) -> Iterator[Any]:
    """Every plan worth trying: whole hidden dimensions in pieces, and single pieces at a time."""
    from pixnerd_kernels.ops.gpu.launch import padded
    from pixnerd_kernels.ops.neural_field_mlp.triton.policy import Plan

    whole = padded(problem.hidden)
    sizes = (16, 32, 64, 128)
    for tile, piece, warps, stages in itertools.product(sizes, sizes, (4, 8), (1, 2, 3)):
        if tile > padded(problem.pixels) or piece > whole:
            continue
        for pieces in sorted({1, 2, -(-problem.hidden // piece)}):
            if pieces <= 8 and piece * pieces < problem.hidden + piece:
                yield Plan(tile, piece, pieces, warps, stages)


def passes(case: Case, shape: Shape, plan: Any, device: torch.device) -> tuple[Callable[[], Any], Any, Any]:
    """The pass that the plan is for, the forward or the backward alone; the output, and all tensors."""
    tensors = made(case, shape, device)
    inputs = {name: tensor for name, tensor in tensors.items() if name != "grad"}
    compute = PROVIDERS["ours"].prepare(case, shape)
    if not case.training:
        return lambda: _under(plan, lambda: compute(inputs)), None, tensors
    for tensor in inputs.values():
        tensor.requires_grad_()
    out = compute(inputs)
    leaves = tuple(inputs.values())
    return (
        lambda: _under(plan, lambda: torch.autograd.grad(out, leaves, tensors["grad"], retain_graph=True)),
        out.detach(),
        {name: tensor.detach() for name, tensor in tensors.items()},
    )


def _under(plan: Any, function: Callable[[], object]) -> Any:
    with tuned.override(plan):
        return function()


def problem_with(case: Case, plan: Any, device: torch.device) -> str:
    """Why a plan cannot be taken, or "": an invalid one may compile to a kernel that does nothing."""
    try:
        run, out, tensors = passes(case, case.smoke, plan, device)
        results = run()
        results = (out, *results) if case.training else (results,)
    except Exception as error:
        return type(error).__name__
    wrong = [str(error) for error in Truth(case, case.smoke, tensors).errors(results) if not error.ok]
    return "; ".join(wrong)


def tune(case: Case, rounds: int, device: torch.device, pool: Executor | None = None) -> dict[str, Any]:
    """Measure every plan of a case that compiles and is right; the fastest is written down.

    A pool's processes compile and check the plans side by side; what they compiled is found in Triton's cache.
    """
    from pixnerd_kernels.ops.gpu.launch import target_of
    from pixnerd_kernels.ops.neural_field_mlp.triton import policy

    target = target_of(device)
    problem = problem_of(case)
    chosen = policy.choose(problem, target)
    candidates = list(dict.fromkeys([chosen, *plans(problem)]))
    judge = partial(problem_with, case, device=device)
    reasons = list(pool.map(judge, candidates) if pool else map(judge, candidates))
    found, refused = [], []
    for plan, reason in zip(candidates, reasons, strict=True):
        if reason:
            refused.append({**plan.entry(), "reason": reason})
            print(f"  {plan}: {reason}", file=sys.stderr)
            continue
        run, _, _ = passes(case, case.shape, plan, device)
        times = milliseconds({"plan": run}, rounds)["plan"]
        found.append((float(np.median(times)), plan))
        print(f"  {found[-1][0]:8.3f} ms  {plan}", flush=True)
    if not found:
        return {"case": case.name, "problem": problem.key, "error": "no plan runs", "refused": refused}
    best = min(found, key=lambda pair: pair[0])
    tuned.save(policy.TUNED, target.name, problem.key, best[1].entry())
    before = next((ms for ms, plan in found if plan == chosen), None)
    return {
        "case": case.name,
        "problem": problem.key,
        "ms": best[0],
        "before_ms": before,
        "plan": best[1].entry(),
        "plans": [{**plan.entry(), "ms": ms} for ms, plan in found],
        "refused": refused,
    }


def _has_own_plan(case: Case) -> bool:
    """Packed weights differ from others in their addresses alone, saved ones in who made them."""
    if isinstance(case.op, NeuralFieldMLP):
        return not case.op.packed
    return isinstance(case.op, PixelDecoder) and not case.op.save_weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--case",
        nargs="+",
        metavar="NAME",
        help="cases of `benchmarks gpu`; default: neural fields and decoders",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile and check plans")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every plan's time as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Tune; 2 without a GPU."""
    if not torch.cuda.is_available():
        print("error: no CUDA device", file=sys.stderr)
        return 2
    known = [name for name, case in CASES.items() if _has_own_plan(case)]
    if unknown := set(arguments.case or []) - set(known):
        print(f"error: unknown case {', '.join(sorted(unknown))}; known: {', '.join(known)}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    told = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, spawn) if arguments.jobs > 1 else nullcontext() as pool:
        for name in arguments.case or known:
            print(name, flush=True)
            told.append(tune(CASES[name], arguments.rounds, device, pool))
            print(json.dumps({key: value for key, value in told[-1].items() if key not in ("plans", "refused")}))
            if arguments.out:
                arguments.out.write_text(json.dumps(told, indent=1) + "\n")
    return 0
