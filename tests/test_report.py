"""`python -m benchmarks report` on the committed results and on broken ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Last, so that an installed package is not shadowed by the checkout.
sys.path.append(str(ROOT))

from benchmarks.__main__ import main  # noqa: E402
from benchmarks.report import to_html  # noqa: E402


def test_the_committed_results_become_one_page(tmp_path: Path) -> None:
    assert main(["report", str(ROOT / "benchmarks/results/cpu-ops"), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "neural_field_mlp-plain-forward" in page
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http-equiv", "")
    assert (tmp_path / "0-ops.png").read_bytes().startswith(b"\x89PNG")


def test_markdown_to_html_escapes() -> None:
    page = to_html("## A & b\n\n| x | y |\n|---|---:|\n| **1** | `<2>` |")
    assert page == (
        "<h2>A &amp; b</h2>\n<table><tr><th>x</th><th>y</th></tr>"
        "<tr><td><b>1</b></td><td><code>&lt;2&gt;</code></td></tr></table>"
    )


def test_what_is_no_result_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "broken.json"
    file.write_text("[]")
    assert main(["report", str(file), "--out", str(tmp_path)]) == 2
    assert "expected a benchmark's JSON" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--out", str(tmp_path)]) == 2
