"""Measure launch plans of the neural field and the pixel decoder on this GPU; the fastest go into tuned.json."""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
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
    """Every plan worth trying: the hidden dimension whole, in pieces, or a part of it at a time."""
    from pixnerd_kernels.ops.gpu.launch import padded
    from pixnerd_kernels.ops.neural_field_mlp.triton.policy import Plan

    whole = padded(problem.hidden)
    lates = (False, True) if problem.dtype == torch.bfloat16 else (False,)
    sizes = [size for size in (32, 64, 128) if whole // 4 <= size <= whole] or [whole]
    tiles = [
        tile
        for tile in ((16, 32, 64) if problem.training else (32, 64, 128))
        if tile <= padded(problem.pixels)
    ]
    for tile, piece, warps in itertools.product(tiles or [padded(problem.pixels)], sizes, (4, 8)):
        for pieces in sorted({1, -(-problem.hidden // piece)}):
            if problem.training:
                yield Plan(tile, piece, pieces, warps, ahead=True)
                # Where a kernel reads what it has written, loads must not be moved before the stores.
                if piece * pieces >= problem.hidden:
                    for late in lates:
                        yield Plan(
                            tile, piece, pieces, warps, stages=3, late=late, carveout=72 if late else 0
                        )
            else:
                for registers in (0, 168 if warps == 4 else 128):
                    for ahead in (False, True):
                        yield Plan(tile, piece, pieces, warps, registers, ahead)
                    if lates[-1]:
                        yield Plan(tile, piece, pieces, warps, registers, stages=2, late=True)


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


_FAULT, _AFTER_A_FAULT = "faulted", "not tried: its process had faulted"
_faulted = False


def problem_with(case: Case, plan: Any, device: torch.device) -> str:
    """Why a plan cannot be taken, or "": an invalid one may compile to a kernel that does nothing."""
    global _faulted
    if _faulted:
        return _AFTER_A_FAULT
    try:
        run, out, tensors = passes(case, case.smoke, plan, device)
        results = run()
        results = (out, *results) if case.training else (results,)
        wrong = [str(error) for error in Truth(case, case.smoke, tensors).errors(results) if not error.ok]
    except Exception as error:
        # A GPU serves no process that has touched what is not its own.
        _faulted = "CUDA error" in str(error)
        return _FAULT if _faulted else f"{type(error).__name__}: {error}"[:200]
    return "; ".join(wrong)


def judged(case: Case, candidates: list[Any], device: torch.device, processes: int) -> dict[Any, str]:
    """What is wrong with each plan; several processes compile them into Triton's cache side by side."""
    judge = partial(problem_with, case, device=device)
    if processes < 2:
        return dict(zip(candidates, map(judge, candidates), strict=True))
    reasons: dict[Any, str] = {}
    for _ in range(5):
        left = [plan for plan in candidates if reasons.get(plan, _AFTER_A_FAULT) == _AFTER_A_FAULT]
        if not left:
            break
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            reasons.update(zip(left, pool.map(judge, left), strict=True))
    return reasons


def tune(
    case: Case, rounds: int, device: torch.device, processes: int = 1, only: Sequence[Any] = ()
) -> dict[str, Any]:
    """Measure every plan of a case (or `only` these) that compiles and is right; the fastest is written down."""
    from pixnerd_kernels.ops.gpu.launch import target_of
    from pixnerd_kernels.ops.neural_field_mlp.triton import policy

    target = target_of(device)
    problem = problem_of(case)
    if policy.on_hopper(problem, target):
        return {"case": case.name, "problem": problem.key, "error": "a kernel without plans takes it"}
    chosen = policy.choose(problem, target)
    candidates = list(dict.fromkeys([chosen, *(only or plans(problem))]))
    found, refused = [], []
    for plan, reason in judged(case, candidates, device, processes).items():
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
    """Packed weights differ from others in their addresses alone; the decoder goes back with the field's own plan."""
    if isinstance(case.op, NeuralFieldMLP):
        return not case.op.packed
    return isinstance(case.op, PixelDecoder) and not case.training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--case",
        nargs="+",
        metavar="NAME",
        help="cases of `benchmarks gpu`; default: neural fields and decoders",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile and check plans")
    parser.add_argument(
        "--plan",
        nargs="+",
        default=[],
        metavar="JSON",
        help='measure these alone, {"tile": 32, "piece": 64, "pieces": 2, "warps": 4, "stages": 3} for one',
    )
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
    from pixnerd_kernels.ops.neural_field_mlp.triton.policy import Plan

    try:
        only = [Plan(**json.loads(plan)) for plan in arguments.plan]
    except (TypeError, ValueError) as error:
        print(f"error: --plan: {error}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    told = []
    for name in arguments.case or known:
        print(name, flush=True)
        told.append(tune(CASES[name], arguments.rounds, device, arguments.jobs, only))
        print(json.dumps({key: value for key, value in told[-1].items() if key not in ("plans", "refused")}))
        if arguments.out:
            arguments.out.write_text(json.dumps(told, indent=1) + "\n")
    return 0
