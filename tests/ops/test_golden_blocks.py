"""The ops inside the models that they were made for: golden class-to-image models and Chroma1-Radiance heads."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from golden import load_here
from tolerance import relative

from benchmarks.baselines.pixnerd import PlainPixNerd, patches
from benchmarks.formulas import rms_norm
from pixnerd_kernels import (
    coordinate_encoding,
    neural_field_mlp,
    neural_field_mlp_packed,
    normalize_weights,
    split_params,
)
from pixnerd_kernels.models import load_official


def recorded(name, inputs):
    """Configuration, golden tensors, parameters by name, and the differentiable inputs; both are leaves."""
    config, golden = load_here(name)
    parameters = {
        key.removeprefix("param."): tensor.clone().requires_grad_()
        for key, tensor in golden.items()
        if key.startswith("param.")
    }
    leaves = {key: golden[f"input.{key}"].clone().requires_grad_() for key in inputs}
    return config, golden, parameters, leaves


def assert_agrees(out, golden, parameters, leaves):
    """The output to 1e-4 and every recorded gradient to 1e-3, norm-wise."""
    assert relative(out, golden["output"]) <= 1e-4
    out.backward(golden["grad_output"])
    wanted = {f"grad.param.{name}": tensor for name, tensor in parameters.items()}
    wanted |= {f"grad.{name}": tensor for name, tensor in leaves.items()}
    assert wanted.keys() == {key for key in golden if key.startswith("grad.")}
    errors = {key: relative(tensor.grad, golden[key]) for key, tensor in wanted.items()}
    assert not {key: error for key, error in errors.items() if not error <= 1e-3}


def packed(hidden, gated):
    def field(x, params, norm_weight):
        return neural_field_mlp_packed(x, params, hidden=hidden, gated=gated, norm_weight=norm_weight)

    return field


def separate(hidden, gated):
    def field(x, params, norm_weight):
        return neural_field_mlp(
            x, **split_params(params, x.shape[2], hidden, gated)._asdict(), norm_weight=norm_weight
        )

    return field


def normalized_before(hidden, gated):
    """The same block out of normalize_weights and a field that normalises nothing."""

    def field(x, params, norm_weight):
        weights = split_params(params, x.shape[2], hidden, gated)._asdict()
        weights = {name: None if w is None else normalize_weights(w) for name, w in weights.items()}
        return neural_field_mlp(x, **weights, norm_weight=norm_weight, normalize=())

    return field


def plain_model(parameters):
    with torch.device("meta"):
        return PlainPixNerd(load_official({name: p.detach() for name, p in parameters.items()}).config)


def call(plain, parameters, golden, leaves):
    return torch.func.functional_call(plain, parameters, (leaves["x"], golden["input.t"], golden["input.y"]))


def forward_through(block, field, x, hidden):
    return field(x, block.param_generator1(hidden), block.norm.weight)


forms = pytest.mark.parametrize("form", [packed, separate, normalized_before], ids=lambda form: form.__name__)


@forms
@pytest.mark.parametrize("name", ["c2i_tiny", "c2i_d64_p16"])
def test_class_to_image(backend, name, form, monkeypatch):
    config, golden, parameters, leaves = recorded(name, ["x"])
    field = form(config["hidden_size_x"] * config["nerf_mlpratio"], False)
    plain = plain_model(parameters)
    monkeypatch.setattr(plain, "_encoding", lambda x: coordinate_encoding(*[config["patch_size"]] * 2))
    for block in plain.blocks[config["num_cond_blocks"] :]:
        monkeypatch.setattr(block, "forward", partial(forward_through, block, field))
    assert_agrees(call(plain, parameters, golden, leaves), golden, parameters, leaves)


@pytest.mark.parametrize("name", ["c2i_tiny", "c2i_d64_p16"])
def test_the_plain_model_that_benchmarks_compare_with(name):
    _, golden, parameters, leaves = recorded(name, ["x"])
    out = call(plain_model(parameters), parameters, golden, leaves)
    assert_agrees(out, golden, parameters, leaves)


@forms
@pytest.mark.parametrize("name", ["radiance_head_conv", "radiance_head_linear"])
def test_radiance_head(backend, name, form):
    config, golden, parameters, leaves = recorded(name, ["image", "hidden"])
    size, channels = config["patch_size"], config["hidden_size_x"]
    image, states = leaves["image"], leaves["hidden"].flatten(0, 1)

    def linear(name, x):
        return F.linear(x, parameters[f"{name}.weight"], parameters.get(f"{name}.bias"))

    pixels = patches(image, size).flatten(0, 1).transpose(1, 2)
    encoding = coordinate_encoding(size, size, config["max_freqs"], "dct_integer")
    x = torch.cat([pixels, encoding.expand(len(states), -1, -1)], -1)
    x = linear("nerf_image_embedder.embedder.0", x)
    assert relative(x, golden["intermediate.embedded"]) <= 1e-4

    field = form(channels * config["mlp_ratio"], True)
    for block in range(config["num_blocks"]):
        generated = linear(f"nerf_blocks.{block}.param_generator", states)
        x = field(x, generated, parameters[f"nerf_blocks.{block}.norm.scale"])
    assert relative(x, golden["intermediate.features"]) <= 1e-4

    last = "nerf_final_layer_conv" if config["final"] == "conv" else "nerf_final_layer"
    x = rms_norm(x, parameters[f"{last}.norm.scale"])
    if config["final"] == "linear":
        x = linear(f"{last}.linear", x)
    x = x.transpose(1, 2).reshape(len(image), len(states) // len(image), -1).transpose(1, 2)
    x = F.fold(x, image.shape[2:], size, stride=size)
    if config["final"] == "conv":
        x = F.conv2d(x, parameters[f"{last}.conv.weight"], parameters[f"{last}.conv.bias"], padding=1)
    assert_agrees(x, golden, parameters, leaves)
