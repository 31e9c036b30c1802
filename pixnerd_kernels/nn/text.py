"""What the text-to-image model's blocks have in place of `Attention` and `SwiGLU`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnerd_kernels.nn.transformer import Attention, rotate
from pixnerd_kernels.ops import attention


class JointAttention(Attention):
    """Image tokens [B, L, D] attend to themselves and to text tokens [B, M, D].

    Image queries and keys are normalised and rotated. Text keys are normalised by the image keys' norm and not
    rotated; they and the text values come from a projection of their own, [B, M, 2, heads, d], and stand
    behind the image's.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__(hidden_size, num_heads)
        self.kv_text = nn.Linear(hidden_size, 2 * hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # [B, L, heads, d]
        text_k, text_v = self.kv_text(text).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        q = rotate(self.q_norm(q), rotary)
        k = torch.cat([rotate(self.k_norm(k), rotary), self.k_norm(text_k)], dim=1)
        v = torch.cat([v, text_v], dim=1)
        out: Tensor = self.proj(attention(q, k, v).flatten(2))
        return out


class PackedSwiGLU(nn.Module):
    """w3(SiLU(gate) * up) with [gate, up] = w12(x), 4 D hidden channels each."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(hidden_size, 8 * hidden_size, bias=False)
        self.w3 = nn.Linear(4 * hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w12(x).chunk(2, dim=-1)
        out: Tensor = self.w3(F.silu(gate) * up)
        return out
