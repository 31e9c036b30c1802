"""The pixel decoder: embedding, every neural-field block and the output layer, in chunks of patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pixnerd_kernels import backends
from pixnerd_kernels.checks import Problems, check_tangents, describe
from pixnerd_kernels.ops.dtypes import autocast
from pixnerd_kernels.ops.library import register, register_autograd, register_gradients, register_jvp
from pixnerd_kernels.ops.native import dense_rows
from pixnerd_kernels.ops.neural_field_mlp import WEIGHTS, select_backend
from pixnerd_kernels.ops.pixel_decoder import chunks, reference
from pixnerd_kernels.ops.pixel_decoder.arguments import (
    check_patch,
    check_tokens,
    check_workspace,
    scaled_patch,
)
from pixnerd_kernels.ops.pixel_decoder.params import (
    DecoderBlockParams,
    DecoderParams,
    check_params,
    generated_by,
)

__all__ = ["DecoderBlockParams", "DecoderParams", "pixel_decoder", "scaled_patch"]


def pixel_decoder(
    image: Tensor,
    hidden: Tensor,
    decoder_params: DecoderParams,
    *,
    patch_size: int,
    decoder_scale: Sequence[float] = (1.0, 1.0),
    workspace: int | str | None = "auto",
    save_weights: bool = False,
) -> Tensor:
    r"""The pixel head: noisy image and hidden states to the velocity image, one neural field per patch.

        x = pixel Wpᵀ + (encoding Weᵀ + b)                 the bracket is one table [P², D1] for all patches
        x = neural_field_mlp_packed(x, hidden Gᵀ + g)      for every block, with generator G and its bias g
        velocity = linear(norm(x))                         each where decoder_params has it

    Patches are decoded in chunks: the weights of a chunk's patches are generated, used and forgotten, and backward
    generates them again, so that memory depends neither on the resolution nor on the batch.

    Args:
        image: [B, C, H, W], any strides; read in place.
        hidden: [B, L, D], activated; row y * (W / w) + x is the patch at (y, x). image's dtype.
        decoder_params: the parameters and what kind of decoder they make.
        patch_size: P, the pixels along the side of a patch.
        decoder_scale: (sh, sw); a patch has int(P * sh) x int(P * sw) pixels, which H and W must be multiples of.
        workspace: bytes that generated weights may take at a time (their gradients take the same place); None
            decodes all patches at once; "auto" is 64 MiB, on a GPU a hundredth of its memory if that is more, 768 MiB
            at most. A chunk has at least one patch. Beside it the Triton backend holds up to 64 MiB of activations, in
            backward 128 MiB, and float32 sums of those patches that it works on.
        save_weights: keep the generated weights for backward, which is then faster by one product in four.

    Returns:
        [B, C_out, H, W] in image's dtype, contiguous; the D1 features where decoder_params has no linear_weight.
        float32 and float64 accumulate in their own dtype; bfloat16 and float16 in float32, with the generated
        weights and their gradients rounded to the dtype. B = 0 gives an empty result.

    Gradients flow to image, hidden and every parameter, and only those needed are computed. Saved for backward:
    image, hidden and the parameters, and with `save_weights` the generated weights. Gradients of the generators add
    up over chunks in float32 (float64). Deterministic: the same input gives the same bits, on any number of threads;
    another workspace may round the gradients of the parameters differently. Tangents along image and hidden (forward
    mode) are computed with the value, in chunks of half as many patches, beside whose weights a block's pixels wait
    in float32; backward then generates the weights again in any case. Derivatives of higher order, tangents along
    parameters and the other transforms of torch.func run on the reference, all patches at once and in memory without
    a bound. Under autocast image, hidden and the generators are cast to the autocast dtype first; the result has it.

    Raises:
        TypeError, ValueError: every problem with the arguments at once.
        NotImplementedError: a forced backend (`use_backend`) cannot run; lists every reason.

    Source: PixNerd (arXiv 2507.23268), section 3, and its official class-to-image and text-to-image models, whose
    linear layer on pixel and encoding concatenated is split into the two terms above; Chroma1-Radiance's pixel head.
    """
    problems = Problems("pixel_decoder")
    named = generated_by(decoder_params)
    image, hidden, *generated = autocast(image, hidden, *(tensor for _, tensor in named))
    readable = problems.tensor("image", image, 4, "[B, C, H, W]")
    readable &= problems.tensor("hidden", hidden, 3, "[B, L, D]")
    problems.same_device("image", image, [("hidden", hidden)])
    patch = check_patch(problems, patch_size, decoder_scale)
    limit = check_workspace(problems, workspace)
    if not isinstance(save_weights, bool):
        problems.add_type("save_weights", "True or False", save_weights)
    if readable:
        if patch:
            check_tokens(problems, image, hidden, patch)
        check_params(problems, decoder_params, image, hidden)
    names = ["hidden", *(name for name, _ in named)]
    problems.same_dtype("image", image, list(zip(names, [hidden, *generated], strict=True)))
    problems.raise_if_any()
    assert patch is not None
    params = decoder_params
    generators, biases = generated[: len(params.blocks)], generated[len(params.blocks) :]
    small = [params.embed_weight, params.embed_bias, *(block.norm_weight for block in params.blocks)]
    small += [params.norm_weight, params.linear_weight, params.linear_bias]
    wants_gradient = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (image, hidden, *generated, *small)
    )
    scale = (1.0, 1.0)
    if params.encoding_extent is not None:
        scale = (params.encoding_extent / patch[1], params.encoding_extent / patch[0])
    out: Tensor
    out, _ = torch.ops.pixnerd.pixel_decoder(
        image, hidden, params.embed_weight, params.embed_bias,
        generators, biases, [block.norm_weight for block in params.blocks],
        params.norm_weight, params.linear_weight, params.linear_bias,
        patch, params.encoding, params.max_freqs, scale,
        params.gated, [name in params.normalize for name in WEIGHTS], params.activation,
        params.norm_eps, params.weight_eps, limit, save_weights and wants_gradient, backends.forced_backend(),
    )  # fmt: skip
    return out


def _backend(call: chunks.Call, forced: str) -> Any:
    """The module that runs the op's chunks."""
    name = select_backend("pixel_decoder", call.image, call.channels, forced)
    if name == "cpu":
        from pixnerd_kernels.ops.pixel_decoder import cpu

        return cpu
    if name == "triton":
        from pixnerd_kernels.ops.pixel_decoder import triton

        return triton
    return reference


def _call(  # type: ignore[no-untyped-def]
    image, hidden, embed_weight, embed_bias, generators, biases, norms, final_norm, linear_weight, linear_bias,
    patch, encoding, max_freqs, scale, gated, normalize, activation, norm_eps, weight_eps, workspace,
):  # fmt: skip
    """Exported programs and graph passes call the op without the public function's checks: what the core relies on
    is checked once more."""
    _check_ranks(image, hidden, embed_weight, generators)
    if len(patch) != 2 or min(patch) < 1 or image.shape[2] % patch[0] or image.shape[3] % patch[1]:
        sizes = " x ".join(map(str, image.shape[2:]))
        raise ValueError(f"patch: expected two sizes that divide the image's {sizes}, got {list(patch)}")
    if linear_weight is None and linear_bias is not None:
        raise ValueError(
            f"linear_bias: expected None where linear_weight is None, got {describe(linear_bias)}"
        )
    others = (
        hidden,
        embed_weight,
        embed_bias,
        generators,
        biases,
        norms,
        final_norm,
        linear_weight,
        linear_bias,
    )
    rows = [generator.shape for generator in generators]
    grid = (image.shape[2] // patch[0]) * (image.shape[3] // patch[1])
    channels = embed_weight.shape[:1]
    unit = max((3 if gated else 2) * channels[0], 1)
    fits = {
        "hidden": hidden.shape[:2] == (image.shape[0], grid),
        "embed_weight": embed_weight.shape[1] == image.shape[1] + max_freqs**2,
        "embed_bias": embed_bias is None or embed_bias.shape == channels,
        "generators": rows != []
        and rows[:1] * len(rows) == rows
        and rows[0][1] == hidden.shape[2]
        and not rows[0][0] % unit,
        "norms": [n.shape for n in norms] == [channels] * len(rows),
        "biases": not biases or [b.shape for b in biases] == [row[:1] for row in rows],
        "final_norm": final_norm is None or final_norm.shape == channels,
        "linear_weight": linear_weight is None or linear_weight.shape[1:] == channels,
        "linear_bias": linear_bias is None or linear_bias.shape == linear_weight.shape[:1],
        "devices": {image.device} == {t.device for t in _flatten(others) if t is not None},
        "dtypes": {image.dtype} == {t.dtype for t in (hidden, *generators, *biases)},
    }
    if wrong := [name for name, fit in fits.items() if not fit]:
        raise ValueError(f"pixel_decoder: {', '.join(wrong)} do not fit the image {describe(image)}")
    return chunks.Call(
        image, dense_rows(hidden), embed_weight, embed_bias, generators, biases, norms,
        final_norm, linear_weight, linear_bias,
        # Numbers that a compiler traces as symbols become constants: tables are computed of them.
        (int(patch[0]), int(patch[1])), encoding, int(max_freqs), (float(scale[0]), float(scale[1])),
        gated, normalize, activation, norm_eps, weight_eps, workspace,
    )  # fmt: skip


def _check_ranks(image: Tensor, hidden: Tensor, embed_weight: Tensor, generators: Sequence[Tensor]) -> None:
    named = [("image", image, 4), ("hidden", hidden, 3), ("embed_weight", embed_weight, 2)]
    for name, tensor, rank in (*named, *(("generators", generator, 2) for generator in generators)):
        if tensor.dim() != rank:
            raise ValueError(f"{name}: expected {rank} dimensions, got {describe(tensor)}")


def _check_backward(
    call: chunks.Call, grad: Tensor, saved: Tensor, needs: Sequence[bool], count: int
) -> None:
    """grad, saved and needs fit the call, which has `count` tensors."""
    image = call.image
    expected = (image.shape[0], call.out_channels, *image.shape[2:])
    if (grad.shape, grad.dtype, grad.device) != (expected, image.dtype, image.device):
        raise ValueError(f"grad: expected the result's shape, dtype and device, got {describe(grad)}")
    kept = (len(call.generators), call.patches, call.generators[0].shape[0])
    if saved.numel() and (saved.shape, saved.dtype, saved.device) != (kept, image.dtype, image.device):
        raise ValueError(
            f"saved: expected nothing or the generated weights {list(kept)} {image.dtype} on {image.device}, "
            f"got {describe(saved)}"
        )
    if len(needs) != count:
        raise ValueError(f"needs: expected {count} values, one for each tensor, got {len(needs)}")


#: Arguments of the op that hold tensors: image to linear_bias.
_TENSORS = 10


def _forward(*arguments):  # type: ignore[no-untyped-def]
    *arguments, save_weights, forced = arguments
    call = _call(*arguments)
    # Autocast has cast the inputs already; inside the op it would round intermediates.
    with torch._C._DisableAutocast():
        return chunks.forward(_backend(call, forced), call, save_weights)


def _backward(grad, saved, needs, *arguments):  # type: ignore[no-untyped-def]
    *arguments, _, forced = arguments
    call = _call(*arguments)
    flat = _flatten(arguments[:_TENSORS])
    _check_backward(call, grad, saved, needs, len(flat))
    saved = dense_rows(saved)
    image, hidden, embed_weight, embed_bias, *rest = needs
    count, biases = len(call.generators), len(call.biases)
    shared = any((embed_weight, embed_bias, *rest[count + biases :]))
    wanted = chunks.Needs(image, hidden, rest[:count], rest[count : count + biases], shared)
    with torch._C._DisableAutocast():
        found = chunks.backward(_backend(call, forced), call, grad, saved, wanted)
        first, last = found.shared(call)
    own = [found.image, found.hidden, *first, *found.generators, *found.biases, *last]
    return [
        _gradient_like(gradient if need else None, tensor, call.image)
        for gradient, need, tensor in zip(own, needs, flat, strict=True)
    ]


def _jvp(image_tangent, hidden_tangent, *arguments):  # type: ignore[no-untyped-def]
    *arguments, _, forced = arguments
    call = _call(*arguments)
    check_tangents(("image", "hidden"), (call.image, call.hidden), (image_tangent, hidden_tangent))
    if image_tangent is None and hidden_tangent is None:
        raise ValueError("pixel_decoder_jvp: expected a tangent of image or hidden, got neither")
    with torch._C._DisableAutocast():
        return chunks.jvp(_backend(call, forced), call, image_tangent, hidden_tangent)


def _gradient_like(gradient: Tensor | None, tensor: Tensor | None, image: Tensor) -> Tensor:
    """Ops return tensors: an absent gradient is an empty one."""
    if gradient is None or tensor is None:
        return image.new_empty(0)
    return gradient.to(tensor.dtype).contiguous()


def _flatten(tensors: Sequence[Any]) -> list[Tensor | None]:
    """image, hidden, the embedding's two, the generators, the biases, the norms, and the three that may be None."""
    flat: list[Tensor | None] = []
    for tensor in tensors:
        flat.extend(tensor if isinstance(tensor, (list, tuple)) else [tensor])
    return flat


def _formula(*arguments):  # type: ignore[no-untyped-def]
    """The op in plain PyTorch, out of place, for derivatives other than the kernels'."""
    *arguments, _, _ = arguments
    call = _call(*arguments)
    with torch._C._DisableAutocast():
        return reference.formula(call), call.hidden.new_empty(0)


def _backward_formula(grad, saved, needs, *arguments):  # type: ignore[no-untyped-def]
    tensors, options = arguments[:_TENSORS], arguments[_TENSORS:]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that a tensor that is two arguments gets the gradient of each.
        flat = [
            t.view_as(t) if t is not None and need else t
            for t, need in zip(_flatten(tensors), needs, strict=True)
        ]
        out, _ = _formula(*_regroup(_counts(tensors), flat), *options)
        asked = [t for t, need in zip(flat, needs, strict=True) if t is not None and need]
        found = iter(torch.autograd.grad(out, asked, grad, create_graph=again))
    return [
        grad.new_empty(0) if t is None or not need else next(found).contiguous()
        for t, need in zip(flat, needs, strict=True)
    ]


def _with_tangents(jvp, arguments, tangents):  # type: ignore[no-untyped-def]
    """Kernels know tangents of image and hidden alone. Backward generates the weights again."""
    image, hidden, *others = tangents
    if any(tangent is not None for tangent in _flatten(others[: _TENSORS - 2])):
        return None
    return jvp(image, hidden, *arguments[:-2], False, arguments[-1]), arguments[1].new_empty(0)


def _jvp_formula(image_tangent, hidden_tangent, *arguments):  # type: ignore[no-untyped-def]
    call = _call(*arguments[:-2])
    with torch._C._DisableAutocast():
        return reference.jvp_formula(call, image_tangent, hidden_tangent)


def _value_gradients(grad, needs, *arguments):  # type: ignore[no-untyped-def]
    arguments = arguments[2:]
    count = len(_flatten(arguments[:_TENSORS]))
    own = list(needs[2 : 2 + count])
    found = torch.ops.pixnerd.pixel_decoder_backward(grad, grad.new_empty(0), own, *arguments)
    return [None, None, *found]


def _counts(tensors: Sequence[Any]) -> tuple[int, ...]:
    """Lengths of the three lists among the op's tensors."""
    return tuple(len(tensors[i]) for i in (4, 5, 6))


def _fake_forward(*arguments):  # type: ignore[no-untyped-def]
    image, hidden, embed_weight, _, generators, _, _, _, linear_weight, *_ = arguments
    save_weights = arguments[-2]
    channels = embed_weight.shape[0] if linear_weight is None else linear_weight.shape[0]
    out = image.new_empty(image.shape[0], channels, *image.shape[2:])
    if not save_weights:
        return out, hidden.new_empty(0)
    patches = hidden.shape[0] * hidden.shape[1]
    return out, hidden.new_empty(len(generators), patches, generators[0].shape[0])


def _fake_jvp(image_tangent, hidden_tangent, *arguments):  # type: ignore[no-untyped-def]
    out, _ = _fake_forward(*arguments[:-2], False, arguments[-1])
    return out, torch.empty_like(out)


def _fake_backward(grad, saved, needs, *arguments):  # type: ignore[no-untyped-def]
    flat = _flatten(arguments[:_TENSORS])
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if t is not None and need
        else grad.new_empty(0)
        for t, need in zip(flat, needs, strict=True)
    ]


_ARGUMENTS = (
    "Tensor image, Tensor hidden, Tensor embed_weight, Tensor? embed_bias, Tensor[] generators, Tensor[] biases, "
    "Tensor[] norms, Tensor? final_norm, Tensor? linear_weight, Tensor? linear_bias, int[] patch, str encoding, "
    "int max_freqs, float[] scale, bool gated, bool[] normalize, str activation, float norm_eps, float weight_eps, "
    "int workspace, bool save_weights, str forced"
)
register(f"pixel_decoder({_ARGUMENTS}) -> (Tensor, Tensor)", _forward, _fake_forward)
register(
    f"pixel_decoder_backward(Tensor grad, Tensor saved, bool[] needs, {_ARGUMENTS}) -> Tensor[]",
    _backward,
    _fake_backward,
)
register(
    f"pixel_decoder_jvp(Tensor? image_tangent, Tensor? hidden_tangent, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _jvp,
    _fake_jvp,
)


class _PixelDecoder(torch.autograd.Function):
    """Takes the op's tensors one by one: autograd does not look into lists."""

    @staticmethod
    def forward(ctx, counts, options, *flat):  # type: ignore[no-untyped-def]
        ctx.counts, ctx.options = counts, options
        with torch._C._AutoDispatchBelowAutograd():
            out, saved = torch.ops.pixnerd.pixel_decoder(*_regroup(counts, flat), *options)
        ctx.save_for_backward(saved, *flat)
        ctx.mark_non_differentiable(saved)
        return out, saved

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
        saved, *flat = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[2:])
        gradients = torch.ops.pixnerd.pixel_decoder_backward(
            grad, saved, needs, *_regroup(ctx.counts, flat), *ctx.options
        )
        return (None, None, *(g if need else None for g, need in zip(gradients, needs, strict=True)))


def _regroup(counts: Sequence[int], flat: Sequence[Tensor | None]) -> list[Any]:
    """The inverse of `_flatten`, given `_counts`."""
    grouped: list[Any] = list(flat[:4])
    at = 4
    for count in counts:
        grouped.append(list(flat[at : at + count]))
        at += count
    return [*grouped, *flat[at:]]


def _autograd(*arguments):  # type: ignore[no-untyped-def]
    tensors, options = arguments[:_TENSORS], arguments[_TENSORS:]
    return _PixelDecoder.apply(_counts(tensors), options, *_flatten(tensors))


register_autograd("pixel_decoder", _autograd, _formula, _with_tangents)
register_gradients("pixel_decoder_backward", _backward_formula)
register_jvp("pixel_decoder", _jvp_formula, _value_gradients)
