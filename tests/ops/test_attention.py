"""ops.attention against the formula, and its complaints."""

import contextlib
import sys
import types

import pytest
import torch
from derivatives import KINDS, assert_derivatives
from tolerance import assert_within
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend, sdpa_kernel

from pixnerd_kernels.ops.attention import (
    _first,
    _in_forward_mode,
    attention,
    flash,
    not_supported_reasons,
    select,
    tangents,
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


MASKS = {
    "none": None,
    "bias": lambda: torch.randn(2, 1, 5, 7),
    "heads": lambda: torch.randn(3, 5, 7),
    "keys": lambda: torch.arange(7).lt(4)[None],
    "no keys": lambda: torch.arange(5)[:, None].ge(1).expand(5, 7),
    "images": lambda: torch.arange(2).view(2, 1, 1, 1).add(3).gt(torch.arange(7)),
}


def moved(function, tensors, along, **constants):
    """Value and tangent along the tensors that `along` names."""
    return torch.func.jvp(
        lambda *values: function(**{**tensors, **dict(zip(along, values, strict=True))}, **constants),
        tuple(tensors[name] for name in along),
        tuple(along.values()),
    )


def masked_formula(q, k, v, mask=None):
    """A row without keys is zero."""
    if mask is None or mask.dtype != torch.bool:
        return formula(q, k, v, mask)
    out = formula(q, k, v, torch.where(mask, 0.0, -1e30).to(q.dtype))
    alone = mask.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1]).any(-1).mT[..., None]
    return torch.where(alone, out, 0.0)


def drawn(dtype=torch.float32):
    torch.manual_seed(0)
    shapes = {"q": (2, 5, 3, 8), "k": (2, 7, 3, 8), "v": (2, 7, 3, 8)}
    return [{name: torch.randn(shape).to(dtype) for name, shape in shapes.items()} for _ in range(2)]


@pytest.mark.parametrize("bytes_at_once", [1, 300, 1000, 1 << 24])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("names", ["qkv", "q", "k", "v"])
def test_tangents(monkeypatch, names, mask, bytes_at_once):
    """In parts of one row of queries, of several, of one image, and of all."""
    monkeypatch.setattr(tangents, "_BYTES", bytes_at_once)
    compute, logits = tangents._rows_jvp, []

    def watched(q, k, *rest):
        logits.append(4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return compute(q, k, *rest)

    monkeypatch.setattr(tangents, "_rows_jvp", watched)
    tensors, along = drawn()
    mask = MASKS[mask] and MASKS[mask]()
    along = {name: along[name] for name in names}
    out = moved(attention, tensors, along, mask=mask)
    row = 4 * 3 * 7
    assert max(logits) <= max(bytes_at_once, row)
    assert sum(logits) == 2 * 5 * row
    assert len(logits) < 10 or bytes_at_once < 2 * row
    wide = [{name: t.double() for name, t in each.items()} for each in (tensors, along)]
    exact = moved(
        masked_formula, *wide, mask=mask.double() if mask is not None and mask.is_floating_point() else mask
    )
    plain = moved(masked_formula, tensors, along, mask=mask)
    assert_within(*({"out": o, "tangent": t} for o, t in (out, plain, exact)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_tangents_of_dtypes(dtype):
    tensors, along = drawn(dtype)
    wide = [{name: t.double() for name, t in each.items()} for each in (tensors, along)]
    found = (
        moved(f, *each)
        for f, each in ((attention, (tensors, along)), (formula, (tensors, along)), (formula, wide))
    )
    assert_within(*({"out": o, "tangent": t} for o, t in found))


def test_gradients_beside_tangents_save_the_inputs_alone():
    """And are those of the op without them."""
    tensors, along = drawn()
    bias = torch.randn(3, 5, 7, requires_grad=True)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out, tangent = moved(attention, leaves, along, mask=bias)
    own = {t.untyped_storage().data_ptr() for t in (*leaves.values(), *along.values(), bias)}
    assert {t.untyped_storage().data_ptr() for t in kept} == own
    grad = torch.randn_like(out)
    inputs = [*leaves.values(), bias]
    found = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    expected = torch.autograd.grad(attention(**leaves, mask=bias), inputs, grad)
    for own, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(own, plain)
    # Of the tangent, and once more, by the formula.
    (_, plain_tangent) = moved(formula, leaves, along, bias=bias)
    for first, second in zip(
        *(torch.autograd.grad(t, inputs, grad, create_graph=True) for t in (tangent, plain_tangent)),
        strict=True,
    ):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    penalties = [
        torch.autograd.grad(
            sum(
                g.square().sum()
                for g in torch.autograd.grad(
                    moved(f, leaves, along, **{name: bias})[0], inputs, grad, create_graph=True
                )
            ),
            inputs,
        )
        for f, name in ((attention, "mask"), (formula, "bias"))
    ]
    for first, second in zip(*penalties, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


def test_a_row_without_keys_has_no_gradients():
    """Neither of the value nor of the tangent, for which torch's formula has NaN."""
    torch.manual_seed(0)
    x, along = torch.randn(2, 2, 5, 2, 8, dtype=torch.float64)
    mask = torch.rand(2, 1, 5, 5) > 0.4
    mask[0, 0, 2] = False
    found = []
    for function in (attention, masked_formula):
        leaf = x.clone().requires_grad_()
        out = torch.func.jvp(lambda x, f=function: f(x, x, x, mask=mask), (leaf,), (along,))
        found.append(torch.autograd.grad([out[0].sin().sum(), out[1].sin().sum()], leaf))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("shape", [(0, 5, 7, 8), (2, 0, 7, 8), (2, 5, 0, 8), (2, 5, 7, 0)], ids=str)
def test_tangents_of_nothing(shape):
    batch, length, keys, size = shape
    q, k = torch.randn(batch, length, 3, size), torch.randn(batch, keys, 3, size)
    for mask in (None, torch.ones(length, keys, dtype=torch.bool)):
        out, tangent = torch.func.jvp(lambda q, k, m=mask: attention(q, k, k, mask=m), (q, k), (q, k))
        assert out.shape == tangent.shape == q.shape
        assert torch.equal(out, attention(q, k, k, mask=mask))
        assert not tangent.any()


def test_one_tensor_as_all_three():
    x, along = torch.randn(2, 2, 5, 2, 8, dtype=torch.float64)
    x.requires_grad_()
    results = []
    for function in (attention, formula):
        out, tangent = torch.func.jvp(lambda x, f=function: f(x, x, x), (x,), (along,))
        results.append((out, tangent, *torch.autograd.grad(out.square().sum(), x)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_every_kind(kind):
    if kind in ("second_gradients", "third_gradients", "tangents_of_gradients", "gradients_at_once"):
        context = sdpa_kernel(SDPBackend.MATH)
    else:
        context = contextlib.nullcontext()
    with context:
        assert_derivatives(kind, lambda **t: (attention(**t),), lambda **t: (formula(**t),), drawn()[0])


def test_tangents_of_the_op_itself():
    tensors, along = drawn()
    q, k, v = tensors.values()
    torch.library.opcheck(torch.ops.pixnerd.attention_jvp, (q, k, v, None, *along.values()))
    torch.library.opcheck(torch.ops.pixnerd.attention, (q, k, v, None))
    with pytest.raises(ValueError, match="tangent of k: expected"):
        torch.ops.pixnerd.attention_jvp(q, k, v, None, None, q, None)


def test_tangents_under_autocast():
    tensors, along = drawn()
    mask = torch.randn(5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        out = moved(attention, tensors, along, mask=mask)
    half = [{name: t.bfloat16() for name, t in each.items()} for each in (tensors, along)]
    by_hand = moved(attention, *half, mask=mask.bfloat16())
    assert all(torch.equal(a, b) and a.dtype == torch.bfloat16 for a, b in zip(out, by_hand, strict=True))


def test_tangents_compile():
    tensors, along = drawn()
    graphs = []

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(moved, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    for found, eager in zip(
        compiled(attention, tensors, along), moved(attention, tensors, along), strict=True
    ):
        assert torch.equal(found, eager)
    assert ["pixnerd.attention_jvp" in graph for graph in graphs] == [True]


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
