"""`pixnerd verify`: passes here, and fails when a backend is wrong."""

import json
import math

import pytest
import torch

from pixnerd_kernels import backends
from pixnerd_kernels.cli import main, plain, verify, verify_cases
from pixnerd_kernels.ops.coordinate_encoding import reference as encoding_reference
from pixnerd_kernels.ops.gated_residual import reference as residual_reference
from pixnerd_kernels.ops.modulated_rms_norm import reference as norm_reference
from pixnerd_kernels.ops.neural_field_mlp import reference as field_reference
from pixnerd_kernels.ops.normalize_weights import reference as weights_reference
from pixnerd_kernels.ops.qk_norm_rope import reference as rope_reference
from pixnerd_kernels.ops.swiglu import reference as swiglu_reference


@pytest.fixture
def few_cases(monkeypatch):
    """One small case of each op: enough to see a wrong backend."""
    chosen = {}
    for case in verify_cases.cases():
        chosen.setdefault(case.op, case)
    monkeypatch.setattr(verify_cases, "cases", lambda: iter(chosen.values()))
    return chosen


def test_everything_that_runs_here_passes(capsys):
    assert main(["verify", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["passed"]
    assert data["misses"] == []
    seen = {(row["op"], row["backend"], row["dtype"]) for row in data["rows"]}
    ops = {case.op for case in verify_cases.cases()}
    dtypes = ("float64", "float32", "bfloat16", "float16")
    assert {(op, "reference", dtype) for op in ops for dtype in dtypes} <= seen
    assert all(0 <= row["of_bound"] <= 1 for row in data["rows"])
    # Every backend is either checked or listed with the reasons why it cannot run.
    told = {(entry["op"], entry["backend"]) for entry in data["unsupported"] if entry["reasons"]}
    assert told | {(op, name) for op, name, _ in seen} == {(op, b) for op in ops for b in backends.BACKENDS}


@pytest.mark.parametrize(
    ("op", "inputs"),
    [
        ("neural_field_mlp", {"x", "w1", "w2", "w_gate", "norm_weight"}),
        ("neural_field_mlp_packed", {"x", "params", "norm_weight"}),
        ("normalize_weights", {"w"}),
        ("modulated_rms_norm", {"x", "weight", "shift", "scale"}),
        ("gated_residual", {"x", "y", "gate"}),
        ("gated_residual_rms_norm", {"x", "y", "gate", "weight", "shift", "scale"}),
        ("swiglu", {"gate", "up"}),
        ("qk_norm_rope", {"qkv", "q_weight", "k_weight", "text_kv"}),
    ],
)
def test_gradients_of_every_input_are_checked(op, inputs):
    cases = [case for case in verify_cases.cases() if case.op == op and "S=256" not in case.label]
    results = [result for case in cases for result in case.run(torch.device("cpu"), torch.float32)]
    assert {result.name for result in results} == {"output", *(f"grad of {name}" for name in inputs)}
    # Nothing is compared with zeros.
    assert all(result.truth.abs().max() > 0 for result in results)


@pytest.mark.parametrize(
    ("module", "function", "op"),
    [
        (field_reference, "forward", "neural_field_mlp"),
        (field_reference, "backward", "neural_field_mlp_packed"),
        (weights_reference, "forward", "normalize_weights"),
        (weights_reference, "backward", "normalize_weights"),
        (encoding_reference, "forward", "coordinate_encoding"),
        (norm_reference, "backward", "modulated_rms_norm"),
        (residual_reference, "norm_forward", "gated_residual_rms_norm"),
        (rope_reference, "backward", "qk_norm_rope"),
        (swiglu_reference, "forward", "swiglu"),
    ],
)
@pytest.mark.parametrize("factor", [1 + 1e-4, math.nan])
def test_a_wrong_backend_fails(few_cases, monkeypatch, capsys, module, function, op, factor):
    right = getattr(module, function)

    def wrong(*args):
        out = right(*args)
        if isinstance(out, torch.Tensor):
            return out * factor
        return (out[0] * factor, *out[1:])

    monkeypatch.setattr(module, function, wrong)
    assert main(["verify", "--backend", "reference"]) == 1
    out = capsys.readouterr().out
    assert f"MISS {op} on reference (cpu, float32)" in out


def test_a_backend_that_cannot_run_is_no_success(few_cases, monkeypatch, capsys):
    monkeypatch.setattr(backends, "_load_native", lambda: (None, "the moon is full"))
    assert main(["verify", "--backend", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert "the moon is full" in out
    assert "cannot run any op" in err


def test_processes_side_by_side_measure_the_same():
    """As on a GPU, where each run compiles its own kernels."""
    every = list(verify_cases.cases())
    chosen = [0, next(i for i, case in enumerate(every) if case.op == "swiglu")]
    where = verify.Where("reference", torch.device("cpu"), torch.bfloat16)
    there = verify._measure_side_by_side([(index, where) for index in chosen])
    for index, errors in zip(chosen, there, strict=True):
        here = verify._measure(every[index], where)
        assert [name for name, *_ in errors] == [name for name, *_ in here]
        torch.testing.assert_close([e[1:] for e in errors], [e[1:] for e in here])
    assert verify._measure_side_by_side([]) == []


def test_runs_on_a_gpu_are_measured_side_by_side(few_cases, monkeypatch):
    """The rows and misses of what the processes measured; this machine need not have a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        backends,
        "not_supported_reasons",
        lambda op, backend, device, dtype: [] if device.type == "cuda" else ["no GPU"],
    )
    seen = []

    def measured(runs):
        seen.extend(runs)
        return [[("output", 2.0 if run == runs[-1] else 0.5, 1e-7)] for run in runs]

    monkeypatch.setattr(verify, "_measure_side_by_side", measured)
    data = verify.collect("triton")
    assert len(seen) == len(set(seen)) == len(data["rows"]) == 4 * len(few_cases)
    assert not data["passed"]
    assert [row["passed"] for row in data["rows"]] == [True] * (len(seen) - 1) + [False]
    (miss,) = data["misses"]
    assert (miss["tensor"], miss["of_bound"], miss["device"]) == ("output", 2.0, "cuda")


def test_table_tells_op_backend_dtype_and_error(few_cases, capsys):
    assert main(["verify", "--backend", "reference"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["op", "backend", "on", "dtype", "cases"]
    assert "36 of 36 passed" in lines[-1]
    assert all(line.endswith("ok") for line in lines[2:38])


@pytest.mark.parametrize("kind", verify_cases.KINDS)
def test_plain_encodings_do_not_depend_on_how_coordinates_are_rounded(kind):
    one = plain.coordinate_encoding(6, 9, 4, kind)
    other = plain.coordinate_encoding(6, 9, 4, kind, linspace=False)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-13)
