"""Whole pixel heads as one op: Chroma1-Radiance's, and the official PixNerDiT's."""

import foreign
import pytest
import torch
import torch.nn.functional as F
from tolerance import relative
from torch import nn

import pixnerd_kernels as pk

HEAD = "pixel_decoder"


def radiance(final="conv", dtype=torch.float32, operations=foreign.plain_operations, **options):
    """The embedder computes in float32 whatever the rest is stored in, as ComfyUI's does."""
    torch.manual_seed(2)
    model = foreign.ChromaRadiance(24, 16, 2, 2, 8, final, operations=operations, **options).to(dtype)
    model.nerf_image_embedder.float()
    return model


def made(dtype=torch.float32, batch=2):
    generator = torch.Generator().manual_seed(6)
    image = torch.randn(batch, 3, 16, 24, generator=generator)
    hidden = torch.randn(batch, 6, 24, generator=generator)
    return image.to(dtype), hidden.to(dtype)


def head(report):
    (entry,) = (entry for entry in report.entries if entry.op == HEAD)
    return entry


@pytest.fixture
def decoded(monkeypatch):
    """How often the op was called."""
    from pixnerd_kernels.patching.rules import radiance_head

    calls = []
    whole = radiance_head.pixel_decoder
    monkeypatch.setattr(radiance_head, HEAD, lambda *a, **k: calls.append(1) or whole(*a, **k))
    return calls


@pytest.mark.parametrize("final", ["conv", "linear"])
@pytest.mark.parametrize("tile", [0, 4])
def test_replaced_with_and_without_tiles(final, tile, decoded):
    model = radiance(final, nerf_tile_size=tile)
    expected = model(*made())
    report = pk.patch(model, ops=HEAD)
    assert head(report).status == "replaced"
    assert head(report).form == "gated blocks, encoding dct_integer"
    assert 0 < head(report).error < 1e-6
    decoded.clear()
    torch.testing.assert_close(model(*made()), expected)
    assert decoded == [1]
    report.unpatch()
    assert torch.equal(model(*made()), expected)


def test_half_precision(decoded):
    model = radiance(dtype=torch.bfloat16)
    expected = model(*made(torch.bfloat16))
    assert head(pk.patch(model)).status == "replaced"
    decoded.clear()
    out = model(*made(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert torch.linalg.vector_norm((out - expected).float()) < 0.02 * torch.linalg.vector_norm(
        expected.float()
    )
    assert decoded == [1]


def test_a_zero_initialised_final_layer_hides_nothing():
    model = radiance()
    nn.init.zeros_(model.nerf_final_layer_conv.conv.weight)
    nn.init.zeros_(model.nerf_final_layer_conv.conv.bias)
    entry = head(pk.patch(model))
    assert entry.status == "replaced"
    assert entry.error > 0


class OtherEncoding(foreign.ChromaRadiance):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.nerf_image_embedder.encode = lambda height, width, like: torch.ones(1, height * width, 64)


class NoBlocks(nn.Module):
    def forward_nerf(self, image, hidden, params):
        return image


def test_others_are_left_and_named():
    model = OtherEncoding(24, 16, 2, 2, 8, "conv")
    entry = head(pk.patch(model))
    assert entry.status == "left"
    assert "computes no known form" in entry.reason
    assert "has forward_nerf, but not" in head(pk.patch(NoBlocks())).reason
    model = radiance(dtype=torch.float8_e4m3fn, operations=foreign.cast_operations)
    report = pk.patch(model)
    assert "torch.float8_e4m3fn: cast at each call" in head(report).reason
    assert [entry.status for entry in report.entries if entry.op == "neural_field_mlp_packed"] == [
        "replaced"
    ] * 2


def test_calls_that_the_op_does_not_take_go_to_the_module(decoded):
    """Another dtype than the weights', a hook on a block, an adapter in a generating layer."""
    model, twin = radiance(operations=foreign.cast_operations), radiance(operations=foreign.cast_operations)
    assert head(pk.patch(model, ops=HEAD)).status == "replaced"
    decoded.clear()
    assert torch.equal(model(*made(torch.bfloat16)), twin(*made(torch.bfloat16)))
    ran = []
    handle = model.nerf_blocks[1].register_forward_hook(lambda *_: ran.append(1))
    assert torch.equal(model(*made()), twin(*made()))
    assert ran == [1]
    handle.remove()
    for child, name in (
        ("nerf_blocks.0.param_generator", "weight_function"),
        ("nerf_blocks.0.param_generator", "bias_function"),
        ("nerf_image_embedder.embedder.0", "bias_function"),
    ):
        without = twin(*made())
        for each in (model, twin):
            setattr(each.get_submodule(child), name, [lambda w: w.flip(0)])
        assert not torch.equal(twin(*made()), without)
        assert torch.equal(model(*made()), twin(*made()))
        for each in (model, twin):
            setattr(each.get_submodule(child), name, [])
    assert decoded == []
    torch.testing.assert_close(model(*made()), twin(*made()))
    assert decoded == [1]


class Packed(torch.Tensor):
    """Stands for a quantised weight: an ordinary dtype, and no memory that a kernel could read."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function not in (F.linear, torch.Tensor.data_ptr):
            return super().__torch_function__(function, types, args, kwargs)
        plain = [arg.as_subclass(torch.Tensor) if isinstance(arg, Packed) else arg for arg in args]
        return function(*plain, **kwargs or {})


def pack(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed), requires_grad=False)


@pytest.mark.parametrize("family", ["official", "radiance"])
def test_weights_of_a_class_of_their_own(family, decoded, decoded_officially):
    """Quantised before the patch: left and said so. After it: the module's own code runs."""

    def build():
        return official() if family == "official" else radiance()

    def layer(model):
        return (
            model.blocks[2].param_generator1[0]
            if family == "official"
            else model.nerf_blocks[0].param_generator
        )

    model, twin = build(), build()
    values = given(twin) if family == "official" else made()
    pack(layer(model))
    entry = head(pk.patch(model, ops=HEAD))
    assert entry.status == "left"
    assert "its generating layers are or hold Packed" in entry.reason
    model = build()
    assert head(pk.patch(model, ops=HEAD)).status == "replaced"
    decoded.clear()
    decoded_officially.clear()
    pack(layer(model))
    torch.testing.assert_close(model(*values), twin(*values), rtol=1e-4, atol=1e-5)
    assert decoded == decoded_officially == []


def test_gradients_flow(decoded):
    gradients = []
    for patched in (False, True):
        model = radiance()
        if patched:
            pk.patch(model, ops=HEAD)
        inputs = [tensor.requires_grad_() for tensor in made()]
        out = model(*inputs)
        gradients.append(torch.autograd.grad(out.square().sum(), [*inputs, *model.parameters()]))
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# The official PixNerDiT


def official(cls=foreign.PixNerDiT, **options):
    torch.manual_seed(8)
    model = cls(**options)
    nn.init.normal_(model.final_layer.linear.weight, std=0.3)
    return model


def given(model, dtype=torch.float32):
    generator = torch.Generator().manual_seed(9)
    size = model.patch_size
    x, t = torch.randn(2, 3, 2 * size, 3 * size, generator=generator), torch.rand(2, generator=generator)
    y = (
        torch.tensor([1, 10])
        if isinstance(model, foreign.PixNerDiT)
        else torch.randn(2, 7, 24, generator=generator)
    )
    return x.to(dtype), t.to(dtype), y.to(dtype) if y.is_floating_point() else y


@pytest.fixture
def decoded_officially(monkeypatch):
    from pixnerd_kernels.patching.rules import official_head

    calls = []
    whole = official_head.pixel_decoder
    monkeypatch.setattr(official_head, HEAD, lambda *a, **k: calls.append(1) or whole(*a, **k))
    return calls


@pytest.mark.parametrize(
    ("cls", "size"),
    [
        (foreign.PixNerDiT, 8), (foreign.PixNerDiT, 16), (foreign.TextPixNerDiT, 8), (foreign.TextPixNerDiT, 16),
        (foreign.HeavyPixNerDiT, 8), (foreign.HeavyPixNerDiT, 16),
    ],
)  # fmt: skip
def test_official_heads(cls, size, decoded_officially):
    """At 16 x 16 pixels a patch, the published size, both text-to-image models have the same coordinates."""
    model, twin = (official(cls, patch_size=size) for _ in range(2))
    report = pk.patch(model, ops=HEAD)
    assert head(report).status == "replaced", head(report).reason
    if cls is foreign.HeavyPixNerDiT:
        assert head(report).form == "w1 normalised, encoding rope over 16"
        assert model.decoder_patch_scaling_h == twin.decoder_patch_scaling_h
    decoded_officially.clear()
    torch.testing.assert_close(model(*given(twin)), twin(*given(twin)), rtol=1e-4, atol=1e-5)
    assert decoded_officially == [1]
    with torch.autocast("cpu"):
        out, expected = model(*given(twin)), twin(*given(twin))
    assert out.dtype == expected.dtype
    assert torch.linalg.vector_norm(out - expected) < 0.05 * torch.linalg.vector_norm(expected)
    if cls is foreign.HeavyPixNerDiT:  # the scale may change after the patch
        for each in (model, twin):
            each.decoder_patch_scaling_h, each.decoder_patch_scaling_w = 2.0, 1.5
        torch.testing.assert_close(model(*given(twin)), twin(*given(twin)), rtol=1e-4, atol=1e-5)
    report.unpatch()
    assert type(model) is cls


def test_a_fresh_official_model(decoded_officially):
    """Its final layer starts at zero: gradients tell what outputs cannot, and without them it is refused."""
    assert head(pk.patch(foreign.PixNerDiT())).status == "replaced"
    with torch.inference_mode():
        entry = head(pk.patch(foreign.PixNerDiT()))
    assert entry.status == "left"
    assert "cannot tell" in entry.reason


class AddsItsInput(foreign.PixNerDiT):
    def forward(self, x, t, y, s=None, mask=None):
        return super().forward(x, t, y, s, mask) + 0.1 * x


class OtherStates(foreign.PixNerDiT):
    """Other positions than those that its `fetch_pos` gives."""

    def fetch_pos(self, height, width, device):
        return super().fetch_pos(width, height, device)

    def forward(self, x, t, y, s=None, mask=None):
        self.fetch_pos = super().fetch_pos
        try:
            return super().forward(x, t, y, s, mask)
        finally:
            del self.fetch_pos


def test_other_official_heads_are_left():
    assert "computes no known form" in head(pk.patch(official(AddsItsInput))).reason
    assert "what leads to its blocks.1 is not what is known" in head(pk.patch(official(OtherStates))).reason


def test_official_calls_that_the_op_does_not_take(decoded_officially):
    """Hidden states from outside, a hook on a field block."""
    model, twin = official(), official()
    pk.patch(model, ops=HEAD)
    decoded_officially.clear()
    x, t, y = given(twin)
    s = torch.randn(2, 6, 32)
    assert torch.equal(model(x, t, y, s), twin(x, t, y, s))
    model.blocks[2].register_forward_hook(lambda *args: args[2] * 2)
    assert not torch.equal(model(x, t, y), twin(x, t, y))
    assert decoded_officially == []


def test_official_gradients(decoded_officially):
    gradients = []
    for patched in (False, True):
        model = official()
        if patched:
            pk.patch(model, ops=HEAD)
        x, t, y = given(model)
        x.requires_grad_()
        gradients.append(torch.autograd.grad(model(x, t, y).square().sum(), [x, *model.parameters()]))
    for theirs, ours in zip(*gradients, strict=True):
        assert relative(ours, theirs) < 1e-4
