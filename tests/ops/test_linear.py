"""ops.linear: the values and gradients of torch.nn.functional.linear, and where it runs."""

import sys

import pytest
import torch
import torch.nn.functional as F
from calls import Call
from tolerance import assert_within

from pixnerd_kernels import backends, use_backend
from pixnerd_kernels.ops import linear
from pixnerd_kernels.ops.linear import core_reasons, cpu

MODULE = sys.modules["pixnerd_kernels.ops.linear"]  # the package's attribute of that name is the function


def plain(x, weight, bias=None):
    return F.linear(x, weight, bias)


LARGE = Call("large", linear, plain, {"x": (3, 100, 96), "weight": (160, 96), "bias": (160,)})
ONE_ROW = Call("one row, no bias", linear, plain, {"x": (1, 1152), "weight": (4000, 1152)})
FEW_ROWS = Call("few rows", linear, plain, {"x": (2, 1152), "weight": (2000, 1152)})
SMALL = Call("small", linear, plain, {"x": (3, 4), "weight": (5, 4), "bias": (5,)})


@pytest.fixture
def products(core, monkeypatch):
    """How often the core multiplies, on any processor."""
    monkeypatch.setattr(MODULE, "CORE_IS_FASTER", True)
    count = []
    real = cpu.matmul
    monkeypatch.setattr(cpu, "matmul", lambda *args, **options: count.append(1) or real(*args, **options))
    return count


@pytest.mark.parametrize("call", [LARGE, ONE_ROW, FEW_ROWS, SMALL], ids=str)
def test_values_and_gradients(products, call):
    out = call.results(call.op, call.inputs(), call.upstream())
    assert_within(out, *call.expected(call.inputs(), call.upstream()))
    assert len(products) == {LARGE: 3, ONE_ROW: 1, FEW_ROWS: 3, SMALL: 0}[call]


def test_strided(products):
    tensors, upstream = LARGE.inputs(), LARGE.upstream()
    views = {"x": tensors["x"].mT.contiguous().mT, "weight": tensors["weight"].T.contiguous().T}
    out = LARGE.results(linear, tensors | views, upstream)
    assert_within(out, *LARGE.expected(tensors, upstream))
    assert len(products) == 3


def test_the_default_library_where_the_core_does_not_fit(products):
    x, weight = torch.randn(300, 96), torch.randn(160, 96)
    with use_backend("reference"):
        linear(x, weight)
    linear(x.double(), weight.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    with pytest.raises(RuntimeError):
        linear(x, weight.T)
    assert not products


def test_second_derivatives(products):
    x, weight = torch.randn(300, 96, requires_grad=True), torch.randn(160, 96, requires_grad=True)
    (grad,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), weight)
    (grad,) = torch.autograd.grad(F.linear(x, weight).square().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(grad.sum(), weight)
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-2)


def test_transforms(products):
    """torch.func's and forward-mode gradients go to torch's own layer."""
    x, weight = torch.randn(300, 96), torch.randn(160, 96)
    grad = torch.func.grad(lambda w: linear(x, w).square().sum())(weight)
    torch.testing.assert_close(grad, torch.func.grad(lambda w: F.linear(x, w).square().sum())(weight))
    each = torch.func.vmap(lambda row: linear(row, weight))(x[:, None].expand(-1, 300, -1)[:2])
    torch.testing.assert_close(each, F.linear(x[:2, None].expand(-1, 300, -1), weight))
    _, along = torch.func.jvp(lambda w: linear(x, w), (weight,), (weight,))
    torch.testing.assert_close(along, F.linear(x, weight))
    assert not products
    linear(x, weight)
    assert products


def test_opcheck_and_compile():
    leaves = tuple(t.requires_grad_() for t in LARGE.inputs().values())
    torch.library.opcheck(torch.ops.pixnerd.linear.default, (leaves[0].flatten(0, 1), *leaves[1:]))
    torch.compiler.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*leaves), linear(*leaves))


def test_reasons_are_told(monkeypatch):
    monkeypatch.setattr(MODULE, "_vendor", lambda: "GenuineIntel")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(backends, "_load_native", lambda: (None, "it was not built"))
    reasons = core_reasons()
    for part in ("vendor is GenuineIntel", "no AVX2", "it was not built"):
        assert any(part in reason for reason in reasons)


def test_without_the_core(monkeypatch):
    monkeypatch.setattr(MODULE, "CORE_IS_FASTER", True)
    monkeypatch.setattr(backends, "_load_native", lambda: (None, "it was not built"))
    x, weight = torch.randn(300, 96), torch.randn(160, 96)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    with use_backend("cpu"), pytest.raises(NotImplementedError, match="it was not built"):
        linear(x, weight)


def test_forced_backends(monkeypatch, products):
    monkeypatch.setattr(MODULE, "CORE_IS_FASTER", False)
    x, weight = torch.randn(300, 96), torch.randn(160, 96)
    linear(x, weight)
    assert not products
    with use_backend("cpu"):
        linear(x, weight)
    assert products
