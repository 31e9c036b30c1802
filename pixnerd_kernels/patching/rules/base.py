"""What a rule is, and what rules share in recognising modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from pixnerd_kernels.nn.layers import untouched
from pixnerd_kernels.patching.probe import Candidate
from pixnerd_kernels.patching.swap import arguments


@dataclass(frozen=True)
class Left:
    """A module that a rule nearly knows, and why it is left alone."""

    reason: str


class Rule(Protocol):
    """Recognises modules of one structure, whatever their class is called and wherever it comes from."""

    #: The public op that it puts in, and its name in `patch(ops=...)`.
    op: str

    def match(self, module: nn.Module) -> Candidate | Left | None:
        """The candidate; why the module is left although it looks like one; None for every other module."""


def own_tensors(module: nn.Module) -> list[str]:
    """Names of the parameters and buffers that the module holds itself."""
    return [name for name, tensor in {**module._parameters, **module._buffers}.items() if tensor is not None]


def positional(module: nn.Module, count: int, method: str = "forward") -> tuple[str, ...] | None:
    """The names of a method's arguments when it takes `count` tensors and nothing else that is required."""
    parameters = arguments(getattr(type(module), method))
    first, rest = parameters[:count], parameters[count:]
    if len(first) < count or any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in first):
        return None
    if any(p.default is not p.empty for p in first) or any(p.default is p.empty for p in rest):
        return None
    return tuple(p.name for p in first)


def is_linear(module: nn.Module) -> bool:
    """A layer with a two-dimensional weight [out, in], an optional bias, and nothing else: any library's Linear."""
    tensors = own_tensors(module)
    return (
        not list(module.children())
        and set(tensors) <= {"weight", "bias"}
        and "weight" in tensors
        and module.get_parameter("weight").dim() == 2
        and hasattr(module, "in_features")
        and hasattr(module, "out_features")
    )


def generating_layer(module: nn.Module) -> nn.Module | None:
    """A linear layer, or a sequence of one."""
    if isinstance(module, nn.Sequential) and len(module) == 1:
        module = module[0]
    return module if is_linear(module) else None


def norm_weight(module: nn.Module) -> str | None:
    """The name of a norm's only tensor, one weight per channel ("weight" or "scale"); None for anything else."""
    tensors = own_tensors(module)
    if list(module.children()) or len(tensors) != 1 or module.get_parameter(tensors[0]).dim() != 1:
        return None
    return tensors[0]


def observed(module: nn.Module) -> bool:
    """Whether calling the module does more than its formula: hooks, a `forward` of the instance, ComfyUI's functions on
    the weight; or whether its tensors are elsewhere until it is called."""
    return bool(
        not untouched(module)
        or getattr(module, "weight_function", None)
        or any(tensor is not None and tensor.is_meta for tensor in module._parameters.values())
    )


def inert(module: nn.Module) -> bool:
    """Children that cannot make a module random or give it weights; what they compute, the probe shows."""
    dropout = isinstance(module, nn.Dropout) and module.p > 0
    return not dropout and not list(module.parameters()) and not list(module.buffers())


def plain_dtype(x: Tensor, weight: Tensor) -> bool:
    """Whether x is computed on in its own dtype: the weight's, outside autocast."""
    kind = x.device.type
    cast = kind in ("cpu", "cuda", "mps", "xpu") and torch.is_autocast_enabled(kind)
    return x.dtype == weight.dtype and x.device == weight.device and not cast


def norm_eps(module: nn.Module) -> float:
    """The eps that a norm says it has; 1e-6 where it is written into the code. The probe tells whether it is true."""
    for name in ("variance_epsilon", "eps", "epsilon"):
        if isinstance(value := getattr(module, name, None), float):
            return value
    return 1e-6


#: Sizes of the probe's rows: among them small ones, for which a norm's eps matters.
_ROW_SCALES = (1.0, 1.0, 0.5, 1e-3, 2.0, 1.0)


def rows(batch: int, channels: int, generator: torch.Generator) -> Tensor:
    """Random [batch, 6, channels]."""
    x = torch.randn(batch, len(_ROW_SCALES), channels, generator=generator)
    return x * torch.tensor(_ROW_SCALES)[:, None]
