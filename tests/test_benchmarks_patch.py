"""`python -m benchmarks patch`: a patched model that agrees is timed, another refused."""

import json

import pytest

from benchmarks import patch
from benchmarks.__main__ import main

SMALL = ["patch", "--width", "64", "--blocks", "1", "--field-blocks", "1", "--size", "32", "--rounds", "2"]


@pytest.mark.parametrize(
    "kind", [[], ["--training"], ["--meanflow"]], ids=["forward", "training", "meanflow"]
)
def test_all_agree_and_are_timed(tmp_path, capsys, kind, threads):
    threads(1)
    file = tmp_path / "patch.json"
    assert main([*SMALL, "--json", str(file), *kind]) == 0
    document = json.loads(file.read_text())
    assert document["median_s"].keys() == document["peak"].keys() == patch.VARIANTS.keys()
    assert 0 < document["errors"]["all"] < 1e-4
    assert "speedup" in capsys.readouterr().out


def test_a_model_that_stays_as_it_is_is_refused(monkeypatch, capsys):
    original = patch.official

    def zeroed(*sizes):
        model = original(*sizes)
        model.blocks[-1].param_generator1[0].weight.data.zero_()
        model.blocks[-1].param_generator1[0].bias.data.zero_()
        return model

    monkeypatch.setattr(patch, "official", zeroed)
    assert main(SMALL) == 1
    assert "WRONG: blocks: left blocks.1" in capsys.readouterr().out
