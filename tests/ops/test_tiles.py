"""Sizes that are no multiples of the Triton kernels' tiles, and sums that take several rounds."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_within

from pixnerd_kernels import gated_residual_rms_norm, modulated_rms_norm, qk_norm_rope, swiglu


@pytest.fixture
def small_sums(backend, monkeypatch):
    """The kernels that add up programs' sums take a few at a time."""
    if backend.name == "triton":
        from pixnerd_kernels.ops.modulated_rms_norm import triton as norm
        from pixnerd_kernels.ops.qk_norm_rope import triton as qk

        monkeypatch.setattr(norm, "_SUMS", 4)
        monkeypatch.setattr(norm, "_COLUMNS", 4)
        monkeypatch.setattr(qk, "_PROGRAMS", 2)


def results(function, tensors):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out = function(**leaves)
    out = out if isinstance(out, tuple) else (out,)
    upstream = drawn(**{f"out{i}": tuple(o.shape) for i, o in enumerate(out)}).values()
    sum((o * g.to(o)).sum() for o, g in zip(out, upstream, strict=True)).backward()
    return {f"out{i}": o.detach() for i, o in enumerate(out)} | {name: t.grad for name, t in leaves.items()}


def check(op, plain, tensors):
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    assert_within(results(op, tensors), results(plain, tensors), results(plain, wide))


def drawn(**shapes):
    draw = torch.Generator().manual_seed(0)
    device = torch.get_default_device()
    return {
        name: torch.randn(shape, generator=draw, device="cpu").to(device) for name, shape in shapes.items()
    }


def normed(x, weight, shift, scale):
    return F.rms_norm(x, weight.shape, weight, 0.0) * (1 + scale) + shift


@pytest.mark.parametrize("batch", [1, 9], ids=lambda n: f"{n} images")
@pytest.mark.parametrize("tokens", [1, 50], ids=lambda n: f"{n} tokens")
@pytest.mark.parametrize("size", [1, 3, 40], ids=lambda n: f"{n} channels")
def test_norm(backend, small_sums, batch, tokens, size):
    """With an eps of 0, which leaves nothing to divide by where there is no token."""
    row = (batch, 1, size)
    tensors = drawn(x=(batch, tokens, size), weight=(size,), shift=row, scale=row)
    check(lambda **t: modulated_rms_norm(**t, eps=0.0), normed, tensors)


@pytest.mark.parametrize("size", [5, 136], ids=lambda n: f"{n} channels")
def test_residual_and_norm(backend, small_sums, size):
    row = (3, 1, size)
    tensors = drawn(x=(3, 5, size), y=(3, 5, size), gate=row, weight=(size,), shift=row, scale=row)

    def plain(x, y, gate, **rest):
        z = x + gate * y
        return z, normed(z, **rest)

    check(lambda **t: gated_residual_rms_norm(**t, eps=0.0), plain, tensors)


@pytest.mark.parametrize("heads", [3, 8, 17], ids=lambda n: f"{n} heads")
@pytest.mark.parametrize("channels", [2, 18], ids=lambda n: f"{n} channels")
def test_heads(backend, small_sums, heads, channels):
    tensors = drawn(
        qkv=(2, 5, 3, heads, channels),
        q_weight=(channels,),
        k_weight=(channels,),
        text_kv=(2, 3, 2, heads, channels),
    )
    angles = drawn(a=(5, channels // 2))["a"]

    def plain(qkv, q_weight, k_weight, text_kv):
        def rotated(x):
            even, odd = x.view(*x.shape[:-1], -1, 2).unbind(-1)
            cosine, sine = angles.cos().to(x)[:, None], angles.sin().to(x)[:, None]
            return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), -1).view(x.shape)

        def norm(x, weight):
            return F.rms_norm(x, weight.shape, weight, 0.0)

        (q, k, v), (text_k, text_v) = qkv.unbind(2), text_kv.unbind(2)
        k = torch.cat((rotated(norm(k, k_weight)), norm(text_k, k_weight)), 1)
        return rotated(norm(q, q_weight)), k, torch.cat((v, text_v), 1)

    rope = torch.stack((angles.cos(), angles.sin()), -1)
    check(
        lambda qkv, q_weight, k_weight, text_kv: qk_norm_rope(qkv, q_weight, k_weight, rope, text_kv, 0.0),
        plain,
        tensors,
    )


@pytest.mark.parametrize("columns", [1, 7, 1100], ids=lambda n: f"{n} columns")
@pytest.mark.parametrize("rows", [1, 5], ids=lambda n: f"{n} rows")
def test_packed_swiglu(backend, columns, rows):
    tensors = drawn(gate=(rows, 2 * columns))

    def plain(gate):
        gate, up = gate.chunk(2, -1)
        return F.silu(gate) * up

    check(swiglu, plain, tensors)
