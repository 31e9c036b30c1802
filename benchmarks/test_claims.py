"""pytest-benchmark over the cases of `python -m benchmarks claims`, at sizes that mean nothing: that each one runs."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.claims import jobs, worker

ONCE = jobs.Effort(seconds=0.01, least=1, most=1, traced_s=0.0)


@pytest.mark.parametrize("name", jobs.names())
def test_case(name: str, benchmark: BenchmarkFixture) -> None:
    job = jobs.Job(name, ("eager", "ours"), ONCE, smoke=True)
    benchmark.group = "claims"
    result = benchmark.pedantic(worker.run_job, (job,), rounds=1)
    assert result["status"] == "ok", result.get("reason")
