"""The transformer's SwiGLU: hidden channels that a GPU wants rounded up change no value."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pixnerd_kernels import patch
from pixnerd_kernels.nn import layers


def results(run, module, x):
    y = run(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
    return [y.detach(), *gradients]


def plain(module):
    return lambda x: module.w2(F.silu(module.w1(x)) * module.w3(x))


@pytest.fixture
def module():
    torch.manual_seed(0)
    found = layers.SwiGLU(20).double()
    assert found.w1.out_features == 53
    return found


@pytest.fixture
def rounding(monkeypatch):
    """What a GPU does, on a CPU; returns the widths that were computed."""
    widths = []
    product = layers.linear

    def seen(x, weight, bias=None):
        widths.append(weight.shape[0])
        return product(x, weight, bias)

    monkeypatch.setattr(layers, "_missing_channels", lambda x, layer: 3)
    monkeypatch.setattr(layers, "linear", seen)
    return widths


def test_padded_channels_change_neither_values_nor_gradients(module, rounding):
    x = torch.randn(2, 5, 20, dtype=torch.float64, requires_grad=True)
    expected = results(plain(module), module, x)
    del rounding[:]
    found = results(module, module, x)
    assert rounding == [56, 56, 20]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["w1", "w2", "w3"])
def test_an_adapter_or_a_hook_is_called(module, rounding, name):
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.out_features, self.weight, self.bias = base, base.out_features, base.weight, None

        def forward(self, x):
            return 2 * self.base(x)

    x = torch.randn(5, 20, dtype=torch.float64)
    base = getattr(module, name)
    handle = base.register_forward_hook(lambda module, args, out: 2 * out)
    hooked = module(x)
    handle.remove()
    setattr(module, name, Adapter(base))
    torch.testing.assert_close(module(x), plain(module)(x))
    torch.testing.assert_close(hooked, plain(module)(x))


def test_only_a_gpu_and_odd_widths_are_rounded_up(module):
    class Cuda:
        is_cuda = True

    assert layers._missing_channels(torch.zeros(1), module.w1) == 0
    assert layers._missing_channels(Cuda(), module.w1) == 3
    assert layers._missing_channels(Cuda(), layers.SwiGLU(24).w1) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    torch.manual_seed(0)
    module = layers.SwiGLU(1024).to("cuda", torch.bfloat16)
    x = torch.randn(256, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    wide, wide_x = layers.SwiGLU(1024).to("cuda", torch.float64), x.detach().double().requires_grad_()
    wide.load_state_dict(module.state_dict())
    exact = results(plain(wide), wide, wide_x)
    usual = results(plain(module), module, x)
    for a, b, c in zip(results(module, module, x), usual, exact, strict=True):
        error, allowed = ((t.double() - c).norm() / c.norm() for t in (a, b))
        assert error <= 2 * allowed + 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("swapped", [False, True])
def test_a_patched_model_s_layers_are_padded_too(rounding, swapped):
    class FeedForward(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w3 = nn.Linear(20, 53, bias=False), nn.Linear(20, 53, bias=False)
            self.w2 = nn.Linear(53, 20, bias=False)

        def forward(self, x):
            if swapped:
                return self.w2(self.w1(x) * F.silu(self.w3(x)))
            return self.w2(F.silu(self.w1(x)) * self.w3(x))

    torch.manual_seed(0)
    model = FeedForward()
    x = torch.randn(2, 5, 20)
    expected = model(x)
    patch(model, ops="swiglu")
    del rounding[:]
    torch.testing.assert_close(model(x), expected)
    assert rounding == [56, 56, 20]
