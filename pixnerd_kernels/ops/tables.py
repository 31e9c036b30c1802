"""Tables of constants that are computed once and kept for later calls."""

from __future__ import annotations

import torch
from torch import Tensor


def lasting(table: Tensor) -> bool:
    """Whether a table that was computed just now may serve later calls; on a GPU, waits until they can read it."""
    # What a tracer makes (fake tensors, symbolic sizes) belongs to its graph, and what a CUDA graph captures to that.
    if torch.compiler.is_compiling() or type(table) is not Tensor or table.device.type == "meta":
        return False
    if table.device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return False
        # The next to read it may do so on another stream.
        torch.cuda.current_stream(table.device).synchronize()
    return True
