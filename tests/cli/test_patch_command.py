"""`pixnerd patch --check` on a checkout: here one whose modules are the stand-ins."""

import json
import sys
from pathlib import Path

import pytest

from pixnerd_kernels.cli import main

STANDINS = Path(__file__).parents[1] / "patching"
MODELS = {"c2i": "PixNerDiT", "t2i": "TextPixNerDiT", "t2i_heavydecoder": "HeavyPixNerDiT"}


@pytest.fixture
def checkout(tmp_path, monkeypatch, threads):
    threads(1)
    folder = tmp_path / "src" / "models" / "transformer"
    folder.mkdir(parents=True)
    for name, cls in MODELS.items():
        (folder / f"pixnerd_{name}.py").write_text(f"from foreign import {cls} as PixNerDiT\n")
    monkeypatch.syspath_prepend(str(STANDINS))
    return tmp_path


def test_a_checkout_passes(checkout, capsys):
    assert main(["patch", "--check", str(checkout), "--kind", "official"]) == 0
    out = capsys.readouterr().out
    assert out.count("restored bit for bit: ok") == 6
    assert out.count(" pixel_decoder ") == out.count(", 0 left, ") == 6
    assert "replaced: w1, w2 normalised" in out
    assert "src" not in sys.modules
    assert str(checkout) not in sys.path


def test_json(checkout, capsys):
    assert main(["patch", "--check", str(checkout), "--kind", "official", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results[0]["label"] == "class-to-image, patches of 8"
    assert all(result["passed"] and result["report"]["entries"] for result in results)


def test_a_model_with_nothing_to_replace_fails(checkout, capsys):
    file = checkout / "src" / "models" / "transformer" / "pixnerd_c2i.py"
    file.write_text(
        "import torch\n"
        "class PixNerDiT(torch.nn.Linear):\n"
        "    def __init__(self, patch_size, **options): super().__init__(3 * patch_size, 1)\n"
        "    def forward(self, x, t, y): return super().forward(x)\n"
    )
    assert main(["patch", "--check", str(checkout), "--kind", "official"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [("nowhere", "official", "expected a folder"), (".", "flow", "not a checkout of kind 'flow'")],
)
def test_mistakes_in_one_line(checkout, monkeypatch, capsys, path, kind, message):
    monkeypatch.chdir(checkout)
    assert main(["patch", "--check", path, "--kind", kind]) == 2
    assert message in capsys.readouterr().err
