"""Official checkpoints: from every container, back bit for bit, and refused by name when they do not fit."""

import pickle
from pathlib import Path

import pytest
import torch
from golden import load
from safetensors.torch import save_file

from pixnerd_kernels import models


def recorded(name):
    return {key[len("param.") :]: value for key, value in load(name)[1].items() if key.startswith("param.")}


@pytest.fixture(scope="module")
def state():
    return recorded("c2i_tiny")


@pytest.fixture(scope="module")
def text_state():
    return recorded("t2i_tiny")


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


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "ema_denoiser._orig_mod."])
def test_wrappers_leave_no_trace_in_names(state, prefix):
    wrapped = {
        prefix + key.replace("blocks.0.", "blocks.0._orig_mod."): value for key, value in state.items()
    }
    assert_same(models.load_official(wrapped), state)


def test_two_names_of_one_tensor_are_refused(state):
    double = {"module.s_embedder.proj.bias": state["s_embedder.proj.bias"] + 1, **state}
    with pytest.raises(ValueError, match=r"got 's_embedder.proj.bias' under several names"):
        models.load_official(double)


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


@pytest.mark.parametrize("name", ["L/16", "XL/16", "XXL/16"])
def test_full_sizes_come_from_their_shapes(name):
    config = (models.CONFIGS | models.T2I_CONFIGS)[name]
    family = models.PixNerd if name in models.CONFIGS else models.PixNerdT2I
    with torch.device("meta"):
        model = family(config)
    assert models.load_official(model.to_official()).config == config


def test_a_model_with_other_coordinates_is_not_passed_off_as_official():
    model = models.PixNerd(models.CONFIGS["tiny/4"])
    with pytest.raises(
        ValueError, match="expected the encoding 'dct', the official model's, got 'dct_aligned'"
    ):
        model.to_official()


def test_text_to_image_coordinates_are_not_passed_off_either():
    model = models.PixNerdT2I(models.T2I_CONFIGS["tiny/4"])
    assert model.config.extent == 8
    with pytest.raises(
        ValueError, match="coordinates that span 4 or 16, an official model's, got an extent of 8"
    ):
        model.to_official()


def test_configuration_is_checked_where_given(state):
    official = load("c2i_tiny")[0]
    models.load_official(state, {**official, "learn_sigma": True, "weight_path": None})
    with pytest.raises(ValueError, match="num_groups is 8, the tensors have 4; patch_size is 16"):
        models.load_official(state, {**official, "num_groups": 8, "patch_size": 16})
    with pytest.raises(ValueError, match="unknown arguments depth"):
        models.load_official(state, {"depth": 12})
    with pytest.raises(TypeError, match="config: expected a dictionary"):
        models.load_official(state, models.PixNerdConfig(32, 4, 2, 2))


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
    with pytest.raises(ValueError, match="expected 2 dimensions"):
        models.load_official({**state, "s_embedder.proj.weight": torch.ones(2)})
    kept = {key: value for key, value in state.items() if "proj" not in key and "final" not in key}
    with pytest.raises(ValueError, match=r"missing s_embedder\.proj\.weight, final_layer\.linear\.weight;"):
        models.load_official({**kept, "x_embedder.embedder.0.weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"unexpected text_refine_blocks\.0\.norm1\.weight$"):
        models.load_official({**state, "text_refine_blocks.0.norm1.weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"missing y_embedder\.embedding_table\.weight$"):
        models.load_official({key: value for key, value in state.items() if "table" not in key})
    with pytest.raises(ValueError, match=r"final_layer\.linear\.bias has the dtype torch.int64"):
        models.load_official({**state, "final_layer.linear.bias": torch.ones(3, dtype=torch.int64)})


def test_what_is_no_official_checkpoint_is_said_to_be_none(state):
    with pytest.raises(
        ValueError, match=r"not an official PixNerd checkpoint: .* the keys are model\.weight"
    ):
        models.load_official({"model.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="the keys are none"):
        models.load_official({})
    with pytest.raises(ValueError, match="expected tensors by name, got the keys 0"):
        models.load_official({0: torch.ones(2)})
    with pytest.raises(ValueError, match="tensors only, got something else for epoch"):
        models.load_official({**state, "epoch": 3})
    with pytest.raises(ValueError, match="variant: expected one of"):
        models.load_official(state, variant="xl")
    with pytest.raises(TypeError, match="path_or_state_dict: expected a path or a state dict, got int"):
        models.load_official(3)


@pytest.mark.parametrize(("variant", "extent"), [("t2i", 8.0), ("t2i_heavydecoder", 16.0)])
def test_text_to_image_checkpoints_come_back(text_state, tmp_path, variant, extent):
    content = {f"ema_denoiser.{key}": value for key, value in text_state.items()}
    torch.save({"state_dict": content}, tmp_path / "text.ckpt")
    model = models.load_official(tmp_path / "text.ckpt", load("t2i_tiny")[0], variant)
    assert isinstance(model, models.PixNerdT2I)
    assert model.config == models.PixNerdT2IConfig(32, 4, 2, 2, 1, 7, 24, 16, 2, 8, 3, 8, extent)
    assert_same(model, text_state)


def test_a_variant_is_needed_where_it_makes_a_difference(state, text_state):
    with pytest.raises(
        ValueError, match=r"^state dict: variant: expected 't2i' or 't2i_heavydecoder' .* patches of 8 pixels"
    ):
        models.load_official(text_state)
    at_16 = {**text_state, "s_embedder.proj.weight": torch.randn(32, 3 * 16 * 16)}
    configs = {
        models.load_official(at_16, variant=name).config for name in ("auto", "t2i", "t2i_heavydecoder")
    }
    assert len(configs) == 1
    for tensors, variant, found in ((state, "t2i", "class-to-image"), (text_state, "c2i", "text-to-image")):
        with pytest.raises(
            ValueError, match=f"variant '{variant}' is .* the keys are those of a {found} model"
        ):
            models.load_official(tensors, variant=variant)


def test_text_to_image_keys_and_arguments_are_checked(text_state):
    changed = {key: value for key, value in text_state.items() if key != "blocks.1.attn.kv_y.weight"}
    changed["blocks.1.attn.qkv.weight"] = torch.ones(2)
    with pytest.raises(
        ValueError, match=r"missing blocks\.1\.attn\.kv_y\.weight; unexpected blocks\.1\.attn\.qkv\."
    ):
        models.load_official(changed, variant="t2i")
    del changed["y_pos_embedding"]
    with pytest.raises(ValueError, match=r"not a whole text-to-image checkpoint: missing y_pos_embedding"):
        models.load_official(changed, variant="t2i")
    config = load("t2i_tiny")[0]
    with pytest.raises(
        ValueError, match="num_text_blocks is 4, the tensors have 1; txt_max_length is 128, the"
    ):
        models.load_official(text_state, {**config, "num_text_blocks": 4, "txt_max_length": 128}, "t2i")


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
    other = tmp_path / "other.ckpt"
    other.write_text("hello world")
    empty = tmp_path / "empty.ckpt"
    empty.touch()
    legacy = tmp_path / "legacy.ckpt"
    torch.save(state, legacy, _use_new_zipfile_serialization=False)
    legacy.write_bytes(legacy.read_bytes()[:20000])
    for path in (cut, text, plain, other, empty, legacy):
        with pytest.raises(ValueError, match=path.name):
            models.load_official(path)
