"""Modules that cannot be patched whatever they compute, and the reason for each."""

from __future__ import annotations

import torch
from torch import nn

from pixnerd_kernels.patching.swap import replacement_of


def refusal(module: nn.Module, method: str = "forward") -> str:
    """Why this module must be left alone; empty if it need not."""
    if (replacement := replacement_of(module)) is not None:
        return f"it is already patched ({replacement.op})"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    if method in vars(module):
        return f"its {method} was replaced on the instance (accelerate's hooks and kernelize do that)"
    if type(module).__call__ is not nn.Module.__call__:
        return "its class overrides __call__"
    if method == "forward" and module._is_full_backward_hook is False:
        return "it has a backward hook of the old kind, which sees the replaced graph: register_full_backward_hook"
    return _storage(module)


def _storage(module: nn.Module) -> str:
    """Why the parameters cannot be used as they are."""
    parameters = dict(module.named_parameters())
    sharded = [name for name, p in parameters.items() if type(p.data).__name__ == "DTensor"]
    if sharded:
        return f"its parameters are sharded ({sharded[0]} is a DTensor): patch before fully_shard"
    if meta := [name for name, p in parameters.items() if p.is_meta]:
        return f"its parameters are offloaded ({meta[0]} is on the meta device)"
    if empty := [name for name, p in parameters.items() if p.numel() == 0]:
        return f"its parameters are not here ({empty[0]} is empty: sharded by FSDP or ZeRO?)"
    if len(devices := {p.device for p in parameters.values()}) > 1:
        return f"its parameters are on several devices: {', '.join(sorted(map(str, devices)))}"
    return ""


def flattened(model: nn.Module) -> list[nn.Module]:
    """FSDP1's wrappers in a model: they keep the parameters of everything below them flat."""
    return [module for module in model.modules() if type(module).__name__ == "FullyShardedDataParallel"]
