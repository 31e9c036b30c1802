"""RMSNorm with one weight per channel, whatever it is called and wherever it keeps its eps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pixnerd_kernels.ops.modulated_rms_norm import modulated_rms_norm
from pixnerd_kernels.patching.probe import Candidate, Form, Inputs, probe_dtype
from pixnerd_kernels.patching.rules.base import (
    Left,
    eps_at,
    norm_eps,
    norm_weight,
    plain_dtype,
    positional,
    rows,
)
from pixnerd_kernels.patching.swap import Replacement


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula in plain PyTorch."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@dataclass(frozen=True)
class Norm(Replacement):
    """x [..., D]. Where x is not in the weight's dtype, and under autocast, norms differ: that stays the module's."""

    op: ClassVar[str] = "modulated_rms_norm"
    weight: str
    eps: float | None

    def accepts(self, module: Any, *args: Any) -> bool:
        return len(args) == 1 and plain_dtype(args[0], getattr(module, self.weight))

    def run(self, module: Any, *args: Any) -> Tensor:
        (x,) = args
        return modulated_rms_norm(x, getattr(module, self.weight), eps=eps_at(self.eps, x.dtype))


class RMSNormRule:
    op = Norm.op

    def match(self, module: nn.Module) -> Candidate | Left | None:
        weight = norm_weight(module)
        names = positional(module, 1)
        if weight is None or names is None or "norm" not in type(module).__name__.lower():
            return None
        channels, own = module.get_parameter(weight).shape[0], norm_eps(module)
        eps = eps_at(own, probe_dtype(module, weight))

        def inputs(rng: torch.Generator) -> Inputs:
            return {names[0]: rows(2, channels, rng)}

        tensors = (names[0], weight)
        forms = (
            Form("RMS", lambda x, w: rms_norm(x, w, eps), tensors, Norm(weight, own)),
            Form("a weight to which one is added", lambda x, w: rms_norm(x, 1 + w, eps), tensors),
            Form("the mean subtracted", lambda x, w: rms_norm(x - x.mean(-1, keepdim=True), w, eps), tensors),
        )
        return Candidate(forms, inputs, (), weight)
