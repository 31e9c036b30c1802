"""The `pixnerd` command itself: exit codes, one-line errors, the module entry, info."""

import json
import re
import subprocess
import sys

import pytest
import torch

from pixnerd_kernels import __version__, backends, training
from pixnerd_kernels.cli import COMMANDS, arguments, info, main


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


DEVICE_COMMANDS = (["sample", "absent.ckpt"], ["train", "--data", "digits"])


def refused(argv, capsys):
    """The one line on stderr of a command that ends with code 2."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith(f"pixnerd {argv[0]}: error: ")
    return err


@pytest.mark.parametrize("argv", DEVICE_COMMANDS, ids=lambda argv: argv[0])
@pytest.mark.parametrize("device", ["foo", "cuda", "cuda:1", "mps", "meta", ""])
def test_a_device_that_is_not_there_is_named(argv, device, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    line = refused([*argv, "--device", device], capsys)
    assert f"--device: expected cpu (torch finds no accelerator here), got {device!r}" in line


@pytest.mark.parametrize("argv", DEVICE_COMMANDS, ids=lambda argv: argv[0])
def test_the_devices_that_are_there_are_listed(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    line = refused([*argv, "--device", "cuda:2"], capsys)
    assert "--device: expected one of cpu, cuda, cuda:0, cuda:1, got 'cuda:2'" in line
    assert [arguments.device(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]


@pytest.mark.parametrize("argv", [*DEVICE_COMMANDS, ["fit", "china"]], ids=lambda argv: argv[0])
def test_a_forced_backend_that_cannot_run_is_refused_before_the_work(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with backends.use_backend("triton"):
        line = refused(argv, capsys)
    assert re.search("PIXNERD_BACKEND: .* forced backend 'triton': - it needs CUDA tensors", line)


def test_a_forced_backend_that_gives_up_later_is_one_line(tmp_path, monkeypatch, capsys):
    """Some of its limits show in the model's sizes only."""

    def train(*_, **__):
        raise NotImplementedError(
            "pixel_decoder cannot run on the forced backend 'triton':\n  - one\n  - two"
        )

    monkeypatch.setattr(training, "train", train)
    line = refused(["train", "--data", "digits", "--out", str(tmp_path / "run")], capsys)
    assert "pixel_decoder cannot run on the forced backend 'triton': - one - two" in line


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
