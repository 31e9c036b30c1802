"""Launches the Triton kernels of `neural_field_mlp`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pixnerd_kernels.ops.gpu.launch import Options, Target, emulates, launch, padded, precision, target_of
from pixnerd_kernels.ops.native import dense_rows
from pixnerd_kernels.ops.neural_field_mlp.shapes import check_gradient, check_tangents, check_weights
from pixnerd_kernels.ops.neural_field_mlp.triton import kernels, tangents
from pixnerd_kernels.ops.neural_field_mlp.triton.policy import Plan, Problem, choose, on_hopper, span


def _arguments(
    plan: Plan,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w_gate: Tensor | None,
    norm_weight: Tensor | None,
    *options: Any,
) -> dict[str, Any]:
    """What forward and backward take."""
    shared = _shared(plan, x, w1, w2, w_gate, norm_weight, *options)
    return shared | {"AHEAD": plan.ahead, "LATE": plan.late and norm_weight is not None}


def _shared(
    plan: Plan,
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
) -> dict[str, Any]:
    """What all kernels take. An absent tensor is stood in for by another, which is not read. half: as in
    `check_weights`."""
    check_weights(x, w1, w2, w_gate, norm_weight, half)
    x, w1, w2 = dense_rows(x), dense_rows(w1), dense_rows(w2)
    gate = w1 if w_gate is None else dense_rows(w_gate)
    norm = x if norm_weight is None else norm_weight
    target = target_of(x.device)
    return {
        "x": x, "w1": w1, "w2": w2, "w_gate": gate, "norm_weight": norm,
        "pixels": x.shape[1],
        "x_patch": x.stride(0), "x_row": x.stride(1),
        "w1_patch": w1.stride(0), "w1_row": w1.stride(1),
        "w2_patch": w2.stride(0), "w2_row": w2.stride(1),
        "gate_patch": gate.stride(0), "gate_row": gate.stride(1),
        "norm_step": norm.stride(0),
        "norm_eps": norm_eps, "weight_eps": weight_eps,
        "CHANNELS": x.shape[2], "HIDDEN": w1.shape[2],
        "TILE": plan.tile, "BLOCK_C": padded(x.shape[2]), "PIECE": plan.piece, "PIECES": plan.pieces,
        "GATED": w_gate is not None, "NORM": norm_weight is not None,
        "UNIT1": normalize[0], "UNIT2": normalize[1], "UNIT_GATE": normalize[2],
        "ACTIVATION": activation, "RESIDUAL": residual,
        "FAST": target.fast_tanh and w1.dtype != torch.float32,
        "PRECISION": precision(w1.dtype, target), "EMULATE": emulates(w1.dtype),
    }  # fmt: skip


def forward(
    x: Tensor, w1: Tensor, w2: Tensor, w_gate: Tensor | None, norm_weight: Tensor | None, *options: Any
) -> Tensor:
    """y [N, S, D1] in x's dtype, contiguous."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        target = target_of(x.device)
        problem = Problem.of(x, w1.shape[2], w_gate is not None, training=False)
        plan = choose(problem, target)
        launch(
            kernels.neural_field_mlp_forward, (problem.patches, plan.sharing(problem, target)), x.device, plan.options,
            **_arguments(plan, x, w1, w2, w_gate, norm_weight, *options), y=y,
        )  # fmt: skip
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
    y, tangent = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    if not y.numel():
        return y, tangent
    along = (x_tangent, w1_tangent, w2_tangent, w_gate_tangent)
    check_tangents((x, w1, w2, w_gate), along)
    target = target_of(x.device)
    patches, pixels, channels = x.shape
    problem = Problem(
        False, w_gate is not None, w1.dtype, patches, pixels, channels, w1.shape[2], tangents=True
    )
    plan = choose(problem, target)
    dx, dw1, dw2, dw_gate = (
        dense_rows(tensor if moved is None else moved)
        for tensor, moved in zip((x, w1, w2, w1 if w_gate is None else w_gate), along, strict=True)
    )
    launch(
        tangents.neural_field_mlp_jvp, (patches, plan.sharing(problem, target)), x.device, plan.options,
        **_shared(plan, x, w1, w2, w_gate, norm_weight, *options, half=True),
        dx=dx, dw1=dw1, dw2=dw2, dw_gate=dw_gate, y=y, dy=tangent,
        dx_patch=dx.stride(0), dw1_patch=dw1.stride(0), dw2_patch=dw2.stride(0), dw_gate_patch=dw_gate.stride(0),
        dx_row=dx.stride(1), dw1_row=dw1.stride(1), dw2_row=dw2.stride(1), dw_gate_row=dw_gate.stride(1),
        INPUT=x_tangent is not None, MOVING=w1_tangent is not None,
    )  # fmt: skip
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
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    if not x.numel():
        for target in targets:
            if target is not None:
                target.zero_()
        return dx, None if norm_weight is None else torch.zeros_like(norm_weight)
    partial = torch.empty(x.shape[0], x.shape[2], dtype=torch.float32, device=x.device)
    backward_into(dx, partial, grad, x, w1, w2, w_gate, norm_weight, targets, *options)
    return dx, None if norm_weight is None else partial.sum(0).to(norm_weight.dtype)


def backward_into(
    dx: Tensor | None,
    d_norm: Tensor,
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w_gate: Tensor | None,
    norm_weight: Tensor | None,
    targets: Sequence[Tensor | None],
    *options: Any,
) -> None:
    """Every gradient into memory of the caller's: dx [N, S, D1] contiguous, which may be `grad` itself, d_norm [N, D1]
    in float32, each patch's own, and `targets`, which may be the weights themselves."""
    check_gradient(grad, x)
    grad = dense_rows(grad)
    device = target_of(x.device)
    problem = Problem.of(x, w1.shape[2], w_gate is not None, training=True)
    if on_hopper(problem, device) and _run_on_hopper(
        device, dx, d_norm, grad, x, w1, w2, norm_weight, targets, *options
    ):
        return
    plan = choose(problem, device)
    programs, chunks = plan.programs(problem, device), plan.chunks(problem)
    d1, d2, d_gate = (x if target is None else target for target in targets)
    block, waiting = padded(problem.channels), programs if chunks > 1 else 0
    wide: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    launch(
        kernels.neural_field_mlp_backward, (programs,), x.device, plan.options,
        **_arguments(plan, x, w1, w2, w_gate, norm_weight, *options),
        grad=grad, dx=x if dx is None else dx, d1=d1, d2=d2, d_gate=d_gate, d_norm=d_norm,
        scratch_x=torch.empty(waiting, problem.pixels, block, **wide),
        scratch_2=torch.empty(waiting, chunks * plan.piece * plan.pieces, block, **wide),
        patches=problem.patches, grad_patch=grad.stride(0), grad_row=grad.stride(1),
        d1_patch=d1.stride(0), d1_row=d1.stride(1), d2_patch=d2.stride(0), d2_row=d2.stride(1),
        d_gate_patch=d_gate.stride(0), d_gate_row=d_gate.stride(1),
        NEED_X=dx is not None, NEED_WEIGHTS=targets[0] is not None, SPAN=span(problem.pixels),
    )  # fmt: skip


def _run_on_hopper(
    device: Target,
    dx: Tensor | None,
    d_norm: Tensor,
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    norm_weight: Tensor | None,
    targets: Sequence[Tensor | None],
    normalize: Sequence[bool],
    activation: str,
    residual: bool,
    norm_eps: float,
    weight_eps: float,
) -> bool:
    """`backward_into` by the kernel in `hopper`; False, and nothing done, where it does not take this call."""
    d1, d2, _ = targets
    if dx is None or d1 is None or d2 is None or norm_weight is None or activation != "silu":
        return False
    check_weights(x, w1, w2, None, norm_weight)
    x, w1, w2 = dense_rows(x), dense_rows(w1), dense_rows(w2)
    if not all(map(_in_pieces_of_16_bytes, (grad, x, w1, w2, d1, d2))):
        return False
    # Imported here, since the interpreter and other Tritons have no Gluon.
    from pixnerd_kernels.ops.neural_field_mlp.triton import hopper

    patches, pixels, _ = x.shape
    launch(
        hopper.neural_field_mlp_backward_hopper, (min(patches, device.processors),), x.device, _ON_HOPPER,
        grad=grad, x=x, w1=w1, w2=w2, norm_weight=norm_weight, dx=dx, d1=d1, d2=d2, d_norm=d_norm,
        patches=patches, pixels=pixels, grad_patch=grad.stride(0), x_patch=x.stride(0), w1_patch=w1.stride(0),
        w2_patch=w2.stride(0), d1_patch=d1.stride(0), d2_patch=d2.stride(0), norm_step=norm_weight.stride(0),
        norm_eps=norm_eps, weight_eps=weight_eps, grad_row=grad.stride(1), x_row=x.stride(1), w1_row=w1.stride(1),
        w2_row=w2.stride(1), d1_row=d1.stride(1), d2_row=d2.stride(1),
        UNIT1=normalize[0], UNIT2=normalize[1], RESIDUAL=residual, FULL=pixels % 128 == 0,
    )  # fmt: skip
    return True


#: A program fills a processor.
_ON_HOPPER = Options(warps=8, registers=255)


def _in_pieces_of_16_bytes(tensor: Tensor) -> bool:
    """Whether every row can be copied so, and Triton knows it of the patches, whose stride it takes at run time."""
    return tensor.data_ptr() % 16 == 0 and tensor.stride(0) % 16 == 0 and tensor.stride(1) % 8 == 0
