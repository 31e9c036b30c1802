"""Hands the tensors of `neural_field_mlp` to csrc/neural_field_mlp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pixnerd_kernels.backends import native
from pixnerd_kernels.ops.dtypes import compute_dtype
from pixnerd_kernels.ops.native import DTYPES, dense_rows, fresh, strided
from pixnerd_kernels.ops.neural_field_mlp.shapes import check_gradient, check_tangents, check_weights

#: The core's numbers.
ACTIVATIONS = {"silu": 0, "gelu": 1, "relu": 2}


def _field(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w_gate: Tensor | None,
    norm_weight: Tensor | None,
    normalize: Sequence[bool],
    activation: str,
    residual: bool,
    norm_eps: float,
    weight_eps: float,
    *,
    half: bool = False,
) -> tuple[Any, tuple[Tensor | None, ...]]:
    """The core's description of a call, and the tensors that must outlive it. half: as in `check_weights`."""
    check_weights(x, w1, w2, w_gate, norm_weight, half)
    patches, pixels, channels = x.shape
    hidden = w1.shape[-1]
    x, w1, w2 = dense_rows(x), dense_rows(w1), dense_rows(w2)
    w_gate = None if w_gate is None else dense_rows(w_gate)
    if norm_weight is not None:
        norm_weight = norm_weight.to(compute_dtype(x.dtype)).contiguous()
    field = native().NeuralField(
        patches=patches,
        pixels=pixels,
        channels=channels,
        hidden=hidden,
        dtype=DTYPES[x.dtype],
        weight_dtype=DTYPES[w1.dtype],
        activation=ACTIVATIONS[activation],
        residual=residual,
        normalize=normalize,
        norm_eps=norm_eps,
        weight_eps=weight_eps,
        threads=torch.get_num_threads(),
        x=strided(x),
        w1=strided(w1),
        w2=strided(w2),
        w_gate=strided(w_gate),
        norm_weight=0 if norm_weight is None else norm_weight.data_ptr(),
    )
    return field, (x, w1, w2, w_gate, norm_weight)


def forward(
    x: Tensor, w1: Tensor, w2: Tensor, w_gate: Tensor | None, norm_weight: Tensor | None, *options: Any
) -> Tensor:
    """y [N, S, D1] in x's dtype, contiguous."""
    y = fresh(torch.empty_like(x, memory_format=torch.contiguous_format))
    if y.numel():
        field, alive = _field(x, w1, w2, w_gate, norm_weight, *options)
        native().neural_field_mlp_forward(field, strided(y))
        del alive
    return y


def jvp(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w_gate: Tensor | None,
    norm_weight: Tensor | None,
    x_tangent: Tensor | None,
    w1_tangent: Tensor | None,
    w2_tangent: Tensor | None,
    w_gate_tangent: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """y [N, S, D1] and its tangent in x's dtype, contiguous. No tangent is a zero one; weights have all or none, and
    may be half where x is float32."""
    y, tangent = (fresh(torch.empty_like(x, memory_format=torch.contiguous_format)) for _ in range(2))
    if y.numel():
        check_tangents((x, w1, w2, w_gate), (x_tangent, w1_tangent, w2_tangent, w_gate_tangent))
        field, alive = _field(x, w1, w2, w_gate, norm_weight, *options, half=True)
        along = [
            None if t is None else dense_rows(t) for t in (x_tangent, w1_tangent, w2_tangent, w_gate_tangent)
        ]
        native().neural_field_mlp_jvp(field, *map(strided, along), strided(y), strided(tangent))
        del alive
    return y, tangent


def backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w_gate: Tensor | None,
    norm_weight: Tensor | None,
    need_x: bool,
    targets: Sequence[Tensor | None],
    *options: Any,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x (if needed) and norm_weight; those of w1, w2, w_gate are written into `targets`."""
    dx = fresh(torch.empty_like(x, memory_format=torch.contiguous_format)) if need_x else None
    d_norm = None
    if norm_weight is not None:
        d_norm = torch.empty_like(norm_weight, dtype=compute_dtype(x.dtype))
    if x.numel():
        check_gradient(grad, x)
        grad = dense_rows(grad)
        field, alive = _field(x, w1, w2, w_gate, norm_weight, *options)
        native().neural_field_mlp_backward(
            field,
            grad=strided(grad),
            dx=strided(dx),
            d_w1=strided(targets[0]),
            d_w2=strided(targets[1]),
            d_w_gate=strided(targets[2]),
            d_norm_weight=0 if d_norm is None else d_norm.data_ptr(),
        )
        del alive
    else:
        for target in (*targets, d_norm):
            if target is not None:
                target.zero_()
    if d_norm is not None and norm_weight is not None:
        d_norm = d_norm.to(norm_weight.dtype)
    return dx, d_norm
