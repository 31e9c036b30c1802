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
    wrong = tune.problem_with
    monkeypatch.setattr(tune, "plans", lambda problem: [slow, faulty, fast])
    monkeypatch.setattr(
        tune,
        "problem_with",
        lambda case, plan, device: "off" if plan == faulty else wrong(case, plan, device),
    )
    monkeypatch.setattr(tune, "milliseconds", timed)
    monkeypatch.setattr(tune, "_under", lambda plan, function: current.append(plan) or under(plan, function))
    monkeypatch.setattr(policy, "TUNED", tmp_path / "tuned.json")
    decoder = {"B": 1, "H": 10, "P": 5, "D": 9, "D1": 12, "D2": 24}
    names = ("odd-bf16-forward", "odd-bf16-training", "decoder-xl-bf16-forward")
    for name in names:
        case = gpu.CASES[name]
        small = decoder if "decoder" in name else {"N": 2}
        case = replace(case, shape={**case.shape, **small}, smoke={**case.smoke, **small})
        with use_backend("triton"):
            told = tune.tune(case, 2, torch.device("cpu"))
        assert told["plan"] == fast.entry()
        assert told["ms"] == 1.0
        assert told["before_ms"] == 3.0
        assert [entry["reason"] for entry in told["refused"]] == ["off"]
        assert len(told["plans"]) == 3
    entries = json.loads((tmp_path / "tuned.json").read_text())["interpreter"]
    assert sorted(entries) == [
        "backward plain bfloat16 S=20 D1=12 D2=24",
        "decoder forward plain bfloat16 S=25 D1=12 D2=24",
        "forward plain bfloat16 S=20 D1=12 D2=24",
    ]
    problem = policy.Problem(True, False, torch.bfloat16, 7, 20, 12, 24)
    assert policy.choose(problem, launch.INTERPRETER) == fast
    assert policy.choose(replace(problem, hidden=48), launch.INTERPRETER) != fast


def test_candidates_are_valid():
    plans = list(tune.plans(tune.problem_of(gpu.CASES["plain-bf16-forward"])))
    assert len(plans) == len(set(plans)) > 20
    assert all(16 <= plan.tile <= 256 and plan.piece * plan.pieces <= 128 for plan in plans)
    assert policy.choose(
        policy.Problem(False, False, torch.bfloat16, 16384, 256, 64, 128), launch.INTERPRETER
    )


under = tune._under
