"""The ops' formulas in plain PyTorch, as anyone would write them, in the dtype of their inputs.

They share no code with the backends, so that `pixnerd verify` and the tests can hold every backend against
them: in float64 as the truth, and in a lower precision as the error that plain PyTorch would make.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def neural_field_mlp(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    w_gate: Tensor | None = None,
    norm_weight: Tensor | None = None,
    normalize: Sequence[str] = ("w1", "w2", "w_gate"),
    activation: str = "silu",
    residual: bool = True,
    norm_eps: float = 1e-6,
    weight_eps: float = 1e-12,
) -> Tensor:
    """x [N, S, D1], w1 and w_gate [N, D1, D2], w2 [N, D2, D1] -> [N, S, D1]."""

    def scaled(name: str, w: Tensor) -> Tensor:
        return F.normalize(w, dim=-2, eps=weight_eps) if name in normalize else w

    def activate(z: Tensor) -> Tensor:
        return (
            {"silu": F.silu, "relu": F.relu}[activation](z)
            if activation != "gelu"
            else F.gelu(z, approximate="tanh")
        )

    n = x
    if norm_weight is not None:
        n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm_eps) * norm_weight.to(x.dtype)
    h = n @ scaled("w1", w1)
    h = activate(h) if w_gate is None else activate(n @ scaled("w_gate", w_gate)) * h
    y = h @ scaled("w2", w2)
    return x + y if residual else y


def normalize_weights(w: Tensor, dim: int, eps: float) -> Tensor:
    """w / max(||w||, eps) over `dim`."""
    return F.normalize(w, dim=dim, eps=eps)


def coordinate_encoding(
    height: int,
    width: int,
    max_freqs: int,
    kind: str,
    scale: tuple[float, float] = (1.0, 1.0),
    *,
    linspace: bool = True,
) -> Tensor:
    """[height * width, max_freqs^2] in float64, one pixel of a patch a row.

    Coordinates come from torch.linspace, or are i / (n - 1): the same numbers, other roundings. The
    difference is how much of an angle's rounding the formula itself passes on.
    """
    K = max_freqs
    y, x = (axis.reshape(-1, 1) for axis in torch.meshgrid(
        torch.arange(height).double(), torch.arange(width).double(), indexing="ij"
    ))  # fmt: skip
    if linspace:
        line_x, line_y = (torch.linspace(0, 1, n, dtype=torch.float64) for n in (width, height))
        u, v = line_x[x.long()], line_y[y.long()]
    else:
        u, v = x / max(width - 1, 1), y / max(height - 1, 1)
    m = torch.arange(K * K).double()
    a, b = m.div(K, rounding_mode="floor"), m % K
    if kind == "dct_aligned":
        step = K / max(K - 1, 1)
        if linspace:
            a, b = a * step, b * step
            angles = math.pi * (x / width) * a, math.pi * (y / height) * b
        else:  # there is no linspace to round otherwise: multiply first, divide last
            angles = a * x * (math.pi * step) / width, b * y * (math.pi * step) / height
            a, b = a * step, b * step
        return torch.cos(angles[0]) * torch.cos(angles[1]) / (1 + a * b)
    if kind in ("dct", "dct_integer"):
        step = K / max(K - 1, 1) if kind == "dct" else 1.0
        a, b = a * step, b * step
        return torch.cos(math.pi * u * a) * torch.cos(math.pi * v * b) / (1 + a * b)
    if kind == "dct_paper":
        return torch.cos(math.pi * u * (a + 1)) * torch.cos(math.pi * v * (b + 1))
    if kind == "rope":
        w = 10000.0 ** (-2 * m[: K * K // 2] / (K * K))
        both = [torch.cos(u * width * scale[0] * w), torch.cos(v * height * scale[1] * w)]
        return torch.stack(both, dim=-1).flatten(1)
    w = 10000.0 ** (-4 * m[: K * K // 4] / (K * K))
    return torch.cat([torch.sin(x * w), torch.cos(x * w), torch.sin(y * w), torch.cos(y * w)], dim=-1)


def modulated_rms_norm(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, L, D], weight [D], shift and scale [B, 1, D] -> [B, L, D]."""
    n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
    return n * (1 + scale) + shift


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x and y [B, L, D], gate [B, 1, D] -> [B, L, D]."""
    return x + gate * y


def gated_residual_rms_norm(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """`gated_residual`, and the `modulated_rms_norm` of it."""
    z = gated_residual(x, y, gate)
    return z, modulated_rms_norm(z, weight, shift, scale)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor, text_kv: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, L, 3, heads, d], rope [L, d / 2, 2], text_kv [B, M, 2, heads, d] -> q, k, v [B, L (+ M), heads, d]."""
    cos, sin = rope[:, None].to(qkv.dtype).unbind(-1)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    def turn(x: Tensor) -> Tensor:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)

    q, k, v = qkv.unbind(2)
    q, k = turn(norm(q, q_weight)), turn(norm(k, k_weight))
    if text_kv is None:
        return q, k, v
    text_k, text_v = text_kv.unbind(2)
    return q, torch.cat([k, norm(text_k, k_weight)], 1), torch.cat([v, text_v], 1)
