"""A linear layer's product, on the compiled core where that is the faster library on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from pixnerd_kernels import backends
from pixnerd_kernels.ops.library import register, register_autograd
from pixnerd_kernels.ops.native import fresh

#: Multiply-adds below which the op's own cost outweighs what it gains.
_LEAST = 1 << 22


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias, the values of torch.nn.functional.linear.

    torch multiplies float32 matrices on a CPU with MKL, which on AMD's processors stays behind them: it takes AVX2
    kernels even where there is AVX-512. The compiled core (csrc/matmul.cpp) reads the weight in place and comes nearer
    to the processor's limit. Large float32 products on such a processor run there, forward and backward; everything
    else is torch.nn.functional.linear itself. `use_backend("reference")` always takes the latter, and
    `use_backend("cpu")` the core on any processor.

    Args:
        x: [..., K]. weight: [N, K]. bias: [N] or None.

    Returns:
        [..., N] in x's dtype. Gradients of any order flow to all three.

    Raises:
        What torch.nn.functional.linear raises.
    """
    if _takes_core(x, weight, bias):
        flat = x.reshape(-1, x.shape[-1])
        out: Tensor = torch.ops.pixnerd.linear(flat, weight, bias)
        return out.view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight, bias)


def _takes_core(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in tensors):
        return False
    # The op's gradient is for plain backward passes only; torch's own layer has all transforms.
    if not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    ):
        return False
    forced = backends.forced_backend()
    if torch.is_autocast_enabled("cpu") or not (CORE_IS_FASTER if not forced else forced == "cpu"):
        return False
    fits = weight.dim() == 2 and x.dim() > 0 and x.shape[-1] == weight.shape[1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        return False
    return x.numel() * weight.shape[0] >= _LEAST


def core_reasons() -> list[str]:
    """Every reason why large float32 products stay on torch's library; empty if they do not."""
    module, missing = backends._load_native()
    return _processor_reasons() + ([] if module else [f"the compiled core is not available: {missing}"])


def _processor_reasons() -> list[str]:
    reasons = []
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        reasons.append("the processor has no AVX2, or torch does not use it")
    if (vendor := _vendor()) != "AuthenticAMD":
        reasons.append(f"only AMD's processors are known to gain, this one's vendor is {vendor}")
    return reasons


def _vendor() -> str:
    try:
        with Path("/proc/cpuinfo").open() as file:
            for line in file:
                if line.startswith("vendor_id"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return "unknown"


#: A constant, which torch.compile can read.
CORE_IS_FASTER = not _processor_reasons()


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    fits = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    there = backends.forced_backend() == "cpu" or backends._load_native()[0] is not None
    # A product of vectors, or of one row with the columns of a weight, mostly moves memory: blocks would be empty.
    thin = min(x.shape[1], weight.shape[0]) < 2 or (x.shape[0] == 1 and weight.stride(1) != 1)
    if not fits or not there or thin:
        return F.linear(x, weight, bias)
    from pixnerd_kernels.ops.linear import cpu

    out = fresh(x.new_empty(x.shape[0], weight.shape[0]))
    cpu.matmul(x, weight.mT, out, bias)
    return out


register(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _forward,
    lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
)


class _Linear(torch.autograd.Function):
    """Backward consists of ops that can be differentiated again."""

    @staticmethod
    def forward(ctx, x, weight, bias):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.pixnerd.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        dx = torch.ops.pixnerd.linear(grad, weight.t(), None) if need_x else None
        d_weight = torch.ops.pixnerd.linear(grad.t(), x.t(), None) if need_weight else None
        return dx, d_weight, grad.sum(0) if need_bias else None


register_autograd("linear", _Linear.apply, F.linear)
