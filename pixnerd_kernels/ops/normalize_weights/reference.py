"""Column normalisation in plain PyTorch: w / max(||w||_2 over dim, eps), and its gradient in closed form.

With u = w / max(||w||, eps):  dw = (g - u * sum(u * g)) / ||w||  where ||w|| >= eps, and g / eps elsewhere.
Source: torch.nn.functional.normalize, which the official PixNerd applies to its generated weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pixnerd_kernels.ops.dtypes import compute_dtype


def forward(w: Tensor, dim: int, eps: float) -> Tensor:
    """The normalised weights in w's shape and dtype, contiguous."""
    wide = w.to(compute_dtype(w.dtype))
    norm = torch.linalg.vector_norm(wide, dim=dim, keepdim=True)
    return (wide / norm.clamp_min(eps)).to(w.dtype).contiguous()


def backward(grad: Tensor, w: Tensor, dim: int, eps: float) -> Tensor:
    """Gradient of w in its shape and dtype, contiguous."""
    wide, grad = w.to(compute_dtype(w.dtype)), grad.to(compute_dtype(w.dtype))
    norm = torch.linalg.vector_norm(wide, dim=dim, keepdim=True)
    inverse = 1 / norm.clamp_min(eps)
    if w.shape[dim] == 1:  # normalised, it is 1 or -1
        inverse = torch.where(norm < eps, inverse, torch.zeros_like(inverse))
    projection = (wide * grad).sum(dim, keepdim=True) * inverse.square()
    projection = torch.where(norm < eps, torch.zeros_like(projection), projection)
    return ((grad - wide * projection) * inverse).to(w.dtype).contiguous()
