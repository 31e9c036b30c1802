"""pytest-benchmark over the registry: every case and provider, checked against float64 and then timed.

Smoke sizes by default, the reported shapes with `--full-size`: `python -m pytest benchmarks --full-size`.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.check import Truth
from benchmarks.providers import PROVIDERS, call
from benchmarks.registry import CASES


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", CASES)
def test_op(name: str, provider: str, request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> None:
    case = CASES[name]
    shape = case.size("full" if request.config.getoption("--full-size") else "smoke")
    made = case.make(shape)
    function = call(case, PROVIDERS[provider].prepare(case, shape), made)
    wrong = [error for error in Truth(case, shape, made).errors(function()) if not error.ok]
    assert not wrong, "; ".join(map(str, wrong))
    benchmark.group = name
    flops = case.flops(shape, PROVIDERS[provider].recompute)
    benchmark.extra_info.update(flops=flops, bytes=case.bytes(shape), threads=torch.get_num_threads())
    benchmark(function)
