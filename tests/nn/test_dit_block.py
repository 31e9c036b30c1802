"""DiT blocks whose norms are not theirs any more: they are called, or refused, and never taken for RMSNorms."""

import pytest
import torch
from torch import nn

from pixnerd_kernels.nn import DiTBlock
from pixnerd_kernels.nn.transformer import Attention


def made():
    torch.manual_seed(0)
    block = DiTBlock(24, 3).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


@pytest.fixture
def given():
    torch.manual_seed(1)
    return torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(2, 1, 24, dtype=torch.float64)


@pytest.mark.parametrize("name", ["norm1", "norm2"])
def test_a_hook_on_a_norm_runs(given, name):
    block, ran = made(), []
    expected = block(*given)
    getattr(block, name).register_forward_hook(lambda module, args, out: ran.append(1))
    torch.testing.assert_close(block(*given), expected)
    assert ran == [1]
    getattr(block, name).register_forward_hook(lambda module, args, out: 2 * out)
    assert (block(*given) - expected).norm() > 0.01 * expected.norm()


@pytest.mark.parametrize("name", ["norm1", "norm2"])
def test_another_norm_is_called(given, name):
    block = made()
    expected = block(*given)
    norm = nn.LayerNorm(24, eps=1e-6, bias=False, dtype=torch.float64)
    norm.weight = getattr(block, name).weight
    setattr(block, name, norm)
    x, condition = given
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(condition).chunk(6, dim=-1)
    x = x + gate1 * block.attn(block.norm1(x) * (1 + scale1) + shift1)
    x = x + gate2 * block.mlp(block.norm2(x) * (1 + scale2) + shift2)
    torch.testing.assert_close(block(*given), x)
    assert (x - expected).norm() > 0.01 * expected.norm()


def test_another_norm_of_queries_is_refused(given):
    block = made()
    block.attn.k_norm = nn.LayerNorm(8)
    with pytest.raises(TypeError, match="k_norm: expected an RMSNorm, got LayerNorm"):
        block(*given)


def test_norms_of_queries_and_keys_have_one_eps():
    """The op takes one for both."""
    attention = Attention(32, 2)
    x = torch.randn(1, 4, 32)
    before = attention(x)
    attention.q_norm.eps = attention.k_norm.eps = 1.0
    assert not torch.allclose(attention(x), before)
    attention.k_norm.eps = 0.5
    with pytest.raises(ValueError, match=r"k_norm.eps: expected q_norm's 1.0, got 0.5"):
        attention(x)
