"""ops.attention against the formula, and its complaints."""

import sys
import types

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pixnerd_kernels.ops.attention import (
    _first,
    _in_forward_mode,
    attention,
    flash,
    not_supported_reasons,
    select,
)


def formula(q, k, v, bias=None):
    logits = torch.einsum("blhd,bmhd->bhlm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhlm,bmhd->blhd", (logits if bias is None else logits + bias).softmax(-1), v)


@pytest.mark.parametrize("head_size", [8, 72])
def test_attention_is_the_formula_forward_and_backward(head_size):
    torch.manual_seed(0)
    packed = torch.randn(2, 5, 3, 4, head_size, dtype=torch.float64, requires_grad=True)
    q, k, v = packed.unbind(2)
    out = attention(q, k, v)
    torch.testing.assert_close(out, formula(q, k, v))
    (grad,) = torch.autograd.grad(out.square().sum(), packed)
    (expected,) = torch.autograd.grad(formula(q, k, v).square().sum(), packed)
    torch.testing.assert_close(grad, expected)


def test_masks_hide_or_bias_keys():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 2, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 8)
    keep = torch.arange(7) < 4
    torch.testing.assert_close(attention(q, k, v, mask=keep[None]), formula(q, k[:, :4], v[:, :4]))
    bias = torch.randn(2, 1, 3, 7)
    torch.testing.assert_close(attention(q, k, v, mask=bias), formula(q, k, v, bias))


def test_every_problem_is_named():
    q = torch.zeros(2, 3, 2, 8)
    with pytest.raises(ValueError, match=r"k: expected batch, heads and d.*v: expected the shape of k"):
        attention(q, torch.zeros(2, 7, 2, 4), torch.zeros(2, 6, 2, 4))
    with pytest.raises(TypeError, match="v: expected the dtype of q"):
        attention(q, q, q.double())


@pytest.mark.parametrize("backend", ["auto", "sdpa", "flash2"])
@pytest.mark.parametrize(
    ("mask", "kind", "message"),
    [
        (torch.ones(3, 6).bool(), ValueError, "what broadcasts to [B, heads, L, M] = [2, 4, 3, 7], got [3, 6]"),
        (torch.ones(7, 3).bool(), ValueError, "got [7, 3]"),
        (torch.ones(7).bool(), ValueError, "got [7]"),
        (torch.ones(2, 3, 7).bool(), ValueError, "got [2, 3, 7]"),
        (torch.ones(1, 2, 4, 3, 7).bool(), ValueError, "got [1, 2, 4, 3, 7]"),
        (torch.ones(3, 7, device="meta").bool(), ValueError, "the device of q (cpu)"),
        (torch.ones(3, 7).long(), TypeError, "torch.bool or the dtype of q (torch.bfloat16), got [3, 7] torch.int64"),
        (torch.ones(3, 7), TypeError, "torch.bool or the dtype of q (torch.bfloat16), got [3, 7] torch.float32"),
        (torch.ones(3, 7).to_sparse(), TypeError, "a dense (strided) tensor, got torch.sparse_coo"),
        ([[True]], TypeError, "a dense (strided) tensor, got [[True]] (list)"),
    ],
    ids=[
        "keys", "transposed", "vector", "batch for heads", "rank", "device", "integers", "dtype", "sparse", "list",
    ],
)  # fmt: skip
def test_a_mask_that_does_not_fit_is_named(backend, mask, kind, message):
    q, k = torch.zeros(2, 3, 4, 8).bfloat16(), torch.zeros(2, 7, 4, 8).bfloat16()
    with pytest.raises(kind) as caught:
        attention(q, k, k, mask=mask, backend=backend)
    assert "attention: mask: expected" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
@pytest.mark.parametrize("shape", [(3, 7), (1, 7), (3, 1), (4, 3, 7), (2, 1, 1, 7), (2, 4, 3, 7)], ids=str)
def test_masks_that_fit(shape, dtype):
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 4, 8).double(), torch.randn(2, 7, 4, 8).double()
    mask = bias = torch.randn(shape, dtype=torch.float64)
    if dtype == torch.bool:
        mask = torch.rand(shape) > 0.3
        mask[..., :1] = True
        bias = torch.where(mask, 0.0, -torch.inf).double()
    torch.testing.assert_close(attention(q, k, k, mask=mask), formula(q, k, k, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_casts_the_mask_along_with_q(dtype):
    torch.manual_seed(0)
    q, k, mask = torch.randn(2, 3, 4, 8), torch.randn(2, 7, 4, 8), torch.randn(3, 7).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, k, mask=mask)
    q, k, mask = (t.bfloat16() for t in (q, k, mask))
    assert torch.equal(out, attention(q, k, k, mask=mask))


def forget():
    flash.load.cache_clear()
    _first.cache_clear()


@pytest.fixture
def packages(monkeypatch):
    """FlashAttention packages of our own making, installed or not, which note what they are called with."""
    calls = []
    forget()

    def install(name, function=None):
        def flash_attn_func(q, k, v):
            calls.append(name)
            return attention(q, k, v, backend="sdpa"), "log-sum-exp"

        module = types.ModuleType(name)
        module.flash_attn_func = function or flash_attn_func
        monkeypatch.setitem(sys.modules, name, module)

    yield install, calls
    forget()


@pytest.mark.parametrize("name", ["flash2", "flash3", "flash4"])
def test_a_named_backend_that_cannot_run_tells_every_reason(name):
    q = torch.zeros(1, 3, 2, 12)
    with pytest.raises(NotImplementedError) as caught:
        attention(q, q, q, mask=torch.ones(3, 3, dtype=torch.bool), backend=name)
    message = str(caught.value)
    for part in (
        f"attention cannot run on the backend '{name}'",
        f"the package {flash.PACKAGES[name].module} is not installed",
        "it needs CUDA tensors, the inputs are on cpu",
        "it takes float16 and bfloat16, the inputs are torch.float32",
        "it takes heads of a multiple of 8",
        "it takes no mask",
    ):
        assert part in message, part


def test_a_broken_package_is_a_reason(packages, monkeypatch):
    class Broken:
        def find_spec(self, name, *_):
            if name == "flash_attn_interface":
                raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    reasons = not_supported_reasons("flash3", torch.zeros(1, 3, 2, 8))
    assert any("importing flash_attn_interface failed: ImportError: undefined symbol" in r for r in reasons)


@pytest.mark.parametrize(
    ("capability", "installed", "chosen"),
    [
        (9, ["flash_attn", "flash_attn_interface", "flash_attn.cute"], "flash3"),
        (9, ["flash_attn", "flash_attn.cute"], "flash4"),
        (8, ["flash_attn", "flash_attn_interface"], "flash2"),
        (9, [], "sdpa"),
    ],
)
def test_auto_takes_the_best_that_runs(packages, monkeypatch, capability, installed, chosen):
    """On what looks like a GPU: the choice reads nothing but the device, the dtype and the head's size."""
    for module in installed:
        packages[0](module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    q = types.SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.bfloat16, shape=(1, 3, 2, 72))
    assert select(q) == chosen
    assert select(q, mask=torch.ones(3, 3)) == "sdpa"
    assert select(types.SimpleNamespace(device=q.device, dtype=torch.float32, shape=q.shape)) == "sdpa"


def test_symbolic_sizes_choose_too(packages, monkeypatch):
    """As in tracing for another device, where no size is a number yet."""

    class Size:
        __hash__ = None

        def __gt__(self, other):
            return False

        def __mod__(self, other):
            return 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    packages[0]("flash_attn")
    q = types.SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.bfloat16, shape=(1, 3, 2, Size()))
    assert select(q) == "flash2"


def test_a_mask_is_checked_in_every_call():
    """Whether it may differ from q's dtype depends on autocast, which a call that has passed does not show."""
    q = torch.randn(1, 3, 2, 8, dtype=torch.bfloat16)
    mask = torch.zeros(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        attention(q, q, q, mask=mask)
    with pytest.raises(TypeError, match="mask"):
        attention(q, q, q, mask=mask)


def test_a_package_is_called_in_the_layout_that_it_takes(packages):
    install, calls = packages
    install("flash_attn_interface")
    q, k, v = torch.randn(3, 2, 5, 4, 8)
    torch.testing.assert_close(flash.run("flash3", q, k, v), attention(q, k, v))
    assert calls == ["flash_attn_interface"]


def test_a_cpu_takes_torchs_kernel():
    assert select(torch.zeros(1, 3, 2, 8, dtype=torch.bfloat16)) == "sdpa"
    with pytest.raises(
        ValueError, match="backend: expected one of 'auto', 'flash3', 'flash4', 'flash2', 'sdpa'"
    ):
        attention(*[torch.zeros(1, 3, 2, 8)] * 3, backend="flash")


def test_derivatives():
    """Forward mode and nested gradients take torch's formula, as its flash kernels have none."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 5, 2, 8, dtype=torch.float64).unbind(0)
    for mode in (jvp_of, torch.func.hessian, jacobian_twice, gradients_of_gradients):
        for own, exact in zip(mode(attention)(q, k, v), mode(formula)(q, k, v), strict=True):
            torch.testing.assert_close(own, exact)


def jacobian_twice(function):
    """Reverse mode within reverse mode."""
    return torch.func.jacrev(torch.func.jacrev(function))


def jvp_of(function):
    return lambda *tensors: torch.func.jvp(function, tensors, tensors[::-1])


def gradients_of_gradients(function):
    """With create_graph; in the context that its docstring names."""

    def call(*tensors):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        with sdpa_kernel(SDPBackend.MATH):
            out = function(*leaves)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    return call


def test_flash_packages_are_for_plain_calls(packages, monkeypatch):
    """Their functions know neither tangents nor torch.func."""
    packages[0]("flash_attn_interface")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    q = types.SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(1, 3, 2, 64))
    assert select(q) == "flash3"
    with torch.autograd.forward_ad.dual_level():
        assert select(q) == "sdpa"
    assert torch.func.vmap(lambda x: x * (select(q) == "sdpa"))(torch.ones(2)).all()


def test_what_has_no_tangent_stays_on_the_flash_kernel():
    """Beside what is differentiated, such as a frozen model: its logits are not kept either."""
    q = torch.randn(1, 5, 2, 8)
    with torch.autograd.forward_ad.dual_level():
        assert not _in_forward_mode(q, q, q)
        dual = torch.autograd.forward_ad.make_dual(q, q)
        assert _in_forward_mode(q, q, dual)
    found = []

    def beside(moving):
        found.append((_in_forward_mode(q, q, q), _in_forward_mode(q, q, moving)))
        return moving * attention(q, q, q)

    _, tangent = torch.func.jvp(beside, (q,), (q,))
    assert found == [(False, True)]
    torch.testing.assert_close(tangent, q * attention(q, q, q))
