"""swiglu: the values and gradients of the formula, and its complaints."""

import pytest
import torch
import torch.nn.functional as F
from calls import Call, Matrix

from pixnerd_kernels import swiglu


def plain(gate, up=None):
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    return F.silu(gate) * up


def swiglu_call(name, *shape, packed=False):
    shapes = {"gate": (*shape[:-1], 2 * shape[-1])} if packed else {"gate": shape, "up": shape}
    return Call(name, swiglu, plain, shapes)


CALLS = [
    swiglu_call("separate", 2, 20, 24),
    swiglu_call("packed", 2, 20, 24, packed=True),
    swiglu_call("odd", 33, 17),
    swiglu_call("packed, odd", 3, 5, 17, packed=True),
    swiglu_call("long rows", 2, 4500),
    swiglu_call("one row", 9),
]


class TestMatrix(Matrix):
    pass


@pytest.mark.parametrize("value", [-1e30, -200.0, -88.0, -30.0, 30.0, 88.0, 200.0, 1e30])
def test_saturated(backend, value):
    gate = torch.full((1, 16), value, requires_grad=True)
    out = swiglu(gate, torch.ones(1, 16))
    out.sum().backward()
    other = gate.detach().requires_grad_()
    expected = F.silu(other)
    expected.sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gate.grad, other.grad)


@pytest.mark.parametrize("value", [-3e38, -1e4, -200.0, -90.0])
def test_what_is_left_of_a_saturated_gate_does_not_grow(backend, value):
    """Zero, as in plain PyTorch, where exp has no more float32: no factor brings it back."""
    gate = torch.full((1, 16), value)
    assert torch.equal(swiglu(gate, torch.full((1, 16), 1e38)), torch.zeros(1, 16))


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_empty(backend, packed):
    backend.may_idle = True
    for shape in [(0, 8), (3, 0), (2, 0, 8)]:
        x = torch.zeros(shape, requires_grad=True)
        out = swiglu(x) if packed else swiglu(x, x)
        out.sum().backward()
        assert out.shape == (*shape[:-1], shape[-1] // 2 if packed else shape[-1])


X = torch.zeros(2, 3)
WRONG = [
    (
        (X,),
        ValueError,
        r"gate: expected \[..., 2 F\], an even number of channels, where up is None, got \[2, 3\]",
    ),
    ((X, X[:1]), ValueError, r"up: expected the shape of gate \[2, 3\], got \[1, 3\]"),
    ((X, X.double()), TypeError, r"up: expected the dtype of gate"),
    ((X.long(), X.long()), TypeError, r"gate: expected a float32.*; up: expected a float32"),
    ((None,), TypeError, r"gate: expected a tensor"),
    ((torch.tensor(1.0),), ValueError, r"gate: expected \[..., F\] \(1 dimensions\)"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), WRONG)
def test_errors(arguments, kind, message):
    with pytest.raises(kind, match=message):
        swiglu(*arguments)
