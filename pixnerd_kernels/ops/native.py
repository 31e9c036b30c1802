"""How tensors are told to the compiled core: addresses, strides, and numbers for dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from pixnerd_kernels import backends

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

#: (address, patch stride, row stride) in elements; a zero address is an absent tensor.
Strided = tuple[int, int, int]
ABSENT: Strided = (0, 0, 0)


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor itself if neighbours along its last dimension are neighbours in memory, else a dense copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def strided(tensor: Tensor | None) -> Strided:
    """A rank-3 tensor with dense rows, as the core takes it."""
    return ABSENT if tensor is None else (tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


#: Bytes from which a tensor is worth a call to the operating system.
_LARGE = 4 << 20


def fresh(tensor: Tensor) -> Tensor:
    """A tensor that was just allocated, once the system is asked to put it on huge pages where it is large.

    A new block otherwise costs a page fault for every 4 KiB of it: a tenth to a quarter of an op's time.
    """
    if tensor.is_cpu and tensor.nbytes >= _LARGE:
        try:
            core = backends.native()
        except NotImplementedError:
            return tensor
        core.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor
