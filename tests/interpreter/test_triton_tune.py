"""`python -m benchmarks tune` in the interpreter: it keeps the fastest right plan, and the policy then takes it."""

import json
from dataclasses import replace

import torch

from benchmarks import gpu, tune
from pixnerd_kernels import use_backend
from pixnerd_kernels.ops.gpu import launch
from pixnerd_kernels.ops.neural_field_mlp.triton import policy


def test_the_fastest_right_plan_is_written_down(monkeypatch, tmp_path):
    fast, slow, faulty = (policy.Plan(tile, 16, 2, 4) for tile in (32, 16, 64))
    milliseconds = {fast: 1.0, slow: 2.0, faulty: 0.5}

    def timed(functions, rounds):
        functions["plan"]()
        return {"plan": [milliseconds.get(current[-1], 3.0)] * rounds}

    current = []
    right = tune.is_right
    monkeypatch.setattr(tune, "plans", lambda case, shape: [slow, faulty, fast])
    monkeypatch.setattr(
        tune, "is_right", lambda case, plan, device: plan != faulty and right(case, plan, device)
    )
    monkeypatch.setattr(tune, "milliseconds", timed)
    monkeypatch.setattr(tune, "_under", lambda plan, function: current.append(plan) or under(plan, function))
    monkeypatch.setattr(policy, "TUNED", tmp_path / "tuned.json")
    for name in ("odd-bf16-forward", "odd-bf16-training"):
        case = gpu.CASES[name]
        case = replace(case, shape={**case.shape, "N": 2}, smoke={**case.smoke, "N": 2})
        with use_backend("triton"):
            told = tune.tune(case, 2, torch.device("cpu"))
        assert told["plan"] == fast.entry()
        assert told["ms"] == 1.0
        assert told["before_ms"] == 3.0
    entries = json.loads((tmp_path / "tuned.json").read_text())["interpreter"]
    assert sorted(entries) == [
        "backward plain bfloat16 S=20 D1=12 D2=24",
        "forward plain bfloat16 S=20 D1=12 D2=24",
    ]
    problem = policy.Problem(True, False, torch.bfloat16, 7, 20, 12, 24)
    assert policy.choose(problem, launch.INTERPRETER) == fast
    assert policy.choose(replace(problem, hidden=48), launch.INTERPRETER) != fast


def test_candidates_are_valid():
    case = gpu.CASES["plain-bf16-forward"]
    plans = list(tune.plans(case, case.shape))
    assert len(plans) == len(set(plans)) > 20
    assert all(16 <= plan.tile <= 256 and plan.piece * plan.pieces <= 128 for plan in plans)
    assert policy.choose(
        policy.Problem(False, False, torch.bfloat16, 16384, 256, 64, 128), launch.INTERPRETER
    )


under = tune._under
