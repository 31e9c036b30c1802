"""The pixel head's module: one op as long as its parts are its own, and never without what somebody has put in."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from pixnerd_kernels.nn import PixelDecoder
from pixnerd_kernels.nn import decoder as decoder_module

KINDS = {
    "dct": {},
    "rope": {"encoding": "rope", "max_freqs": 4, "extent": 16.0, "normalize": ("w1",)},
    "no final norm": {"final_norm": False, "encoding": "dct_aligned"},
}


def made(**options):
    torch.manual_seed(0)
    head = PixelDecoder(2, 24, 8, 2, 2, 4, **{"max_freqs": 3, **options}).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    return head


def inputs(size=8):
    torch.manual_seed(1)
    return torch.randn(3, 2, size, size, dtype=torch.float64), torch.randn(3, 4, 24, dtype=torch.float64)


@pytest.fixture
def fused(monkeypatch):
    """How often the op runs."""
    calls, op = [], decoder_module.pixel_decoder
    monkeypatch.setattr(
        decoder_module, "pixel_decoder", lambda *args, **options: calls.append(1) or op(*args, **options)
    )
    return calls


@pytest.mark.parametrize("scale", [(1.0, 1.0), (2.0, 1.5)])
@pytest.mark.parametrize("kind", KINDS)
def test_part_by_part_it_computes_the_same(fused, kind, scale):
    head = made(**KINDS[kind])
    image, hidden = inputs()
    image = image.repeat_interleave(int(scale[0] * 2), 2).repeat_interleave(int(scale[1] * 2), 3)[
        ..., ::2, ::2
    ]

    def results():
        given = [image.clone().requires_grad_(), hidden.clone().requires_grad_()]
        out = head(*given, scale)
        return [out, *torch.autograd.grad(out.square().sum(), [*given, *head.parameters()])]

    expected = results()
    assert len(fused) == 1
    head.linear.register_forward_hook(lambda *_: None)
    for found, wanted in zip(results(), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert len(fused) == 1


class Adapted(nn.Linear):
    """An adapter that shows its base's weight, as peft's do."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, dtype=torch.float64)
        self.weight, self.bias = base.weight, base.bias
        self.more = nn.Parameter(torch.full((), 0.5, dtype=torch.float64))

    def forward(self, x):
        out = super().forward(x)  # a factor would be normalised away
        return out + self.more * torch.sin(3 * out)


def replaced_norm(head):
    head.norm = nn.RMSNorm(8, eps=1e-6, dtype=torch.float64)


def adapted_generator(head):
    head.blocks[1].generator = Adapted(head.blocks[1].generator)


def forward_of_its_own(head):
    layer = head.blocks[0].generator
    layer.forward = lambda x: torch.sin(3 * nn.Linear.forward(layer, x))


def hooked_block(head):
    head.blocks[0].register_forward_hook(lambda module, args, out: 2 * out)


def hooked_norm_of_a_block(head):
    head.blocks[0].norm.register_forward_hook(lambda module, args, out: out.flip(-1))


CHANGES = [replaced_norm, adapted_generator, forward_of_its_own, hooked_block, hooked_norm_of_a_block]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_put_in_is_called(fused, change):
    """Against the parts called by hand, with gradients for what was added."""
    head = made()
    change(head)
    image, hidden = inputs()
    out = head(image, hidden)
    patches = decoder_module.patchify(image, 4, 4).flatten(0, 1)
    encoding = decoder_module.coordinate_encoding(4, 4, 3, dtype=torch.float64)
    x = head.embed(torch.cat([patches, encoding.expand(len(patches), -1, -1)], -1))
    for block in head.blocks:
        x = block(x, hidden.flatten(0, 1))
    x = head.linear(head.norm(x)).unflatten(0, (3, 4))
    torch.testing.assert_close(out, decoder_module.unpatchify(x, 4, 4, 2, 2))
    untouched = made()
    assert (out - untouched(image, hidden)).norm() > 0.01 * out.norm()
    assert len(fused) == 1  # the untouched one's
    if change is adapted_generator:
        out.sum().backward()
        assert head.blocks[1].generator.more.grad.abs() > 0
    with pytest.raises(TypeError, match="a part was replaced, wrapped, hooked"):
        head.params()


def other_eps_everywhere(head):
    for norm in (head.norm, *(block.norm for block in head.blocks)):
        norm.eps = 0.5


def other_weights_normalised(head):
    for block in head.blocks:
        block.normalize = ("w1",)


def another_eps_of_one_norm(head):
    head.blocks[1].norm.eps = 0.5


def another_weight_normalised_in_one_block(head):
    head.blocks[0].normalize = ("w2",)


@pytest.mark.parametrize(
    ("change", "calls"),
    [
        (other_eps_everywhere, 1),
        (other_weights_normalised, 1),
        (another_eps_of_one_norm, 0),
        (another_weight_normalised_in_one_block, 0),
    ],
)
def test_attributes_of_the_parts_hold(fused, change, calls):
    """In the one call, or where it knows one value for all, part by part."""
    head, image, hidden = made(), *inputs()
    before = head(image, hidden)
    fused.clear()
    change(head)
    out = head(image, hidden)
    assert len(fused) == calls
    assert (out - before).norm() > 0.01 * before.norm()
    torch.testing.assert_close(out, head._part_by_part(image, hidden, (1.0, 1.0)))


@pytest.mark.parametrize("count", [1, 2])
def test_checkpointed_blocks(fused, count):
    head, plain = made(), made()
    for index in range(count):
        head.blocks[index] = checkpoint_wrapper(head.blocks[index])
    given = inputs()
    out, expected = head(*given), plain(*given)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    for found, wanted in zip(head.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad)


def test_every_size_that_is_none_is_named():
    message = "in_channels: expected an integer of at least 1, got 0 .*; num_blocks: .* got 0 .*; patch_size: .* 4.0"
    with pytest.raises(TypeError, match=message):
        PixelDecoder(0, 24, 8, 2, 0, 4.0)


def test_it_compiles_as_one_graph(fused):
    head, (image, hidden) = made().float(), inputs()
    image, hidden = image.float(), hidden.float()
    torch.compiler.reset()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image, hidden), head(image, hidden))
