"""A linear layer's product, on the faster of the two matrix libraries that torch brings on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from pixnerd_kernels import backends
from pixnerd_kernels.ops.library import register, register_autograd

#: Multiply-adds below which the op's own cost outweighs what it gains.
_LEAST = 1 << 22


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias, the values of torch.nn.functional.linear.

    torch multiplies float32 matrices on a CPU with MKL, which takes its AVX2 kernels on AMD's processors even where
    they have AVX-512. oneDNN, which the same torch holds for other dtypes, takes the AVX-512 ones and reads the weight
    in place. Large float32 products on such a processor run there, forward and backward; everything else is
    torch.nn.functional.linear itself. `use_backend("reference")` always takes the latter.

    Args:
        x: [..., K]. weight: [N, K]. bias: [N] or None.

    Returns:
        [..., N] in x's dtype. Gradients of any order flow to all three.

    Raises:
        What torch.nn.functional.linear raises.
    """
    if _takes_onednn(x, weight, bias):
        flat = x.reshape(-1, x.shape[-1])
        out: Tensor = torch.ops.pixnerd.linear(flat, weight, bias)
        return out.view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight, bias)


def _takes_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in tensors):
        return False
    # The op's gradient is for plain backward passes only; torch's own layer has all transforms.
    if not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    ):
        return False
    if torch.is_autocast_enabled("cpu") or backends.forced_backend() == "reference" or not _ONEDNN:
        return False
    fits = weight.dim() == 2 and x.dim() > 0 and x.shape[-1] == weight.shape[1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        return False
    return x.numel() * weight.shape[0] >= _LEAST


def onednn_reasons() -> list[str]:
    """Every reason why large float32 products stay on torch's default library; empty if they do not."""
    reasons = []
    if not torch.backends.mkldnn.is_available():
        reasons.append("torch is built without oneDNN")
    elif not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        reasons.append("this torch does not offer oneDNN's linear layer (mkldnn::_linear_pointwise)")
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        reasons.append("the processor has no AVX-512, or torch does not use it")
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
_ONEDNN = not onednn_reasons()


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.numel() == 0 or weight.numel() == 0 or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
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
        # Of one row, such as a condition's, both read or write a matrix once and compute next to nothing: oneDNN takes
        # twice as long as torch's default library.
        multiply = F.linear if grad.shape[0] == 1 else torch.ops.pixnerd.linear
        dx = multiply(grad, weight.t(), None) if need_x else None
        d_weight = multiply(grad.t(), x.t(), None) if need_weight else None
        return dx, d_weight, grad.sum(0) if need_bias else None


register_autograd("linear", _Linear.apply)
