"""The official PixNerd repository: a Lightning callback, for its YAML or its trainer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pixnerd_kernels.patching.api import patch
from pixnerd_kernels.patching.report import Report

if TYPE_CHECKING:
    Callback = object
else:
    try:
        from lightning.pytorch.callbacks import Callback
    except ImportError:  # Lightning is the trainer's dependency, not ours
        Callback = object

log = logging.getLogger(__name__)


class PatchPixNerd(Callback):
    """Patches the LightningModel's denoisers before its `configure_model` compiles them.

    Args:
        ops: as in `pixnerd_kernels.patch`.
        models: the attributes of the LightningModel that are patched.

    Checkpoints are as before: parameters and `state_dict` do not change. The reports are logged on rank 0 and kept in
    `reports` by attribute.

    Raises:
        ValueError: the LightningModel lacks one of `models`.
    """

    def __init__(
        self, ops: str | Sequence[str] = "all", models: Sequence[str] = ("denoiser", "ema_denoiser")
    ) -> None:
        self.ops = ops
        self.models = tuple(models)
        self.reports: dict[str, Report] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Lightning's hook before `configure_model`."""
        if missing := [name for name in self.models if not hasattr(pl_module, name)]:
            raise ValueError(f"models: {type(pl_module).__name__} has no {', '.join(missing)}")
        for name in self.models:
            if name not in self.reports:
                self.reports[name] = patch(getattr(pl_module, name), ops=self.ops)
                if getattr(trainer, "is_global_zero", True):
                    log.info("%s:\n%s", name, self.reports[name])

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Lightning's hook at the end: the models are as they were."""
        while self.reports:
            self.reports.popitem()[1].unpatch()
