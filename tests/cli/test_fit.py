"""`pixnerd fit`: reaches its PSNR on a small photograph, decodes finer without noise, and reads any image."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pixnerd_kernels.cli import fields, main, pictures

SMALL = ["--patch", "8", "--channels", "16", "--hidden", "32", "--steps", "150", "--no-compare"]


def pixels(path):
    return np.asarray(Image.open(path), dtype=np.float64) / 255


def decibels(one, other):
    return -10 * math.log10(((one - other) ** 2).mean())


@pytest.fixture
def photograph(tmp_path):
    """48 x 34 real pixels, as a file."""
    path = tmp_path / "photo.png"
    pictures.load("china").crop((100, 60, 292, 196)).resize((48, 34), Image.Resampling.BOX).save(path)
    return path


def test_fit_reaches_its_psnr_and_decodes_finer(photograph, tmp_path, capsys):
    out = tmp_path / "results" / "deep"
    assert main(["fit", str(photograph), "--out", str(out), *SMALL]) == 0
    report = json.loads((out / "fit.json").read_text())
    cropped = pixels(photograph)[1:33]
    decoded = {factor: pixels(out / report["files"][f"{factor}x"]) for factor in (1, 2, 4)}
    assert report["psnr_db"] > 32
    assert decibels(decoded[1], cropped) == pytest.approx(report["psnr_db"], abs=0.01)
    assert report["size"] == [48, 32]
    assert report["fields"]["count"] == 24
    assert report["compare"] is None
    assert "PSNR" in capsys.readouterr().out
    for factor in (2, 4):
        # The pixels themselves are among the finer samples, so fields decode the same colours there.
        assert np.abs(decoded[factor][::factor, ::factor] - decoded[1]).max() <= 1 / 255
        smooth = np.asarray(pictures.bicubic(Image.open(photograph).crop((0, 1, 48, 33)), factor)) / 255
        inner = slice(2 * factor, -2 * factor)
        assert decibels(decoded[factor][inner, inner], smooth[inner, inner]) > 25
    picture = pixels(out / "side_by_side.png")
    assert picture.std() > 0.1


def test_fit_is_reproducible_and_the_seed_matters(photograph, tmp_path):
    images = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        argv = ["fit", str(photograph), "--out", str(tmp_path / name), *SMALL, "--steps", "5", "--seed", seed]
        assert main(argv) == 0
        images.append(pixels(tmp_path / name / "decoded_2x.png"))
    assert (images[0] == images[1]).all()
    assert (images[0] != images[2]).any()


def test_compare_times_both_on_the_same_work(photograph, tmp_path):
    argv = ["fit", str(photograph), "--out", str(tmp_path), *SMALL[:-1], "--steps", "2", "--blocks", "2"]
    assert main(argv) == 0
    report = json.loads((tmp_path / "fit.json").read_text())
    timing = report["compare"]
    ours, eager = timing["ours_seconds_per_step"], timing["eager_seconds_per_step"]
    assert min(ours, eager) > 0
    assert timing["ratio"] == pytest.approx(eager / ours)
    assert report["machine"]["torch"] == torch.__version__


def test_eager_and_fused_fields_are_the_same_function():
    shape = fields.Shape(patch=6, channels=9, hidden=20, blocks=2, frequencies=3)
    image = torch.rand(12, 18, 3)
    made = []
    for block in (fields.fused_block, fields.eager_block):
        torch.manual_seed(3)
        one = fields.PatchFields(image, shape, 10, 0.1, block)
        one.step()
        made.append(one)
    torch.testing.assert_close(made[0].decode(2), made[1].decode(2), rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(made[0].params, made[1].params, strict=True):
        assert ours.grad.norm() > 0
        assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm()


def test_targets_overlap_their_neighbours():
    shape = fields.Shape(patch=4, channels=4, hidden=4, blocks=1, frequencies=2)
    image = torch.rand(8, 12, 3)
    target = fields.PatchFields(image, shape, 1, 0.1).target.view(2, 3, 7, 7, 3)
    assert torch.equal(target[0, 1, 1:, :], image[0:6, 3:10])
    assert torch.equal(target[0, 0, 0], target[0, 0, 1])
    assert torch.equal(target[1, 2, 5], target[1, 2, 4])


MODES = {
    "L": lambda im: im.convert("L"),
    "LA": lambda im: im.convert("LA"),
    "RGBA": lambda im: im.convert("RGBA"),
    "P": lambda im: im.quantize(32),
    "1": lambda im: im.convert("1"),
    "I;16": lambda im: Image.fromarray(np.asarray(im.convert("L"), dtype=np.uint16) * 257),
    "CMYK": lambda im: im.convert("CMYK"),
}


@pytest.mark.parametrize("mode", MODES)
def test_any_kind_of_image_is_read(mode, photograph, tmp_path):
    original = Image.open(photograph)
    path = tmp_path / "image.tif"
    MODES[mode](original).save(path)
    assert Image.open(path).mode == mode
    read = pictures.load(str(path))
    assert read.mode == "RGB"
    expected = (
        MODES[mode](original).convert("RGB") if mode != "I;16" else original.convert("L").convert("RGB")
    )
    assert np.abs(np.asarray(read, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


def test_transparency_is_laid_on_white(tmp_path):
    path = tmp_path / "clear.png"
    Image.new("RGBA", (20, 20), (200, 0, 0, 0)).save(path)
    assert np.asarray(pictures.load(str(path))).min() == 255


def test_bicubic_keeps_the_pixels(photograph):
    original = Image.open(photograph)
    enlarged = np.asarray(pictures.bicubic(original, 4), dtype=int)
    assert np.abs(enlarged[::4, ::4] - np.asarray(original, dtype=int)).max() <= 1


def bad_inputs(folder):
    """name -> (arguments, words of the message)"""
    photo = str(folder / "photo.png")
    text = folder / "text.png"
    text.write_text("this is no image")
    cut = folder / "cut.png"
    cut.write_bytes((folder / "photo.png").read_bytes()[:300])
    tiny = folder / "tiny.png"
    Image.new("RGB", (7, 40)).save(tiny)
    return {
        "missing": (["nowhere.png"], ["IMAGE", "nowhere.png", "does not exist", "china"]),
        "directory": ([str(folder)], ["IMAGE", "directory"]),
        "not an image": ([str(text)], ["IMAGE", "text.png", "cannot be read"]),
        "truncated": ([str(cut)], ["IMAGE", "cut.png", "cannot be read"]),
        "tiny": ([str(tiny), "--patch", "8"], ["IMAGE", "8x8", "7x40"]),
        "downscaled below a patch": ([photo, "--size", "10"], ["IMAGE", "16x16", "10x7"]),
        "out is a file": ([photo, "--out", str(text)], ["--out", "text.png"]),
        "out below a file": ([photo, "--out", str(text / "deeper")], ["--out", "deeper"]),
        "negative steps": ([photo, "--steps", "-3"], ["--steps", "at least 1", "-3"]),
        "a word for a number": ([photo, "--size", "big"], ["--size", "big"]),
        "no learning": ([photo, "--lr", "0"], ["--lr", "above 0", "0"]),
        "not finite": ([photo, "--lr", "nan"], ["--lr", "nan"]),
        "too large a seed": ([photo, "--seed", "9" * 20], ["--seed", "at most 9223372036854775807"]),
        "aliasing": ([photo, "--frequencies", "16"], ["--frequencies", "16"]),
        "crop outside": ([photo, "--crop", "48", "0"], ["--crop", "48x32", "[48, 0]"]),
    }


@pytest.mark.parametrize(
    "name",
    [
        "missing", "directory", "not an image", "truncated", "tiny", "downscaled below a patch", "out is a file",
        "out below a file", "negative steps", "a word for a number", "no learning", "not finite",
        "too large a seed", "aliasing", "crop outside",
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_code_2(name, photograph, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, words = bad_inputs(tmp_path)[name]
    assert main(["fit", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize("package", ["PIL.Image", "tqdm", "matplotlib", "sklearn.datasets"])
def test_missing_extras_are_named(package, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["fit", "flower", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert package.split(".")[0] in err
    assert 'pip install "pixnerd-kernels[cli]"' in err


def test_a_diverging_fit_says_so(photograph, tmp_path, capsys):
    argv = ["fit", str(photograph), "--out", str(tmp_path), *SMALL, "--steps", "20", "--lr", "1e38"]
    assert main(argv) == 2
    assert "--lr" in capsys.readouterr().err
