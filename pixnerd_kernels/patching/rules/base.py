"""What a rule is, and what rules share in recognising modules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnerd_kernels.checks import FLOATS
from pixnerd_kernels.nn.layers import untouched
from pixnerd_kernels.patching.probe import Candidate
from pixnerd_kernels.patching.swap import arguments, special


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
    """A layer with a two-dimensional weight [out, in], an optional bias, and nothing else: any library's Linear.

    Within torch.func.functional_call its weight is a tensor and no nn.Parameter.
    """
    weight = getattr(module, "weight", None) if "weight" in own_tensors(module) else None
    return (
        not list(module.children())
        and set(own_tensors(module)) <= {"weight", "bias"}
        and isinstance(weight, Tensor)
        and weight.dim() == 2
        and hasattr(module, "in_features")
        and hasattr(module, "out_features")
    )


def acts_as_linear(module: nn.Module) -> bool:
    """A linear layer, or what stands in one's place and says its sizes: an adapter around one, a quantised one."""
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def alone(module: nn.Module) -> nn.Module:
    """The module of a sequence of one."""
    return module[0] if isinstance(module, nn.Sequential) and len(module) == 1 else module


def generating_layer(module: nn.Module) -> nn.Module | None:
    """A linear layer, or a sequence of one."""
    layer = alone(module)
    return layer if is_linear(layer) else None


def first_parameter(module: nn.Module, name: str) -> str:
    """The parameter that tells the dtype of child `name`: its weight, the first one inside, or the module's first.

    Raises:
        LookupError: the module has no parameters.
    """
    child = module.get_submodule(name)
    if child._parameters.get("weight") is not None:
        return f"{name}.weight"
    inside = [f"{name}.{inner}" for inner, _ in child.named_parameters()]
    names = inside or [other for other, _ in module.named_parameters()]
    if not names:
        raise LookupError("no parameter tells the dtype that it computes in")
    return names[0]


def norm_weight(module: nn.Module) -> str | None:
    """The name of a norm's only tensor, a parameter for each channel ("weight" or "scale"); None for anything else."""
    tensors = own_tensors(module)
    weight = module._parameters.get(tensors[0]) if len(tensors) == 1 else None
    return tensors[0] if weight is not None and weight.dim() == 1 and not list(module.children()) else None


#: ComfyUI's functions that change a layer's tensors when it is called.
_COMFY_FUNCTIONS = ("weight_function", "bias_function", "weight_lowvram_function", "bias_lowvram_function")


def observed(module: nn.Module) -> bool:
    """Whether calling the module does more than its formula: hooks, a `forward` of the instance, ComfyUI's functions on
    weight and bias; or whether its tensors are elsewhere until it is called, or of a class with rules of its own."""
    return bool(
        not untouched(module)
        or any(getattr(module, name, None) for name in _COMFY_FUNCTIONS)
        or any(
            tensor is not None and (tensor.is_meta or special(tensor))
            for tensor in module._parameters.values()
        )
    )


def unreadable(layers: Iterable[nn.Module]) -> str:
    """The classes of adapters and weights that stand where an op reads plain weights; empty where there are none."""
    found = set()
    for layer in map(alone, layers):
        if acts_as_linear(layer) and not is_linear(layer):
            extra = [name for name in own_tensors(layer) if name not in ("weight", "bias")]
            found.add(" with ".join([type(layer).__name__, *extra]))
        elif special(weight := layer._parameters.get("weight")):
            found.add(type(weight).__name__)
    return ", ".join(sorted(found))


def inert(module: nn.Module) -> bool:
    """Children that cannot make a module random or give it weights; what they compute, the probe shows."""
    dropout = isinstance(module, nn.Dropout) and module.p > 0
    return not dropout and not list(module.parameters()) and not list(module.buffers())


def plain_dtype(x: Tensor, weight: Tensor) -> bool:
    """Whether x is computed on in its own dtype: the weight's, outside autocast."""
    kind = x.device.type
    cast = kind in ("cpu", "cuda", "mps", "xpu") and torch.is_autocast_enabled(kind)
    return x.dtype == weight.dtype and x.device == weight.device and not cast


def norm_eps(module: nn.Module) -> float | None:
    """The eps that a norm says it has; 1e-6 where it is written into the code. The probe tells whether it is true.

    None, as torch.nn.RMSNorm has it unless told otherwise, is the smallest difference of the dtype: `eps_at`.
    """
    unsaid = False
    for name in ("variance_epsilon", "eps", "epsilon"):
        value = getattr(module, name, 1e-6)
        if isinstance(value, float) and hasattr(module, name):
            return value
        unsaid |= value is None
    return None if unsaid else 1e-6


def eps_at(eps: float | None, dtype: torch.dtype) -> float:
    """What a norm of x in this dtype adds to the mean square."""
    return _SMALLEST[dtype] if eps is None else eps


def _implied_eps(dtype: torch.dtype) -> float:
    """torch.nn.functional.rms_norm's eps where none is given: the dtype's own, or for half precision that of float32,
    in which newer versions of PyTorch compute."""
    own, wide = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    if dtype not in (torch.bfloat16, torch.float16):
        return own
    normed = F.rms_norm(torch.full((8,), 2.0**-12, dtype=dtype, device="cpu"), (8,))[0].item()
    return min(own, wide, key=lambda eps: abs(normed - 2.0**-12 * (2.0**-24 + eps) ** -0.5))


#: Known before a compiler reads it, in a process too that only unpickles a patched model.
_SMALLEST = {dtype: _implied_eps(dtype) for dtype in FLOATS}


#: Sizes of the probe's rows: among them small ones, for which a norm's eps matters.
_ROW_SCALES = (1.0, 1.0, 0.5, 1e-3, 2.0, 1.0)


def rows(batch: int, channels: int, generator: torch.Generator) -> Tensor:
    """Random [batch, 6, channels]."""
    x = torch.randn(batch, len(_ROW_SCALES), channels, generator=generator)
    return x * torch.tensor(_ROW_SCALES)[:, None]
