"""The `pixnerd` command itself: exit codes, one-line errors, the module entry, info."""

import json
import subprocess
import sys

import pytest
import torch

from pixnerd_kernels import __version__, backends
from pixnerd_kernels.cli import COMMANDS, info, main


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nonsense"], ["nonsense", "verify"]),
        ([], ["COMMAND"]),
        (["verify", "--backend", "gpu"], ["--backend", "gpu", "reference"]),
        (["info", "--unknown"], ["--unknown"]),
    ],
)
def test_mistakes_are_one_line_and_code_2(argv, words, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("pixnerd")
    for word in words:
        assert word in err


def test_interruption_exits_130(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "collect", interrupted)
    assert main(["info"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_module_entry_prints_info_as_json():
    command = [sys.executable, "-m", "pixnerd_kernels.cli", "info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    data = json.loads(done.stdout)
    assert data["versions"]["pixnerd_kernels"] == __version__
    assert data["versions"]["torch"] == torch.__version__
    assert {row["op"] for row in data["ops"]} == backends.CPU_OPS | backends.TRITON_OPS
    libraries = {(row["op"], row["device"]): row for row in data["libraries"]}
    assert libraries["attention", "cpu"]["backend"] == "sdpa"
    assert all(row["others"] and all(row["others"].values()) for row in libraries.values())
    assert ("linear", "cpu") in libraries


def test_info_agrees_with_the_backend_choice():
    with backends.use_backend("reference"):
        data = info.collect()
    on_cpu = [row for row in data["ops"] if row["device"] == "cpu"]
    assert {row["backend"] for row in on_cpu} == {"reference"}
    for row in on_cpu:
        expected = backends.not_supported_reasons(row["op"], "triton", torch.device("cpu"))
        assert row["others"]["triton"] == expected
        assert row["others"]["cpu"]


def test_info_tells_why_the_core_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(backends, "_load_native", lambda: (None, "the moon is full"))
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "CPU core         none" in out
    # Once for the core itself, and once for each op and the linear layer, which would have taken it.
    assert out.count("the moon is full") == 1 + len(backends.CPU_OPS) + 1


def test_info_names_what_a_forced_backend_lacks(capsys):
    with backends.use_backend("triton"):
        data = info.collect()
    row = next(row for row in data["ops"] if row["device"] == "cpu" and row["op"] == "normalize_weights")
    assert row["backend"] == "none"
    assert "CUDA tensors" in row["error"]
    assert row["others"]["reference"] == []
