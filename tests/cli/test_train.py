"""`pixnerd train` from the command line: a whole run, its interruption and continuation, and mistakes."""

import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from pixnerd_kernels import training
from pixnerd_kernels.cli import main
from pixnerd_kernels.training import checkpoint

TINY = [
    "--hidden-size", "32", "--num-heads", "2", "--num-blocks", "1", "--field-channels", "8",
    "--batch-size", "8", "--warmup", "2", "--sample-steps", "2",
]  # fmt: skip


def train(*arguments):
    return main(["train", *map(str, arguments)])


def start(data, out, *arguments):
    return train("--data", data, "--out", out, "--quiet", *TINY, *arguments)


def state(out):
    return checkpoint.load(out / "checkpoint.safetensors")[0]


@pytest.fixture
def folder(tmp_path):
    for label, colour in (("cold", (0, 0, 255)), ("warm", (255, 120, 0))):
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (20 + index, 18), colour).save(tmp_path / "images" / label / f"{index}.png")
    return tmp_path / "images"


def test_a_run_leaves_checkpoint_curve_and_grids(tmp_path, capsys):
    out = tmp_path / "run"
    assert start("digits", out, "--steps", 6, "--sample-every", 4, "--decoder-scales", 1, 2) == 0
    assert "6 steps done" in capsys.readouterr().out
    grids = sorted((out / "samples").iterdir())
    assert [grid.name for grid in grids] == ["step_000004.png", "step_000006.png"]
    # Ten classes of eight images of 8 x 8 with gaps of 2.
    assert Image.open(grids[0]).size == (82, 102)
    losses = state(out)["losses"]
    assert len(losses) == 6
    assert torch.isfinite(losses).all()
    assert np.array(Image.open(out / "loss.png").convert("L")).min() < 100


def test_the_progress_bar_shows_loss_and_speed(tmp_path, capsys):
    assert train("--data", "digits", "--out", tmp_path, "--steps", 3, "--sample-every", 0, *TINY) == 0
    assert re.search(r"3/3.*images_per_s=\d+, loss=\d\.\d{4}", capsys.readouterr().err)


def test_a_folder_trains_and_names_what_it_skips(folder, tmp_path, capsys):
    (folder / "cold" / "broken.jpg").write_bytes(b"x")
    assert start(folder, tmp_path / "run", "--size", 16, "--steps", 2) == 0
    err = capsys.readouterr().err
    assert "skipped 1 unreadable images" in err
    assert "broken.jpg: UnidentifiedImageError" in err
    _, content = checkpoint.load(tmp_path / "run" / "checkpoint.safetensors")
    assert content["classes"] == ["cold", "warm"]
    assert content["settings"]["model"]["num_classes"] == 2
    assert content["settings"]["model"]["in_channels"] == 3


def test_ctrl_c_saves_and_a_resumed_run_ends_with_the_same_bits(tmp_path):
    """A real process and a real signal."""
    steps = 40
    arguments = ["--data", "digits", "--steps", str(steps), "--sample-every", "0", *TINY]
    command = [sys.executable, "-m", "pixnerd_kernels.cli", "train", *arguments]
    command += ["--out", str(tmp_path / "cut"), "--save-every", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "cut" / "checkpoint.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    done = int(re.search(r"stopped after (\d+) of 40 steps", out)[1])
    assert len(state(tmp_path / "cut")["losses"]) == done < steps
    assert train("--resume", "--out", tmp_path / "cut", "--quiet") == 0
    assert train("--out", tmp_path / "whole", "--quiet", *arguments) == 0
    cut, whole = state(tmp_path / "cut"), state(tmp_path / "whole")
    assert cut.keys() == whole.keys()
    assert [name for name in cut if not torch.equal(cut[name], whole[name])] == []


@pytest.mark.parametrize(("choice", "stored"), [("auto", "off"), ("bf16", "bf16")])
def test_autocast_is_a_setting_of_the_run(tmp_path, capsys, choice, stored):
    assert start("digits", tmp_path, "--steps", 2, "--autocast", choice) == 0
    tensors, content = checkpoint.load(tmp_path / "checkpoint.safetensors")
    assert content["settings"]["autocast"] == stored
    assert torch.isfinite(tensors["losses"]).all()
    assert tensors["model.patch_embed.weight"].dtype == torch.float32
    capsys.readouterr()
    other = "bf16" if stored == "off" else "off"
    assert "autocast is" in failure(capsys, "--resume", "--out", tmp_path, "--autocast", other)


def failure(capsys, *arguments):
    """The one line that a mistaken command prints."""
    assert train(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err


def test_mistakes_are_one_line(folder, tmp_path, capsys):
    run = tmp_path / "run"
    assert "--data: expected" in failure(capsys, "--out", run)
    assert "got 'nowhere'" in failure(capsys, "--data", "nowhere", "--out", run)
    assert "one of XL/16" in failure(capsys, "--data", "digits", "--model", "huge", "--out", run)
    assert "size: expected a multiple of the patch size 4, got 10" in failure(
        capsys, "--data", "digits", "--size", 10, "--out", run
    )
    assert "no checkpoint at" in failure(capsys, "--resume", "--out", run)
    (tmp_path / "empty").mkdir()
    assert "found none" in failure(capsys, "--data", tmp_path / "empty", "--out", run)
    assert not run.exists()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--guidance=nan", "--guidance: expected a finite number, got 'nan'"),
        ("--guidance=-inf", "--guidance: expected a finite number, got '-inf'"),
        ("--guidance=strong", "--guidance: expected a finite number, got 'strong'"),
        ("--steps=-1", "--steps: expected an integer of at least 1, got '-1'"),
        ("--batch-size=0", "--batch-size: expected an integer of at least 1, got '0'"),
        ("--sample-steps=0", "--sample-steps: expected an integer of at least 1, got '0'"),
        ("--sample-steps=9999999999", "--sample-steps: expected an integer of at most 2147483647"),
        ("--sample-every=-1", "--sample-every: expected an integer of at least 0, got '-1'"),
        ("--learning-rate=0", "--learning-rate: expected a finite number above 0, got '0'"),
        ("--ema=nan", "--ema: expected a finite number, got 'nan'"),
        ("--ema=2", "ema: expected a number from 0 to 1, got 2.0"),
        ("--cooldown=-1", "cooldown: expected a number from 0 to 1, got -1.0"),
        ("--class-dropout=1.5", "class_dropout: expected a number from 0 to 1, got 1.5"),
        ("--weight-decay=-1", "weight_decay: expected a finite number of at least 0, got -1.0"),
        ("--decoder-scales=0.5", "decoder_scales: expected a finite number of at least 1, got 0.5"),
        ("--hidden-size=33", "hidden_size: expected a multiple of 4 * num_heads"),
        ("--patch-size=5", "size: expected a multiple of the patch size 5, got 64"),
    ],
)
def test_numbers_are_refused_before_the_images_are_read(option, words, tmp_path, monkeypatch, capsys):
    def load_dataset(*_):
        raise AssertionError("the images are read")

    monkeypatch.setattr(training, "load_dataset", load_dataset)
    out = tmp_path / "run"
    assert words in failure(capsys, "--data", tmp_path, "--out", out, option)
    assert not out.exists()


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("the run began"))
    (tmp_path / "file").touch()
    line = failure(capsys, "--data", "digits", "--out", tmp_path / "file" / "run", *TINY)
    assert "--out: expected a folder that can be written" in line


def test_a_run_is_neither_overwritten_nor_continued_otherwise(tmp_path, capsys):
    assert start("digits", tmp_path, "--steps", 2) == 0
    before = state(tmp_path)
    capsys.readouterr()
    assert "holds a run already" in failure(capsys, "--data", "digits", "--out", tmp_path)
    line = failure(capsys, "--resume", "--out", tmp_path, "--steps", 9, "--field-channels", 16)
    assert "steps is 9, the run has 2; model.field_channels is 16, the run has 8" in line
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "not a readable checkpoint" in failure(capsys, "--resume", "--out", tmp_path)
    assert len(before["losses"]) == 2


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint(tmp_path, capsys):
    import resource

    assert start("digits", tmp_path, "--steps", 4, "--save-every", 0, "--sample-every", 0) == 0
    assert start("digits", tmp_path / "b", "--steps", 4, "--sample-every", 0) == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        (tmp_path / "c").mkdir()
        line = failure(capsys, "--data", "digits", "--out", tmp_path / "c", "--quiet", "--steps", 1, *TINY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "could not save the checkpoint" in line
    assert not (tmp_path / "c" / "checkpoint.safetensors").exists()
