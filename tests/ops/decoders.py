"""Pixel decoders for the tests: sizes and options of a case, its inputs, and the formula in plain PyTorch."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from fields import ACTIVATIONS, ALL, Tensors, drawn
from torch import Tensor

from pixnerd_kernels import DecoderBlockParams, DecoderParams, coordinate_encoding, pixel_decoder, use_backend


@dataclass(frozen=True)
class Case:
    """B images of rows x columns patches of P pixels, scaled; the families' options as in `DecoderParams`."""

    batch: int = 2
    rows: int = 1
    columns: int = 3
    patch: int = 4
    scale: tuple[float, float] = (1, 1)
    c: int = 3
    d: int = 9
    d1: int = 16
    d2: int = 24
    blocks: int = 2
    frequencies: int = 4
    outputs: int | None = 3  # None returns features
    bias: bool = True
    final_norm: bool = True
    gated: bool = False
    normalize: tuple[str, ...] = ALL
    activation: str = "silu"
    encoding: str = "dct"
    extent: float | None = None

    def __str__(self) -> str:
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return "-".join(f"{f.name}={getattr(self, f.name)}" for f in changed).replace(" ", "") or "plain"

    @property
    def pixels(self) -> tuple[int, int]:
        return int(self.patch * self.scale[0] + 1e-6), int(self.patch * self.scale[1] + 1e-6)

    @property
    def size(self) -> tuple[int, int]:
        return self.rows * self.pixels[0], self.columns * self.pixels[1]

    @property
    def generated(self) -> int:
        """G, numbers for a patch and block."""
        return (3 if self.gated else 2) * self.d1 * self.d2

    def workspace(self, patches: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes for the weights of this many patches."""
        return patches * self.blocks * self.generated * dtype.itemsize

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
            return (shift + scale * drawn(*shape, generator=draw)).to(dtype)

        embedded = self.c + self.frequencies**2
        tensors = {
            "image": normal(self.batch, self.c, *self.size),
            "hidden": normal(self.batch, self.rows * self.columns, self.d),
            "embed_weight": normal(self.d1, embedded, scale=embedded**-0.5),
            "linear_weight": normal(self.outputs or 0, self.d1, scale=self.d1**-0.5),
            "norm_weight": normal(self.d1, scale=0.25, shift=1),
        }
        for k in range(self.blocks):
            tensors[f"generator.{k}"] = normal(self.generated, self.d, scale=(self.d * self.d1) ** -0.5)
            tensors[f"norm.{k}"] = normal(self.d1, scale=0.25, shift=1)
            tensors[f"bias.{k}"] = normal(self.generated, scale=self.d1**-0.5)
        tensors["embed_bias"] = normal(self.d1)
        tensors["linear_bias"] = normal(self.outputs or 0)
        absent = {"linear_weight", "linear_bias"} if self.outputs is None else set()
        absent |= set() if self.final_norm else {"norm_weight"}
        absent |= set() if self.bias else {name for name in tensors if "bias" in name}
        return {name: tensor for name, tensor in tensors.items() if name not in absent}

    def upstream(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.outputs or self.d1, *self.size)
        return drawn(*shape, generator=draw).to(dtype)

    def params(self, tensors: Mapping[str, Tensor]) -> DecoderParams:
        return DecoderParams(
            embed_weight=tensors["embed_weight"],
            embed_bias=tensors.get("embed_bias"),
            blocks=[
                DecoderBlockParams(tensors[f"generator.{k}"], tensors.get(f"bias.{k}"), tensors[f"norm.{k}"])
                for k in range(self.blocks)
            ],
            norm_weight=tensors.get("norm_weight"),
            linear_weight=tensors.get("linear_weight"),
            linear_bias=tensors.get("linear_bias"),
            gated=self.gated,
            normalize=self.normalize,
            activation=self.activation,
            encoding=self.encoding,
            max_freqs=self.frequencies,
            encoding_extent=self.extent,
        )


def decode(case: Case, tensors: Mapping[str, Tensor], **options) -> Tensor:
    """The op."""
    return pixel_decoder(
        tensors["image"],
        tensors["hidden"],
        case.params(tensors),
        patch_size=case.patch,
        decoder_scale=case.scale,
        **options,
    )


def op_arguments(case: Case, forced: str, save_weights: bool = False, leaves: bool = True) -> tuple[Any, ...]:
    """Arguments of the registered op for a workspace of two patches."""
    tensors = {name: tensor.requires_grad_(leaves) for name, tensor in case.inputs().items()}
    listed = [[tensors[f"{kind}.{k}"] for k in range(case.blocks)] for kind in ("generator", "norm")]
    biases = [tensors[f"bias.{k}"] for k in range(case.blocks)] if case.bias else []
    last = [tensors.get(name) for name in ("norm_weight", "linear_weight", "linear_bias")]
    flags = [name in case.normalize for name in ("w1", "w2", "w_gate")]
    options = (case.activation, 1e-6, 1e-12, case.workspace(2), save_weights, forced)
    first = [tensors.get(name) for name in ("image", "hidden", "embed_weight", "embed_bias")]
    positions = (list(case.pixels), case.encoding, case.frequencies, (1.0, 1.0))
    return *first, listed[0], biases, listed[1], *last, *positions, case.gated, flags, *options


def plain_decoder(case: Case, tensors: Mapping[str, Tensor]) -> Tensor:
    """The decoder as the public implementations write it, at the dtype of its inputs."""
    image, states = tensors["image"], tensors["hidden"].flatten(0, 1)
    (height, width), (count, _) = case.pixels, states.shape
    pixels = F.unfold(image, case.pixels, stride=case.pixels).transpose(1, 2)
    pixels = pixels.reshape(count, case.c, height * width).transpose(1, 2)
    scale = None if case.extent is None else (case.extent / width, case.extent / height)
    like = {"dtype": image.dtype, "device": image.device}
    with use_backend("reference"):
        encoding = coordinate_encoding(height, width, case.frequencies, case.encoding, scale=scale, **like)
    x = torch.cat([pixels, encoding.expand(count, -1, -1)], -1)
    x = F.linear(x, tensors["embed_weight"], tensors.get("embed_bias"))

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    act = ACTIVATIONS[case.activation]
    names = ["w_gate", "w1", "w2"] if case.gated else ["w1", "w2"]
    for k in range(case.blocks):
        generated = F.linear(states, tensors[f"generator.{k}"], tensors.get(f"bias.{k}"))
        weights = {}
        for name, matrix in zip(names, generated.chunk(len(names), -1), strict=True):
            shape = (count, case.d2, case.d1) if name == "w2" else (count, case.d1, case.d2)
            weights[name] = (
                F.normalize(matrix.view(shape), dim=-2) if name in case.normalize else matrix.view(shape)
            )
        n = norm(x, tensors[f"norm.{k}"])
        h = torch.bmm(n, weights["w1"])
        h = act(torch.bmm(n, weights["w_gate"])) * h if case.gated else act(h)
        x = x + torch.bmm(h, weights["w2"])
    if "norm_weight" in tensors:
        x = norm(x, tensors["norm_weight"])
    if "linear_weight" in tensors:
        x = F.linear(x, tensors["linear_weight"], tensors.get("linear_bias"))
    x = x.transpose(1, 2).reshape(len(image), count // len(image), -1).transpose(1, 2)
    return F.fold(x, case.size, case.pixels, stride=case.pixels)


def results(
    function: Callable[[Tensors], Tensor], tensors: Mapping[str, Tensor], upstream: Tensor
) -> Tensors:
    """The output "y" and the gradient of every input, each input a leaf that keeps its strides."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    y = function(leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def _reversed(case: Case, name: str, tensor: Tensor) -> Tensor:
    """Every dimension that is summed over reversed, so that sums run in the opposite order; its own inverse."""
    if name.startswith(("generator", "bias")):
        matrices = tensor.unflatten(0, (-1, case.d1, case.d2))
        if not name.startswith("bias"):
            matrices = matrices.flip(3)
        first = matrices.flip(1, 2)
        last = matrices[-1:].flatten(1, 2).unflatten(1, (case.d2, case.d1)).flip(1, 2).flatten(1, 2)
        return torch.cat([first[:-1].flatten(1, 2), last]).flatten(0, 1)
    if name == "embed_weight":
        return torch.cat([tensor[:, : case.c].flip(1), tensor[:, case.c :]], 1).flip(0)
    if name == "hidden":
        return tensor.flip(0, 2)
    if name == "y" and case.outputs is not None:
        return tensor.flip(0)
    return (
        tensor.flip((0, 1) if tensor.dim() in (2, 4) and name != "linear_weight" else (-1,))
        if (name != "linear_bias")
        else tensor
    )


@functools.lru_cache(maxsize=64)
def expected(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensors, Tensors]:
    """Results of the plain formula at the dtype, and in float64 with every sum in the opposite order."""
    with torch.device("cpu"):
        tensors, upstream = case.inputs(dtype), case.upstream(dtype)
    wide = {name: _reversed(case, name, tensor.double()) for name, tensor in tensors.items()}
    exact = results(functools.partial(plain_decoder, case), wide, _reversed(case, "y", upstream.double()))
    back = {name: _reversed(case, name, tensor) for name, tensor in exact.items()}
    return results(functools.partial(plain_decoder, case), tensors, upstream), back
