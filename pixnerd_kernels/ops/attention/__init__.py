"""Scaled dot-product attention behind one function, so that models do not choose a kernel themselves."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from pixnerd_kernels.checks import Problems
from pixnerd_kernels.ops.attention import flash, tangents
from pixnerd_kernels.ops.dtypes import autocast, autocasts
from pixnerd_kernels.ops.library import Passed, forward_mode_alone, has_tangents, plain

#: In order of preference for tensors that flash kernels take; "sdpa" takes all others.
BACKENDS = ("flash3", "flash4", "flash2", "sdpa")
_passed = Passed()


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v for every head, in the layout that a packed projection gives without a copy.

    Args:
        q: [B, L, heads, d], any strides.
        k, v: [B, M, heads, d].
        mask: [L, M] or what broadcasts to [B, heads, L, M]; booleans (True takes part) or addends of the
            logits, in q's dtype.
        backend: "flash3" (package flash_attn_interface), "flash4" (flash_attn.cute), "flash2" (flash_attn), or "sdpa",
            torch's scaled_dot_product_attention, which picks a flash or cuDNN kernel on a GPU and its flash kernel on
            a CPU. "auto" takes the first of these that runs here for these tensors; under torch.compile it is "sdpa",
            whose kernels the compiler knows, and so it is in the transforms of torch.func.

    Returns:
        [B, L, heads, d] in q's dtype.

    Gradients flow to all of them. Tangents along q, k and v under torch.func.jvp are computed with the value, some rows
    of logits at a time; saved for backward are inputs alone, and the value's gradients are those of torch's kernel.
    Flash kernels have no second derivatives: in nested gradients of torch.func, unless they are compiled, in those of
    tangents, and in dual numbers by hand of what requires gradients, a formula is taken, which writes all logits to
    memory. For all other second derivatives (torch.autograd.grad with create_graph) ask for torch's, as for its own
    function: torch.nn.attention.sdpa_kernel(SDPBackend.MATH) around the forward.

    Raises:
        TypeError, ValueError: every problem with the arguments at once.
        NotImplementedError: the named backend cannot run; lists every reason.
    """
    direct = plain(q, k, v)
    # What a mask may be depends on autocast.
    known = None if direct is None or mask is not None else (*direct, backend)
    _passed.check(known, _check, q, k, v, mask, backend)
    chosen = select(q, mask, backend)
    if chosen != "sdpa":
        return flash.run(chosen, q, k, v)
    if _in_forward_mode(q, k, v, mask):
        out: Tensor = torch.ops.pixnerd.attention(*autocast(q, k, v, mask))
        return out
    with sdpa_kernel(SDPBackend.MATH) if _nested() else contextlib.nullcontext():
        return tangents.plain(q, k, v, mask)


def _in_forward_mode(*tensors: Tensor | None) -> bool:
    """Whether a tensor has a tangent, or may have one where a compiler or several transforms of torch.func look on."""
    if torch.compiler.is_compiling():
        return forward_ad._current_level >= 0
    if torch._C._are_functorch_transforms_active() and not forward_mode_alone():
        return forward_ad._current_level >= 0
    return has_tangents(tensors)


def _nested() -> bool:
    """Whether gradients of torch.func's gradients are taken, where no compiler traces."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    levels = torch._C._functorch.get_interpreter_stack() or []
    return sum(level.key() == torch._C._functorch.TransformType.Grad for level in levels) > 1


def _check(q: Any, k: Any, v: Any, mask: Any, backend: Any) -> None:
    problems = Problems("attention")
    readable = problems.tensor("q", q, 4, "[B, L, heads, d]")
    readable &= problems.tensor("k", k, 4, "[B, M, heads, d]")
    readable &= problems.tensor("v", v, 4, "[B, M, heads, d]")
    if readable:
        if (k.shape[0], *k.shape[2:]) != (q.shape[0], *q.shape[2:]):
            problems.add("k", f"batch, heads and d of q {list(q.shape)}", k)
        if v.shape != k.shape:
            problems.add("v", f"the shape of k {list(k.shape)}", v)
        if mask is not None:
            _check_mask(problems, q, k, mask)
    problems.same_dtype("q", q, [("k", k), ("v", v)])
    problems.same_device("q", q, [("k", k), ("v", v), ("mask", mask)])
    problems.choice("backend", backend, ("auto", *BACKENDS))
    problems.raise_if_any()


def _check_mask(problems: Problems, q: Tensor, k: Tensor, mask: object) -> None:
    if not isinstance(mask, Tensor) or mask.layout != torch.strided:
        problems.add_type("mask", "a dense (strided) tensor", getattr(mask, "layout", mask))
        return
    # torch takes float32 beside any dtype, but of its GPU kernels one refuses it and one reads it as q's dtype.
    if mask.dtype not in (torch.bool, q.dtype) and not (autocasts(q) and autocasts(mask)):
        problems.add_type("mask", f"torch.bool or the dtype of q ({q.dtype})", mask)
    whole = [q.shape[0], q.shape[2], q.shape[1], k.shape[1]]
    fits = all(size in (1, full) for size, full in zip(mask.shape[::-1], whole[::-1], strict=False))
    if not 2 <= mask.dim() <= 4 or not fits:
        problems.add("mask", f"[L, M] or what broadcasts to [B, heads, L, M] = {whole}", mask)


def select(q: Tensor, mask: Tensor | None = None, backend: str = "auto") -> str:
    """The backend that runs for these tensors.

    Raises:
        NotImplementedError: the named backend cannot run; lists every reason.
    """
    if backend == "auto":
        if q.device.type != "cuda" or torch.compiler.is_compiling():
            return "sdpa"
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            return "sdpa"
        head_size = q.shape[-1]
        # A tracer's symbolic size cannot be looked up.
        first = _first if type(head_size) is int else _first.__wrapped__
        return first(q.device, q.dtype, head_size, mask is not None)
    if reasons := not_supported_reasons(backend, q, mask):
        lines = "\n".join(f"  - {reason}" for reason in reasons)
        raise NotImplementedError(f"attention cannot run on the backend {backend!r}:\n{lines}")
    return backend


@functools.cache
def _first(device: torch.device, dtype: torch.dtype, head_size: int, masked: bool) -> str:
    """The first backend that runs here for such tensors."""
    return next(name for name in BACKENDS if not _reasons(name, device, dtype, head_size, masked))


def _reasons(
    backend: str, device: torch.device, dtype: torch.dtype, head_size: int, masked: bool
) -> list[str]:
    if backend == "sdpa":
        return []
    return flash.not_supported_reasons(backend, device, dtype, head_size, masked)


def not_supported_reasons(backend: str, q: Tensor, mask: Tensor | None = None) -> list[str]:
    """Every reason why a backend cannot run for these tensors; empty if it can."""
    return _reasons(backend, q.device, q.dtype, q.shape[-1], mask is not None)


__all__ = ["BACKENDS", "attention", "not_supported_reasons", "select"]
