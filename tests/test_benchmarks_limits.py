"""What the benchmarks say of the processor: its limit, how near libraries come, and what a chunk of patches costs."""

from __future__ import annotations

import json
import timeit
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import chunks, products, timing
from benchmarks.__main__ import main


@pytest.mark.parametrize(("isa", "lanes"), [("portable", 4), ("avx2", 8), ("avx512", 16)])
def test_the_limit_of_the_arithmetic(core: Any, isa: str, lanes: int) -> None:
    """The multiply-adds are really done: all of them, on every thread, and none is optimised away."""
    if isa not in core.isas():
        pytest.skip(f"this processor does not run {isa}")
    before = core.isa()
    core.set_isa(isa)
    try:
        once = core.multiply_adds(1, 1)
        assert once % (2 * lanes) == 0
        assert [core.multiply_adds(n, threads) for n, threads in ((10, 1), (1, 2), (7, 2))] == [
            10 * once, 2 * once, 14 * once,
        ]  # fmt: skip

        def seconds(steps: int) -> float:
            return min(timeit.repeat(lambda: core.multiply_adds(steps, 1), number=1, repeat=5))

        assert seconds(1_000_000) > 20 * seconds(10_000)
        (peak,) = timing.multiply_adds()
        assert isa in peak.label
        assert peak.work == torch.get_num_threads() * once * timing._STEPS
    finally:
        core.set_isa(before)


def test_a_chunk_s_cost_is_fitted(core: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known numbers are found again, and a small run is fitted, saved and drawn."""
    found = chunks.fit([10, 20, 40], [2e-3 + 1e-4 * n for n in (10, 20, 40)])
    assert found["chunk_s"] == pytest.approx(2e-3)
    assert found["row_s"] == pytest.approx(1e-4)
    assert found["largest_error"] < 1e-9
    assert chunks.fit([1, 2, 3], [1.0, 2.0, 1.0])["largest_error"] > 0.3
    monkeypatch.setitem(chunks.HEADS, "XL/16", (96, 640))
    words = ["chunks", "--head", "XL/16", "--rows", "16", "48", "96", "--rounds", "2", "--out", str(tmp_path)]
    assert main(words) == 0
    results = json.loads((tmp_path / "chunks.json").read_text())["results"]
    assert [entry["product"] for entry in results] == [*chunks.TRAINING, "a training step's chunk"]
    for *parts, total in zip(*(entry["seconds"] for entry in results), strict=True):
        counted = sum(count * seconds for count, seconds in zip(chunks.TRAINING.values(), parts, strict=True))
        assert total == pytest.approx(counted)
    assert results[-1]["flops_a_row"] == 4 * 2 * 96 * 640
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "0-chunks.png").read_bytes().startswith(b"\x89PNG")
    assert main(["chunks", "--rows", "1", "2"]) == 2


def test_products_by_library(
    core: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch does not offer oneDNN's linear layer")
    words = ["products", "--config", "tiny/4", "--rows", "16", "--rounds", "2", "--out", str(tmp_path)]
    assert main(words) == 0
    results = json.loads((tmp_path / "products.json").read_text())["results"]
    assert len(results) == 4 * len(products.PASSES)
    assert len(results[0]["flops_per_s"]) == 4
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "0-products.png").read_bytes().startswith(b"\x89PNG")
    right = products.products

    def wrong(*sizes: int) -> Any:
        found = right(*sizes)
        call = found["forward"]["the core"]
        return found | {"forward": found["forward"] | {"the core": lambda: call() * 1.001}}

    monkeypatch.setattr(products, "products", wrong)
    assert main(words) == 1
    assert "WRONG: qkv, forward: the core" in capsys.readouterr().out
