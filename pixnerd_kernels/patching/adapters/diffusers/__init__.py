"""The diffusers port: the transformer of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from pixnerd_kernels.patching.api import patch
from pixnerd_kernels.patching.report import Report


def patch_pipeline(pipeline: Any, *, ops: str | Sequence[str] = "all", dry_run: bool = False) -> Report:
    """`pixnerd_kernels.patch` on a pipeline's transformer; `save_pretrained` writes what it wrote before.

    Args:
        pipeline: anything with a `transformer` (a DiffusionPipeline), after `to(device)` and before
            `enable_sequential_cpu_offload`, which leaves no parameters to verify with.
        ops, dry_run: as in `patch`.

    Raises:
        TypeError: there is no transformer.
    """
    transformer = getattr(pipeline, "transformer", None)
    if not isinstance(transformer, nn.Module):
        raise TypeError(f"pipeline: expected one with a transformer, got {type(pipeline).__name__}")
    return patch(transformer, ops=ops, dry_run=dry_run)
