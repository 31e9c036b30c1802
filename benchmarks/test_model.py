"""pytest-benchmark over whole models, at the size of the smallest; `python -m benchmarks model` has the real ones."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.model import PROVIDERS, Setting
from pixnerd_kernels.models import CONFIGS


@pytest.mark.parametrize("provider", PROVIDERS)
def test_forward(provider: str, benchmark: BenchmarkFixture) -> None:
    setting = Setting(CONFIGS["tiny/4"], 32, 2)
    with torch.inference_mode():
        torch._dynamo.reset()
        forward, expected = setting.forwards([provider])[provider], setting.eager()
        assert (forward() - expected).norm() <= 1e-4 * expected.norm()
        benchmark.group = "model-tiny/4"
        benchmark(forward)
