"""gated_residual and gated_residual_rms_norm: the values and gradients of the formulas, and their complaints."""

import pytest
import torch
from calls import Call, Matrix
from test_modulated_rms_norm import plain as plain_norm
from tolerance import assert_within

from pixnerd_kernels import gated_residual, gated_residual_rms_norm


def plain(x, y, gate):
    return x + gate * y


def plain_with_norm(x, y, gate, weight, shift=None, scale=None):
    z = plain(x, y, gate)
    return z, plain_norm(z, weight, shift, scale)


def residual_call(name, batch, tokens, channels):
    shapes = {"x": (batch, tokens, channels), "y": (batch, tokens, channels), "gate": (batch, 1, channels)}
    return Call(name, gated_residual, plain, shapes)


def norm_call(name, batch, tokens, channels, rows=("shift", "scale"), **options):
    shapes = residual_call("", batch, tokens, channels).shapes | {"weight": (channels,)}
    shapes |= dict.fromkeys(rows, (batch, 1, channels))
    return Call(name, gated_residual_rms_norm, plain_with_norm, shapes, ("weight",), **options)


CALLS = [
    residual_call("residual", 2, 20, 24),
    norm_call("with norm", 2, 20, 24),
    norm_call("with norm, odd", 3, 33, 17),
    residual_call("residual, odd", 3, 33, 17),
    norm_call("with norm, float32 weight", 2, 7, 72, wide_weights=True),
    norm_call("with norm alone", 1, 3, 20, ()),
]


class TestMatrix(Matrix):
    pass


def test_either_output_alone(backend):
    """A gradient that one output does not send is zero."""

    def gradients(function, tensors, index):
        leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
        function(**leaves)[index].square().sum().backward()
        return {n: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for n, leaf in leaves.items()}

    for index in range(2):
        inputs = CALLS[1].inputs
        wide = {name: tensor.double() for name, tensor in inputs().items()}
        out = gradients(gated_residual_rms_norm, inputs(), index)
        plain, exact = (gradients(plain_with_norm, tensors, index) for tensors in (inputs(), wide))
        assert_within(out, plain, exact)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)], ids=str)
def test_empty(backend, shape):
    backend.may_idle = True
    x, gate, weight = (torch.ones(s, requires_grad=True) for s in (shape, (shape[0], 1, 8), (8,)))
    out = gated_residual(x, x, gate)
    z, n = gated_residual_rms_norm(x, x, gate, weight, gate, gate)
    (out.sum() + z.sum() + n.sum()).backward()
    assert out.shape == z.shape == n.shape == shape
    assert gate.grad.shape == (shape[0], 1, 8)
    assert not gate.grad.any()
    assert not weight.grad.any()


X, ROW = torch.zeros(2, 3, 8), torch.zeros(2, 1, 8)
WRONG = [
    ((X, X[:, :2], ROW), ValueError, r"y: expected the shape of x \[2, 3, 8\], got \[2, 2, 8\]"),
    ((X, X, X), ValueError, r"gate: expected \[2, 1, 8\], one row for each image of x"),
    ((X[0], X, ROW), ValueError, r"x: expected \[B, L, D\] \(3 dimensions\)"),
    ((X, X.double(), ROW), TypeError, r"y: expected the dtype of x"),
    ((X, X[:1], ROW[:1]), ValueError, r"y: .*; gate: "),
]


@pytest.mark.parametrize("op", [gated_residual, gated_residual_rms_norm], ids=lambda op: op.__name__)
@pytest.mark.parametrize(("arguments", "kind", "message"), WRONG)
def test_errors(op, arguments, kind, message):
    weight = () if op is gated_residual else (torch.ones(8),)
    with pytest.raises(kind, match=message):
        op(*arguments, *weight)


def test_every_problem_is_told_at_once():
    with pytest.raises(ValueError, match=r"gate: .*; shift: .*; weight: .*; eps: "):
        gated_residual_rms_norm(X, X, X, torch.ones(7), X, None, -1.0)
