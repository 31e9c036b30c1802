"""modulated_rms_norm: the values and gradients of the formula, and its complaints."""

import pytest
import torch
import torch.nn.functional as F
from calls import Call, Matrix

from pixnerd_kernels import modulated_rms_norm


def plain(x, weight, shift=None, scale=None, eps=1e-6):
    n = F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)
    n = n if scale is None else n * (1 + scale)
    return n if shift is None else n + shift


def norm_call(name, batch, tokens, channels, rows=("shift", "scale"), **options):
    shapes = {"x": (batch, tokens, channels), "weight": (channels,)}
    shapes |= dict.fromkeys(rows, (batch, 1, channels))
    return Call(name, modulated_rms_norm, plain, shapes, ("weight",), **options)


CALLS = [
    norm_call("both", 2, 20, 24),
    norm_call("odd", 3, 33, 17),
    norm_call("wide", 1, 5, 1152),
    norm_call("float32 weight", 2, 7, 72, wide_weights=True),
    norm_call("shift", 2, 3, 20, ("shift",)),
    norm_call("scale", 2, 3, 20, ("scale",)),
    norm_call("neither", 2, 3, 5, ()),
]


class TestMatrix(Matrix):
    pass


def test_any_rank_without_modulation(backend):
    weight = torch.randn(8)
    for shape in [(8,), (5, 8), (2, 3, 4, 8)]:
        x = torch.randn(shape)
        torch.testing.assert_close(modulated_rms_norm(x, weight), F.rms_norm(x, (8,), weight, 1e-6))


def test_one_row_for_all_images(backend):
    """An expanded row's gradient is the sum over images."""
    x, weight, row = torch.randn(3, 5, 8), torch.randn(8), torch.randn(1, 1, 8, requires_grad=True)
    modulated_rms_norm(x, weight, row.expand(3, 1, 8), row.expand(3, 1, 8)).square().sum().backward()
    other = row.detach().requires_grad_()
    plain(x, weight, other, other).square().sum().backward()
    torch.testing.assert_close(row.grad, other.grad)


def test_zeros_and_a_large_eps(backend):
    x, weight = torch.zeros(1, 2, 8, requires_grad=True), torch.ones(8)
    out = modulated_rms_norm(x, weight, eps=0.25)
    out.backward(torch.ones(1, 2, 8))
    assert not out.any()
    torch.testing.assert_close(x.grad, torch.full((1, 2, 8), 2.0))


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)], ids=str)
def test_empty(backend, shape):
    backend.may_idle = True
    x, row, weight = (torch.ones(s, requires_grad=True) for s in (shape, (shape[0], 1, 8), (8,)))
    out = modulated_rms_norm(x, weight, row, row)
    out.sum().backward()
    assert out.shape == shape
    assert not weight.grad.any()
    assert row.grad.shape == (shape[0], 1, 8)
    assert not row.grad.any()


def test_saved_for_backward(any_isa):
    x, weight, shift, scale = CALLS[0].inputs().values()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), lambda t: t):
        modulated_rms_norm(x.requires_grad_(), weight, shift, scale)
    assert saved == [t.data_ptr() for t in (x, weight, scale)]


X, ROW, WEIGHT = torch.zeros(2, 3, 8), torch.zeros(2, 1, 8), torch.ones(8)
WRONG = [
    ((X, torch.ones(7)), ValueError, r"weight: expected \[8\], one weight for each channel of x, got \[7\]"),
    ((X[0], WEIGHT, ROW), ValueError, r"x: expected \[B, L, D\] \(3 dimensions\), got \[3, 8\]"),
    ((X, WEIGHT, ROW[0]), ValueError, r"shift: expected \[B, 1, D\]"),
    ((X, WEIGHT, None, X), ValueError, r"scale: expected \[2, 1, 8\], one row for each image of x"),
    ((X, WEIGHT, ROW.double()), TypeError, r"shift: expected the dtype of x"),
    ((X.int(), WEIGHT), TypeError, r"x: expected a float32, float64, bfloat16 or float16 tensor"),
    ((3.0, WEIGHT), TypeError, r"x: expected a tensor"),
    ((X[..., :0], WEIGHT[:0]), ValueError, r"x: expected at least one channel"),
    ((X, WEIGHT, None, None, -1.0), ValueError, r"eps: expected a finite number of at least 0"),
    ((X, torch.ones(7), ROW[0]), ValueError, r"shift: .*; weight: "),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), WRONG)
def test_errors(arguments, kind, message):
    with pytest.raises(kind, match=message):
        modulated_rms_norm(*arguments)
