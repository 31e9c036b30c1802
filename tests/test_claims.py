"""`python -m benchmarks claims`: what it derives from measurements, refuses, keeps and survives."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up_gpu
import pytest
import torch

# Last, so that an installed package is not shadowed by the checkout.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import claims, device_time
from benchmarks.__main__ import main
from benchmarks.baselines.networks import NETWORKS
from benchmarks.claims import costs, jobs, measure, tables, worker
from benchmarks.claims.models import MODELS
from pixnerd_kernels.diffusion import graphs

TINY = jobs.Effort(seconds=0.01, least=1, most=1)


def measured(name: str, seconds: float, **batches: float) -> dict[str, Any]:
    memory = {"peak": 10, "resident": 12}
    times = {"1": seconds, **{key.removeprefix("b"): value for key, value in batches.items()}}
    entries = {key: {"median_s": value, "memory": memory, "runs": 1} for key, value in times.items()}
    return {"case": name, "status": "ok", "parameters": 100, "bytes": 400, "gflop": 1.0,
            "providers": {"eager": {"status": "ok", "batches": entries}}}  # fmt: skip


def test_an_image_is_evaluations_times_forwards() -> None:
    results = {
        "ADM-256": measured("ADM-256", 2.0),
        "ADM-classifier": measured("ADM-classifier", 0.5),
        "PixNerd-L/16": measured("PixNerd-L/16", 0.1, b2=0.15),
        "SiT-L/2": measured("SiT-L/2", 0.2),
        "VAE-decoder": measured("VAE-decoder", 3.0),
    }
    adm = costs.row(results, MODELS["ADM-G"], "eager")
    assert adm.step == costs.Cost(2.5)
    assert adm.image == costs.Cost(2.5 * 250)
    assert adm.equal == costs.Cost(2.5 * 50)
    assert (adm.peak, adm.parameters) == (810, 200)
    pixnerd = costs.row(results, MODELS["PixNerd-L/16"], "eager")
    assert pixnerd.image is not None
    assert pixnerd.image.seconds == pytest.approx(89 * 0.15 + 11 * 0.1)
    assert pixnerd.step == costs.Cost(0.15)
    sit = costs.row(results, MODELS["SiT-L/2"], "eager")
    assert sit.image == costs.Cost(250 * 0.4 + 3.0, doubled=True)
    assert costs.row(results, MODELS["RDM"], "eager").image is None


def test_pixelflow_steps_are_the_mean_of_its_stages() -> None:
    results = {
        f"PixelFlow-{edge}": measured("", seconds) for edge, seconds in ((32, 1.0), (64, 2.0), (128, 3.0))
    }
    ratio = NETWORKS["PixelFlow-256"].gflop / NETWORKS["PixelFlow-128"].gflop
    row = costs.row(results, MODELS["PixelFlow-XL/4"], "eager")
    assert row.step is not None
    assert row.step.by_flops
    assert row.step.seconds == pytest.approx(2 * (1 + 2 + 3 + 3 * ratio) / 4)
    results["PixelFlow-256"] = measured("", 4.0)
    row = costs.row(results, MODELS["PixelFlow-XL/4"], "eager")
    assert row.image == costs.Cost(2 * 30 * (1.0 + 2 + 3 + 4), doubled=True)
    assert row.equal == costs.Cost(2 * 12.5 * (1.0 + 2 + 3 + 4), doubled=True)
    # Four stages of one network: its weights once.
    assert row.peak == 410


def test_the_paper_s_ratios() -> None:
    """8.3x an image, 8.0x a step against ADM-G; 6.5x and 15.5x for XL against ADM-G and PixelFlow."""
    adm, flow = MODELS["ADM-G"], MODELS["PixelFlow-XL/4"]
    large, extra = MODELS["PixNerd-L/16"], MODELS["PixNerd-XL/16"]
    assert tables.paper_ratios(adm, large) == ("**8.0x**", "**8.3x (the paper's 8x)**")
    assert tables.paper_ratios(adm, extra) == ("6.7x", "6.5x")
    assert tables.paper_ratios(flow, extra) == ("7.0x", "15.5x")
    assert tables.paper_ratios(MODELS["DiT-XL/2"], extra) == ("-", "-")


def test_tables_show_what_was_measured_and_name_the_rest() -> None:
    names = ("PixNerd-L/16", "ADM-256", "ADM-classifier")
    document = {"results": [measured(name, 2.0, b2=3.0) for name in names]}
    results = costs.by_case(document)
    text = tables.main_table(results) + tables.ratios(results)
    assert "ADM-G 256" in text
    assert "Relay" not in text
    assert "PixNerd-L/16, eager: ADM-G 256, eager" in text
    assert "| 1.3x | 1.3x |" in text  # two images take 3, the UNet and the classifier 4
    assert "Relay Diffusion, eager" in "".join(tables.failures(document))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(jobs, "QUICK", TINY)
    threads = torch.get_num_threads()

    def call(*arguments: str, launch: Any = worker.run_job) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(claims, "launch_process", launch)
        file = tmp_path / "claims.json"
        words = ["claims", "--smoke", "--quick", "--device", "cpu", "--json", str(file), *arguments]
        code = main(words)
        return code, json.loads(file.read_text())

    yield call
    torch.set_num_threads(threads)


def test_a_model_is_compiled_where_all_its_networks_are() -> None:
    results = {name: measured(name, 1.0) for name in ("ADM-256", "ADM-classifier")}
    unet = results["ADM-256"]["providers"]
    unet["compile"] = unet["eager"]
    assert [r.provider for r in tables.rows(results) if r.model.label.startswith("ADM-G")] == ["eager"]
    results["ADM-classifier"]["providers"]["compile"] = unet["eager"]
    assert [r.provider for r in tables.rows(results) if r.model.label.startswith("ADM-G")] == [
        "eager",
        "compile",
    ]


def test_a_small_run_is_checked_measured_and_resumed(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cases = ("--case", "PixNerd-L/16", "halves-PixNerd-L/16", "ablations", "block-noise")
    asked = []

    def interrupted(job: jobs.Job) -> dict[str, Any]:
        asked.append(job.name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return worker.run_job(job)

    code, document = run(*cases, launch=interrupted)
    assert code == 130
    assert document["interrupted"] is True
    assert [r["case"] for r in document["results"]] == ["PixNerd-L/16"]
    code, document = run(*cases)
    assert code == 0
    assert "1 of 4 cases" in capsys.readouterr().out
    pixnerd, noise, ablations, halves = document["results"]
    assert {entry["status"] for entry in pixnerd["providers"].values()} == {"ok"}
    ours = pixnerd["providers"]["ours"]
    assert ours["error"] <= ours["allowed"]
    assert ours["batches"]["2"]["memory"]["peak"] > ours["batches"]["1"]["memory"]["peak"] > 0
    assert noise["providers"]["eager"]["median_s"] > 0
    assert len(ablations["ablations"]) == 4
    assert halves["halves"]["64"]["head, ours"]["gflop"] == pytest.approx(
        4 * halves["halves"]["32"]["head, ours"]["gflop"]
    )


def test_a_wrong_model_is_refused(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = worker.PixNerd.forward
    monkeypatch.setattr(worker.PixNerd, "forward", lambda *arguments: right(*arguments) * 1.001)
    code, document = run("--case", "PixNerd-L/16")
    entries = document["results"][0]["providers"]
    assert code == 1
    assert entries["ours"]["status"] == "wrong"
    assert "median_s" not in entries["ours"]
    assert entries["eager"]["median_s"] > 0


def test_out_of_memory_and_death_leave_the_others(run: Any) -> None:
    def launch(job: jobs.Job) -> dict[str, Any]:
        if job.name == "ADM-256":
            return claims.died(job.name, -9)
        return worker.run_job(job)

    code, document = run("--case", "ADM-256", "block-noise", launch=launch)
    assert code == 1
    assert {r["case"]: r["status"] for r in document["results"]} == {
        "block-noise": "ok",
        "ADM-256": "out of memory",
    }
    assert "ADM-256 is out of memory" in tables.markdown(document)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--case", "ADM-1024"], ["'ADM-1024'", "ADM-256", "PixelFlow-32"]),
        (["--provider", "theirs"], ["'theirs'", "ours"]),
    ],
)
def test_unknown_names_list_the_known_ones(
    arguments: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["claims", *arguments]) == 2
    message = capsys.readouterr().err
    assert [word for word in expected if word not in message] == []


def test_without_diffusers_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(claims.importlib.util, "find_spec", lambda name: None)
    assert main(["claims"]) == 2
    assert "pixnerd-kernels[claims]" in capsys.readouterr().err


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's measurements on the CPU, with graphs uncompiled."""
    made_up_gpu.install(monkeypatch)
    monkeypatch.setattr(device_time, "BACK_TO_BACK", (0.0, 1, 1))

    def capture(function: Any) -> Any:
        output = function().clone()
        return output, lambda: output.copy_(function())

    class Decoder(torch.nn.Conv2d):
        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    small = replace(NETWORKS["VAE-decoder"], build=lambda: Decoder(4, 3, 1))
    monkeypatch.setitem(NETWORKS, "VAE-decoder", small)
    monkeypatch.setattr(worker, "_counts", lambda job: {"parameters": 15, "gflop": 1.0, "bytes": 30})
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, **options: compiled(*args, **options, backend="eager")
    )
    monkeypatch.setattr(graphs, "capture", capture)
    # A large product in bfloat16 takes minutes on a CPU without instructions for it.
    monkeypatch.setattr(worker, "matmul_gflops", lambda device, dtype: 100.0)
    monkeypatch.setattr(worker, "measure", lambda calls, device, effort: measure.on_gpu(calls, effort))


def test_a_gpu_s_providers_are_measured_and_tabled(gpu: None) -> None:
    torch._dynamo.reset()
    pixnerd = jobs.Job("PixNerd-L/16", jobs.PROVIDERS, TINY, (1, 2, 4), dtype="bfloat16", smoke=True)
    providers = ("eager", "compile", "compile-graph")
    decoder = jobs.Job("VAE-decoder", providers, TINY, (1, 4), smoke=True)
    results = [worker.run_job(job) for job in (pixnerd, decoder)]
    for job, result in zip((pixnerd, decoder), results, strict=True):
        assert result["status"] == "ok", result
        assert set(result["providers"]) == set(job.providers)
        for entry in result["providers"].values():
            assert all(entry["batches"]["4"][f"{clock}_s"] > 0 for clock in ("median", "device", "latency"))
    for name in ("ADM-256", "ADM-classifier"):
        results.append(measured(name, 2.0, b4=4.0))
        for batch in results[-1]["providers"]["eager"]["batches"].values():
            batch["device_s"] = batch["median_s"] / 2
    where = {"command": "a test", "cpu": "", "threads": 1, "isa": "", "torch": "", "python": "", "commit": None,
             "dirty": None, "date": "2026-01-01"}  # fmt: skip
    text = tables.markdown({"results": results, "provenance": where})
    assert "PixNerd-L/16, ours-graph: ADM-G 256, eager" in text
    assert "## The same of the device's time alone" in text
    assert "## The same of an image's share of 4 at a time" in text
    assert "device s" in text


def test_a_provider_that_fails_on_a_gpu_leaves_the_others(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(function: Any) -> Any:
        raise RuntimeError("no capture")

    monkeypatch.setattr(graphs, "capture", fails)
    job = jobs.Job("VAE-decoder", ("eager", "compile-graph"), TINY, (1, 2), smoke=True)
    result = worker.run_job(job)
    assert result["status"] == "error"
    assert "no capture" in result["providers"]["compile-graph"]["reason"]
    assert result["providers"]["eager"]["batches"]["2"]["device_s"] > 0
    assert "no capture" in "".join(tables.failures({"results": [result]}))


def test_another_clock_and_a_share_of_a_batch() -> None:
    results = {"PixNerd-L/16": measured("PixNerd-L/16", 2.0, b2=3.0, b8=8.0)}
    batches = results["PixNerd-L/16"]["providers"]["eager"]["batches"]
    batches["2"]["device_s"] = 1.5
    batches["8"]["device_s"] = 4.0
    assert costs.gpu_batches(results) == [8]
    name = "PixNerd-L/16"
    assert costs.network_cost(costs.view(results, "device_s"), name, 2, "eager") == costs.Cost(1.5)
    assert costs.network_cost(costs.view(results, "device_s"), name, 1, "eager") is None
    assert costs.network_cost(costs.view(results, images=8), name, 2, "eager") == costs.Cost(2.0)
    assert costs.network_cost(costs.view(results, "device_s", 8), name, 1, "eager") == costs.Cost(0.5)
    assert batches["2"]["median_s"] == 3.0


def test_what_a_gpu_compiles_and_runs() -> None:
    def batches(name: str) -> tuple[int, ...]:
        return jobs.compiled_batches(jobs.Job(name, (), TINY, jobs.batches(name, [32]), "cuda"))

    assert batches("PixNerd-L/16") == (1, 2)
    assert batches("ADM-256") == batches("VAE-decoder") == (1,)
    assert batches("DiT-XL/2") == batches("PixelFlow-256") == (2,)
    assert "ours-graph" in jobs.select_providers([], "cuda")
    assert jobs.select_providers([], "cpu") == ["eager", "compile", "ours"]
    with pytest.raises(ValueError, match="'ours-graph'"):
        jobs.select_providers(["ours-graph"], "cpu")


def test_cases_are_compiled_side_by_side_first(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[str] = []
    monkeypatch.setattr(claims, "_prepare_process", lambda job: prepared.append(job.name) or 1)
    code, _ = run("--case", "block-noise", "PixelFlow-32", "--compile-baselines", "--prepare", "2", launch=lambda job: {
        "case": job.name, "status": "ok", "providers": {}})  # fmt: skip
    assert (code, prepared) == (0, ["PixelFlow-32"])
