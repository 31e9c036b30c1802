"""The official checkpoints: names, configuration from shapes, loading and the way back."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pixnerd_kernels.models.config import PixNerdConfig
from pixnerd_kernels.models.pixnerd import PixNerd

VARIANTS = ("auto", "c2i")

#: The official constructor's arguments that determine shapes, and those that do not.
_ARGUMENTS = (
    "in_channels", "num_groups", "hidden_size", "hidden_size_x", "nerf_mlpratio",
    "num_blocks", "num_cond_blocks", "patch_size", "num_classes",
)  # fmt: skip
_IGNORED_ARGUMENTS = ("learn_sigma", "deep_supervision", "weight_path", "load_ema")

_OUTER = {
    "patch_embed": "s_embedder.proj",
    "time_embed.linear1": "t_embedder.mlp.0",
    "time_embed.linear2": "t_embedder.mlp.2",
    "class_embed": "y_embedder.embedding_table",
    "decoder.embed": "x_embedder.embedder.0",
    "decoder.norm": "final_layer.norm",
    "decoder.linear": "final_layer.linear",
}
_INNER = {"modulation": "adaLN_modulation.0", "generator": "param_generator1.0"}


def official_name(name: str, config: PixNerdConfig) -> str:
    """The official name of a parameter; there, one list of blocks holds the DiT's and then the field's."""
    module, _, leaf = name.rpartition(".")
    if module in _OUTER:
        return f"{_OUTER[module]}.{leaf}"
    match = re.fullmatch(r"(decoder\.)?blocks\.(\d+)\.(.+)", module)
    assert match, name
    index = int(match[2]) + (config.num_blocks if match[1] else 0)
    return f"blocks.{index}.{_INNER.get(match[3], match[3])}.{leaf}"


def to_official(model: PixNerd) -> dict[str, Tensor]:
    """The model's weights under the official names: the tensors that `load_official` took, bit for bit.

    They share the model's memory; clone before changing either.
    """
    return {official_name(name, model.config): tensor for name, tensor in model.state_dict().items()}


def load_official(
    path_or_state_dict: str | Path | Mapping[str, Tensor],
    config: Mapping[str, object] | None = None,
    variant: str = "auto",
) -> PixNerd:
    """A `PixNerd` with the weights of an official class-to-image checkpoint.

    Args:
        path_or_state_dict: a Lightning checkpoint (its averaged weights, prefix ``ema_denoiser.``, are taken;
            without those ``denoiser.``), a file of a bare state dict (torch.save or .safetensors), or a state
            dict.
        config: the official constructor's arguments. The shapes determine all of them, so this is a check.
        variant: "c2i" or "auto".

    Returns:
        The model on the CPU, its own copies of the weights in the checkpoint's dtype. Pickles are read with
        ``weights_only=True``: no code in a checkpoint is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, is not such a checkpoint, lacks keys or has unexpected ones
            (named), or contradicts config.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(map(repr, VARIANTS))}, got {variant!r}")
    if isinstance(path_or_state_dict, Mapping):
        source, state = "state dict", _denoiser(path_or_state_dict, "state dict")
    else:
        source = str(path_or_state_dict)
        state = _denoiser(_read(Path(path_or_state_dict)), source)
    inferred = _infer(state, source)
    if config is not None:
        _compare(config, inferred, source)
    with torch.device("meta"):
        model = PixNerd(inferred)
    own = {official_name(name, inferred): (name, tensor) for name, tensor in model.state_dict().items()}
    _check_keys(state, {name: tensor for name, (_, tensor) in own.items()}, source)
    model.load_state_dict({name: state[key].detach().clone() for key, (name, _) in own.items()}, assign=True)
    return model


def _read(path: Path) -> Mapping[str, object]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # not a zip archive: the format before torch 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Torch's message advises to switch the protection off; only its reason is of use.
        reason = str(error).partition("WeightsUnpickler error:")[2].strip().partition("\n")[0] or "unreadable"
        raise ValueError(
            f"{path}: refused, because it is damaged or holds more than tensors and plain values: {reason}"
        ) from error
    except Exception as error:
        raise ValueError(f"{path}: not a readable checkpoint: {type(error).__name__}: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a dictionary of tensors, got {type(content).__name__}")
    return content


def _denoiser(content: Mapping[str, object], source: str) -> dict[str, Tensor]:
    """The denoiser's tensors without prefix, averaged ones where there are two sets."""
    inner = content.get("state_dict")
    content = inner if isinstance(inner, Mapping) else content
    for prefix in ("ema_denoiser.", "denoiser."):
        chosen = {key[len(prefix) :]: value for key, value in content.items() if key.startswith(prefix)}
        if chosen:
            content = chosen
            break
    if strangers := [key for key, value in content.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{source}: expected tensors only, got something else for {_names(strangers)}")
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def _infer(state: Mapping[str, Tensor], source: str) -> PixNerdConfig:
    """The configuration that the shapes determine."""
    if any(key.startswith("text_refine_blocks.") for key in state):
        raise ValueError(f"{source}: a text-to-image checkpoint; this loads class-to-image ones")

    def shape(key: str, rank: int) -> torch.Size:
        if key not in state:
            raise ValueError(
                f"{source}: not an official class-to-image checkpoint: the key {key!r} is missing"
            )
        if state[key].dim() != rank:
            raise ValueError(
                f"{source}: expected {rank} dimensions for {key!r}, got {list(state[key].shape)}"
            )
        return state[key].shape

    def count(pattern: str) -> int:
        return sum(bool(re.fullmatch(pattern, key)) for key in state)

    num_blocks = count(r"blocks\.\d+\.attn\.qkv\.weight")
    num_field_blocks = count(r"blocks\.\d+\.param_generator1\.0\.weight")
    hidden_size, pixels = shape("s_embedder.proj.weight", 2)
    in_channels, channels = shape("final_layer.linear.weight", 2)
    (head_size,) = shape("blocks.0.attn.q_norm.weight", 1)
    generated, _ = shape(f"blocks.{num_blocks}.param_generator1.0.weight", 2)
    encoding_size = shape("x_embedder.embedder.0.weight", 2)[1] - in_channels
    try:
        return PixNerdConfig(
            hidden_size=hidden_size,
            num_heads=hidden_size // max(head_size, 1),
            num_blocks=num_blocks,
            num_field_blocks=num_field_blocks,
            field_channels=channels,
            field_ratio=generated // max(2 * channels**2, 1),
            patch_size=math.isqrt(pixels // max(in_channels, 1)),
            in_channels=in_channels,
            num_classes=shape("y_embedder.embedding_table.weight", 2)[0] - 1,
            max_freqs=math.isqrt(max(encoding_size, 0)),
        )
    except ValueError as error:
        raise ValueError(f"{source}: the shapes do not make a class-to-image model: {error}") from error


def _compare(config: Mapping[str, object], inferred: PixNerdConfig, source: str) -> None:
    if unknown := set(config) - {*_ARGUMENTS, *_IGNORED_ARGUMENTS}:
        raise ValueError(
            f"config: unknown arguments {_names(sorted(unknown))}, expected {_names(_ARGUMENTS)}"
        )
    actual = {
        "in_channels": inferred.in_channels,
        "num_groups": inferred.num_heads,
        "hidden_size": inferred.hidden_size,
        "hidden_size_x": inferred.field_channels,
        "nerf_mlpratio": inferred.field_ratio,
        "num_blocks": inferred.num_blocks + inferred.num_field_blocks,
        "num_cond_blocks": inferred.num_blocks,
        "patch_size": inferred.patch_size,
        "num_classes": inferred.num_classes,
    }
    wrong = [
        f"{name} is {config[name]!r}, the tensors have {value}"
        for name, value in actual.items()
        if config.get(name, value) != value
    ]
    if wrong:
        raise ValueError(f"{source}: contradicts config: {'; '.join(wrong)}")


def _check_keys(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    problems = []
    if missing := sorted(set(expected) - set(state)):
        problems.append(f"missing {_names(missing)}")
    if unexpected := sorted(set(state) - set(expected)):
        problems.append(f"unexpected {_names(unexpected)}")
    problems += [
        f"{key} has the shape {list(state[key].shape)}, expected {list(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    if problems:
        raise ValueError(f"{source}: not this model's weights: {'; '.join(problems)}")


def _names(names: list[str] | tuple[str, ...], limit: int = 20) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
