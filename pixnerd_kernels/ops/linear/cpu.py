"""Hands matrices to csrc/matmul."""

from __future__ import annotations

import torch
from torch import Tensor

from pixnerd_kernels.backends import native
from pixnerd_kernels.ops.native import DTYPES, Strided


def _readable(matrix: Tensor) -> Tensor:
    """The matrix itself if it has neighbours in memory along one dimension, else a dense copy."""
    fits = any(size == 1 or step == 1 for size, step in zip(matrix.shape, matrix.stride(), strict=True))
    return matrix if fits else matrix.contiguous()


def _operand(tensor: Tensor) -> Strided:
    """A matrix by address and strides; those of a dimension of one do not matter, and may be anything in torch."""
    row, column = (1 if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), row, column


def matmul(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    *,
    add: bool = False,
    row_invariant: bool = False,
) -> None:
    """out (+)= a @ b + bias, accumulated in the computed dtype: float32, for float64 outputs float64.

    Args:
        a: [rows, depth]. b: [depth, columns]. bias: [columns] in b's dtype, or None. out: [rows, columns], dense rows.
        add: to what `out` holds.
        row_invariant: a row of the result has the same bits whatever the number of rows, for some speed.
    """
    a, b = _readable(a), _readable(b)
    bias = None if bias is None else bias.contiguous()
    native().matmul(
        rows=a.shape[0],
        columns=b.shape[1],
        depth=a.shape[1],
        a=_operand(a),
        a_dtype=DTYPES[a.dtype],
        b=_operand(b),
        b_dtype=DTYPES[b.dtype],
        bias=0 if bias is None else bias.data_ptr(),
        c=out.data_ptr(),
        row_stride=out.stride(0),
        dtype=DTYPES[out.dtype],
        accumulate=add,
        row_invariant=row_invariant,
        threads=torch.get_num_threads(),
    )
