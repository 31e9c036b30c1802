"""What the text-to-image model's blocks have in place of `Attention` and `SwiGLU`."""

from __future__ import annotations

from torch import Tensor, nn

from pixnerd_kernels.nn.layers import Linear
from pixnerd_kernels.nn.transformer import Attention
from pixnerd_kernels.ops import swiglu


class JointAttention(Attention):
    """Image tokens [B, L, D] attend to themselves and to text tokens [B, M, D].

    Image queries and keys are normalised and rotated. Text keys are normalised by the image keys' norm and not
    rotated; they and the text values come from a projection of their own, [B, M, 2, heads, d], and stand
    behind the image's.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__(hidden_size, num_heads)
        self.kv_text = Linear(hidden_size, 2 * hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        return self._attend(x, rotary, self.kv_text(text).unflatten(-1, (2, self.num_heads, -1)))


class PackedSwiGLU(nn.Module):
    """w3(SiLU(gate) * up) with [gate, up] = w12(x), 4 D hidden channels each."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.w12 = Linear(hidden_size, 8 * hidden_size, bias=False)
        self.w3 = Linear(4 * hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w3(swiglu(self.w12(x)))
        return out
