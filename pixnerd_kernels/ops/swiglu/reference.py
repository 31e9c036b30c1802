"""SwiGLU's product in plain PyTorch: silu(gate) * up, and its gradients in closed form.

    silu(z) = z s,  silu'(z) = s (1 + z (1 - s)),  s = 1 / (1 + exp(-z))

A tangent: out' = gate' up silu'(gate) + silu(gate) up'.

gate and up [rows, F]. float32 and float64 compute in their own dtype, bfloat16 and float16 in float32 with one
rounding at the end. Source: the official PixNerd's feed-forward layer (GLU Variants Improve Transformer, arXiv
2002.05202).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pixnerd_kernels.ops.dtypes import compute_dtype


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in gate's dtype, contiguous."""
    wide = gate.to(compute_dtype(gate.dtype))
    return (wide * torch.sigmoid(wide) * up.to(wide.dtype)).to(gate.dtype).contiguous()


def gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up in their dtype."""
    wide = gate.to(compute_dtype(gate.dtype))
    g, s = grad.to(wide.dtype), torch.sigmoid(wide)
    d_gate = g * up.to(wide.dtype) * s * (1 + wide * (1 - s))
    return d_gate.to(gate.dtype), (g * wide * s).to(gate.dtype)


def backward(grad: Tensor, gate: Tensor, up: Tensor, d_gate: Tensor, d_up: Tensor) -> None:
    """Write the gradients of gate and up."""
    for target, gradient in zip((d_gate, d_up), gradients(grad, gate, up), strict=True):
        target.copy_(gradient)


def jvp(
    gate: Tensor, up: Tensor, gate_tangent: Tensor | None, up_tangent: Tensor | None
) -> tuple[Tensor, Tensor]:
    """silu(gate) * up and its tangent in gate's dtype, contiguous; no tangent is a zero one."""
    wide = gate.to(compute_dtype(gate.dtype))
    u, s = up.to(wide.dtype), torch.sigmoid(wide)
    tangent = torch.zeros_like(wide)
    if gate_tangent is not None:
        tangent = gate_tangent.to(wide.dtype) * u * (s * (1 + wide * (1 - s)))
    if up_tangent is not None:
        tangent = tangent + wide * s * up_tangent.to(wide.dtype)
    return (wide * s * u).to(gate.dtype).contiguous(), tangent.to(gate.dtype).contiguous()
