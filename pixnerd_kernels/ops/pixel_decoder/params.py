"""What a pixel decoder is made of, and the checks that every tensor of it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pixnerd_kernels.checks import Problems
from pixnerd_kernels.ops.coordinate_encoding import KINDS
from pixnerd_kernels.ops.neural_field_mlp import ACTIVATIONS, WEIGHTS


@dataclass(frozen=True)
class DecoderBlockParams:
    """One neural-field block. Letters as in `DecoderParams`.

    Attributes:
        generator_weight: [M * D1 * D2, D], in `split_params`' order (M = 2 matrices, or 3 when gated); hidden's dtype.
        generator_bias: [M * D1 * D2] in the same dtype, or None (for all blocks or for none).
        norm_weight: [D1], any floating dtype.
    """

    generator_weight: Tensor
    generator_bias: Tensor | None
    norm_weight: Tensor


@dataclass(frozen=True)
class DecoderParams:
    """The parameters of a pixel decoder, and what tells the three known families apart.

    C channels of the image, K frequencies per axis, D hidden size, D1 channels of a pixel in the neural field, D2
    hidden units of it. All tensors but the generators' may be of any floating dtype.

    | family | gated | normalize | encoding | norm_weight | linear_weight |
    |---|---|---|---|---|---|
    | official class-to-image | False | all | "dct" | given | given |
    | official text-to-image | False | ("w1",) | "rope" | None | given |
    | Chroma1-Radiance | True | all | "dct_integer" | given | None (a 3x3 convolution follows) or given |

    Attributes:
        embed_weight: [D1, C + K²], columns for the pixel and then for the encoding. embed_bias: [D1] or None.
        blocks: the neural-field blocks in their order, at least one.
        norm_weight: [D1] of the final RMSNorm; None leaves it out.
        linear_weight: [C_out, D1] of the output layer; None returns the D1 features. linear_bias: [C_out] or None.
        gated, normalize, activation, norm_eps, weight_eps: as in `neural_field_mlp`, the same for all blocks;
            norm_eps holds for the final norm too.
        encoding, max_freqs: `coordinate_encoding`'s kind, and K.
        encoding_extent: "rope" only: positions span 0 to this along each axis at any patch size (16 in the official
            heavy decoder); None spans 0 to the number of pixels.
    """

    embed_weight: Tensor
    embed_bias: Tensor | None
    blocks: Sequence[DecoderBlockParams]
    norm_weight: Tensor | None
    linear_weight: Tensor | None
    linear_bias: Tensor | None = None
    gated: bool = False
    normalize: Sequence[str] = WEIGHTS
    activation: str = "silu"
    encoding: str = "dct"
    max_freqs: int = 8
    encoding_extent: float | None = None
    norm_eps: float = 1e-6
    weight_eps: float = 1e-12


def check_params(problems: Problems, params: object, image: Tensor, hidden: Tensor) -> None:
    """Add every misfit with image [B, C, H, W] and hidden [B, L, D]."""
    if not isinstance(params, DecoderParams):
        problems.add_type("decoder_params", "a DecoderParams", params)
        return
    channels = _check_embedding(problems, params, image)
    if channels:
        _check_output(problems, params, channels)
    _check_options(problems, params)
    blocks = params.blocks
    if not isinstance(blocks, Sequence) or not blocks:
        problems.add("blocks", "a sequence of at least one DecoderBlockParams", blocks)
        return
    for index, block in enumerate(blocks):
        if not isinstance(block, DecoderBlockParams):
            problems.add_type(f"blocks[{index}]", "a DecoderBlockParams", block)
        elif channels:
            _check_block(problems, index, params, channels, hidden)
    names = ("embed_weight", "embed_bias", "norm_weight", "linear_weight", "linear_bias")
    problems.same_device("image", image, [(name, getattr(params, name)) for name in names])


def _check_embedding(problems: Problems, params: DecoderParams, image: Tensor) -> int:
    """D1, or 0 where it cannot be told."""
    weight = params.embed_weight
    if not problems.tensor("embed_weight", weight, 2, "[D1, C + K²]"):
        return 0
    counted = problems.count("max_freqs", params.max_freqs, maximum=4096)
    if counted and weight.shape[1] != image.shape[1] + params.max_freqs**2:
        expected = f"{image.shape[1]} columns for the pixel and {params.max_freqs}² for the encoding"
        problems.add("embed_weight", expected, weight)
    if counted and params.encoding in ("rope", "sincos") and params.max_freqs % 2:
        problems.add("max_freqs", f"an even number for encoding {params.encoding!r}", params.max_freqs)
    _vector(problems, "embed_bias", params.embed_bias, weight.shape[0], "channel")
    if not weight.shape[0]:
        problems.add("embed_weight", "at least one channel", weight)
    return weight.shape[0]


def _check_output(problems: Problems, params: DecoderParams, channels: int) -> None:
    _vector(problems, "norm_weight", params.norm_weight, channels, "channel")
    weight = params.linear_weight
    if weight is None:
        if params.linear_bias is not None:
            problems.add("linear_bias", "None where linear_weight is None", params.linear_bias)
    elif problems.tensor("linear_weight", weight, 2, "[C_out, D1]"):
        if weight.shape[1] != channels or not weight.shape[0]:
            problems.add("linear_weight", f"[C_out, {channels}]", weight)
        _vector(problems, "linear_bias", params.linear_bias, weight.shape[0], "output channel")


def _check_options(problems: Problems, params: DecoderParams) -> None:
    if not isinstance(params.gated, bool):
        problems.add_type("gated", "True or False", params.gated)
    if isinstance(params.normalize, str) or not isinstance(params.normalize, Sequence):
        problems.add_type("normalize", "a sequence of names out of " + ", ".join(WEIGHTS), params.normalize)
    else:
        for name in params.normalize:
            problems.choice("normalize", name, WEIGHTS)
    problems.choice("activation", params.activation, ACTIVATIONS)
    problems.choice("encoding", params.encoding, KINDS)
    problems.number("norm_eps", params.norm_eps)
    problems.number("weight_eps", params.weight_eps)
    if params.encoding_extent is not None:
        problems.number("encoding_extent", params.encoding_extent)
        if params.encoding != "rope":
            problems.add("encoding_extent", "None for every encoding but 'rope'", params.encoding_extent)


def _check_block(
    problems: Problems, index: int, params: DecoderParams, channels: int, hidden: Tensor
) -> None:
    block, first = params.blocks[index], params.blocks[0]
    where = f"blocks[{index}]"
    weight = block.generator_weight
    unit = (3 if params.gated is True else 2) * channels
    if problems.tensor(f"{where}.generator_weight", weight, 2, "[M * D1 * D2, D]"):
        if weight.shape[1] != hidden.shape[2]:
            problems.add(f"{where}.generator_weight", f"{hidden.shape[2]} columns, hidden's D", weight)
        if weight.shape[0] % unit or not weight.shape[0]:
            problems.add(f"{where}.generator_weight", f"a multiple of {unit} rows (M * D1)", weight)
        elif isinstance(first, DecoderBlockParams) and _rows(weight) != _rows(first.generator_weight):
            expected = f"as many rows as that of blocks[0] ({_rows(first.generator_weight)})"
            problems.add(f"{where}.generator_weight", expected, weight)
        _vector(problems, f"{where}.generator_bias", block.generator_bias, weight.shape[0], "row")
    if isinstance(first, DecoderBlockParams) and (block.generator_bias is None) != (
        first.generator_bias is None
    ):
        problems.add(f"{where}.generator_bias", "biases in all blocks or in none", block.generator_bias)
    if problems.tensor(f"{where}.norm_weight", block.norm_weight, 1, "[D1]"):
        _vector(problems, f"{where}.norm_weight", block.norm_weight, channels, "channel")
    own = [(f"{where}.generator_weight", weight), (f"{where}.generator_bias", block.generator_bias)]
    problems.same_device("hidden", hidden, [*own, (f"{where}.norm_weight", block.norm_weight)])


def _rows(weight: object) -> int:
    return weight.shape[0] if isinstance(weight, Tensor) and weight.dim() else 0


def _vector(problems: Problems, name: str, value: Tensor | None, size: int, unit: str) -> None:
    if value is not None and problems.tensor(name, value, 1, f"[{size}]") and value.shape[0] != size:
        problems.add(name, f"[{size}], one for each {unit}", value)


def generated_by(params: object) -> list[tuple[str, Tensor]]:
    """Name and tensor of the generators' weights, and then of their biases; checks nothing."""
    blocks = (
        params.blocks if isinstance(params, DecoderParams) and isinstance(params.blocks, Sequence) else ()
    )
    known = [(index, block) for index, block in enumerate(blocks) if isinstance(block, DecoderBlockParams)]
    weights = [(f"blocks[{index}].generator_weight", block.generator_weight) for index, block in known]
    biases = [(f"blocks[{index}].generator_bias", block.generator_bias) for index, block in known]
    return [*weights, *((name, bias) for name, bias in biases if bias is not None)]
