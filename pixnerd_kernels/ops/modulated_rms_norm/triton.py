"""The Triton kernels of `modulated_rms_norm`, and of its fusion with the residual before it.

Forward: a program per tile of tokens. Backward: a program walks over tiles of one image's tokens and keeps their column
sums (of g, g n and dz y) on chip; the programs' sums are added up by a second, small reduction. No atomics. Not run on
a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pixnerd_kernels.checks import describe
from pixnerd_kernels.ops.gpu.launch import Options, emulates, interpreting, launch, target_of
from pixnerd_kernels.ops.gpu.pieces import load_tile, rms_norm, rms_norm_grad, store_tile
from pixnerd_kernels.ops.native import dense_rows

#: Numbers of a tile; in the interpreter a program costs what its entries do not.
_TILE, _TILE_INTERPRETED = 4096, 32768


@triton.jit
def load_row(pointer, columns, COLUMNS: tl.constexpr):
    """[1, columns] in float32, zeros beyond COLUMNS."""
    return tl.load(pointer + columns, mask=columns < COLUMNS, other=0.0).to(tl.float32)[None, :]


@triton.jit
def modulated_rms_norm_forward(
    x, y, gate, weight, shift, scale, z, out, eps,
    x_batch, x_token, y_batch, y_token, gate_batch, shift_batch, scale_batch, tokens,
    COLUMNS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """z = x + gate * y where RESIDUAL, and out, the modulated norm of it (or of x), where NORM."""
    blocks = tl.cdiv(tokens, BLOCK_L)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
    column = tl.arange(0, BLOCK_D)
    dense = image * tokens * COLUMNS
    tile = load_tile(x + image * x_batch, token, x_token, column, tokens, COLUMNS).to(tl.float32)
    if RESIDUAL:
        added = load_tile(y + image * y_batch, token, y_token, column, tokens, COLUMNS).to(tl.float32)
        tile += load_row(gate + image * gate_batch, column, COLUMNS) * added
        store_tile(z + dense, token, COLUMNS, column, tokens, COLUMNS, tile, EMULATE)
    if NORM:
        unit, _ = rms_norm(tile, token < tokens, eps, COLUMNS)
        factor = load_row(weight, column, COLUMNS)
        if SCALE:
            factor *= 1.0 + load_row(scale + image * scale_batch, column, COLUMNS)
        unit *= factor
        if SHIFT:
            unit += load_row(shift + image * shift_batch, column, COLUMNS)
        store_tile(out + dense, token, COLUMNS, column, tokens, COLUMNS, unit, EMULATE)


@triton.jit
def modulated_rms_norm_backward(
    grad_z, grad, z, y, gate, weight, scale, dx, dy, sums, eps,
    grad_z_batch, grad_z_token, grad_batch, grad_token, z_batch, z_token, y_batch, y_token, gate_batch, scale_batch,
    tokens, tokens_each, parts,
    COLUMNS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr,
    GRAD_Z: tl.constexpr, SCALE: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """dx where NORM, dy where RESIDUAL, and sums [images, parts, 3, COLUMNS] over tokens: of g, g n and dz y."""
    image = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    column = tl.arange(0, BLOCK_D)
    dense = image * tokens * COLUMNS
    sum_g = tl.zeros([BLOCK_D], tl.float32)
    sum_g_unit = tl.zeros([BLOCK_D], tl.float32)
    sum_gate = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, tokens_each, BLOCK_L):
        token = part * tokens_each + start + tl.arange(0, BLOCK_L)
        if NORM:
            g = load_tile(grad + image * grad_batch, token, grad_token, column, tokens, COLUMNS).to(
                tl.float32
            )
            tile = load_tile(z + image * z_batch, token, z_token, column, tokens, COLUMNS).to(tl.float32)
            unit, r = rms_norm(tile, token < tokens, eps, COLUMNS)
            sum_g += tl.sum(g, 0)
            sum_g_unit += tl.sum(g * unit, 0)
            g *= load_row(weight, column, COLUMNS)
            if SCALE:
                g *= 1.0 + load_row(scale + image * scale_batch, column, COLUMNS)
            dz = rms_norm_grad(g, unit, r, COLUMNS)
            if GRAD_Z:
                dz += load_tile(grad_z + image * grad_z_batch, token, grad_z_token, column, tokens, COLUMNS)
            store_tile(dx + dense, token, COLUMNS, column, tokens, COLUMNS, dz, EMULATE)
        else:
            dz = load_tile(grad_z + image * grad_z_batch, token, grad_z_token, column, tokens, COLUMNS)
            dz = dz.to(tl.float32)
        if RESIDUAL:
            added = load_tile(y + image * y_batch, token, y_token, column, tokens, COLUMNS).to(tl.float32)
            sum_gate += tl.sum(dz * added, 0)
            dz *= load_row(gate + image * gate_batch, column, COLUMNS)
            store_tile(dy + dense, token, COLUMNS, column, tokens, COLUMNS, dz, EMULATE)
    here = sums + (image * parts + part) * 3 * COLUMNS + column
    inside = column < COLUMNS
    tl.store(here, sum_g, mask=inside)
    tl.store(here + COLUMNS, sum_g_unit, mask=inside)
    tl.store(here + 2 * COLUMNS, sum_gate, mask=inside)


def _plan(tokens: int, columns: int) -> tuple[int, int, Options]:
    """Tokens and channels of a tile, and the warps that hold it: 32 numbers a thread where that can be."""
    block_d = triton.next_power_of_2(columns)
    tile = _TILE_INTERPRETED if interpreting() else _TILE
    block_l = max(1, min(tile // block_d, triton.next_power_of_2(max(tokens, 1))))
    return block_l, block_d, Options(min(32, max(4, block_l * block_d // 1024)))


def _check(like: Tensor, tensors: dict[str, Tensor | None], rows: dict[str, Tensor | None]) -> None:
    """Exported programs and graph passes call the op without the public function's checks."""
    row = (like.shape[0], 1, like.shape[2])
    for named, shape in ((tensors, like.shape), (rows, row)):
        for name, tensor in named.items():
            if tensor is not None and (tensor.shape != shape or tensor.dtype != like.dtype):
                raise ValueError(f"{name}: expected {list(shape)} {like.dtype}, got {describe(tensor)}")


def _strided(tensors: dict[str, Tensor | None], unused: Tensor, tokens: bool = True) -> dict[str, object]:
    """Each tensor with dense rows, its batch stride and (not for rows) its token stride, as the kernels take them."""
    arguments: dict[str, object] = {}
    for name, tensor in tensors.items():
        given = unused if tensor is None else dense_rows(tensor)
        arguments[name] = given
        arguments[f"{name}_batch"] = given.stride(0)
        if tokens:
            arguments[f"{name}_token"] = given.stride(1)
    return arguments


def run_forward(
    x: Tensor,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    y: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """z = x + gate * y (None without y) and its norm (None without weight), contiguous."""
    _check(x, {"y": y}, {"gate": gate, "shift": shift, "scale": scale})
    batch, tokens, columns = x.shape
    out = None if weight is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    z = None if y is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    block_l, block_d, options = _plan(tokens, columns)
    launch(
        modulated_rms_norm_forward, (batch * triton.cdiv(tokens, block_l),), x.device, options,
        **_strided({"x": x, "y": y}, x), **_strided({"gate": gate, "shift": shift, "scale": scale}, x, tokens=False),
        weight=x if weight is None else weight.float().contiguous(), z=x if z is None else z,
        out=x if out is None else out, eps=eps, tokens=tokens,
        COLUMNS=columns, BLOCK_L=block_l, BLOCK_D=block_d, RESIDUAL=y is not None, NORM=weight is not None,
        SHIFT=shift is not None, SCALE=scale is not None, EMULATE=emulates(x.dtype),
    )  # fmt: skip
    return z, out


def run_backward(
    grad_z: Tensor | None,
    grad: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    shifted: bool,
    scale: Tensor | None,
    eps: float,
    y: Tensor | None,
    gate: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, y, gate, weight, shift and scale (None where absent), contiguous."""
    _check(z, {"grad": grad, "grad_z": grad_z, "y": y}, {"gate": gate, "scale": scale})
    batch, tokens, columns = z.shape
    dx = None if weight is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    dy = None if y is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    block_l, block_d, options = _plan(tokens, columns)
    # As many programs as keep the GPU busy; more would only write more sums.
    parts = triton.cdiv(4 * target_of(z.device).processors, max(batch, 1))
    tokens_each = triton.cdiv(triton.cdiv(max(tokens, 1), parts), block_l) * block_l
    parts = triton.cdiv(max(tokens, 1), tokens_each)
    sums = torch.empty(batch, parts, 3, columns, dtype=torch.float32, device=z.device)
    launch(
        modulated_rms_norm_backward, (batch * parts,), z.device, options,
        **_strided({"grad_z": grad_z, "grad": grad, "z": z, "y": y}, z),
        **_strided({"gate": gate, "scale": scale}, z, tokens=False),
        weight=z if weight is None else weight.float().contiguous(), dx=z if dx is None else dx,
        dy=z if dy is None else dy, sums=sums, eps=eps, tokens=tokens, tokens_each=tokens_each, parts=parts,
        COLUMNS=columns, BLOCK_L=block_l, BLOCK_D=block_d, RESIDUAL=y is not None, NORM=weight is not None,
        GRAD_Z=grad_z is not None, SCALE=scale is not None, EMULATE=emulates(z.dtype),
    )  # fmt: skip
    g, g_unit, gated = (row.contiguous() for row in sums.sum(1, keepdim=True).unbind(2))
    d_gate = None if gate is None else gated.to(z.dtype)
    if weight is None:
        return dx, dy, d_gate, None, None, None
    d_weight = g_unit if scale is None else g_unit * (1 + scale.float())
    d_scale = None if scale is None else (g_unit * weight.float()).to(z.dtype)
    return dx, dy, d_gate, d_weight.sum((0, 1)).to(weight.dtype), g.to(z.dtype) if shifted else None, d_scale


def forward(x: Tensor, weight: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float) -> Tensor:
    """out [B, L, D] in x's dtype, contiguous."""
    _, out = run_forward(x, weight, shift, scale, eps, None, None)
    assert out is not None
    return out


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, shifted: bool, scale: Tensor | None, eps: float
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, shift and scale (None where absent), contiguous."""
    dx, _, _, *others = run_backward(None, grad, x, weight, shifted, scale, eps, None, None)
    return dx, *others
