"""The pixel decoder in plain PyTorch: the truth that every other backend is measured against.

    x = pixel @ pixel_weightᵀ + table[position]
    x = block_k(x)                                     for every block; see neural_field_mlp's reference
    out = norm(x) @ linear_weightᵀ + linear_bias       norm and the linear layer each where they are given

with the blocks' weights generated from the patch's hidden state, hidden @ generator_weightᵀ + generator_bias, in
hidden's dtype. Everything else is computed in float32 for bfloat16 and float16, in the dtype itself otherwise, and
rounded once at the end. Source: PixNerd (arXiv 2507.23268), section 3, and its official code; Chroma1-Radiance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixnerd_kernels.ops.dtypes import compute_dtype
from pixnerd_kernels.ops.neural_field_mlp import FieldParams, split_params
from pixnerd_kernels.ops.neural_field_mlp import reference as field

if TYPE_CHECKING:
    from pixnerd_kernels.ops.pixel_decoder.chunks import Call


def at_once(call: Call, training: bool) -> int:
    """Patches are not counted out: every op takes all of a chunk."""
    return 1


def columns_of_ones(call: Call) -> int:
    return 0


def generate(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out [n, G] = hidden @ weightᵀ + bias."""
    if bias is None:
        torch.mm(hidden, weight.mT, out=out)
    else:
        torch.addmm(bias, hidden, weight.mT, out=out)


def weight_gradient(total: Tensor, d_generated: Tensor, hidden: Tensor, add: bool) -> None:
    """total [G, D] (+)= d_generatedᵀ @ hidden."""
    _accumulate(total, d_generated.mT, hidden, add)


def hidden_gradient(total: Tensor, d_generated: Tensor, weight: Tensor, add: bool) -> None:
    """total [n, D] (+)= d_generated @ weight."""
    _accumulate(total, d_generated, weight, add)


def _accumulate(total: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    if total.dtype != a.dtype:
        # Half types multiply into float32 in one product where torch offers that.
        if total.device.type == "cuda" and WIDE_PRODUCTS:
            if add:
                torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
            else:
                torch.ops.aten.mm.dtype_out(a, b, total.dtype, out=total)
            return
        product = torch.mm(a, b)
        total.add_(product) if add else total.copy_(product)
    elif add:
        total.addmm_(a, b)
    else:
        torch.mm(a, b, out=total)


#: From torch 2.8 on, on CUDA.
WIDE_PRODUCTS = hasattr(torch.ops.aten.addmm, "dtype_out")


def _grid(call: Call, planes: Tensor) -> Tensor:
    """planes [B, C, H, W] as a view [B, rows, columns, C, height, width]."""
    height, width = call.patch
    return planes.unflatten(3, (-1, width)).unflatten(2, (-1, height)).permute(0, 2, 4, 1, 3, 5)


def _places(call: Call, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image, row and column of patches first ... first + count."""
    rows, columns = call.grid
    patch = torch.arange(first, first + count, device=call.image.device)
    return patch // (rows * columns), patch // columns % rows, patch % columns


def _read(call: Call, planes: Tensor, first: int, count: int) -> Tensor:
    """[n, S, C] in the computed dtype."""
    pixels = _grid(call, planes)[_places(call, first, count)]
    return pixels.flatten(2).mT.to(compute_dtype(planes.dtype))


def _write(call: Call, planes: Tensor, first: int, values: Tensor) -> None:
    """The inverse of `_read`."""
    values = values.mT.unflatten(2, call.patch).to(planes.dtype)
    _grid(call, planes)[_places(call, first, len(values))] = values


def _split(call: Call, packed: Tensor) -> FieldParams:
    return split_params(packed, call.channels, call.field_hidden, call.gated)


def _fields(call: Call, generated: Sequence[Tensor] | Tensor) -> list[tuple[Any, ...]]:
    """The arguments of each block's field after x and up to weight_eps."""
    compute = compute_dtype(call.image.dtype)
    return [
        (
            *_split(call, weights.to(compute)),
            norm.to(compute),
            *call.field_options,
        )
        for weights, norm in zip(generated, call.norms, strict=True)
    ]


def embed(call: Call, first: int, count: int) -> Tensor:
    """x [n, S, D1] before the first block, in the computed dtype."""
    return _embed(call, _read(call, call.image, first, count))


def _embed(call: Call, pixels: Tensor) -> Tensor:
    """x before the first block, of pixels [n, S, C]."""
    return F.linear(pixels, call.pixel_weight.to(pixels.dtype)) + call.table.to(pixels.dtype)


def _run(call: Call, generated: Tensor, first: int) -> list[Tensor]:
    """x [n, S, D1] before each block, and after the last."""
    x = [embed(call, first, generated.shape[1])]
    for arguments in _fields(call, generated):
        x.append(field.forward(x[-1], *arguments))
    return x


def _output(call: Call, x: Tensor) -> Tensor:
    """The output layer, of x behind the last block."""
    norm = None if call.final_norm is None else call.final_norm.to(x.dtype)
    n, _ = field.rms_norm(x, norm, call.norm_eps)
    return _linear(call, n, call.linear_bias)


def _linear(call: Call, n: Tensor, bias: Tensor | None = None) -> Tensor:
    """The linear layer where there is one, of the normalised x or of its tangent, which has no bias."""
    if call.linear_weight is None:
        return n
    return F.linear(n, call.linear_weight.to(n.dtype), None if bias is None else bias.to(n.dtype))


def forward(call: Call, generated: Tensor, first: int, out: Tensor) -> None:
    """Write the pixels of the patches in `out` [B, C_out, H, W]."""
    _write(call, out, first, _output(call, _run(call, generated, first)[-1]))


def _value_and_tangent(
    call: Call,
    pixels: Tensor,
    pixels_tangent: Tensor | None,
    generated: Sequence[Tensor] | Tensor,
    generated_tangent: Sequence[Tensor] | Tensor | None,
    block: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """The output layer's result of pixels [n, S, C], and its tangent; `block` runs a field."""
    x, dx = _embed(call, pixels), None
    if pixels_tangent is not None:
        dx = F.linear(pixels_tangent, call.pixel_weight.to(x.dtype))
    for index, norm in enumerate(call.norms):
        weights, tangents = (
            (None,) * 3 if packed is None else _split(call, packed[index])
            for packed in (generated, generated_tangent)
        )
        x, dx = block(x, *weights, norm.to(x.dtype), dx, *tangents, *call.field_options)
    assert dx is not None
    norm_weight = None if call.final_norm is None else call.final_norm.to(x.dtype)
    n, r = field.rms_norm(x, norm_weight, call.norm_eps)
    dn = field.rms_norm_tangent(x, r, norm_weight, dx)
    return _linear(call, n, call.linear_bias), _linear(call, dn)


def jvp(
    call: Call,
    generated: Tensor,
    generated_tangent: Tensor | None,
    first: int,
    image_tangent: Tensor | None,
    out: Tensor,
    out_tangent: Tensor,
    block: Callable[..., tuple[Tensor, Tensor]] = field.jvp,
) -> None:
    """Write the pixels of the patches, and their tangents."""
    pixels, pixels_tangent = (
        None if planes is None else _read(call, planes, first, generated.shape[1])
        for planes in (call.image, image_tangent)
    )
    assert pixels is not None
    value, tangent = _value_and_tangent(call, pixels, pixels_tangent, generated, generated_tangent, block)
    _write(call, out, first, value)
    _write(call, out_tangent, first, tangent)


def _generated(call: Call) -> list[Tensor]:
    """All weights of every block."""
    biases: Sequence[Tensor | None] = call.biases or [None] * len(call.generators)
    return [F.linear(call.states, *pair) for pair in zip(call.generators, biases, strict=True)]


def _pixels(call: Call, planes: Tensor) -> Tensor:
    """All of `_read`."""
    return _grid(call, planes).flatten(0, 2).flatten(2).mT.to(compute_dtype(planes.dtype))


def _planes(call: Call, values: Tensor) -> Tensor:
    """The inverse of `_pixels`."""
    rows, columns = call.grid
    planes = values.mT.unflatten(2, call.patch).unflatten(0, (-1, rows, columns)).permute(0, 3, 1, 4, 2, 5)
    return planes.flatten(4, 5).flatten(2, 3).to(call.image.dtype).contiguous()


def formula(call: Call) -> Tensor:
    """The decoded image [B, C_out, H, W] of all patches at once, out of place, for derivatives of any kind."""
    x = _embed(call, _pixels(call, call.image))
    for arguments in _fields(call, _generated(call)):
        x = field.forward(x, *arguments)
    return _planes(call, _output(call, x))


def jvp_formula(
    call: Call, image_tangent: Tensor | None, hidden_tangent: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The decoded image and its tangent, as `formula`."""
    pixels_tangent = None if image_tangent is None else _pixels(call, image_tangent)
    generated_tangent = None
    if hidden_tangent is not None:
        generated_tangent = [F.linear(hidden_tangent.flatten(0, 1), weight) for weight in call.generators]
    value, tangent = _value_and_tangent(
        call, _pixels(call, call.image), pixels_tangent, _generated(call), generated_tangent, field.jvp
    )
    return _planes(call, value), _planes(call, tangent)


def backward(
    call: Call,
    generated: Tensor,
    first: int,
    grad: Tensor,
    d_image: Tensor | None,
    d_generated: Tensor | None,
    sums: Tensor | None,
) -> None:
    """Gradients in closed form. d_generated may be `generated` itself."""
    x = _run(call, generated, first)
    dx, shared = output_gradient(call, x.pop(), grad, first)
    norms: list[Any] = []
    for block, arguments in reversed(list(enumerate(_fields(call, generated)))):
        dx, d1, d2, d_gate, d_norm = field.backward(dx, x[block], *arguments)
        norms.append(d_norm)
        if d_generated is not None:
            targets = _split(call, d_generated[block])
            for target, gradient in zip(targets, (d1, d2, d_gate), strict=True):
                if target is not None and gradient is not None:
                    target.copy_(gradient)
    input_gradient(call, first, dx, {**shared, "norms": torch.stack(norms[::-1])}, d_image, sums)


def output_gradient(call: Call, last: Tensor, grad: Tensor, first: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient of x behind the last block, [n, S, D1] in its dtype, and those of the output layer by name.

    last: that x, in the computed dtype. grad: the result's gradient, [B, C_out, H, W].
    """
    compute = last.dtype
    norm = None if call.final_norm is None else call.final_norm.to(compute)
    n, r = field.rms_norm(last, norm, call.norm_eps)
    dx = _read(call, grad, first, len(last))
    shared: dict[str, Tensor] = {}
    if call.linear_weight is not None:
        shared["linear_weight"] = torch.einsum("nso,nsd->od", dx, n)
        shared["linear_bias"] = dx.sum((0, 1))
        dx = dx @ call.linear_weight.to(compute)
    shared["final_norm"] = dx.new_zeros(call.channels)
    if norm is not None:
        unit = last * r
        shared["final_norm"] = (dx * unit).sum((0, 1))
        dx = dx * norm
        dx = r * (dx - unit * (dx * unit).mean(-1, keepdim=True))
    return dx, shared


def input_gradient(
    call: Call,
    first: int,
    dx: Tensor,
    shared: dict[str, Tensor],
    d_image: Tensor | None,
    sums: Tensor | None,
) -> None:
    """Write the image's gradient, and add those of what all patches share to `sums`.

    dx: gradient of x before the first block, [n, S, D1]. shared: the gradients of the norms and the output layer.
    """
    if sums is not None:
        pixels = _read(call, call.image, first, len(dx))
        own = {"table": dx.sum(0), "pixel_weight": torch.einsum("nsc,nsd->cd", pixels, dx)}
        sums += torch.cat([(shared | own)[name].flatten() for name, _ in call.sums()])
    if d_image is not None:
        _write(call, d_image, first, dx @ call.pixel_weight.to(dx.dtype))
