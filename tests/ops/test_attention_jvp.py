"""ops.attention in forward mode: value and tangent against the formula, in parts, and what is kept of them."""

import contextlib

import pytest
import torch
from derivatives import KINDS, assert_derivatives, jvp_along
from test_attention import formula
from tolerance import assert_within
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend, sdpa_kernel

from pixnerd_kernels.ops.attention import attention, tangents

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
    return jvp_along(lambda named: function(**named, **constants), tensors, along)


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
