"""`pixnerd sample` from the command line: reproducible grids at any size, films, official checkpoints, mistakes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pixnerd_kernels.cli import main
from pixnerd_kernels.diffusion import pictures

DATA = Path(__file__).parents[1] / "data"


def official(name, path):
    """A checkpoint as the official training writes it."""
    tensors = load_file(DATA / f"{name}.safetensors")
    state = {f"ema_denoiser.{key[6:]}": value for key, value in tensors.items() if key.startswith("param.")}
    torch.save({"state_dict": state}, path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on images of two plain greys, which even a tiny model learns to tell apart."""
    folder = tmp_path_factory.mktemp("sample")
    for label, grey in (("dark", 0), ("light", 255)):
        (folder / "images" / label).mkdir(parents=True)
        Image.new("L", (8, 8), grey).save(folder / "images" / label / "x.png")
    arguments = [
        "--data", folder / "images", "--out", folder / "run", "--size", 8, "--channels", 1, "--patch-size", 4,
        "--max-freqs", 3, "--hidden-size", 32, "--num-heads", 2, "--num-blocks", 1, "--field-channels", 8,
        "--batch-size", 32, "--steps", 200, "--warmup", 10, "--learning-rate", 0.01, "--ema", 0.95,
        "--decoder-scales", 1, 2, "--sample-every", 0, "--quiet",
    ]  # fmt: skip
    assert main(["train", *map(str, arguments)]) == 0
    return folder / "run" / "checkpoint.safetensors"


def sample(checkpoint, out, *arguments):
    return main(["sample", str(checkpoint), "--out", str(out), *map(str, arguments)])


def pixels(path):
    return np.array(Image.open(path))


def test_the_same_seed_draws_the_same_pixels(run, tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert sample(run, tmp_path / f"{name}.png", "--n", 4, "--steps", 5, "--seed", seed) == 0
    assert "4 images of 8 x 8" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert not np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "c.png"))


@pytest.mark.parametrize("size", [8, 16, 20])
def test_classes_are_drawn_as_asked_at_any_size(run, tmp_path, size):
    out = tmp_path / "g.png"
    assert (
        sample(run, out, "--class", "light", "0", "--n", 3, "--columns", 3, "--size", size, "--steps", 10)
        == 0
    )
    drawn = pixels(out)
    assert drawn.shape == (size + 4, 3 * size + 8)
    first, second, third = (drawn[2:-2, 2 + i * (size + 2) :][:, :size].mean() for i in range(3))
    assert first > 170
    assert second < 85
    assert third > 170


@pytest.mark.parametrize("solver", ["euler", "heun", "adams"])
def test_every_solver_ends_in_the_film_s_last_frame(run, tmp_path, solver):
    out, gif = tmp_path / "g.png", tmp_path / "g.gif"
    assert sample(run, out, "--n", 2, "--steps", 6, "--solver", solver, "--gif", gif) == 0
    film = Image.open(gif)
    assert film.n_frames == 6
    film.seek(5)
    assert np.array_equal(np.array(film.convert("L")), pixels(out))


def test_guidance_one_and_an_interval_change_the_images(run, tmp_path):
    options = {"one": ["--guidance", 1], "two": [], "half": ["--guidance-interval", 0.3, 0.6]}
    drawn = []
    for name, arguments in options.items():
        assert sample(run, tmp_path / f"{name}.png", "--n", 2, "--steps", 8, *arguments) == 0
        drawn.append(pixels(tmp_path / f"{name}.png"))
    assert all(not np.array_equal(drawn[i], drawn[j]) for i, j in ((0, 1), (1, 2), (0, 2)))


def test_official_checkpoints_are_drawn_in_colour(tmp_path):
    path = official("c2i_tiny", tmp_path / "official.ckpt")
    arguments = ["--trained-size", 16, "--size", 24, "--n", 2, "--steps", 2, "--class", 9]
    assert sample(path, tmp_path / "g.png", *arguments) == 0
    drawn = pixels(tmp_path / "g.png")
    assert drawn.shape == (28, 54, 3)
    assert drawn[2:26, 2:26].std() > 10


def test_texts_are_drawn_from_their_features(tmp_path):
    path = official("t2i_tiny", tmp_path / "text.ckpt")
    torch.manual_seed(0)
    texts = {"features": torch.randn(2, 7, 24).bfloat16(), "null_features": torch.randn(7, 24)}
    torch.save(texts, tmp_path / "texts.pt")
    save_file(texts, tmp_path / "texts.safetensors")
    arguments = ["--trained-size", 16, "--size", 24, "--steps", 2, "--variant", "t2i_heavydecoder"]
    for name in ("texts.pt", "texts.safetensors"):
        assert sample(path, tmp_path / f"{name}.png", *arguments, "--features", tmp_path / name) == 0
    drawn = pixels(tmp_path / "texts.pt.png")
    assert drawn.shape == (28, 54, 3)
    assert np.array_equal(drawn, pixels(tmp_path / "texts.safetensors.png"))
    # Three images from two texts: the third has the first one's text, and noise of its own.
    more = [*arguments, "--features", tmp_path / "texts.pt", "--n", 3, "--columns", 2]
    assert sample(path, tmp_path / "three.png", *more) == 0
    three = pixels(tmp_path / "three.png")
    assert three.shape == (54, 54, 3)
    assert abs(three[:28].astype(int) - drawn).max() <= 1
    # What is not asked for is as the official text-to-image sampler has it.
    assert sample(path, tmp_path / "same.png", *more[:-4], "--guidance", 4, "--timeshift", 3) == 0
    assert np.array_equal(drawn, pixels(tmp_path / "same.png"))


def test_mistakes_with_texts_are_one_line(run, tmp_path, capsys):
    path = official("t2i_tiny", tmp_path / "text.ckpt")
    texts = {"features": torch.zeros(2, 7, 24), "null_features": torch.zeros(7, 24)}
    files = {
        "good": texts,
        "short": {**texts, "features": torch.zeros(2, 6, 24)},
        "alone": {"features": texts["features"]},
        "other": {"prompt_embeds": texts["features"]},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pt")
    heavy = [path, "--variant", "t2i_heavydecoder", "--trained-size", 16]
    cases = [
        ([path, "--features", "good.pt"], "text.ckpt: variant: expected 't2i' or 't2i_heavydecoder'"),
        ([path, "--variant", "c2i"], "the keys are those of a text-to-image model"),
        (heavy, "text.ckpt is a text-to-image checkpoint, and needs a file with the features"),
        ([*heavy, "--class", "1"], "text.ckpt is a text-to-image checkpoint, which takes --features"),
        ([run, "--features", "good.pt"], "is a class-to-image checkpoint, which takes --class"),
        ([*heavy, "--features", tmp_path / "none.pt"], "no features file at"),
        (
            [*heavy, "--features", tmp_path / "short.pt"],
            "features: expected the shape [n, 7, 24], got [2, 6, 24]",
        ),
        (
            [*heavy, "--features", tmp_path / "alone.pt"],
            "null_features: expected those of an empty text [7, 24]",
        ),
        (
            [*heavy, "--features", tmp_path / "other.pt"],
            "expected a tensor `features` [n, tokens, width], got None",
        ),
    ]
    for arguments, words in cases:
        assert sample(*arguments[:1], tmp_path / "g.png", *arguments[1:]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1, err
        assert words in err


def test_mistakes_are_one_line(run, tmp_path, capsys):
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"no checkpoint")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(run.read_bytes()[:2000])
    cases = [
        ([run, "--class", "5"], "--class: expected 0 to 1 or one of dark, light, got '5'"),
        ([run, "--size", "9"], "size: expected a multiple of 2"),
        ([run, "--out", "x.jpg"], "--out: expected a .png file"),
        ([run, "--gif", "x.png"], "--gif: expected a .gif file"),
        ([tmp_path / "absent.safetensors"], "no checkpoint at"),
        ([tmp_path / "absent.ckpt"], "no checkpoint at"),
        ([broken], "broken.ckpt: "),
        ([damaged], "damaged.safetensors: "),
    ]
    for arguments, words in cases:
        assert main(["sample", "--out", str(tmp_path / "g.png"), *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1, err
        assert words in err
    assert not (tmp_path / "g.png").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--order=7"], "--order: expected an integer of at most 4, got '7'"),
        (["--steps=0"], "--steps: expected an integer of at least 1, got '0'"),
        (["--n=-2"], "--n: expected an integer of at least 1, got '-2'"),
        (["--guidance=inf"], "--guidance: expected a finite number, got 'inf'"),
        (["--guidance-interval", "nan", "1"], "--guidance-interval: expected a finite number, got 'nan'"),
        (["--guidance-interval", "0.9", "0.1"], "--guidance-interval: expected LOW up to HIGH, got 0.9 0.1"),
        (["--fine-from=1.5"], "--fine-from: expected a time from 0 to below 1, got 1.5"),
        (["--fine-from=-1"], "--fine-from: expected a time from 0 to below 1, got -1"),
        (["--timeshift=0"], "--timeshift: expected a finite number above 0, got '0'"),
        (["--seed=9223372036854775808"], "--seed: expected an integer of at most 9223372036854775807"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_numbers_are_refused_before_the_checkpoint_is_read(options, words, tmp_path, capsys):
    assert sample(tmp_path / "absent.ckpt", tmp_path / "g.png", *options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert words in err


@pytest.mark.parametrize("argument", ["--out", "--gif"])
def test_a_folder_that_cannot_be_written_is_refused_before_drawing(
    argument, run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(pictures, "draw", lambda *_, **__: pytest.fail("the images are drawn"))
    (tmp_path / "file").touch()
    path = tmp_path / "file" / ("x.gif" if argument == "--gif" else "x.png")
    assert sample(run, tmp_path / "g.png", argument, path) == 2
    assert f"{argument}: expected a folder that can be written" in capsys.readouterr().err


def test_the_largest_seed_draws(run, tmp_path):
    assert sample(run, tmp_path / "g.png", "--n", 1, "--steps", 1, "--seed", 2**63 - 1) == 0
