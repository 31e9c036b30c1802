"""The official checkpoints: names, loading and the way back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixnerd_kernels.checks import FLOATS
from pixnerd_kernels.models.base import PixNerdBase
from pixnerd_kernels.models.config import PixNerdConfig, PixNerdT2IConfig
from pixnerd_kernels.models.files import read
from pixnerd_kernels.models.official_shapes import FAMILIES, HEAVY_EXTENT, compare, infer, names
from pixnerd_kernels.models.pixnerd import PixNerd
from pixnerd_kernels.models.text_to_image import PixNerdT2I

VARIANTS = ("auto", *FAMILIES)

_OUTER = {
    "patch_embed": "s_embedder.proj",
    "time_embed.linear1": "t_embedder.mlp.0",
    "time_embed.linear2": "t_embedder.mlp.2",
    "class_embed": "y_embedder.embedding_table",
    "text_embed": "y_embedder.proj",
    "text_norm": "y_embedder.norm",
    "decoder.embed": "x_embedder.embedder.0",
    "decoder.norm": "final_layer.norm",
    "decoder.linear": "final_layer.linear",
}
_INNER = {"modulation": "adaLN_modulation.0", "generator": "param_generator1.0"}
_JOINT = {"attn.qkv": "attn.qkv_x", "attn.kv_text": "attn.kv_y"}


def official_name(name: str, config: PixNerdConfig | PixNerdT2IConfig) -> str:
    """The official name of a parameter; there, one list of blocks holds the DiT's and then the field's."""
    if name == "text_positions":
        return "y_pos_embedding"
    module, _, leaf = name.rpartition(".")
    if module in _OUTER:
        return f"{_OUTER[module]}.{leaf}"
    match = re.fullmatch(r"(decoder\.|text_)?blocks\.(\d+)\.(.+)", module)
    assert match, name
    kind, index, part = match[1], int(match[2]), _INNER.get(match[3], match[3])
    if kind == "text_":
        return f"text_refine_blocks.{index}.{part}.{leaf}"
    if kind is None and isinstance(config, PixNerdT2IConfig):
        part = _JOINT.get(part, part)
    return f"blocks.{index + config.num_blocks * (kind is not None)}.{part}.{leaf}"


def to_official(model: PixNerdBase) -> dict[str, Tensor]:
    """The model's weights under the official names: the tensors that `load_official` took, bit for bit.

    They share the model's memory; clone before changing either.

    Raises:
        ValueError: the model encodes coordinates otherwise than the official one, which no tensor says.
    """
    encoding = getattr(model.config, "encoding", "dct")
    if encoding != "dct":
        raise ValueError(f"to_official: expected the encoding 'dct', the official model's, got {encoding!r}")
    if isinstance(model.config, PixNerdT2IConfig):
        extents = (float(model.config.patch_size), HEAVY_EXTENT)
        if model.config.extent not in extents:
            raise ValueError(
                f"to_official: expected coordinates that span {' or '.join(f'{e:g}' for e in extents)}, an official "
                f"model's, got an extent of {model.config.extent:g}"
            )
    return {official_name(name, model.config): tensor for name, tensor in model.state_dict().items()}


def load_official(
    path_or_state_dict: str | Path | Mapping[str, Tensor],
    config: Mapping[str, object] | None = None,
    variant: str = "auto",
) -> PixNerd | PixNerdT2I:
    """A `PixNerd` or `PixNerdT2I` with the weights of an official checkpoint; the keys tell which.

    Args:
        path_or_state_dict: a Lightning checkpoint (its averaged weights, prefix ``ema_denoiser.``, are taken;
            without those ``denoiser.``), a file of a bare state dict (torch.save or .safetensors), or a state
            dict. What torch.compile and DistributedDataParallel put into names is taken out of them.
        config: the official constructor's arguments. The shapes determine all of them, so this is a check.
        variant: "c2i", "t2i", "t2i_heavydecoder" or "auto". The two text-to-image models have the same keys
            and shapes, but other coordinates unless patches have 16 pixels; for those "auto" is refused.
            With "t2i", whose official model decodes at one size only, coordinates span the same range at
            every `decoder_scale`.

    Returns:
        The model on the CPU (the device of a given state dict), its own copies of the weights in the
        checkpoint's dtype. Pickles are read with ``weights_only=True``: no code in a checkpoint is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, is not such a checkpoint, lacks keys or has unexpected ones
            (named), contradicts config or variant, or needs a variant.
        TypeError: an argument is of another kind.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
    if isinstance(path_or_state_dict, Mapping):
        source, state = "state dict", _denoiser(path_or_state_dict, "state dict")
    elif isinstance(path_or_state_dict, (str, Path)):
        source = str(path_or_state_dict)
        state = _denoiser(read(path_or_state_dict), source)
    else:
        raise TypeError(
            f"path_or_state_dict: expected a path or a state dict, got {type(path_or_state_dict).__name__}"
        )
    inferred = infer(state, variant, source)
    if config is not None:
        compare(config, inferred, source)
    with torch.device("meta"):
        model = PixNerd(inferred) if isinstance(inferred, PixNerdConfig) else PixNerdT2I(inferred)
    own = {official_name(name, inferred): (name, tensor) for name, tensor in model.state_dict().items()}
    _check_keys(state, {name: tensor for name, (_, tensor) in own.items()}, source)
    model.load_state_dict({name: state[key].detach().clone() for key, (name, _) in own.items()}, assign=True)
    return model


def _denoiser(content: Mapping[Any, Any], source: str) -> dict[str, Tensor]:
    """The denoiser's tensors without prefix, averaged ones where there are two sets."""
    inner = content.get("state_dict")
    content = inner if isinstance(inner, Mapping) else content
    if strangers := [repr(key) for key in content if not isinstance(key, str)]:
        raise ValueError(f"{source}: expected tensors by name, got the keys {names(strangers)}")
    named: dict[str, Any] = {}
    for key, value in content.items():
        name = re.sub(r"(^|\.)((_orig_mod|module)\.)+", r"\1", key)
        if name in named:
            raise ValueError(
                f"{source}: expected each tensor once, got {name!r} under several names, as {key!r}"
            )
        named[name] = value
    for prefix in ("ema_denoiser.", "denoiser."):
        chosen = {key[len(prefix) :]: value for key, value in named.items() if key.startswith(prefix)}
        if chosen:
            named = chosen
            break
    if strangers := [key for key, value in named.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{source}: expected tensors only, got something else for {names(strangers)}")
    return {key: value for key, value in named.items() if isinstance(value, Tensor)}


def _check_keys(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    problems = []
    if missing := sorted(set(expected) - set(state)):
        problems.append(f"missing {names(missing)}")
    if unexpected := sorted(set(state) - set(expected)):
        problems.append(f"unexpected {names(unexpected)}")
    for key, tensor in expected.items():
        if key in state and state[key].shape != tensor.shape:
            problems.append(f"{key} has the shape {list(state[key].shape)}, expected {list(tensor.shape)}")
        if key in state and state[key].dtype not in FLOATS:
            expected_dtype = "float32, float64, bfloat16 or float16"
            problems.append(f"{key} has the dtype {state[key].dtype}, expected {expected_dtype}")
    if problems:
        raise ValueError(f"{source}: not this model's weights: {'; '.join(problems)}")
