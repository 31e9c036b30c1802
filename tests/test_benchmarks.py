"""The benchmarks themselves: what they count, what they refuse, and what they keep."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
# Last, so that an installed package is not shadowed by the checkout.
sys.path.append(str(ROOT))

from benchmarks import ops, provenance, tables, worker  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.check import Truth  # noqa: E402
from benchmarks.heads import PixelDecoder  # noqa: E402
from benchmarks.memory import allocation_peak  # noqa: E402
from benchmarks.providers import PROVIDERS, Provider, call, select_providers  # noqa: E402
from benchmarks.registry import CASES, select_cases  # noqa: E402
from benchmarks.tangents import Tangent  # noqa: E402
from benchmarks.timing import Budget, Samples, Yardstick, interleave  # noqa: E402

PRODUCTS = [name for name, case in CASES.items() if case.op.bound == "matmul"]
FORWARD = "neural_field_mlp-plain-forward"
TRAINING = "neural_field_mlp-plain-training"


def small_yardsticks(**sizes: int) -> list[Yardstick]:
    a = torch.ones(8, 8)
    return [
        Yardstick("matmul", "8^3 float32 matmul", 2 * 8**3, lambda: a @ a),
        Yardstick("copy", "tiny copy", 2 * a.nbytes, a.clone),
    ]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Run `ops` in this process on smoke shapes with tiny yardsticks; returns the exit code and the JSON."""
    monkeypatch.setattr(worker, "yardsticks", small_yardsticks)
    monkeypatch.setattr("benchmarks.breakdown.yardsticks", small_yardsticks)
    monkeypatch.setattr(ops, "QUICK", Budget(seconds=0.01, least=2, most=2, warm_up=0))

    def call_main(*arguments: str, launch: Any = worker.run_job) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(ops, "launch_process", launch)
        file = tmp_path / "result.json"
        code = main(["ops", "--size", "smoke", "--quick", "--threads", "1", "--json", str(file), *arguments])
        return code, json.loads(file.read_text())

    threads = torch.get_num_threads()
    yield call_main
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("size", ["full", "smoke"])
def test_flops_match_the_counter(name: str, size: str) -> None:
    case = CASES[name]
    shape = case.size(size)
    with torch.device("meta"):
        made = {key: torch.empty(dims) for key, dims in case.sizes(shape).items()}
    with FlopCounterMode(display=False) as counter:
        call(case, lambda tensors: case.op.eager(shape, tensors, torch.float32), made)()
    # Forward mode multiplies by the zeros that the weights of plain linear layers have for tangents.
    zeros = 0
    if isinstance(case.op, Tangent) and isinstance(case.op.op, PixelDecoder):
        zeros = case.op.op.linear_flops(shape, recompute=False)
    assert counter.get_total_flops() - zeros == case.flops(shape, recompute=False)


def test_headline_flops() -> None:
    """The figures that the targets are stated in: 2 and 7 products of 1.07 GFLOP, 3 and 11 when gated."""
    product = 2 * 256 * 256 * 64 * 128
    assert CASES[FORWARD].flops(CASES[FORWARD].shape, recompute=True) == 2 * product
    assert CASES[TRAINING].flops(CASES[TRAINING].shape, recompute=True) == 7 * product
    gated = CASES["neural_field_mlp-gated-training"]
    assert gated.flops({"N": 256, "S": 256, "D1": 64, "D2": 128}, recompute=True) == 11 * product


def test_bytes_by_hand() -> None:
    shape = {"N": 2, "S": 3, "D1": 5, "D2": 7}
    x, weights = 2 * 3 * 5, 2 * 2 * 5 * 7 + 5
    assert CASES[FORWARD].bytes(shape) == 4 * (2 * x + weights)
    backward = (2 * x + weights) + (x + weights)
    assert CASES[TRAINING].bytes(shape) == 4 * (2 * x + weights + backward)
    assert CASES["neural_field_mlp-bf16-forward"].bytes(shape) == 2 * (2 * x + weights)


@pytest.mark.parametrize("provider", ["eager", "ours"])
@pytest.mark.parametrize("name", CASES)
def test_every_case_is_right_at_smoke_size(name: str, provider: str) -> None:
    case = CASES[name]
    made = case.make(case.smoke)
    function = call(case, PROVIDERS[provider].prepare(case, case.smoke), made)
    errors = Truth(case, case.smoke, made).errors(function())
    assert [str(error) for error in errors if not error.ok] == []


@pytest.mark.parametrize("damage", ["scaled", "nan", "shape", "gradient"])
def test_a_wrong_provider_is_refused(
    damage: str, run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepare(case: Any, shape: Any) -> Any:
        def compute(tensors: Any) -> torch.Tensor:
            out = case.op.eager(shape, tensors, case.dtype)
            if damage == "gradient":
                return out + 1e-3 * (tensors["w1"] - tensors["w1"].detach()).sum()
            return {"scaled": out * 1.001, "nan": out * float("nan"), "shape": out[:1]}[damage]

        return compute

    monkeypatch.setitem(PROVIDERS, "broken", Provider(prepare, recompute=False))
    name = TRAINING if damage == "gradient" else FORWARD
    code, document = run("--case", name, "--provider", "eager", "broken", "--malloc", "default")
    (result,) = document["results"]
    assert code == 1
    assert result["status"] == "wrong"
    assert "median_s" not in result["providers"]["broken"]
    assert ("gradient of w1" if damage == "gradient" else "output") in result["providers"]["broken"]["reason"]
    assert result["providers"]["eager"]["median_s"] > 0
    assert "WRONG" in capsys.readouterr().out
    assert "WRONG" in tables.markdown(document)


def test_an_accepted_baseline_is_timed_and_marked(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = PROVIDERS["eager"].prepare
    inexact = Provider(lambda case, shape: lambda t: eager(case, shape)(t) * 1.001, recompute=False)
    monkeypatch.setitem(PROVIDERS, "eager", inexact)
    arguments = ("--case", FORWARD, "--provider", "eager", "ours", "--malloc", "default")
    assert run(*arguments)[0] == 1
    code, document = run(*arguments, "--accept", "eager")
    entry = document["results"][0]["providers"]["eager"]
    assert code == 0
    assert entry["status"] == "inexact"
    assert entry["median_s"] > 0
    assert "eager (inexact)" in tables.text(document["results"][0])
    assert "output: error" in tables.text(document["results"][0])


def test_the_json_tells_where_it_comes_from(run: Any) -> None:
    code, document = run("--case", "neural_field_mlp-plain-*", "--provider", "eager", "ours", "--profile")
    assert code == 0
    assert [(r["case"], r["malloc"]) for r in document["results"]] == [
        (case, malloc) for case in (FORWARD, TRAINING) for malloc in ("default", "tuned")
    ]
    where = document["provenance"]
    for key in ("cpu", "cores", "threads", "isa", "torch", "python", "pixnerd_kernels", "command", "date"):
        assert where[key], key
    assert {"commit", "dirty"} <= where.keys()
    result = document["results"][0]
    assert result["backend"] in ("cpu", "reference")
    ours = result["providers"]["ours"]
    assert ours["p20_s"] <= ours["median_s"] <= ours["p80_s"]
    assert ours["memory"]["peak"] >= ours["memory"]["without_results"] >= 0
    assert ours["time_over_ours"] == 1
    assert any(row["label"] == "the full op" for row in result["breakdown"])


@pytest.mark.parametrize("name", ["pixel_decoder-xl-256-training", "pixel_decoder-xl-256-saving"])
def test_the_decoder_s_steps_are_timed(run: Any, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = run("--case", name, "--provider", "ours", "--profile")
    assert code == 0
    rows = document["results"][0]["breakdown"]
    assert sum(row["share"] for row in rows) == pytest.approx(1, abs=0.2)  # medians of each
    computed = sum(row.get("flops_per_s", 0) * row["median_s"] for row in rows)
    assert computed == pytest.approx(CASES[name].flops(CASES[name].smoke, recompute=True))
    assert "generators' gradients" in capsys.readouterr().out


def test_an_interrupted_run_is_resumed(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--case", "neural_field_mlp-plain-*", "--provider", "ours", "--malloc", "default")
    asked: list[str] = []

    def launch(job: worker.Job) -> dict[str, Any]:
        asked.append(job.case)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return worker.run_job(job)

    code, first = run(*words, launch=launch)
    assert (code, asked) == (130, [FORWARD, TRAINING])
    code, document = run(*words, "--resume", launch=launch)
    assert (code, asked) == (0, [FORWARD, TRAINING, TRAINING])
    assert document["results"][0] == first["results"][0]
    assert [result["case"] for result in document["results"]] == [FORWARD, TRAINING]
    run(*words, "--provider", "eager", "--resume", launch=launch)  # another setting
    assert asked[3:] == [FORWARD, TRAINING]


def test_a_busy_machine_is_told() -> None:
    assert "3.0 on 2 cores" in provenance.busy({"load_average": 3.0, "cores": 2})
    assert not provenance.busy({"load_average": 0.3, "cores": 2})
    assert not provenance.busy({"load_average": None, "cores": 2})


def test_an_interrupted_run_keeps_its_results(run: Any) -> None:
    done = []

    def launch(job: worker.Job) -> dict[str, Any]:
        if done:
            raise KeyboardInterrupt
        done.append(job)
        return worker.run_job(job)

    code, document = run("--case", "normalize_weights", "--provider", "ours", launch=launch)
    assert code == 130
    assert document["interrupted"] is True
    assert [result["case"] for result in document["results"]] == ["normalize_weights-forward"]


def test_a_killed_run_s_results_say_so(run: Any, tmp_path: Path) -> None:
    """Nobody tells a process that is killed: what it has saved by then must not pass for a complete run."""
    saved = []

    def launch(job: worker.Job) -> dict[str, Any]:
        if (tmp_path / "result.json").exists():
            saved.append(json.loads((tmp_path / "result.json").read_text()))
        return worker.run_job(job)

    code, document = run("--case", "normalize_weights", "--provider", "ours", launch=launch)
    assert code == 0
    assert [(part["interrupted"], len(part["results"])) for part in saved] == [(True, 1)]
    assert document["interrupted"] is False


def test_out_of_memory_in_one_case_leaves_the_others(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = dataclasses.replace(CASES[FORWARD], smoke={"N": 1 << 30, "S": 1 << 10, "D1": 64, "D2": 64})
    monkeypatch.setitem(CASES, FORWARD, huge)
    code, document = run(
        "--case", FORWARD, "normalize_weights-forward", "--provider", "ours", "--malloc", "default"
    )
    assert code == 1
    assert [result["status"] for result in document["results"]] == ["out of memory", "ok"]


def test_a_killed_process_is_reported() -> None:
    job = worker.Job(FORWARD, ("ours",), Budget())
    result = ops._died(job, -9)
    assert result["status"] == "out of memory"
    assert "killed" in tables.text(result)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--case", "neural_field"], ["'neural_field'", *CASES]),
        (["--provider", "theirs"], ["'theirs'", *PROVIDERS]),
        (["--accept", "ours"], ["eager", "compile"]),
    ],
)
def test_unknown_names_list_the_known_ones(
    arguments: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ops", *arguments]) == 2
    message = capsys.readouterr().err
    assert [word for word in expected if word not in message] == []


def test_selection() -> None:
    assert [case.name for case in select_cases(["normalize_weights"])] == [
        "normalize_weights-forward", "normalize_weights-training",
    ]  # fmt: skip
    assert len(select_cases([])) + len(select_cases(["pixel_decoder"])) == len(CASES)
    assert select_providers(["ours", "ours"]) == ["ours"]


def test_allocation_peak_of_a_known_pattern() -> None:
    """4 MB live, then 2 MB more (the peak), then 4 MB freed and 1 MB kept."""
    before = torch.ones(3_000_000)

    def pattern() -> tuple[torch.Tensor, ...]:
        first = torch.ones(1_000_000)
        second = torch.ones(500_000)
        del first
        kept = before[:250_000].clone()
        del second
        return (kept,)

    allocated = allocation_peak(pattern)
    assert allocated.peak == 6_000_000
    assert allocated.results == 1_000_000
    assert allocated.transient == 5_000_000


def test_page_faults_fall_with_tuned_malloc() -> None:
    """The tuned setting does what it says: glibc accepts the values and stops returning pages."""
    code = (
        "import resource, torch\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        # 40 MB, above the 32 MiB up to which glibc raises its threshold by itself.
        "def touch(): torch.ones(10_000_000)\n"
        "for _ in range(12): touch()\n"
        "before = faults()\n"
        "for _ in range(5): touch()\n"
        "print(faults() - before)"
    )
    clean = {name: value for name, value in os.environ.items() if name not in ops.MALLOC["tuned"]}
    counts = {}
    for name, setting in ops.MALLOC.items():
        done = subprocess.run(
            [sys.executable, "-c", code], env={**clean, **setting}, capture_output=True, text=True, check=True
        )
        counts[name] = int(done.stdout)
    if sys.platform != "linux" or counts["default"] < 1000:
        pytest.skip(f"this libc does not return pages by default: {counts}")
    assert counts["tuned"] < counts["default"] / 10


def test_samples_and_interleaving() -> None:
    order: list[str] = []
    tasks = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    samples = interleave(tasks, Budget(seconds=0, least=3, most=3))
    assert {name: len(entry.seconds) for name, entry in samples.items()} == {"a": 3, "b": 3}
    # The ratio is taken within rounds: drift that hits both alike cancels.
    slow, fast = Samples([2.0, 20.0, 200.0], []), Samples([1.0, 10.0, 100.0], [])
    assert slow.ratio(fast) == 2
    assert slow.median == 20


def test_the_command_in_processes_of_its_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "benchmarks", "ops", "--size", "smoke", "--quick", "--out", str(tmp_path),
            "--provider", "eager", "ours", "--case", "coordinate_encoding",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"ops.json", "ops.md", "ops.png"}
    assert "coordinate_encoding-forward" in done.stdout
    assert json.loads((tmp_path / "ops.json").read_text())["results"][0]["status"] == "ok"


def test_the_commands_need_no_triton():
    """Where it is not installed, as on a Mac, everything but the GPU commands still runs."""
    program = "import sys; sys.modules['triton'] = None; from benchmarks.__main__ import main; main(['ops', '--list'])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert FORWARD in done.stdout
