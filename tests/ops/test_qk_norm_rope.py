"""qk_norm_rope: the values and gradients of the formula, rotary tables, and its complaints."""

import pytest
import torch
import torch.nn.functional as F
from calls import Call, Matrix, expected
from fields import drawn
from tolerance import assert_same

from pixnerd_kernels import qk_norm_rope
from pixnerd_kernels.nn import rotary_table


def plain(qkv, q_weight, k_weight, text_kv=None, rope=None):
    """Rotation by complex numbers, as the official code has it."""

    def norm(x, weight):
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, 1e-6).to(x.dtype)

    def turn(x):
        if rope is None:
            return x
        wide = x if x.dtype == torch.float64 else x.float()
        turned = torch.view_as_complex(wide.unflatten(-1, (-1, 2)).contiguous())
        turned = turned * torch.view_as_complex(rope.to(wide.dtype))[:, None]
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)

    q, k, v = qkv.unbind(2)
    q, k = turn(norm(q, q_weight)), turn(norm(k, k_weight))
    if text_kv is not None:
        text_k, text_v = text_kv.unbind(2)
        k, v = torch.cat([k, norm(text_k, k_weight)], 1), torch.cat([v, text_v], 1)
    return q, k, v


def rope_call(name, batch, grid, heads, channels, text=0, turned=True, **options):
    tokens = grid[0] * grid[1]
    shapes = {"qkv": (batch, tokens, 3, heads, channels), "q_weight": (channels,), "k_weight": (channels,)}
    if text:
        shapes["text_kv"] = (batch, text, 2, heads, channels)
    constants = {"rope": rotary_table(*grid, channels)} if turned else {}
    return Call(name, qk_norm_rope, plain, shapes, ("q_weight", "k_weight"), constants=constants, **options)


CALLS = [
    rope_call("image", 2, (4, 5), 3, 24),
    rope_call("image and text", 2, (3, 4), 2, 24, text=7),
    rope_call("XL's heads", 1, (3, 6), 2, 72),
    rope_call("no table", 2, (1, 5), 3, 17, turned=False),
    rope_call("no table, text", 2, (1, 5), 3, 9, text=20, turned=False, wide_weights=True),
    rope_call("four channels", 1, (2, 2), 1, 4, wide_weights=True),
]


class TestMatrix(Matrix):
    pass


@pytest.mark.parametrize(("tokens", "text"), [(3, 0), (0, 3)])
def test_gradients_at_once_where_there_is_nothing(any_isa, tokens, text):
    any_isa.may_idle = True
    qkv, text_kv = torch.randn(1, tokens, 3, 2, 4), torch.randn(1, text, 2, 2, 4)
    leaves = [tensor.requires_grad_() for tensor in (qkv, text_kv)]
    out = qk_norm_rope(qkv, torch.ones(4), torch.ones(4), None, text_kv)
    upstream = [torch.randn(2, *o.shape) for o in out]
    found = torch.autograd.grad(out, leaves, upstream, is_grads_batched=True, retain_graph=True)
    for i in range(2):
        each = torch.autograd.grad(out, leaves, [u[i] for u in upstream], retain_graph=True)
        for own, one in zip(found, each, strict=True):
            torch.testing.assert_close(own[i], one)


def test_gradients_in_attentions_layout(backend):
    """scaled_dot_product_attention's gradients come as [B, heads, L, d] seen from the side."""
    call = CALLS[1]
    upstream = {n: g.transpose(1, 2).contiguous().transpose(1, 2) for n, g in call.upstream().items()}
    out = call.results(call.op, call.inputs(), upstream)
    dense = call.results(call.op, call.inputs(), call.upstream())
    assert_same(out, dense, backend.one_kernel, lambda: expected(call, torch.float32))


def test_rotation_keeps_relative_positions():
    """q · k depends on the difference of two tokens' places alone."""
    table = rotary_table(1, 17, 8)  # positions 0 ... 16
    qkv = torch.randn(1, 1, 3, 1, 8).expand(1, 17, 3, 1, 8)
    q, k, _ = qk_norm_rope(qkv, torch.ones(8), torch.ones(8), table)
    logits = q[0, :, 0] @ k[0, :, 0].T
    torch.testing.assert_close(logits[5, 3], logits[12, 10])
    assert (logits[5, 3] - logits[5, 4]).abs() > 1e-3


@pytest.mark.parametrize("shape", [(0, 4, 3, 2, 8), (2, 0, 3, 2, 8), (2, 4, 3, 0, 8)], ids=str)
def test_empty(backend, shape):
    backend.may_idle = True
    qkv, weight = torch.zeros(shape, requires_grad=True), torch.ones(8, requires_grad=True)
    q, k, v = qk_norm_rope(qkv, weight, weight)
    (q.sum() + k.sum() + v.sum()).backward()
    assert q.shape == k.shape == v.shape == (*shape[:2], *shape[3:])
    assert not weight.grad.any()


def test_parts_beyond_32_bits(backend):
    """Queries, keys and values 2^30 numbers apart in the address space, of which hardly any page is touched."""
    close = drawn(1, 2, 3, 2, 16, generator=torch.Generator().manual_seed(0)).half()
    far = torch.empty_strided(close.shape, (64, 32, 1 << 30, 16, 1), dtype=close.dtype).copy_(close)
    weight = torch.ones(16)
    for out, expected_out in zip(
        qk_norm_rope(far, weight, weight), qk_norm_rope(close, weight, weight), strict=True
    ):
        assert torch.equal(out, expected_out) if backend.one_kernel else torch.allclose(out, expected_out)


QKV, WEIGHT, ROPE = torch.zeros(2, 6, 3, 2, 8), torch.ones(8), torch.zeros(6, 4, 2)
TEXT = torch.zeros(2, 5, 2, 2, 8)
WRONG = [
    ((QKV[:, :, :2], WEIGHT, WEIGHT), ValueError, r"qkv: expected \[B, L, 3, heads, d\] with at least one"),
    ((QKV[0], WEIGHT, WEIGHT), ValueError, r"qkv: expected \[B, L, 3, heads, d\] \(5 dimensions\)"),
    ((QKV, WEIGHT[:7], WEIGHT[:6]), ValueError, r"q_weight: expected \[8\].*; k_weight: expected \[8\]"),
    ((QKV, WEIGHT, WEIGHT, ROPE[:5]), ValueError, r"rope: expected \[6, 4, 2\], got \[5, 4, 2\]"),
    ((QKV[..., :7], WEIGHT[:7], WEIGHT[:7], ROPE), ValueError, r"qkv: expected an even number of channels"),
    (
        (QKV, WEIGHT, WEIGHT, ROPE.clone().requires_grad_()),
        ValueError,
        r"rope: expected a table without a grad",
    ),
    ((QKV, WEIGHT, WEIGHT, ROPE, TEXT[:1]), ValueError, r"text_kv: expected \[2, 5, 2, 2, 8\]"),
    ((QKV, WEIGHT, WEIGHT, ROPE, TEXT.double()), TypeError, r"text_kv: expected the dtype of qkv"),
    ((QKV, WEIGHT, WEIGHT, None, None, -1), ValueError, r"eps: expected a finite number of at least 0"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), WRONG)
def test_errors(arguments, kind, message):
    with pytest.raises(kind, match=message):
        qk_norm_rope(*arguments)


def test_the_core_reads_no_table_for_odd_heads(core):
    """The public function refuses it; exported programs and graph passes call the op itself."""
    qkv, weight, rope = torch.randn(1, 4, 3, 2, 5), torch.ones(5), torch.randn(4, 2, 2)
    with pytest.raises(ValueError, match="heads of 5 channels, which are no pairs"):
        torch.ops.pixnerd.qk_norm_rope(qkv, weight, weight, rope, None, 1e-6, "cpu")
