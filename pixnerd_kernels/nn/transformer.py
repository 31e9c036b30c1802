"""The transformer over patches: rotary attention and DiT blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pixnerd_kernels.nn.layers import Linear, RMSNorm, SwiGLU, fusable
from pixnerd_kernels.ops import (
    attention,
    gated_residual,
    gated_residual_rms_norm,
    modulated_rms_norm,
    qk_norm_rope,
)
from pixnerd_kernels.ops.tables import kept


def rotary_table(
    height: int,
    width: int,
    head_size: int,
    extent: tuple[float, float] = (16.0, 16.0),
    device: torch.device | None = None,
) -> Tensor:
    """(cos, sin) of every token's rotation angles: float32 [height * width, head_size / 2, 2].

    Token y * width + x turns its channel pairs 0, 1, 2 ... by x w_0, y w_0, x w_1 ..., with positions x in
    linspace(0, extent[0], width) and y in linspace(0, extent[1], height), and w_m = 10000^(-4 m / head_size).
    The official class-to-image model's extent is (16, 16); the text-to-image model's is (height, width),
    with height along x. Without a device it is on torch's default one. Tables are computed once and kept; do not write
    into them.
    """
    device = torch.empty(0).device if device is None else device
    key = (height, width, head_size, extent, device)
    return kept(_tables, key, lambda: _rotary_table(*key))


_tables: dict[tuple[object, ...], Tensor] = {}


def _rotary_table(
    height: int, width: int, head_size: int, extent: tuple[float, float], device: torch.device | None
) -> Tensor:
    like = {"dtype": torch.float64, "device": device}
    speeds = 10000.0 ** (-torch.arange(0, head_size, 4, **like) / head_size)  # type: ignore[arg-type]
    x = torch.outer(torch.linspace(0, extent[0], width, **like), speeds)  # type: ignore[arg-type]
    y = torch.outer(torch.linspace(0, extent[1], height, **like), speeds)  # type: ignore[arg-type]
    grid = (height, width, speeds.shape[0])
    angles = torch.stack([x[None].expand(grid), y[:, None].expand(grid)], dim=-1).flatten(0, 1).flatten(1)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


class Attention(nn.Module):
    """Self-attention with normalised queries and keys, rotated where there is a rotary table.

    The op reads the weights of `q_norm` and `k_norm`, which are never called: their hooks do not run.

    Raises:
        TypeError: one of them was replaced by another kind of norm.
        ValueError: their eps differ.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size, bias=False)
        self.q_norm = RMSNorm(hidden_size // num_heads)
        self.k_norm = RMSNorm(hidden_size // num_heads)
        self.proj = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, rotary: Tensor | None = None) -> Tensor:
        return self._attend(x, rotary, None)

    def _attend(self, x: Tensor, rotary: Tensor | None, text_kv: Tensor | None) -> Tensor:
        for name, norm in (("q_norm", self.q_norm), ("k_norm", self.k_norm)):
            if not isinstance(norm, RMSNorm):
                raise TypeError(f"Attention: {name}: expected an RMSNorm, got {type(norm).__name__}")
        if self.q_norm.eps != self.k_norm.eps:
            raise ValueError(
                f"Attention: k_norm.eps: expected q_norm's {self.q_norm.eps}, got {self.k_norm.eps}"
            )
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, L, 3, heads, d]
        q, k, v = qk_norm_rope(qkv, self.q_norm.weight, self.k_norm.weight, rotary, text_kv, self.q_norm.eps)
        out: Tensor = self.proj(attention(q, k, v).flatten(2))
        return out


class DiTBlock(nn.Module):
    """Attention and SwiGLU on tokens x [B, L, D], shifted, scaled and gated by the condition [B, 1, D].

    Args:
        hidden_size: D. num_heads: attention heads.
        attention, mlp: make the two parts from (hidden_size, num_heads) and from hidden_size. What `forward`
            gets after the condition goes to the attention.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        attention: Callable[[int, int], nn.Module] = Attention,
        mlp: Callable[[int], nn.Module] = SwiGLU,
    ) -> None:
        super().__init__()
        self.norm1 = RMSNorm(hidden_size)
        self.attn = attention(hidden_size, num_heads)
        self.norm2 = RMSNorm(hidden_size)
        self.mlp = mlp(hidden_size)
        self.modulation = Linear(hidden_size, 6 * hidden_size)

    def forward(self, x: Tensor, condition: Tensor, *context: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        if not (fusable(self.norm1) and fusable(self.norm2)):
            h = self.attn(self.norm1(x) * (1 + scale1) + shift1, *context)
            x = gated_residual(x, h, gate1)
            return gated_residual(x, self.mlp(self.norm2(x) * (1 + scale2) + shift2), gate2)
        h = modulated_rms_norm(x, self.norm1.weight, shift1, scale1, self.norm1.eps)
        h = self.attn(h, *context)
        x, h = gated_residual_rms_norm(x, h, gate1, self.norm2.weight, shift2, scale2, self.norm2.eps)
        return gated_residual(x, self.mlp(h), gate2)
