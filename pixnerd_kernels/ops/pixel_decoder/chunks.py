"""The pixel decoder chunk by chunk: generate the weights of some patches, decode them, forget them.

Shared by all backends. One of them is a module with

    generate(hidden, weight, bias, out)                out [n, G] = hidden @ weightᵀ + bias
    weight_gradient(total, d_generated, hidden, add)   total [G, D] (+)= d_generatedᵀ @ hidden
    hidden_gradient(total, d_generated, weight, add)   total [n, D] (+)= d_generated @ weight
    forward(call, generated, first, out)
    backward(call, generated, first, grad, d_image, d_generated, sums)
    jvp(call, generated, generated_tangent, first, image_tangent, out, out_tangent)
    at_once(call, training)                            patches that run side by side, of which chunks are made up
    columns_of_ones(call)                              0, or columns that hidden is padded by for weight_gradient, the
                                                       first with ones, which brings the bias's gradient along

where generated [blocks, n, G] are the weights of patches first ... first + n, and sums collects the gradients of what
all patches share.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pixnerd_kernels.ops.coordinate_encoding.reference import forward as coordinate_encoding
from pixnerd_kernels.ops.dtypes import compute_dtype
from pixnerd_kernels.ops.native import fresh
from pixnerd_kernels.ops.tables import kept

AUTO, UNCHUNKED = -1, 0

#: Bytes of generated weights that live at once by default; the second on a GPU with a hundred times as much memory or
#: more. On an H100, with XL/16's head and 64 images, training takes 36.1 ms with 256 MiB, 32.8 with 512, 31.5 with 768
#: and 31.7 with 1024: the float32 sums of the generators' gradients are read and written once for every chunk.
_LEAST, _MOST = 64 << 20, 768 << 20


_encodings: dict[tuple[object, ...], Tensor] = {}


def _positions(*key: Any) -> Tensor:
    """`coordinate_encoding`, kept: on a GPU its dozens of small kernels would be launched in every call."""
    return kept(_encodings, key, lambda: coordinate_encoding(*key))


@dataclass(frozen=True)
class Small:
    """The parameters that all patches share as kernels take them: dense, in the dtype computed in."""

    pixel_weight: Tensor  # [C, D1]
    table: Tensor  # [S, D1]
    norms: Tensor  # [blocks, D1]
    final_norm: Tensor | None  # [D1]
    linear_weight: Tensor | None  # [C_out, D1]
    linear_bias: Tensor | None  # [C_out]


@dataclass(frozen=True)
class Call:
    """The op's arguments, checked, with what follows from them."""

    image: Tensor  # [B, C, H, W]
    hidden: Tensor  # [B, L, D]
    embed_weight: Tensor  # [D1, C + K²]
    embed_bias: Tensor | None  # [D1]
    generators: Sequence[Tensor]  # [G, D] of each block
    biases: Sequence[Tensor]  # [G] of each block, or none
    norms: Sequence[Tensor]  # [D1] of each block
    final_norm: Tensor | None
    linear_weight: Tensor | None
    linear_bias: Tensor | None
    patch: tuple[int, int]  # pixels, height and width
    encoding: str
    max_freqs: int
    scale: tuple[float, float]
    gated: bool
    normalize: Sequence[bool]
    activation: str
    norm_eps: float
    weight_eps: float
    workspace: int

    @property
    def patches(self) -> int:
        return self.hidden.shape[0] * self.hidden.shape[1]

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of an image, vertically and horizontally."""
        return self.image.shape[2] // self.patch[0], self.image.shape[3] // self.patch[1]

    @property
    def channels(self) -> int:
        return self.embed_weight.shape[0]

    @property
    def field_hidden(self) -> int:
        """D2."""
        return self.generators[0].shape[0] // ((3 if self.gated else 2) * self.channels)

    @property
    def field_options(self) -> tuple[Any, ...]:
        """A block's arguments behind its tensors: `neural_field_mlp`'s from normalize on, with the residual."""
        return self.normalize, self.activation, True, self.norm_eps, self.weight_eps

    @property
    def out_channels(self) -> int:
        return self.channels if self.linear_weight is None else self.linear_weight.shape[0]

    @property
    def states(self) -> Tensor:
        """hidden as [N, D]."""
        return self.hidden.flatten(0, 1)

    @property
    def pixel_weight(self) -> Tensor:
        """[D1, C]."""
        return self.embed_weight[:, : self.image.shape[1]]

    @functools.cached_property
    def positions(self) -> Tensor:
        """The coordinate encoding [S, K²], in the dtype computed in."""
        arguments = (*self.patch, self.max_freqs, self.encoding, *self.scale, self.image.device)
        return _positions(*arguments, compute_dtype(self.image.dtype))

    @functools.cached_property
    def table(self) -> Tensor:
        """positions Weᵀ + b [S, D1], what is added to every pixel's embedding."""
        weight = self.embed_weight[:, self.image.shape[1] :].to(self.positions.dtype)
        bias = None if self.embed_bias is None else self.embed_bias.to(weight.dtype)
        return F.linear(self.positions, weight, bias)

    @functools.cached_property
    def small(self) -> Small:
        dtype = compute_dtype(self.image.dtype)
        final_norm, linear_weight, linear_bias = (
            None if tensor is None else tensor.to(dtype).contiguous()
            for tensor in (self.final_norm, self.linear_weight, self.linear_bias)
        )
        return Small(
            self.pixel_weight.to(dtype).mT.contiguous(),
            self.table.contiguous(),
            torch.stack([norm.to(dtype) for norm in self.norms]),
            final_norm,
            linear_weight,
            linear_bias,
        )

    def sums(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of the gradients that are summed over all patches, in the order of their memory."""
        channels, inputs = self.pixel_weight.shape
        named: list[tuple[str, tuple[int, ...]]] = [
            ("table", (self.patch[0] * self.patch[1], channels)),
            ("pixel_weight", (inputs, channels)),  # transposed
            ("norms", (len(self.norms), channels)),
            ("final_norm", (channels,)),
        ]
        if self.linear_weight is not None:
            named += [
                ("linear_weight", tuple(self.linear_weight.shape)),
                ("linear_bias", (self.out_channels,)),
            ]
        return named


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted."""

    image: bool
    hidden: bool
    generators: Sequence[bool]
    biases: Sequence[bool]
    shared: bool  # any of what all patches share

    @property
    def generated(self) -> bool:
        return self.hidden or any(self.generators) or any(self.biases)


@dataclass(frozen=True)
class Gradients:
    """In the inputs' dtypes; None where not wanted. `sums` in float64, in `Call.sums`' order."""

    image: Tensor | None
    hidden: Tensor | None
    generators: list[Tensor | None]
    biases: list[Tensor | None]
    sums: Tensor | None

    def shared(self, call: Call) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """In float64: embed_weight and embed_bias; the norms, final_norm, linear_weight and linear_bias."""
        if self.sums is None:
            return [None, None], [None] * (len(call.norms) + 3)
        shapes = call.sums()
        parts = self.sums.split([torch.Size(shape).numel() for _, shape in shapes])
        found = {name: part.view(shape) for part, (name, shape) in zip(parts, shapes, strict=True)}
        table = found["table"]
        embed_weight = torch.cat([found["pixel_weight"].mT, table.mT @ call.positions.to(table.dtype)], 1)
        linear = [found.get("linear_weight"), found.get("linear_bias")]
        return [embed_weight, table.sum(0)], [*found["norms"], found["final_norm"], *linear]


def chunk_size(patches: int, patch_bytes: int, workspace: int, at_once: int = 1) -> int:
    """Patches of a chunk whose generated weights (patch_bytes each) fit the workspace in bytes; one at least.

    Measured, the products of a chunk of n patches take as long as n + c patches would, whatever n: they read the
    generators' own weights once. On the CPU of benchmarks/results/cpu-chunks (`python -m benchmarks chunks`) c is 24 to
    25 for a forward and 25 (XL/16's head) to 28 (Radiance's) for a training step, and the fit is off by 4% at most. So
    the fewest chunks are the fastest, shared out evenly. Where `at_once` patches run side by side, chunks hold a
    multiple of them: the last few would take as long as a full round.
    """
    if workspace == UNCHUNKED:
        return max(patches, 1)
    most = max(workspace // max(patch_bytes, 1), 1)
    if most >= patches:
        return max(patches, 1)
    if most >= at_once > 1:
        return most // at_once * at_once
    return -(-patches // -(-patches // most))


@functools.cache
def default_workspace(device: torch.device) -> int:
    """Bytes that "auto" stands for on a device."""
    if device.type != "cuda":
        return _LEAST
    return min(_MOST, max(_LEAST, torch.cuda.get_device_properties(device).total_memory // 100))


def _chunks(call: Call, at_once: int, copies: int = 1) -> list[tuple[int, int]]:
    """First patch and number of patches of each chunk, whose generated weights fit the workspace so many times."""
    row = copies * sum(generator.shape[0] for generator in call.generators)
    workspace = call.workspace
    if workspace == AUTO:
        workspace = default_workspace(call.hidden.device)
    size = chunk_size(call.patches, row * call.hidden.element_size(), workspace, at_once)
    return [(first, min(size, call.patches - first)) for first in range(0, call.patches, size)]


def _room(call: Call, chunks: Sequence[tuple[int, int]]) -> Tensor:
    """Memory for the generated weights of the largest chunk."""
    largest = max((count for _, count in chunks), default=0)
    return fresh(call.hidden.new_empty(len(call.generators), largest, call.generators[0].shape[0]))


def _generate(backend: Any, call: Call, first: int, out: Tensor, tangents: Tensor | None = None) -> None:
    """Weights of the patches from the hidden states; or, from those states' tangents [N, D], the weights' own."""
    states = (call.states if tangents is None else tangents)[first : first + out.shape[1]]
    biases: Sequence[Tensor | None] = [None] * len(call.generators)
    if call.biases and tangents is None:
        biases = call.biases
    for block, (weight, bias) in enumerate(zip(call.generators, biases, strict=True)):
        backend.generate(states, weight, bias, out[block])


def forward(backend: Any, call: Call, save_weights: bool) -> tuple[Tensor, Tensor]:
    """The result [B, C_out, H, W], and the generated weights [blocks, N, G] or an empty tensor."""
    batch, _, height, width = call.image.shape
    out = fresh(call.image.new_empty(batch, call.out_channels, height, width))
    saved = call.hidden.new_empty(0)
    if save_weights:
        saved = fresh(call.hidden.new_empty(len(call.generators), call.patches, call.generators[0].shape[0]))
    chunks = _chunks(call, backend.at_once(call, training=False))
    room = saved if save_weights else _room(call, chunks)
    for first, count in chunks:
        generated = room[:, first : first + count] if save_weights else room[:, :count]
        _generate(backend, call, first, generated)
        backend.forward(call, generated, first, out)
    return out, saved


def jvp(
    backend: Any, call: Call, image_tangent: Tensor | None, hidden_tangent: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The result [B, C_out, H, W] and its tangent, from those of image and hidden (None: zero)."""
    batch, _, height, width = call.image.shape
    out, tangent = (fresh(call.image.new_empty(batch, call.out_channels, height, width)) for _ in range(2))
    copies = 1 if hidden_tangent is None else 2
    chunks = _chunks(call, 1, copies)
    room, along = _room(call, chunks), None if hidden_tangent is None else _room(call, chunks)
    for first, count in chunks:
        generated, moving = room[:, :count], None
        _generate(backend, call, first, generated)
        if along is not None and hidden_tangent is not None:
            moving = along[:, :count]
            _generate(backend, call, first, moving, hidden_tangent.flatten(0, 1))
        backend.jvp(call, generated, moving, first, image_tangent, out, tangent)
    return out, tangent


def backward(backend: Any, call: Call, grad: Tensor, saved: Tensor, needs: Needs) -> Gradients:
    """Every wanted gradient; `saved` holds the generated weights or is empty."""
    image, hidden = call.image, call.hidden
    compute = compute_dtype(hidden.dtype)
    d_image = torch.empty_like(image, memory_format=torch.contiguous_format) if needs.image else None
    d_states = hidden.new_empty(call.patches, hidden.shape[2]) if needs.hidden else None
    width = hidden.shape[2]
    chunks = _chunks(call, backend.at_once(call, training=True))
    # The gradients of the generators add up in the dtype computed in, unless there is nothing to add.
    summed = compute if len(chunks) > 1 else hidden.dtype
    # Where the biases' gradients are wanted alone, they are sums; else they are columns of the weights'.
    wanted = all(needs.generators) and any(needs.biases) and len(chunks) > 1
    extra = backend.columns_of_ones(call) if wanted else 0
    weights = [
        fresh(hidden.new_empty(w.shape[0], width + extra, dtype=summed)) if need else None
        for w, need in zip(call.generators, needs.generators, strict=True)
    ]
    biases = [
        torch.zeros_like(b, dtype=compute) if need and not extra else None
        for b, need in zip(call.biases, needs.biases, strict=True)
    ]
    sums = None
    if needs.shared:
        size = sum(torch.Size(shape).numel() for _, shape in call.sums())
        sums = torch.zeros(size, dtype=torch.float64, device=image.device)
    has_saved = bool(saved.numel())
    room = _room(call, chunks) if needs.generated or not has_saved else None
    for first, count in chunks:
        if has_saved:
            generated = saved[:, first : first + count]
        else:
            assert room is not None
            generated = room[:, :count]
            _generate(backend, call, first, generated)
        # Without saved weights their gradient takes their place.
        d_generated = room[:, :count] if room is not None and needs.generated else None
        backend.backward(call, generated, first, grad, d_image, d_generated, sums)
        if d_generated is None:
            continue
        states = call.states[first : first + count]
        if extra:
            ones = states.new_zeros(count, extra)
            ones[:, 0] = 1
            states = torch.cat([states, ones], 1)
        for block, total in enumerate(weights):
            if total is not None:
                backend.weight_gradient(total, d_generated[block], states, first > 0)
        for block, total in enumerate(biases):
            if total is not None:
                total += d_generated[block].sum(0, dtype=compute)
        if d_states is not None:
            _hidden_gradient(backend, call, d_generated, d_states[first : first + count])
    if not call.patches:
        for total in (*weights, d_image, d_states):
            if total is not None:
                total.zero_()
    if extra:
        biases = [
            t[:, width] if need and t is not None else None
            for t, need in zip(weights, needs.biases, strict=True)
        ]
    return Gradients(
        d_image,
        None if d_states is None else d_states.view(hidden.shape),
        [None if t is None else (t[:, :width] if extra else t).to(hidden.dtype) for t in weights],
        [None if t is None else t.to(hidden.dtype) for t in biases],
        sums,
    )


def _hidden_gradient(backend: Any, call: Call, d_generated: Tensor, out: Tensor) -> None:
    compute = compute_dtype(out.dtype)
    total = out if out.dtype == compute else torch.empty_like(out, dtype=compute)
    for block, weight in enumerate(call.generators):
        backend.hidden_gradient(total, d_generated[block], weight, block > 0)
    if total is not out:
        out.copy_(total)
