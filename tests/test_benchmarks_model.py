"""`python -m benchmarks model`: equal results are timed, unequal ones refused, and every product is counted."""

import json

import pytest

from benchmarks import model
from benchmarks.__main__ import main
from benchmarks.model_profile import launches, profile
from pixnerd_kernels.models import CONFIGS

SMALL = [
    "model",
    "--config",
    "tiny/4",
    "--size",
    "16",
    "--batch",
    "2",
    "--rounds",
    "2",
    "--provider",
    "eager",
    "ours",
]


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_both_agree_and_are_timed(tmp_path, capsys, training):
    file = tmp_path / "model.json"
    assert main([*SMALL, "--json", str(file), *(["--training"] if training else ["--profile"])]) == 0
    result = json.loads(file.read_text())["results"][0]
    assert result["errors"]["ours"] < 1e-4
    assert all(result["median_s"][name] > 0 and result["peak"][name] > 0 for name in ("eager", "ours"))
    assert "over ours" in capsys.readouterr().out
    if not training:
        assert result["stacks"]["ours"].keys() == result["stacks"]["eager"].keys()
        assert main(["report", str(file), "--out", str(tmp_path)]) == 0
        assert (tmp_path / "0-model.png").read_bytes().startswith(b"\x89PNG")
        assert "pixel head" in (tmp_path / "report.html").read_text()


def test_a_wrong_model_is_refused(monkeypatch, capsys):
    right = model.Setting.ours
    monkeypatch.setattr(model.Setting, "ours", lambda self: right(self) * 1.001)
    assert main(SMALL) == 1
    assert "WRONG" in capsys.readouterr().out


def test_the_profile_counts_every_product():
    """Against a count by hand, multiply-adds twice: the transformer's layers, the head's and the attention."""
    config = CONFIGS["tiny/4"]
    setting = model.Setting(config, 16, 1)
    result = profile(setting.ours, config, 16, 1)
    tokens, size, inner = 16, config.hidden_size, int(8 * config.hidden_size / 3)
    block = tokens * size * (4 * size + 3 * inner) + 6 * size**2 + 2 * tokens**2 * size
    channels, pixels = config.field_channels, 16 * 16
    generated = 2 * channels**2 * config.field_ratio
    head = config.num_field_blocks * (tokens * size * generated + pixels * generated)
    head += pixels * channels * 2 * config.in_channels + 16 * channels * config.max_freqs**2
    ends = tokens * size * 16 + 256 * size + size**2
    assert result["flops"] == 2 * (config.num_blocks * block + head + ends)
    assert sum(result["shares"].values()) == pytest.approx(1)


def test_fewer_launches_than_plain_pytorch():
    counts = launches(
        lambda blocks: model.Setting(model.replace(CONFIGS["tiny/4"], num_blocks=blocks), 16, 1)
    )
    assert counts["ours"]["block"] < counts["eager"]["block"] / 2
