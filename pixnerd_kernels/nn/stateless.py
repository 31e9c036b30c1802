"""The ops as layers of the Hugging Face `kernels` package: no state of their own, they run on a foreign module's.

    from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping
    from pixnerd_kernels.nn.stateless import REPOSITORY

    replace_kernel_forward_from_hub(NerfBlock, "NerfBlock")
    layer = LocalLayerRepository(REPOSITORY, layer_name="NerfBlock")
    with use_kernel_mapping({"NerfBlock": {"cuda": layer, "cpu": layer}}):
        kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE)

A layer's `forward` is called with the module that it replaces as `self`, and reads the attributes that the official
models have; nothing is verified, that is what `pixnerd_kernels.patch` is for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pixnerd_kernels.nn.layers import feed_forward
from pixnerd_kernels.ops.modulated_rms_norm import modulated_rms_norm
from pixnerd_kernels.ops.neural_field_mlp import neural_field_mlp_packed
from pixnerd_kernels.ops.swiglu import swiglu as _swiglu

#: The folder that `kernels` takes for a repository: build/torch-universal/ with its metadata.
REPOSITORY = Path(__file__).with_name("hub")


def _field(module: Any, generator: str, x: Tensor, s: Tensor, **options: Any) -> Tensor:
    params = getattr(module, generator)(s)
    norm = module.norm
    weight = norm.weight if hasattr(norm, "weight") else norm.scale
    eps = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None) or 1e-6
    hidden = x.shape[2] * module.mlp_ratio
    options |= {"hidden": hidden, "norm_weight": weight, "norm_eps": eps}
    if x.dtype == params.dtype:
        return neural_field_mlp_packed(x, params, **options)
    return x + neural_field_mlp_packed(x.to(params.dtype), params, residual=False, **options)


class NerfBlock(nn.Module):
    """The official class-to-image block: `param_generator1`, `norm`, `mlp_ratio`; both matrices normalised."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        """x [N, S, D1] and s [N, D] -> [N, S, D1]."""
        return _field(self, "param_generator1", x, s)


class TextNerfBlock(nn.Module):
    """The official text-to-image block: as `NerfBlock`, with the first matrix alone normalised."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        """x [N, S, D1] and s [N, D] -> [N, S, D1]."""
        return _field(self, "param_generator1", x, s, normalize=("w1",))


class NerfGLUBlock(nn.Module):
    """Chroma1-Radiance's gated block: `param_generator`, `norm`, `mlp_ratio`; all three matrices normalised."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        """x [N, S, D1] and s [N, D] -> [N, S, D1]."""
        return _field(self, "param_generator", x, s, gated=True)


class RMSNorm(nn.Module):
    """`weight` and `eps`, as `pixnerd_kernels.nn.RMSNorm` and torch's with an eps; x and weight of one dtype."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return modulated_rms_norm(x, self.weight, eps=self.eps)  # type: ignore[arg-type]


class SwiGLU(nn.Module):
    """w2(silu(w1(x)) * w3(x)): `pixnerd_kernels.nn.SwiGLU` and the official class-to-image FeedForward."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return feed_forward(x, self.w1, self.w3, self.w2)  # type: ignore[arg-type]


class PackedSwiGLU(nn.Module):
    """w3(silu(gate) * value) of gate and value side by side from w12: the official text-to-image SwiGLU."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        out: Tensor = self.w3(_swiglu(self.w12(x)))  # type: ignore[operator]
        return out
