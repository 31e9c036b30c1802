"""The pixel decoder inside the golden models: outputs and every gradient, for every backend and chunking."""

import pytest
import torch
import torch.nn.functional as F
from golden import load_here
from tolerance import relative

from pixnerd_kernels import DecoderBlockParams, DecoderParams, models, pixel_decoder
from pixnerd_kernels.models.official import official_name
from pixnerd_kernels.nn import scaled_patch

chunks = pytest.mark.parametrize("patches", [1, 3, None], ids=["one", "three", "all"])


def workspace(generated, patches):
    return None if patches is None else patches * 4 * generated


@chunks
@pytest.mark.parametrize(
    ("name", "variant", "scale"),
    [
        ("c2i_tiny", "c2i", (1, 1)),
        ("c2i_d64_p16", "c2i", (1, 1)),
        ("t2i_tiny", "t2i", (1, 1)),
        ("t2i_heavydecoder_scaled", "t2i_heavydecoder", (2.0, 1.5)),
    ],
)
def test_models(any_isa, name, variant, scale, patches):
    _, golden = load_here(name)
    state = {key.removeprefix("param."): value for key, value in golden.items() if key.startswith("param.")}
    model = models.load_official(state, variant=variant)
    blocks = model.decoder.blocks
    model.decoder.workspace = workspace(len(blocks) * blocks[0].generator.out_features, patches)
    x = golden["input.x"].clone().requires_grad_()
    out = model(x, golden["input.t"], golden["input.y"], scale)
    assert relative(out, golden["output"]) <= 1e-4
    out.backward(golden["grad_output"])
    errors = {"x": relative(x.grad, golden["grad.x"])}
    for own, parameter in model.named_parameters():
        official = official_name(own, model.config)
        errors[own] = relative(parameter.grad, golden[f"grad.param.{official}"])
    assert not {key: error for key, error in errors.items() if not error <= 1e-3}
    if any_isa.compiled:
        height, width = scaled_patch(model.decoder.patch_size, scale)
        tokens = len(x) * (x.shape[2] // height) * (x.shape[3] // width)
        assert any_isa.calls["pixel_decoder_forward"] == (1 if patches is None else -(-tokens // patches))


@chunks
@pytest.mark.parametrize("name", ["radiance_head_conv", "radiance_head_linear"])
def test_radiance_heads(any_isa, name, patches):
    config, golden = load_here(name)
    leaves = {
        key: value.clone().requires_grad_()
        for key, value in golden.items()
        if key.startswith(("param.", "input."))
    }
    last = "param.nerf_final_layer" + ("_conv" if config["final"] == "conv" else "")
    blocks = [
        DecoderBlockParams(
            leaves[f"param.nerf_blocks.{k}.param_generator.weight"],
            leaves[f"param.nerf_blocks.{k}.param_generator.bias"],
            leaves[f"param.nerf_blocks.{k}.norm.scale"],
        )
        for k in range(config["num_blocks"])
    ]
    params = DecoderParams(
        embed_weight=leaves["param.nerf_image_embedder.embedder.0.weight"],
        embed_bias=leaves["param.nerf_image_embedder.embedder.0.bias"],
        blocks=blocks,
        norm_weight=leaves[f"{last}.norm.scale"],
        linear_weight=leaves.get(f"{last}.linear.weight"),
        linear_bias=leaves.get(f"{last}.linear.bias"),
        gated=True,
        encoding="dct_integer",
    )
    generated = len(blocks) * blocks[0].generator_weight.shape[0]
    out = pixel_decoder(
        leaves["input.image"],
        leaves["input.hidden"],
        params,
        patch_size=config["patch_size"],
        workspace=workspace(generated, patches),
    )
    if config["final"] == "conv":
        out = F.conv2d(out, leaves[f"{last}.conv.weight"], leaves[f"{last}.conv.bias"], padding=1)
    assert relative(out, golden["output"]) <= 1e-4
    gradients = torch.autograd.grad(out, list(leaves.values()), golden["grad_output"])
    errors = {
        key: relative(gradient, golden[f"grad.{key.removeprefix('input.')}"])
        for key, gradient in zip(leaves, gradients, strict=True)
    }
    assert not {key: error for key, error in errors.items() if not error <= 1e-3}
