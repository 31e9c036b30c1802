"""The slim PixNerds against the official ones, their sizes, their resolutions and their complaints."""

from dataclasses import replace

import pytest
import torch
from golden import load

from pixnerd_kernels import models
from pixnerd_kernels.models.official import official_name
from pixnerd_kernels.nn import patchify, rotary_table, unpatchify

TINY = models.PixNerdConfig(32, 2, 2, 2, 8, 2, patch_size=4, in_channels=1, num_classes=3, max_freqs=3)
TEXT = models.PixNerdT2IConfig(
    32, 2, 2, 2, 1, text_tokens=5, text_width=12, field_channels=8, patch_size=4, in_channels=1, max_freqs=4,
    extent=8.0,
)  # fmt: skip
families = pytest.mark.parametrize("config", [TINY, TEXT], ids=["c2i", "t2i"])


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def fresh(config):
    return (models.PixNerd if isinstance(config, models.PixNerdConfig) else models.PixNerdT2I)(config)


def conditions(config, count):
    if isinstance(config, models.PixNerdConfig):
        return torch.arange(count)
    return torch.randn(count, config.text_tokens, config.text_width)


def randomised(config=TINY, dtype=torch.float32):
    """A model whose output layer is not zero."""
    torch.manual_seed(0)
    model = fresh(config).to(dtype)
    torch.nn.init.normal_(model.decoder.linear.weight)
    return model


@pytest.mark.parametrize(
    ("name", "variant", "scale"),
    [
        ("c2i_tiny", "auto", (1.0, 1.0)),
        ("c2i_d64_p16", "auto", (1.0, 1.0)),
        ("t2i_tiny", "t2i", (1.0, 1.0)),
        ("t2i_heavydecoder_scaled", "t2i_heavydecoder", (2.0, 1.5)),
    ],
)
def test_agrees_with_the_official_model(any_isa, name, variant, scale):
    config, tensors = load(name)
    state = {key[len("param.") :]: value for key, value in tensors.items() if key.startswith("param.")}
    model = models.load_official(state, config, variant)
    x = tensors["input.x"].clone().requires_grad_()
    output = model(x, tensors["input.t"], tensors["input.y"], scale)
    assert distance(output, tensors["output"]) < 1e-4
    output.backward(tensors["grad_output"])
    assert distance(x.grad, tensors["grad.x"]) < 1e-3
    names = {name: official_name(name, model.config) for name, _ in model.named_parameters()}
    assert set(names.values()) == set(state)
    for name, parameter in model.named_parameters():
        assert distance(parameter.grad, tensors[f"grad.param.{names[name]}"]) < 1e-3, name


@pytest.mark.parametrize("family", ["c2i", "t2i"])
@pytest.mark.parametrize("case", ["dim24.h4.w6", "dim64.h8.w12", "dim72.h16.w16"])
def test_rotary_table_agrees_with_the_official_one(family, case):
    size, height, width = (int("".join(filter(str.isdigit, part))) for part in case.split("."))
    extent = (16, 16) if family == "c2i" else (height, width)
    expected = load("encodings")[1][f"rope_{family}.{case}"]
    assert (rotary_table(height, width, size, extent) - expected).abs().max() <= 2e-6


def test_text_to_image_tokens_are_rotated_by_the_official_table():
    """Its height and width are swapped, which square images do not show."""
    model = randomised(replace(TEXT, hidden_size=48))
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.extend(args))
    model(torch.randn(1, 1, 4 * 4, 6 * 4), torch.rand(1), conditions(TEXT, 1))
    expected = load("encodings")[1]["rope_t2i.dim24.h4.w6"]
    (rotary,) = [tensor for tensor in seen if tensor.shape == expected.shape]
    assert (rotary - expected).abs().max() <= 2e-6


def test_image_tokens_attend_to_the_text():
    model, x, t = randomised(TEXT), torch.randn(1, 1, 8, 8), torch.rand(1)
    text = conditions(TEXT, 1).requires_grad_()
    model(x, t, text).sum().backward()
    assert text.grad.abs().sum(-1).all()  # every text token has its say
    with torch.no_grad():
        for block in model.blocks:
            block.attn.kv_text.weight.zero_()  # text keys and values of zero dilute, whatever the text says
        assert torch.equal(model(x, t, text), model(x, t, text + 1))


@pytest.mark.parametrize(
    ("model", "name", "millions"),
    [
        (models.PixNerd, "L/16", 452.1),
        (models.PixNerd, "XL/16", 700.6),
        (models.PixNerdT2I, "XXL/16", 1171.5),
    ],
)
def test_parameter_counts(model, name, millions):
    with torch.device("meta"):
        model = model((models.CONFIGS | models.T2I_CONFIGS)[name])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


@families
def test_a_fresh_model_returns_zeros_and_learns_from_them(config):
    model = fresh(config)
    x, t, y = torch.randn(2, 1, 8, 8), torch.rand(2), conditions(config, 2)
    output = model(x, t, y)
    assert not output.any()
    (output - x).square().mean().backward()
    assert model.decoder.linear.weight.grad.abs().sum() > 0


def test_patches_are_cut_and_joined_without_loss():
    image = torch.arange(2 * 3 * 4 * 6).float().view(2, 3, 4, 6)
    patches = patchify(image, 2, 3)
    assert patches.shape == (2, 4, 6, 3)
    assert torch.equal(patches[1, 3, :, 2].view(2, 3), image[1, 2, 2:, 3:])
    assert torch.equal(unpatchify(patches, 2, 3, 2, 2), image)


@families
def test_float64_and_bfloat16_follow_float32(config):
    args = torch.randn(2, 1, 8, 12), torch.rand(2), conditions(config, 2)
    expected = randomised(config)(*args)
    wide = randomised(config, torch.float64)(args[0].double(), *args[1:])
    assert wide.dtype == torch.float64
    assert distance(expected, wide) < 1e-5
    narrow = randomised(config, torch.bfloat16)(args[0].bfloat16(), *args[1:])
    assert narrow.dtype == torch.bfloat16
    assert distance(narrow.float(), expected) < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        assert distance(randomised(config)(*args).float(), expected) < 0.05


@families
@pytest.mark.parametrize(("scale", "size"), [((2, 3), (16, 36)), ((1.5, 1), (12, 12)), ((0.5, 1.3), (4, 15))])
def test_decoder_scale_keeps_the_tokens_and_refines_the_pixels(config, scale, size):
    """The transformer sees exactly the coarse image, and the field's values at shared pixels are the same."""
    model = randomised(config)
    t, y = torch.tensor([0.3]), conditions(config, 1)
    fine = torch.randn(1, 1, *size)
    seen = []
    hook = model.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    output = model(fine, t, y, decoder_scale=scale)
    assert output.shape == fine.shape
    coarse = torch.nn.functional.interpolate(fine, (8, 12))
    expected = model(coarse, t, y)
    hook.remove()
    assert torch.equal(seen[0], seen[1])
    if scale[0] >= 1 and scale[1] >= 1:
        # The first pixel of a patch has the same coordinates and the same noise at every scale.
        rows, columns = size[0] // 2, size[1] // 3
        assert torch.allclose(output[..., ::rows, ::columns], expected[..., ::4, ::4], atol=1e-5)


def test_a_scale_that_is_a_ratio_of_pixels_is_exact():
    output = randomised()(torch.randn(1, 1, 14, 14), torch.rand(1), torch.tensor([0]), (7 / 4, 7 / 4))
    assert output.shape == (1, 1, 14, 14)


def outputs_and_gradients(function, model, args):
    output = function(*args)
    return [output, *torch.autograd.grad(output.square().sum(), list(model.parameters()), allow_unused=True)]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@families
def test_the_model_compiles_without_graph_breaks(config, autocast):
    """Forward and backward are one graph each: fullgraph makes a break an error."""
    model = randomised(replace(config, num_blocks=1, num_field_blocks=1))
    args = torch.randn(2, 1, 8, 8), torch.rand(2), conditions(config, 2)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        results = outputs_and_gradients(compiled, model, args)
        expected = outputs_and_gradients(model, model, args)
    for out, eager in zip(results, expected, strict=True):
        assert (out is None) == (eager is None)
        assert eager is None or torch.equal(out, eager) or distance(out.float(), eager.float()) < 1e-5


def test_the_model_compiles_with_inductor():
    model = randomised(replace(TINY, num_blocks=1, num_field_blocks=1))
    args = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([0, 3])
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    results = outputs_and_gradients(compiled, model, args)
    for out, eager in zip(results, outputs_and_gradients(model, model, args), strict=True):
        assert (out is None) == (eager is None)
        assert eager is None or distance(out, eager) < 1e-5


def test_every_problem_is_named():
    model = models.PixNerd(TINY)
    x, t, y = torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="H and W divisible by the decoded patch of 4 x 4"):
        model(torch.zeros(2, 1, 8, 10), t, y)
    with pytest.raises(ValueError, match="divisible by the decoded patch of 8 x 8"):
        model(torch.zeros(2, 1, 12, 8), t, y, decoder_scale=(2, 2))
    with pytest.raises(ValueError, match=r"x: expected 1 channels.*t: expected the shape \[2\]"):
        model(torch.zeros(2, 3, 8, 8), torch.zeros(1), y)
    with pytest.raises(ValueError, match=r"y: expected classes 0 to 2 \(3 is no class\), got 4"):
        model(x, t, torch.tensor([0, 4]))
    with pytest.raises(
        TypeError, match=r"x: expected the dtype of the model \(torch.float32\), got .*bfloat16"
    ):
        model(x.bfloat16(), t, y)
    with pytest.raises(TypeError, match="y: expected an integer tensor"):
        model(x, t, torch.zeros(2))
    with pytest.raises(TypeError, match=r"decoder_scale: expected a pair \(sh, sw\), got 2 \(int\)"):
        model(x, t, y, decoder_scale=2)
    with pytest.raises(ValueError, match="decoder_scale: expected a finite number of at least 0, got -1"):
        model(x, t, y, decoder_scale=(1, -1))
    with pytest.raises(ValueError, match="at least one pixel a patch"):
        model(x, t, y, decoder_scale=(0.1, 1))
    with pytest.raises(TypeError, match=r"y: expected \[B, 5, 12\] \(3 dimensions\), got \[2\] torch.int64"):
        fresh(TEXT)(x, t, y)
    with pytest.raises(
        ValueError, match=r"t: expected the shape \[2\].*y: expected the shape \[2, 5, 12\], padded"
    ):
        fresh(TEXT)(x, torch.zeros(3), torch.zeros(2, 4, 12))
    with pytest.raises(ValueError, match=r"max_freqs: expected an even number, got 3"):
        replace(TEXT, max_freqs=3)
    with pytest.raises(
        ValueError, match=r"num_heads: expected an integer of at least 1, got 0 .*; encoding: "
    ):
        models.PixNerdConfig(30, 0, 1, 1, encoding="fourier")
    with pytest.raises(
        ValueError, match=r"max_freqs: expected an even number for the encoding 'rope', got 3"
    ):
        models.PixNerdConfig(32, 2, 1, 1, encoding="rope", max_freqs=3)
    with pytest.raises(ValueError, match=r"multiple of 4 \* num_heads = 16"):
        models.PixNerdConfig(40, 4, 1, 1)
