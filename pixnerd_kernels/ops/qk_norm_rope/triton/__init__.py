"""Launches the Triton kernels of `qk_norm_rope`."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pixnerd_kernels.checks import describe
from pixnerd_kernels.ops.gpu.launch import (
    Options,
    ceil_div,
    emulates,
    interpreting,
    launch,
    power_of_two,
    target_of,
)
from pixnerd_kernels.ops.native import dense_rows
from pixnerd_kernels.ops.qk_norm_rope.shapes import new_results
from pixnerd_kernels.ops.qk_norm_rope.triton import kernels

#: Numbers of a tile, forward and backward, at four warps; in the interpreter a program costs what its entries do not.
_TILE, _TILE_BACKWARD, _TILE_INTERPRETED = 2048, 1024, 32768
_TILE_OF_TANGENTS = 1024
#: Programs of the backward that a processor holds at a time.
_RESIDENT = 4
_OPTIONS = Options(4)
#: Programs and channels of a tile of the kernel that adds up.
_PROGRAMS, _CHANNELS = 256, 8


class _Plan(NamedTuple):
    """Tiles of BLOCK_T tokens by BLOCK_H heads; in the backward a program takes `each` of them."""

    sizes: dict[str, Any]
    programs: int
    each: int = 1


@functools.lru_cache(maxsize=256)
def _plan(count: int, heads: int, channels: int, largest: int, slots: int) -> _Plan:
    """The tiles of `count` tokens. slots: programs that run at a time, where each shall run once; 0: one a tile."""
    width = max(2, power_of_two(channels))
    rows = max(1, (_TILE_INTERPRETED if interpreting() else largest) // width)
    # As many heads as pads their number by an eighth at most.
    block_h = min(16, rows, power_of_two(heads))
    while 8 * ceil_div(heads, block_h) * block_h > 9 * heads:
        block_h //= 2
    block_t = min(rows // block_h, power_of_two(count))
    tiles, head_blocks = ceil_div(count, block_t), ceil_div(heads, block_h)
    each = max(1, ceil_div(tiles * head_blocks, slots)) if slots else 1
    sizes = {"CHANNELS": channels, "WIDTH": width, "BLOCK_T": block_t, "BLOCK_H": block_h}
    return _Plan(sizes, ceil_div(tiles, each) * head_blocks, each)


def _check(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor | None, text_kv: Tensor | None
) -> None:
    """Exported programs and graph passes call the op without the public function's checks."""
    batch, tokens, parts, heads, channels = qkv.shape
    fits = parts == 3 and q_weight.shape == k_weight.shape == (channels,)
    if rope is not None:
        fits = fits and rope.shape == (tokens, channels // 2, 2)
    if text_kv is not None:
        fits = fits and text_kv.shape == (batch, text_kv.shape[1], 2, heads, channels)
        fits = fits and text_kv.dtype == qkv.dtype
    if not fits:
        given = {"q_weight": q_weight, "k_weight": k_weight, "rope": rope, "text_kv": text_kv}
        told = [f"{name} {describe(tensor)}" for name, tensor in given.items() if tensor is not None]
        raise ValueError(f"expected tensors that fit qkv {describe(qkv)}, got {', '.join(told)}")


def _unit(strides: dict[str, int]) -> dict[str, int]:
    """Strides of packed tensors and gradients in units of the largest power of two that divides them all, 16 at most.

    Triton is told by itself of numbers that 16 divides; 72 channels of a head it would load one by one.
    """
    bits = 16
    for stride in strides.values():
        bits |= stride
    unit = bits & -bits
    return {"UNIT": unit} | {name: stride // unit for name, stride in strides.items()}


def _strides(packed: Tensor, prefix: str = "") -> dict[str, int]:
    named = zip(("batch", "token", "part", "head"), packed.stride(), strict=False)
    return {f"{prefix}{name}_stride": stride for name, stride in named}


def forward(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor | None, text_kv: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, L, heads, d], k and v [B, L + M, heads, d], contiguous."""
    _check(qkv, q_weight, k_weight, rope, text_kv)
    q_out, k_out, v_out = new_results(qkv, text_kv)
    batch, tokens, _, heads, channels = qkv.shape
    keys = k_out.shape[1]
    rope = None if rope is None else rope.contiguous()
    for packed, first in ((qkv, 0), (text_kv, tokens)):
        if packed is None:
            continue
        packed = dense_rows(packed)
        own, query = packed.shape[1], packed.shape[2] == 3
        plan = _plan(batch * own, heads, channels, _TILE, 0)
        table = rope if query else None
        launch(
            kernels.qk_norm_rope_forward, (plan.programs,), qkv.device, _OPTIONS,
            packed=packed, q_weight=q_weight, k_weight=k_weight, rope=q_weight if table is None else table,
            q_out=q_out, k_out=k_out, v_out=v_out, eps=eps, **_unit(_strides(packed)),
            q_step=q_weight.stride(0), k_step=k_weight.stride(0),
            count=batch * own, tokens=own, heads=heads, keys=keys, first=first, **plan.sizes,
            QUERY=query, ROPE=table is not None, EMULATE=emulates(qkv.dtype),
        )  # fmt: skip
    return q_out, k_out, v_out


def jvp(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor | None,
    text_kv: Tensor | None,
    qkv_tangent: Tensor | None,
    text_kv_tangent: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """q [B, L, heads, d], k and v [B, L + M, heads, d], and a tangent of each; no tangent is a zero one."""
    _check(qkv, q_weight, k_weight, rope, text_kv)
    values, tangents = new_results(qkv, text_kv), new_results(qkv, text_kv)
    batch, tokens, _, heads, channels = qkv.shape
    rope = None if rope is None else rope.contiguous()
    for packed, along, first in ((qkv, qkv_tangent, 0), (text_kv, text_kv_tangent, tokens)):
        if packed is None:
            continue
        packed = dense_rows(packed)
        moving = packed if along is None else dense_rows(along)
        own, query = packed.shape[1], packed.shape[2] == 3
        plan = _plan(batch * own, heads, channels, _TILE_OF_TANGENTS, 0)
        table = rope if query else None
        launch(
            kernels.qk_norm_rope_jvp, (plan.programs,), qkv.device, _OPTIONS,
            packed=packed, tangents=moving, q_weight=q_weight, k_weight=k_weight,
            rope=q_weight if table is None else table,
            **dict(zip(("q_out", "k_out", "v_out"), values, strict=True)),
            **dict(zip(("dq_out", "dk_out", "dv_out"), tangents, strict=True)),
            eps=eps, **_unit(_strides(packed) | _strides(moving, "d_")),
            q_step=q_weight.stride(0), k_step=k_weight.stride(0),
            count=batch * own, tokens=own, heads=heads, keys=values[1].shape[1], first=first, **plan.sizes,
            QUERY=query, ROPE=table is not None, MOVES=along is not None, EMULATE=emulates(qkv.dtype),
        )  # fmt: skip
    return *values, *tangents


def backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: Tensor | None,
    text_kv: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of qkv, q_weight, k_weight and text_kv, contiguous."""
    _check(qkv, q_weight, k_weight, rope, text_kv)
    batch, tokens, _, heads, channels = qkv.shape
    keys = tokens + (0 if text_kv is None else text_kv.shape[1])
    grads: dict[str, Tensor] = {}
    grad_strides: dict[str, int] = {}
    for name, grad, length in (
        ("grad_q", grad_q, tokens),
        ("grad_k", grad_k, keys),
        ("grad_v", grad_v, keys),
    ):
        expected = (batch, length, heads, channels)
        if grad.shape != expected or grad.dtype != qkv.dtype:
            raise ValueError(f"{name}: expected {list(expected)} {qkv.dtype}, got {describe(grad)}")
        grads[name] = grad = dense_rows(grad)
        strides = zip(("batch", "token", "head"), grad.stride(), strict=False)
        grad_strides |= {f"{name}_{axis}": stride for axis, stride in strides}
    rope = None if rope is None else rope.contiguous()
    # As many programs as run at a time; more would only write more sums.
    slots = _RESIDENT * target_of(qkv.device).processors
    plans = [
        None if packed is None else _plan(batch * packed.shape[1], heads, channels, _TILE_BACKWARD, slots)
        for packed in (qkv, text_kv)
    ]
    programs = sum(plan.programs for plan in plans if plan is not None)
    sums = torch.empty((programs, 2, channels), dtype=torch.float32, device=qkv.device)
    targets: list[Tensor | None] = []
    done = 0
    for packed, plan, first in ((qkv, plans[0], 0), (text_kv, plans[1], tokens)):
        if packed is None or plan is None:
            targets.append(None)
            continue
        target = torch.empty_like(packed, memory_format=torch.contiguous_format)
        targets.append(target)
        packed = dense_rows(packed)
        own, query = packed.shape[1], packed.shape[2] == 3
        table = rope if query else None
        launch(
            kernels.qk_norm_rope_backward, (plan.programs,), qkv.device, _OPTIONS,
            **grads, packed=packed, q_weight=q_weight, k_weight=k_weight, rope=q_weight if table is None else table,
            target=target, sums=sums, eps=eps, **_unit(grad_strides | _strides(packed)),
            q_step=q_weight.stride(0), k_step=k_weight.stride(0),
            count=batch * own, tokens=own, heads=heads, first=first, each=plan.each, program=done, **plan.sizes,
            QUERY=query, ROPE=table is not None, EMULATE=emulates(qkv.dtype),
        )  # fmt: skip
        done += plan.programs
    d_q, d_k = q_weight.new_empty(channels), k_weight.new_empty(channels)
    launch(
        kernels.qk_norm_rope_sums, (2 * ceil_div(channels, _CHANNELS),), qkv.device, _OPTIONS,
        sums=sums, d_q=d_q, d_k=d_k, programs=programs,
        CHANNELS=channels, BLOCK_P=_PROGRAMS, BLOCK_C=_CHANNELS,
        EMULATE=emulates(q_weight.dtype) or emulates(k_weight.dtype),
    )  # fmt: skip
    d_qkv, d_text = targets
    assert d_qkv is not None
    return d_qkv, d_q, d_k, d_text
