"""The GPU benchmark without a GPU: what it counts, and what it says where there is none."""

import subprocess
from dataclasses import replace

import pytest
import torch
from processes import PACKAGE, environment

from benchmarks import gpu, providers
from benchmarks.__main__ import main

RATES = gpu.Rates(3.0e12, 800e12, "a test")


def test_the_roofline_that_is_written_down():
    """1.61 GB and 137 GFLOP: 0.54 ms by memory, 0.17 ms by products."""
    case = gpu.CASES["plain-bf16-forward"]
    assert case.bytes(case.shape) == pytest.approx(1.61e9, rel=1e-2)
    assert case.flops(case.shape, recompute=True) == pytest.approx(137e9, rel=1e-2)
    assert RATES.roofline(case, case.shape, True) == pytest.approx(0.54e-3, rel=1e-2)
    slow_memory = gpu.Rates(1e15, 800e12, "a test")
    assert slow_memory.roofline(case, case.shape, True) == pytest.approx(0.17e-3, rel=2e-2)
    training = gpu.CASES["plain-bf16-training"]
    assert RATES.roofline(training, training.shape, True) == pytest.approx(1.43e-3, rel=1e-2)
    assert gpu.rates_of("NVIDIA H100 80GB HBM3", slow_memory).memory == 3.0e12
    assert gpu.rates_of("NVIDIA L4", slow_memory) is slow_memory


def test_rivals_run_where_they_are_installed_and_can_run_again(monkeypatch):
    asked = ["ours", "liger"]
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
    assert gpu._runs(gpu.CASES["norm-bf16-training"], asked) == ["ours"]
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: name == "liger_kernel")
    for name in ("norm-bf16-forward", "norm-bf16-training", "swiglu-bf16-forward"):
        assert gpu._runs(gpu.CASES[name], asked) == asked
    for name in ("swiglu-bf16-training", "plain-bf16-forward"):
        assert gpu._runs(gpu.CASES[name], asked) == ["ours"]


SMALL = {"decoder-xl-saving-bf16-training": {"B": 1, "H": 16, "K": 1}, "rope-bf16-forward": {"B": 1}}
NAMES = ["plain-bf16-forward", "packed-bf16-training", "weights-bf16-training", *SMALL]


@pytest.mark.parametrize("name", NAMES)
def test_a_case_is_checked_timed_and_tabled(name, monkeypatch):
    """On the CPU, with the timing and the memory of a GPU made up."""
    monkeypatch.setattr(
        gpu, "milliseconds", lambda functions, rounds: {n: [2.0, 1.0, 4.0] for n in functions}
    )
    monkeypatch.setattr(gpu, "host_seconds", lambda function: 5e-4)
    monkeypatch.setattr(gpu, "peak_memory", lambda function: len(function()))
    case = gpu.CASES[name]
    small = SMALL.get(name, {"N": 2})
    case = replace(case, shape={**case.shape, **small}, smoke={**case.smoke, **small})
    result = gpu.measure(case, ["eager", "ours"], 3, RATES, torch.device("cpu"))
    for entry in result["providers"].values():
        assert entry["status"] == "ok", entry
        assert entry["median_s"] == pytest.approx(2e-3)
        assert entry["bytes_per_s"] == pytest.approx(case.bytes(case.shape) / 2e-3)
        assert entry["share_of_roofline"] == pytest.approx(RATES.roofline(case, case.shape, True) / 2e-3)
    assert f"| {name} | ours | 2.000 (1.400-3.200) | 1.00x |" in gpu.table([result])


def test_wrong_results_of_ours_are_not_timed(monkeypatch):
    monkeypatch.setattr(gpu, "milliseconds", lambda functions, rounds: {n: [1.0] for n in functions})
    monkeypatch.setattr(gpu, "host_seconds", lambda function: 5e-4)
    monkeypatch.setattr(gpu, "peak_memory", lambda function: 0)
    monkeypatch.setattr(gpu, "wrong", lambda *arguments: "everything is off")
    case = gpu.CASES["weights-bf16-forward"]
    case = replace(case, shape={**case.shape, "N": 2})
    result = gpu.measure(case, ["eager", "ours"], 1, RATES, torch.device("cpu"))
    assert result["providers"]["ours"] == {"status": "wrong", "reason": "everything is off"}
    assert result["providers"]["eager"]["status"] == "inexact"
    assert "wrong: everything is off" in gpu.table([result])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_commands_say_so(capsys, tmp_path):
    for command in ("gpu", "tune"):
        assert main([command]) == 2
        assert "no CUDA device" in capsys.readouterr().err
    script = PACKAGE.parent / "benchmarks" / "gpu_check.sh"
    done = subprocess.run([script, tmp_path / "out"], capture_output=True, text=True, env=environment())
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert "torch" in (tmp_path / "out" / "info.txt").read_text()
