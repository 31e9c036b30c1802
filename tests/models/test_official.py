"""Official checkpoints: from every container, back bit for bit, and refused by name when they do not fit."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixnerd_kernels import models

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def state():
    tensors = load_file(DATA / "c2i_tiny.safetensors")
    return {key[len("param.") :]: value for key, value in tensors.items() if key.startswith("param.")}


def assert_same(model, state):
    back = model.to_official()
    assert set(back) == set(state)
    for key, value in state.items():
        assert torch.equal(back[key], value), key


def test_lightning_checkpoints_give_their_averaged_weights(state, tmp_path):
    content = {
        "epoch": 3,
        "hyper_parameters": {"lr": 1e-4},
        "optimizer_states": [{"step": torch.tensor(5.0)}],
        "state_dict": {
            **{f"denoiser.{key}": value + 1 for key, value in state.items()},
            **{f"ema_denoiser.{key}": value for key, value in state.items()},
            "diffusion_trainer.proj.weight": torch.ones(3),
        },
    }
    torch.save(content, tmp_path / "last.ckpt")
    assert_same(models.load_official(tmp_path / "last.ckpt"), state)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "denoiser only"])
def test_every_container_loads(state, tmp_path, kind):
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pt")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "denoiser only":
        torch.save({"state_dict": {f"denoiser.{key}": value for key, value in state.items()}}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    model = models.load_official(str(path), variant="c2i")
    assert_same(model, state)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_loading_copies_and_keeps_the_dtype(state):
    half = {key: value.bfloat16() for key, value in state.items()}
    model = models.load_official(half)
    assert_same(model, half)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        model.patch_embed.bias.add_(1)
    assert torch.equal(half["s_embedder.proj.bias"], state["s_embedder.proj.bias"].bfloat16())


def test_configuration_comes_from_the_shapes(state):
    config = models.load_official(state).config
    assert config == models.PixNerdConfig(32, 4, 2, 2, 16, 2, 8, 3, 10, 8)


def test_configuration_is_checked_where_given(state):
    from safetensors import safe_open

    with safe_open(DATA / "c2i_tiny.safetensors", "pt") as file:
        official = json.loads(file.metadata()["config"])
    models.load_official(state, {**official, "learn_sigma": True, "weight_path": None})
    with pytest.raises(ValueError, match="num_groups is 8, the tensors have 4; patch_size is 16"):
        models.load_official(state, {**official, "num_groups": 8, "patch_size": 16})
    with pytest.raises(ValueError, match="unknown arguments depth"):
        models.load_official(state, {"depth": 12})


def test_missing_unexpected_and_misshapen_keys_are_named(state):
    changed = dict(state)
    del changed["blocks.1.mlp.w3.weight"]
    changed["blocks.1.mlp.w4.weight"] = torch.ones(2)
    changed["final_layer.linear.bias"] = torch.ones(5)
    expected = (
        "missing blocks.1.mlp.w3.weight; unexpected blocks.1.mlp.w4.weight; "
        r"final_layer.linear.bias has the shape \[5\], expected \[3\]"
    )
    with pytest.raises(ValueError, match=expected):
        models.load_official(changed)
    with pytest.raises(ValueError, match=r"'s_embedder\.proj\.weight' is missing"):
        models.load_official({"model.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="expected 2 dimensions for 's_embedder"):
        models.load_official({**state, "s_embedder.proj.weight": torch.ones(2)})
    with pytest.raises(ValueError, match="a text-to-image checkpoint"):
        models.load_official({**state, "text_refine_blocks.0.norm1.weight": torch.ones(2)})
    with pytest.raises(ValueError, match="tensors only, got something else for epoch"):
        models.load_official({**state, "epoch": 3})
    with pytest.raises(ValueError, match="variant: expected one of"):
        models.load_official(state, variant="xl")


class _Hostile:
    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


def test_no_code_in_a_checkpoint_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": _Hostile()}, "bad.ckpt")
    Path("bad.pkl").write_bytes(pickle.dumps(_Hostile(), protocol=2))
    for name in ("bad.ckpt", "bad.pkl"):
        with pytest.raises(ValueError, match=f"{name}: (refused|not a readable)"):
            models.load_official(name)
    assert not Path("owned").exists()


def test_files_that_are_no_checkpoint_are_refused(state, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        models.load_official(tmp_path / "absent.ckpt")
    whole = tmp_path / "whole.ckpt"
    torch.save(state, whole)
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    text = tmp_path / "text.safetensors"
    text.write_text("hello")
    plain = tmp_path / "list.pt"
    torch.save([1, 2], plain)
    for path in (cut, text, plain):
        with pytest.raises(ValueError, match=path.name):
            models.load_official(path)
