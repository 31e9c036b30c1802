"""DiT blocks: two norms, shifted, scaled and gated by a condition, around an attention and an MLP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pixnerd_kernels.ops import gated_residual, gated_residual_rms_norm, modulated_rms_norm
from pixnerd_kernels.patching.probe import Candidate, Form, Inputs, probe_dtype
from pixnerd_kernels.patching.rules.attention import _parts, role_inputs, roles
from pixnerd_kernels.patching.rules.base import (
    Left,
    acts_as_linear,
    alone,
    eps_at,
    norm_eps,
    norm_weight,
    observed,
    own_tensors,
    plain_dtype,
)
from pixnerd_kernels.patching.rules.rms_norm import rms_norm
from pixnerd_kernels.patching.swap import Replacement, arguments

#: Places of shift, scale and gate of the attention and of the MLP in the six chunks of the modulation.
_USUAL = (0, 1, 2, 3, 4, 5)


@dataclass(frozen=True)
class DiTBlock(Replacement):
    """x [B, L, D] and a condition [B, 1, D]; the attention and the MLP stay the module's."""

    op: ClassVar[str] = "gated_residual_rms_norm"
    #: The block's arguments, and which of them the attention takes, by name.
    names: tuple[str, ...]
    condition: str
    attended: tuple[str, ...]
    norms: tuple[str, str]
    weights: tuple[str, str]
    eps: tuple[float | None, float | None]
    modulation: str
    attention: str
    mlp: str

    def accepts(self, module: Any, *args: Any) -> bool:
        given = dict(zip(self.names, args, strict=False))
        x, condition = args[0], given[self.condition]
        norm1, norm2 = (getattr(module, name) for name in self.norms)
        fits = x.dim() == condition.dim() == 3 and condition.shape[1] == 1
        fits = fits and condition.shape[0] == x.shape[0]
        own = plain_dtype(x, getattr(norm1, self.weights[0])) and plain_dtype(
            x, getattr(norm2, self.weights[1])
        )
        return fits and (own or _autocast_dtype(x) == x.dtype) and not observed(norm1) and not observed(norm2)

    def run(self, module: Any, *args: Any) -> Tensor:
        x, given = args[0], dict(zip(self.names, args, strict=False))
        modulation = getattr(module, self.modulation)(given[self.condition])
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        attended = {name: given[name] for name in self.attended if name in given}
        weight1 = getattr(getattr(module, self.norms[0]), self.weights[0])
        weight2 = getattr(getattr(module, self.norms[1]), self.weights[1])
        eps1, eps2 = (eps_at(eps, x.dtype) for eps in self.eps)
        n = modulated_rms_norm(x, weight1, shift1, scale1, eps1)
        y = getattr(module, self.attention)(n, **attended)
        x, n = gated_residual_rms_norm(x, y, gate1, weight2, shift2, scale2, eps2)
        return gated_residual(x, getattr(module, self.mlp)(n), gate2)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Under autocast the dtype that linear layers give; a residual stream in it stays in it."""
    kind = x.device.type
    if kind not in ("cpu", "cuda", "mps", "xpu") or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


@dataclass(frozen=True)
class _Formula:
    eps: tuple[float, float]
    attention: str
    mlp: str
    order: tuple[int, ...] = _USUAL

    def __call__(
        self, x: Tensor, modulation: Tensor, y: Tensor, z: Tensor, weight1: Tensor, weight2: Tensor
    ) -> dict[str, Tensor]:
        """`y` and `z` are what the attention and the MLP gave."""
        chunks = modulation.chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = (chunks[place] for place in self.order)
        first = rms_norm(x, weight1, self.eps[0]) * (1 + scale1) + shift1
        x = x + gate1 * y
        second = rms_norm(x, weight2, self.eps[1]) * (1 + scale2) + shift2
        return {"output": x + gate2 * z, f"{self.attention}<": first, f"{self.mlp}<": second}


class DiTBlockRule:
    op = DiTBlock.op

    def match(self, module: nn.Module) -> Candidate | Left | None:
        children = dict(module.named_children())
        norms = {name: weight for name, child in children.items() if (weight := norm_weight(child))}
        sizes = {children[name].get_parameter(weight).shape[0] for name, weight in norms.items()}
        if len(norms) != 2 or len(sizes) != 1 or len(children) != 5 or own_tensors(module):
            return None
        (size,) = sizes
        rest = {name: child for name, child in children.items() if name not in norms}
        layers = {name: layer for name, child in rest.items() if acts_as_linear(layer := alone(child))}
        modulations = [name for name, layer in layers.items() if layer.out_features == 6 * size]
        if len(modulations) != 1:
            return None
        modulation = modulations[0]
        attention, mlp = (name for name in rest if name != modulation)
        parts, wanted = _parts(children[attention]), roles(children[attention])
        if parts is None or wanted is None:
            return Left(f"its {attention} is not an attention of a known structure")
        names = tuple(p.name for p in arguments(type(module).forward))
        taken = tuple(p.name for p in arguments(type(children[attention]).forward))[1:]
        conditions = [name for name in names[1:] if name not in taken]
        if len(conditions) != 1:
            return Left(f"its forward takes other arguments than x, a condition and {', '.join(taken)}")
        (norm1, weight1), (norm2, weight2) = norms.items()
        block = DiTBlock(
            names, conditions[0], tuple(n for n in taken if n in names), (norm1, norm2), (weight1, weight2),
            (norm_eps(children[norm1]), norm_eps(children[norm2])), modulation, attention, mlp,
        )  # fmt: skip

        def inputs(rng: torch.Generator) -> Inputs:
            made = dict(zip(("x", *taken), role_inputs(parts, wanted, rng).values(), strict=True))
            made[names[0]] = made.pop("x")
            made[conditions[0]] = torch.randn(2, 1, size, generator=rng)
            return {name: made[name] for name in names}

        tensors = (
            names[0], f"{modulation}()", f"{attention}()", f"{mlp}()", f"{norm1}.{weight1}", f"{norm2}.{weight2}",
        )  # fmt: skip
        dtype = probe_dtype(module, f"{norm1}.{weight1}")
        forms = tuple(_forms(block, (eps_at(block.eps[0], dtype), eps_at(block.eps[1], dtype)), tensors))
        return Candidate(forms, inputs, (modulation,), f"{norm1}.{weight1}", (attention, mlp))


def _forms(block: DiTBlock, eps: tuple[float, float], tensors: tuple[str, ...]) -> Iterator[Form]:
    parts = (eps, block.attention, block.mlp)
    yield Form("shift, scale and gate", _Formula(*parts), tensors, block)
    for name, order in _ORDERS.items():
        yield Form(name, _Formula(*parts, order), tensors)


_ORDERS = {
    "the scale before the shift": (1, 0, 2, 4, 3, 5),
    "the MLP's modulation before the attention's": (3, 4, 5, 0, 1, 2),
    "the gate before shift and scale": (1, 2, 0, 4, 5, 3),
}
