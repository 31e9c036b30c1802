"""Hands the tensors of `normalize_weights` to csrc/normalize_weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pixnerd_kernels.backends import native
from pixnerd_kernels.checks import describe
from pixnerd_kernels.ops.native import DTYPES, fresh


def _run(w: Tensor, grad: Tensor | None, dim: int, eps: float) -> Tensor:
    w = w.contiguous()
    if grad is not None:
        if grad.shape != w.shape or grad.dtype != w.dtype:
            raise ValueError(f"grad: expected {list(w.shape)} {w.dtype}, got {describe(grad)}")
        grad = grad.contiguous()
    out = fresh(torch.empty_like(w))
    if out.numel():
        native().normalize_weights(
            outer=math.prod(w.shape[:dim]),
            rows=w.shape[dim],
            columns=math.prod(w.shape[dim + 1 :]),
            dtype=DTYPES[w.dtype],
            eps=eps,
            threads=torch.get_num_threads(),
            w=w.data_ptr(),
            grad=0 if grad is None else grad.data_ptr(),
            out=out.data_ptr(),
        )
    return out


def forward(w: Tensor, dim: int, eps: float) -> Tensor:
    """The normalised weights in w's shape and dtype, contiguous."""
    return _run(w, None, dim, eps)


def backward(grad: Tensor, w: Tensor, dim: int, eps: float) -> Tensor:
    """Gradient of w in its shape and dtype, contiguous."""
    return _run(w, grad, dim, eps)
