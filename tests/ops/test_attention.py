"""ops.attention against the formula, and its complaints."""

import pytest
import torch

from pixnerd_kernels.ops import attention


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
