"""`--base REF` and `curves`: what they compare, sweep, refuse and draw."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# Last, so that an installed package is not shadowed by the checkout.
sys.path.append(str(ROOT))

from benchmarks import compare, ops, worker  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.registry import CASES  # noqa: E402
from benchmarks.timing import Budget, Yardstick  # noqa: E402
from benchmarks.worker import Job  # noqa: E402

FORWARD = "neural_field_mlp-plain-forward"
JOB = Job(FORWARD, ("ours",), Budget(), size="smoke")


def launcher(seconds: dict[str, list[float]], log: list[str]) -> Any:
    def launch(job: Job, root: Path) -> dict[str, Any]:
        log.append(root.name)
        return {"providers": {"ours": {"median_s": seconds[root.name].pop(0), "memory": {"peak": 7}}}}

    return launch


def test_ratios_are_taken_round_by_round_and_the_order_alternates() -> None:
    log: list[str] = []
    seconds = {"base": [2.0, 9.0, 4.0, 3.0, 6.0], "now": [1.0, 3.0, 4.0, 2.0, 2.0]}
    roots = {"base": Path("base"), "now": Path("now")}
    result = compare.compare(JOB, roots, launcher(seconds, log))
    assert log[:4] == ["base", "now", "now", "base"]
    assert result["base_over_now"] == 2.0
    assert (result["least_ratio"], result["largest_ratio"]) == (1.0, 3.0)
    assert result["median_s"] == {"base": 4.0, "now": 2.0}


def test_a_side_that_cannot_run_is_named() -> None:
    def launch(job: Job, root: Path) -> dict[str, Any]:
        if root.name == "base":
            return {"status": "error", "reason": "the process exited with 1", "providers": {}}
        return {"providers": {"ours": {"median_s": 1.0}}}

    result = compare.compare(JOB, {"base": Path("base"), "now": Path("now")}, launch)
    assert result["status"] == "error"
    assert result["reason"] == "base cannot run it: the process exited with 1"


def test_an_unknown_commit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ops", "--case", FORWARD, "--base", "no-such-branch"]) == 2
    assert "git knows no commit 'no-such-branch'" in capsys.readouterr().err


def test_the_commit_s_package_is_the_one_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process started there; its core is not built here, which takes half a minute."""
    monkeypatch.setattr(compare, "_build", lambda tree: None)
    root = compare.checkout(compare.resolve("HEAD"), tmp_path)
    code = "import pixnerd_kernels, benchmarks.registry; print(pixnerd_kernels.__file__)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).resolve().is_relative_to(tmp_path)
    assert compare.checkout(compare.resolve("HEAD"), tmp_path) == root


def test_a_comparison_is_written_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[str] = []
    seconds = {"base": [2.0] * 5, ROOT.name: [1.0] * 5}
    monkeypatch.setattr(compare, "checkout", lambda commit, folder: tmp_path / "base")
    monkeypatch.setattr(ops, "launch_process", launcher(seconds, log))
    words = ["ops", "--size", "smoke", "--malloc", "default", "--case", FORWARD, "--base", "HEAD"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    assert "2.00x (2.00-2.00)" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "comparison.json"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "0-comparison.png").read_bytes().startswith(b"\x89PNG")


def test_curves_sweep_the_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.ones(8, 8)
    small = [
        Yardstick("matmul", "8^3 float32 matmul", 2 * 8**3, lambda: a @ a),
        Yardstick("copy", "tiny copy", 2 * a.nbytes, a.clone),
    ]
    monkeypatch.setattr(worker, "yardsticks", lambda: small)
    monkeypatch.setattr("benchmarks.curves.QUICK", Budget(seconds=0.01, least=2, most=2, warm_up=0))
    monkeypatch.setattr(ops, "launch_process", worker.run_job)
    assert (
        main(["curves", "--size", "smoke", "--sweep", "batch", "hidden-training", "--out", str(tmp_path)])
        == 0
    )
    results = json.loads((tmp_path / "curves.json").read_text())["results"]
    batch = CASES["pixel_decoder-l-256-forward"].smoke["B"]
    assert [(r["sweep"], r["value"]) for r in results[:2]] == [("batch", batch), ("batch", 2 * batch)]
    assert [r["shape"]["D2"] for r in results[2:]] == [r["value"] for r in results[2:]]
    assert results[1]["bytes"] > results[0]["bytes"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert main(["report", str(tmp_path), "--out", str(tmp_path)]) == 0
    assert "hidden-training" in (tmp_path / "report.html").read_text()


def test_unknown_sweeps_list_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curves", "--sweep", "depth"]) == 2
    assert "'depth'; known: batch, resolution" in capsys.readouterr().err
