"""The per-patch neural field: a layer that generates two or three matrices, a norm, and an mlp ratio.

Known kinds: the official PixNerd's class-to-image block (both matrices normalised) and text-to-image block (the first
alone), also in their forks and in the diffusers port, and Chroma1-Radiance's gated block. They are told apart by what
they compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnerd_kernels.checks import FLOATS
from pixnerd_kernels.ops import neural_field_mlp_packed
from pixnerd_kernels.patching.probe import Candidate, Form, Inputs, probe_dtype
from pixnerd_kernels.patching.rules.base import (
    Left,
    acts_as_linear,
    alone,
    eps_at,
    first_parameter,
    generating_layer,
    inert,
    norm_eps,
    norm_weight,
    observed,
    own_tensors,
    positional,
    rows,
)
from pixnerd_kernels.patching.swap import Replacement

_PROBE_PATCHES = 3


@dataclass(frozen=True)
class FieldBlock(Replacement):
    """x [N, S, D1] and s [N, D] through the module's own generating layer into `neural_field_mlp_packed`."""

    op: ClassVar[str] = "neural_field_mlp_packed"
    generator: str
    norm: str
    weight: str
    hidden: int
    gated: bool
    normalize: tuple[str, ...]
    norm_eps: float | None
    #: Compute the norm inside the op; otherwise the module's own norm is called.
    fused_norm: bool

    def accepts(self, module: Any, *args: Any) -> bool:
        return len(args) == 2 and args[0].dim() == 3 and args[1].shape[:-1] == args[0].shape[:1]

    def run(self, module: Any, *args: Any) -> Tensor:
        x, s = args
        params = getattr(module, self.generator)(s)
        norm = getattr(module, self.norm)
        options = {"hidden": self.hidden, "gated": self.gated, "normalize": self.normalize}
        if not self.fused_norm or observed(norm):
            n = norm(x).to(params.dtype)
            return x + neural_field_mlp_packed(n, params, residual=False, **options)  # type: ignore[arg-type]
        weight = getattr(norm, self.weight)
        weight = weight.to(x.device, weight.dtype if weight.dtype in FLOATS else x.dtype)
        options |= {"norm_weight": weight, "norm_eps": eps_at(self.norm_eps, x.dtype)}
        if x.dtype == params.dtype:
            return neural_field_mlp_packed(x, params, **options)  # type: ignore[arg-type]
        # Autocast: the generating layer gives half precision, the residual keeps x's.
        return x + neural_field_mlp_packed(x.to(params.dtype), params, residual=False, **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class FieldFormula:
    """The block in plain PyTorch, from the packed parameters, with what may differ between blocks."""

    hidden: int
    gated: bool
    normalize: tuple[str, ...]
    norm_eps: float | None
    dim: int = -2
    residual: bool = True
    activation: Callable[[Tensor], Tensor] = F.silu

    def __call__(self, x: Tensor, params: Tensor, n: Tensor) -> Tensor:
        """`n` is the norm's weight, or without norm_eps the normalised x itself."""
        if self.norm_eps is not None:
            n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.norm_eps) * n
        shapes = {"w1": (x.shape[2], self.hidden), "w2": (self.hidden, x.shape[2])}
        if self.gated:
            shapes = {"w_gate": shapes["w1"], **shapes}
        w = {
            name: part.reshape(len(x), *shapes[name])
            for name, part in zip(shapes, params.chunk(len(shapes), -1), strict=True)
        }
        w = {name: F.normalize(m, dim=self.dim) if name in self.normalize else m for name, m in w.items()}
        z = torch.bmm(n, w["w1"])
        h = self.activation(torch.bmm(n, w["w_gate"])) * z if self.gated else self.activation(z)
        y = torch.bmm(h, w["w2"])
        return x + y if self.residual else y


class NeuralFieldRule:
    op = FieldBlock.op

    def match(self, module: nn.Module) -> Candidate | Left | None:
        children = dict(module.named_children())
        generators = {name: layer for name, child in children.items() if (layer := generating_layer(child))}
        named = [name for name in children if name.startswith("param_generator")]
        # By its name we also know an adapter around one, or a quantised one.
        generators |= {name: layer for name in named if acts_as_linear(layer := alone(children[name]))}
        norms = [name for name, child in children.items() if name not in generators and _is_norm(child)]
        if not named and (len(generators) != 1 or len(norms) != 1):
            return None
        if len(generators) != 1:
            return Left(f"{len(generators)} generating layers, expected one linear layer")
        if len(norms) != 1:
            return Left(f"{len(norms)} norms, expected one")
        (generator, layer), norm = *generators.items(), norms[0]
        strangers = own_tensors(module)
        strangers += [n for n, child in children.items() if n not in (generator, norm) and not inert(child)]
        channels = next(iter(children[norm].parameters())).shape[0]
        sizes = list(_sizes(module, int(layer.out_features), channels))  # type: ignore[arg-type]
        if not sizes:
            reason = f"{layer.out_features} generated numbers do not make two or three matrices of {channels}"
            return Left(f"{reason} x (mlp ratio * {channels})") if named else None
        if strangers:
            return Left(f"it has more than a generating layer and a norm: {', '.join(strangers)}")
        names = positional(module, 2)
        if names is None:
            return Left("its forward takes other arguments than pixels and hidden states")

        def inputs(rng: torch.Generator) -> Inputs:
            x = rows(_PROBE_PATCHES, channels, rng)
            s = torch.randn(_PROBE_PATCHES, int(layer.in_features), generator=rng)  # type: ignore[arg-type]
            return {names[0]: x, names[1]: s}

        inner = generator if layer is children[generator] else f"{generator}.0"
        parameter = first_parameter(module, inner)
        dtype = probe_dtype(module, parameter)
        forms = tuple(_forms(children[norm], norm, generator, names[0], sizes, dtype))
        return Candidate(forms, inputs, (generator, norm), parameter)


def _is_norm(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not list(module.children()) and all(p.dim() == 1 for p in parameters)


def _sizes(module: nn.Module, generated: int, channels: int) -> Iterator[tuple[bool, int]]:
    """(gated, hidden) for every way to read the generated numbers; the module's mlp ratio decides where it has one."""
    ratio = getattr(module, "mlp_ratio", None)
    for gated in (False, True):
        hidden, rest = divmod(generated, (3 if gated else 2) * channels)
        wanted = hidden % channels == 0 if not isinstance(ratio, int) else hidden == ratio * channels
        if hidden and not rest and wanted:
            yield gated, hidden


def _forms(
    module: nn.Module,
    norm: str,
    generator: str,
    x: str,
    sizes: list[tuple[bool, int]],
    dtype: torch.dtype,
) -> Iterator[Form]:
    """`dtype` is the probe's."""
    weight, params, eps = norm_weight(module), f"{generator}()", norm_eps(module)
    at = eps_at(eps, dtype)
    for gated, hidden in sizes:
        names = ("w_gate", "w1", "w2") if gated else ("w1", "w2")
        subsets = [tuple(n for i, n in enumerate(names) if mask >> i & 1) for mask in range(2 ** len(names))]
        for normalize in reversed(subsets):
            function = f"{'gated, ' if gated else ''}{', '.join(normalize) or 'nothing'} normalised"
            for fused in (True, False) if weight else (False,):
                formula = FieldFormula(hidden, gated, normalize, at if fused else None)
                block = FieldBlock(
                    generator, norm, weight or "", hidden, gated, normalize, eps, fused_norm=fused
                )
                last = f"{norm}.{weight}" if fused else f"{norm}()"
                published = normalize == names or (normalize == ("w1",) and not gated)
                yield Form(function, formula, (x, params, last), block, () if fused else (x,), published)
        for normalize in (subsets[-1], ("w1",)):
            for change, options in _UNLIKE.items():
                formula = FieldFormula(hidden, gated, normalize, None, **options)
                yield Form(change, formula, (x, params, f"{norm}()"), constants=(x,))


#: Blocks that look the same and compute something else; what they are is worth saying.
_UNLIKE: dict[str, dict[str, Any]] = {
    "weights normalised over dim -1": {"dim": -1},
    "no residual": {"residual": False},
    "activation relu": {"activation": F.relu},
    "activation gelu": {"activation": F.gelu},
    "activation gelu (tanh)": {"activation": lambda z: F.gelu(z, approximate="tanh")},
}
