"""ops.linear: the values and gradients of torch.nn.functional.linear, and which library runs."""

import sys

import pytest
import torch
import torch.nn.functional as F
from calls import Call
from tolerance import assert_within

from pixnerd_kernels import backends, use_backend
from pixnerd_kernels.ops import linear
from pixnerd_kernels.ops.linear import onednn_reasons

MODULE = sys.modules["pixnerd_kernels.ops.linear"]  # the package's attribute of that name is the function


def plain(x, weight, bias=None):
    return F.linear(x, weight, bias)


LARGE = Call("large", linear, plain, {"x": (3, 100, 96), "weight": (160, 96), "bias": (160,)})
ONE_ROW = Call("one row, no bias", linear, plain, {"x": (1, 1152), "weight": (4000, 1152)})
SMALL = Call("small", linear, plain, {"x": (3, 4), "weight": (5, 4), "bias": (5,)})


@pytest.fixture
def products(monkeypatch):
    """Which libraries multiply, one after the other, on any processor."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch does not offer oneDNN's linear layer")
    monkeypatch.setattr(MODULE, "_ONEDNN", True)
    names = []
    onednn, core = torch.ops.mkldnn._linear_pointwise, MODULE.matmul
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda *args: names.append("oneDNN") or onednn(*args)
    )
    monkeypatch.setattr(MODULE, "matmul", lambda *args: names.append("core") or core(*args))
    return names


def expected_products():
    """Of a forward and a backward: the result, the gradient of x, and that of the weight."""
    return ["oneDNN", "oneDNN", "core" if has_core() else "oneDNN"]


def has_core():
    return backends._load_native()[0] is not None


@pytest.mark.parametrize("call", [LARGE, ONE_ROW, SMALL], ids=str)
def test_values_and_gradients(products, call):
    out = call.results(call.op, call.inputs(), call.upstream())
    assert_within(out, *call.expected(call.inputs(), call.upstream()))
    assert products == ([] if call is SMALL else expected_products())


def test_strided(products):
    tensors, upstream = LARGE.inputs(), LARGE.upstream()
    views = {"x": tensors["x"].mT.contiguous().mT, "weight": tensors["weight"].T.contiguous().T}
    out = LARGE.results(linear, tensors | views, upstream)
    assert_within(out, *LARGE.expected(tensors, upstream))
    assert products == expected_products()


def test_the_default_library_where_onednn_does_not_fit(products):
    x, weight = torch.randn(300, 96), torch.randn(160, 96)
    with use_backend("reference"):
        linear(x, weight)
    linear(x.double(), weight.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    with pytest.raises(RuntimeError):
        linear(x, weight.T)
    assert not products


@pytest.mark.parametrize("first", [0, 1], ids=["x", "weight"])
def test_second_derivatives(products, first):
    """Of x's gradient and of the weight's, by both."""
    x, weight = torch.randn(300, 96, requires_grad=True), torch.randn(160, 96, requires_grad=True)

    def second(op, *inputs):
        (grad,) = torch.autograd.grad(op(*inputs).square().sum(), inputs[first], create_graph=True)
        return torch.autograd.grad(grad.square().sum() / grad.numel(), inputs)

    exact = second(F.linear, x.double(), weight.double())
    for found, expected in zip(second(linear, x, weight), exact, strict=True):
        torch.testing.assert_close(
            found.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item()
        )
    assert len(products) >= 5


def test_no_core_and_no_rows(products, monkeypatch):
    """Without the core oneDNN computes the weight's gradient too; of no rows it is zero."""
    grad, x = torch.randn(300, 160), torch.randn(300, 96)
    found = torch.ops.pixnerd.linear_weight_gradient(grad, x)
    monkeypatch.setattr(MODULE, "_core", lambda: False)
    torch.testing.assert_close(torch.ops.pixnerd.linear_weight_gradient(grad, x), found, rtol=1e-4, atol=1e-3)
    assert products == [*expected_products()[2:], "oneDNN"]
    monkeypatch.undo()
    assert not torch.ops.pixnerd.linear_weight_gradient(grad[:0], x[:0]).any()


def test_opcheck_and_compile():
    leaves = tuple(t.requires_grad_() for t in LARGE.inputs().values())
    rows = leaves[0].flatten(0, 1)
    torch.library.opcheck(torch.ops.pixnerd.linear.default, (rows, *leaves[1:]))
    grad = torch.randn(rows.shape[0], leaves[1].shape[0], requires_grad=True)
    torch.library.opcheck(torch.ops.pixnerd.linear_weight_gradient.default, (grad, rows))
    torch.compiler.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*leaves), linear(*leaves))


def test_reasons_are_told(monkeypatch):
    monkeypatch.setattr(MODULE, "_vendor", lambda: "GenuineIntel")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    reasons = onednn_reasons()
    assert any("no AVX-512" in reason for reason in reasons)
    assert any("vendor is GenuineIntel" in reason for reason in reasons)
