"""`python -m benchmarks model`: equal results are timed, unequal ones refused, and every product is counted."""

import argparse
import json
from dataclasses import replace

import made_up_gpu
import pytest
import torch

from benchmarks import device_time, model, model_gpu, model_gpu_tables
from benchmarks.__main__ import main
from benchmarks.model_profile import kernel_kind, kernel_rows, kernel_table, launches, profile
from pixnerd_kernels.diffusion import graphs
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


TINY = replace(CONFIGS["tiny/4"], encoding="dct", num_blocks=1)
EVENTS = [("nvjet_tst_192x192", 3e-3), ("fmha_cutlassF_bf16", 2e-3), ("norm", 1e-3), ("Memcpy DtoD", 1e-3)]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Runs the GPU's benchmark on the CPU, graphs uncompiled; the exit code, the result and its file."""
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, **options: compiled(*args, **options, backend="eager")
    )
    told, matmul = made_up_gpu.install(monkeypatch), device_time.Matmul

    def capture(function):
        output = function().clone()
        return output, lambda: output.copy_(function())

    def kernels(call):
        call()
        return kernel_rows(EVENTS)

    monkeypatch.setattr(device_time, "BACK_TO_BACK", (0.0, 1, 1))
    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(model_gpu, "kernels", kernels)
    monkeypatch.setattr(model_gpu, "gpu", lambda: {"name": "made up"})
    monkeypatch.setattr(device_time, "Matmul", lambda device, dtype: matmul(device, dtype, 64))

    def run(*words):
        parser = argparse.ArgumentParser()
        model.add_arguments(parser)
        file = tmp_path / "model.json"
        arguments = parser.parse_args(
            [
                "--config",
                "tiny/4",
                "--size",
                "16",
                "--batch",
                "3",
                "--rounds",
                "2",
                "--json",
                str(file),
                *words,
            ]
        )
        arguments.provider = arguments.provider or model_gpu.default_providers(arguments.training)
        setting = model.Setting(TINY, 16, 3, "cpu", torch.bfloat16)
        code = model_gpu.run(arguments, setting, TINY)
        return code, json.loads(file.read_text())["results"][0], file

    run.told = told
    return run


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_every_provider_of_a_gpu_is_checked_timed_and_tabled(gpu, capsys, tmp_path, training):
    torch._dynamo.reset()
    code, result, file = gpu(*(["--training"] if training else ["--profile"]))
    assert code == 0, result["providers"]
    names = model_gpu.TRAINING if training else model_gpu.FORWARDS[:-1]
    assert list(result["providers"]) == list(names)
    for name, entry in result["providers"].items():
        assert entry["error"] <= result["allowed"], name
        assert entry["peak"] > 0
        assert entry["interleaved"]
        assert entry["device_s"] > 0
        assert entry["latency_s"] >= entry["host_s"] > 0
        assert entry["profile"]["kernels"] == 3
        assert entry["share_of_matmul"] == pytest.approx(
            entry["flops_per_s"] / result["matmul"]["flops_per_s"]
        )
    assert gpu.told.count("_sleep") > 2 * len(names)
    out = capsys.readouterr().out
    assert "ours against compile: device" in out
    assert "nvjet_tst_192x192" in out
    assert main(["report", str(file), "--out", str(tmp_path)]) == 0
    assert "made up" in (tmp_path / "0-model.md").read_text()
    assert ("stacks" in result) != training


@pytest.mark.parametrize("change", [torch.zeros_like, torch.neg], ids=["zero", "turned"])
def test_one_wrong_gradient_is_seen(monkeypatch, change):
    bench = model_gpu.Bench(model.Setting(TINY, 16, 2, "cpu", torch.bfloat16), training=True)
    truth = model_gpu.Truth(bench)
    assert truth.error(bench.setting.model) <= truth.allowed
    right = bench.gradients
    for index in (0, len(truth.exact) // 2):

        def wrong(forward, index=index):
            found = list(right(forward))
            found[index] = change(found[index])
            return found

        monkeypatch.setattr(bench, "gradients", wrong)
        assert not truth.error(bench.setting.model) <= truth.allowed


def test_a_wrong_or_failing_provider_leaves_the_others(gpu, monkeypatch, capsys):
    right = model.PixNerd.forward
    monkeypatch.setattr(model.PixNerd, "forward", lambda *arguments: right(*arguments) * 1.5)

    def fails(*arguments):
        raise RuntimeError("no capture")

    monkeypatch.setattr(graphs, "capture", fails)
    code, result, file = gpu("--provider", "eager", "ours", "ours-graph")
    entries = result["providers"]
    assert code == 1
    assert [entry["status"] for entry in entries.values()] == ["ok", "wrong", "error"]
    assert "no capture" in entries["ours-graph"]["reason"]
    assert entries["eager"]["median_s"] > 0
    assert "no capture" in model.markdown(json.loads(file.read_text()))


def test_a_killed_run_keeps_what_was_measured(gpu, monkeypatch, tmp_path):
    def killed(self, name):
        if name == "ours":
            raise KeyboardInterrupt
        return right(self, name)

    right = model_gpu.Bench.forward
    monkeypatch.setattr(model_gpu.Bench, "forward", killed)
    with pytest.raises(KeyboardInterrupt):
        gpu("--provider", "eager", "ours")
    (result,) = json.loads((tmp_path / "model.json").read_text())["results"]
    assert result["providers"]["eager"]["device_s"] > 0
    assert not result["providers"]["eager"]["interleaved"]


def test_targets_are_told():
    ratios = {"device": 1.6, "latency": 1.9, "repeated": 1.0}
    entry = {"time_of_others": {"compile": ratios}, "share_of_matmul": 0.5}
    result = {"config": "XL/16", "pass": "forward", "batch": 64, "providers": {"ours": entry}}
    text = "\n".join(model_gpu_tables.targets(result))
    assert "device 1.60x" in text
    assert "target: device 1.5x, met" in text
    assert "target: 55%, missed" in text
    text = "\n".join(model_gpu_tables.targets({**result, "batch": 1}))
    assert "target: latency 2.0x, missed" in text
    assert "device 1.5x" not in text


def test_flops_of_a_model():
    """FACTS: 268.6 GFLOP of XL/16; a step of training takes two more for each weight's and most inputs' gradients."""
    config = replace(CONFIGS["XL/16"], encoding="dct")
    assert model_gpu.model_flops(config, 256, False) / 1e9 == pytest.approx(268.6, rel=1e-3)
    forward, step = (model_gpu.model_flops(TINY, 16, training) for training in (False, True))
    assert 2.9 < step / forward < 3.0


def test_kernels_by_kind():
    result = kernel_rows([*EVENTS, ("nvjet_tst_192x192", 1e-3), ("Context Sync", 1.0)])
    assert (result["kernels"], result["copies"]) == (4, 1)
    assert result["seconds"] == pytest.approx(8e-3)
    assert result["shares"] == pytest.approx(
        {"product": 0.5, "attention": 0.25, "other": 0.125, "copy": 0.125}
    )
    assert "4 kernels, 1 copies" in kernel_table(result)
    assert kernel_kind("void pytorch_flash::flash_fwd_kernel<...>") == "attention"
    assert kernel_kind("pixel_decoder_forward") == "product"
    assert kernel_kind("pixel_decoder_output_grad") == "other"
    with pytest.raises(RuntimeError, match="saw nothing"):
        kernel_rows([])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cuda"], "torch sees no GPU"),
        (["--dtype", "bfloat16"], "expected float32 on a CPU"),
        (["--provider", "ours-graph"], "ours-graph cannot run forwards on cpu"),
    ],
)
def test_what_does_not_go_together(words, message, capsys):
    assert main(["model", *words]) == 2
    assert message in capsys.readouterr().err


def test_gradients_come_in_the_layout_of_their_parameters():
    """torch.compile returns some transposed, and the fused AdamW refuses those on a GPU."""
    parameters = [torch.nn.Parameter(torch.randn(3, 5)), torch.nn.Parameter(torch.randn(4))]
    gradients = [torch.randn(5, 3).t(), torch.randn(4)]
    model_gpu.hand_over(parameters, gradients)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad.stride() == parameter.stride()
        assert torch.equal(parameter.grad, gradient)
    assert parameters[1].grad is gradients[1]
