"""The layers for Hugging Face's `kernels` package: loaded from the local repository, without a network."""

import socket
import sys
from pathlib import Path

import pytest
import torch
from kernels import (
    LocalLayerRepository,
    Mode,
    kernelize,
    use_kernel_forward_from_hub,
    use_kernel_mapping,
)
from torch import nn

import pixnerd_kernels.nn as own
from pixnerd_kernels.nn import stateless

sys.path.append(str(Path(__file__).parents[1] / "patching"))

import foreign

LAYERS = {
    "NerfBlock": (foreign.NerfBlock, (24, 8, 2), ((3, 5, 8), (3, 24))),
    "TextNerfBlock": (foreign.TextNerfBlock, (24, 8, 2), ((3, 5, 8), (3, 24))),
    "NerfGLUBlock": (foreign.NerfGLUBlock, (24, 8, 2), ((3, 5, 8), (3, 24))),
    "RMSNorm": (own.RMSNorm, (24,), ((2, 5, 24),)),
    "SwiGLU": (foreign.FeedForward, (24, 96), ((2, 5, 24),)),
    "PackedSwiGLU": (foreign.PackedFeedForward, (24, 64), ((2, 5, 24),)),
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch, threads):
    def refuse(*_):
        raise AssertionError("a network connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    threads(1)


def test_every_layer_is_tested():
    layers = {
        name
        for name, value in vars(stateless).items()
        if isinstance(value, type) and value.__module__ == stateless.__name__
    }
    assert layers == set(LAYERS)


@pytest.mark.parametrize("name", LAYERS)
def test_kernelize(name, core_calls):
    cls, arguments, shapes = LAYERS[name]
    torch.manual_seed(0)
    module = use_kernel_forward_from_hub(name)(type(name, (cls,), {}))(*arguments)
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    expected = module(*inputs)
    wanted = torch.autograd.grad(expected.square().sum(), [*inputs, *module.parameters()])
    layer = LocalLayerRepository(stateless.REPOSITORY, layer_name=name)
    with use_kernel_mapping({name: {"cpu": layer}}, inherit_mapping=False):
        kernelize(
            nn.Sequential(module), mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu", use_fallback=False
        )
    core_calls.clear()
    out = module(*inputs)
    gradients = torch.autograd.grad(out.square().sum(), [*inputs, *module.parameters()])
    assert core_calls.total() >= 2
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
