"""The slim PixNerds under derivatives other than a training step's."""

import copy
import gc

import torch
from test_pixnerd import conditions, families, randomised
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from pixnerd_kernels.nn import transformer


def difference(function, tensors, along, step=1e-6):
    """The derivative along a direction, by central differences."""
    ahead, behind = (
        function(*(t + sign * step * v for t, v in zip(tensors, along, strict=True))) for sign in (1, -1)
    )
    return (ahead - behind) / (2 * step)


@families
def test_tangents_are_differences(config):
    """Along image and time together, as MeanFlow takes them."""
    model, y = randomised(config, torch.float64), conditions(config, 2)
    y = y.double() if y.is_floating_point() else y
    x, t = torch.randn(2, config.in_channels, 8, 12).double(), torch.rand(2).double()
    along = torch.randn_like(x), torch.ones_like(t)
    out, tangent = torch.func.jvp(lambda x, t: model(x, t, y), (x, t), along)
    torch.testing.assert_close(out, model(x, t, y), rtol=1e-12, atol=1e-12)
    expected = difference(lambda x, t: model(x, t, y), (x, t), along)
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-6)


def meanflow_step(model, x, t, velocity, y):
    """The loss of arXiv 2505.13447 for r = 0, and its gradients."""
    u, tangent = torch.func.jvp(lambda x, t: model(x, t, y), (x, t), (velocity, torch.ones_like(t)))
    target = velocity - t.view(-1, 1, 1, 1) * tangent
    loss = (u - target.detach()).square().mean()
    return loss, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def test_a_meanflow_step(monkeypatch):
    """The first call that needs its tables is within a transform, whose tensors later calls must not meet."""
    monkeypatch.setattr(transformer, "_tables", {})
    model, y = randomised(), torch.tensor([0, 1])
    x, velocity, t = torch.randn(2, 1, 8, 12), torch.randn(2, 1, 8, 12), torch.rand(2)
    wide = copy.deepcopy(model).double()
    loss, gradients = meanflow_step(model, x, t, velocity, y)
    expected, wide_gradients = meanflow_step(wide, x.double(), t.double(), velocity.double(), y)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for own, exact in zip(gradients, wide_gradients, strict=True):
        torch.testing.assert_close(own.double(), exact, rtol=1e-3, atol=1e-5 * exact.abs().max().item())
    model(x, t, y).sum().backward()  # without any transform


@families
def test_tangents_keep_little_for_backward(config):
    """Twice what an ordinary step keeps: each op its inputs, and their tangents for a tangent's own gradients."""
    model, y = randomised(config), conditions(config, 2)
    x, t = torch.randn(2, config.in_channels, 16, 16), torch.rand(2)

    def kept(run):
        """Bytes that are there after it, while its results and their graph are alive."""
        run()  # tables that stay
        gc.collect()  # lest it frees what others left while memory is counted
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            results = run()
        events = profile.profiler.kineto_results.events()
        assert results is not None
        return sum(event.nbytes() for event in events if event.name() == "[memory]")

    alone = kept(lambda: model(x, t, y))
    both = kept(lambda: torch.func.jvp(lambda x, t: model(x, t, y), (x, t), (x, t)))
    assert alone < both < 2.5 * alone


def test_tangents_compile_as_one_graph():
    model, y = randomised(), torch.tensor([0, 1])
    x, t = torch.randn(2, 1, 8, 12), torch.rand(2)

    def tangent(x, t):
        return torch.func.jvp(lambda x, t: model(x, t, y), (x, t), (x, t))

    torch.compiler.reset()
    compiled = torch.compile(tangent, fullgraph=True, backend="aot_eager")
    for out, eager in zip(compiled(x, t), tangent(x, t), strict=True):
        torch.testing.assert_close(out, eager)
    torch.compiler.reset()


@families
def test_a_penalty_on_gradients(config):
    """Under torch's formula for attention, whose flash kernels have no second derivatives."""
    model, y = randomised(config, torch.float64), conditions(config, 2)
    y = y.double() if y.is_floating_point() else y
    x, t = torch.randn(2, config.in_channels, 8, 12).double(), torch.rand(2).double()

    def penalty(x):
        leaf = x.detach().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            out = model(leaf, t, y)
        (gradient,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        return gradient.square().sum(), leaf

    along = torch.randn_like(x)
    total, leaf = penalty(x)
    (second,) = torch.autograd.grad(total, leaf)
    expected = difference(lambda x: penalty(x)[0].detach(), (x,), (along,))
    torch.testing.assert_close((second * along).sum(), expected, rtol=1e-6, atol=0)


def test_gradients_of_every_example():
    """By vmap over torch.func.grad, against one backward pass each."""
    model, y = randomised(), torch.tensor([0, 1])
    x, t = torch.randn(2, 1, 8, 12), torch.rand(2)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x, t, y):
        return functional_call(model, parameters, (x[None], t[None], y[None])).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(parameters, x, t, y)
    for i in range(2):
        model.zero_grad()
        model(x[i : i + 1], t[i : i + 1], y[i : i + 1]).square().sum().backward()
        for name, parameter in model.named_parameters():
            limit = 1e-5 * parameter.grad.abs().max().item()
            torch.testing.assert_close(found[name][i], parameter.grad, rtol=1e-3, atol=limit)
