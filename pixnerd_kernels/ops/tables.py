"""Tables of constants that are computed once and kept for later calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Tables of a kind that are kept. None is ever thrown away: a captured CUDA graph may read it.
MOST = 64


def kept(tables: dict[Any, Tensor], key: Any, compute: Callable[[], Tensor]) -> Tensor:
    """tables[key], computed where it is not there yet, and then kept if it may be and there are not too many."""
    # What is made within a transform of torch.func belongs to it; and a tracer's fake tensors know no others.
    if not torch.compiler.is_dynamo_compiling() and (
        torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack()
    ):
        return compute()
    if key in tables:
        return tables[key]
    # Outside of inference mode, whose tensors autograd would refuse later.
    with torch.inference_mode(False):
        table = compute()
    if len(tables) < MOST and _lasting(table):
        tables[key] = table
    return table


def _lasting(table: Tensor) -> bool:
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
