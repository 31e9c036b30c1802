"""What the keys and shapes of an official checkpoint tell: the family, and its configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pixnerd_kernels.models.config import PixNerdConfig, PixNerdT2IConfig

#: Family by variant; the two text-to-image variants share keys and shapes.
FAMILIES = {"c2i": "class-to-image", "t2i": "text-to-image", "t2i_heavydecoder": "text-to-image"}

_OWN_KEYS = {
    "class-to-image": r"(y_embedder\.embedding_table|final_layer\.norm|blocks\.\d+\.(attn\.qkv|mlp\.w[12]))\..+",
    "text-to-image": r"y_pos_embedding|text_refine_blocks\..+|"
    r"(y_embedder\.(proj|norm)|blocks\.\d+\.(attn\.(qkv_x|kv_y)|mlp\.w12))\..+",
}
#: The positions that the heavy decoder's patches span at any size.
HEAVY_EXTENT = 16


def family(state: Mapping[str, Tensor], source: str) -> str:
    """The family that more of the keys belong to."""
    votes = {name: sum(bool(re.fullmatch(own, key)) for key in state) for name, own in _OWN_KEYS.items()}
    if not any(votes.values()):
        raise ValueError(
            f"{source}: not an official PixNerd checkpoint: no key such as y_embedder.embedding_table.weight "
            f"(class-to-image) or y_pos_embedding (text-to-image); the keys are {names(list(state), 5) or 'none'}"
        )
    return max(votes, key=lambda name: votes[name])


def infer(state: Mapping[str, Tensor], variant: str, source: str) -> PixNerdConfig | PixNerdT2IConfig:
    """The configuration that the shapes, and for text-to-image the variant, determine."""
    found = family(state, source)
    if variant != "auto" and FAMILIES[variant] != found:
        raise ValueError(
            f"{source}: variant {variant!r} is {FAMILIES[variant]}, but the keys are those of a {found} model"
        )
    num_blocks = _count(state, r"blocks\.(\d+)\.(attn|mlp|adaLN_modulation|norm1|norm2)\..+")
    ranks = {
        "s_embedder.proj.weight": 2,
        "final_layer.linear.weight": 2,
        "x_embedder.embedder.0.weight": 2,
        "blocks.0.attn.q_norm.weight": 1,
        f"blocks.{num_blocks}.param_generator1.0.weight": 2,
    }
    if found == "class-to-image":
        ranks["y_embedder.embedding_table.weight"] = 2
    else:
        ranks |= {"y_pos_embedding": 3, "y_embedder.proj.weight": 2}
    _check_ranks(state, ranks, f"{source}: not a whole {found} checkpoint")
    hidden_size, pixels = state["s_embedder.proj.weight"].shape
    in_channels, channels = state["final_layer.linear.weight"].shape
    generated = len(state[f"blocks.{num_blocks}.param_generator1.0.weight"])
    sizes: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_heads": hidden_size // max(len(state["blocks.0.attn.q_norm.weight"]), 1),
        "num_blocks": num_blocks,
        "num_field_blocks": _count(state, r"blocks\.(\d+)\.param_generator1\..+"),
        "field_channels": channels,
        "field_ratio": generated // max(2 * channels**2, 1),
        "patch_size": math.isqrt(pixels // max(in_channels, 1)),
        "in_channels": in_channels,
        "max_freqs": math.isqrt(max(state["x_embedder.embedder.0.weight"].shape[1] - in_channels, 0)),
    }
    extent = 0.0 if found == "class-to-image" else _extent(variant, sizes["patch_size"], source)
    try:
        if found == "class-to-image":
            return PixNerdConfig(**sizes, num_classes=len(state["y_embedder.embedding_table.weight"]) - 1)
        return PixNerdT2IConfig(
            **sizes,
            num_text_blocks=_count(state, r"text_refine_blocks\.(\d+)\..+"),
            text_tokens=state["y_pos_embedding"].shape[1],
            text_width=state["y_embedder.proj.weight"].shape[1],
            extent=extent,
        )
    except ValueError as error:
        raise ValueError(f"{source}: the shapes do not make a {found} model: {error}") from error


def compare(config: Mapping[str, object], inferred: PixNerdConfig | PixNerdT2IConfig, source: str) -> None:
    """Check the official constructor's arguments against what the shapes tell."""
    if not isinstance(config, Mapping):
        raise TypeError(f"config: expected a dictionary of the official arguments, got {config!r}")
    actual = _arguments(inferred)
    if unknown := set(config) - {*actual, "learn_sigma", "deep_supervision", "weight_path", "load_ema"}:
        raise ValueError(
            f"config: unknown arguments {names(sorted(map(str, unknown)))}, expected {names(list(actual))}"
        )
    wrong = [
        f"{name} is {config[name]!r}, the tensors have {value}"
        for name, value in actual.items()
        if config.get(name, value) != value
    ]
    if wrong:
        raise ValueError(f"{source}: contradicts config: {'; '.join(wrong)}")


def names(keys: list[str], limit: int = 20) -> str:
    """Keys for a message, a long list cut."""
    rest = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + rest


def _extent(variant: str, patch_size: int, source: str) -> float:
    if variant == "auto" and patch_size != HEAVY_EXTENT:
        raise ValueError(
            f"{source}: variant: expected 't2i' or 't2i_heavydecoder' for this text-to-image checkpoint, got "
            f"'auto': the two official models have the same keys and shapes, but with patches of {patch_size} "
            f"pixels (not {HEAVY_EXTENT}) other coordinates, so say which one it was trained as"
        )
    return float(patch_size if variant == "t2i" else HEAVY_EXTENT)


def _arguments(config: PixNerdConfig | PixNerdT2IConfig) -> dict[str, int]:
    """The official constructor's arguments that determine shapes."""
    shared = {
        "in_channels": config.in_channels,
        "num_groups": config.num_heads,
        "hidden_size": config.hidden_size,
        "patch_size": config.patch_size,
    }
    if isinstance(config, PixNerdConfig):
        return shared | {
            "hidden_size_x": config.field_channels,
            "nerf_mlpratio": config.field_ratio,
            "num_blocks": config.num_blocks + config.num_field_blocks,
            "num_cond_blocks": config.num_blocks,
            "num_classes": config.num_classes,
        }
    return shared | {
        "decoder_hidden_size": config.field_channels,
        "num_encoder_blocks": config.num_blocks,
        "num_decoder_blocks": config.num_field_blocks,
        "num_text_blocks": config.num_text_blocks,
        "txt_embed_dim": config.text_width,
        "txt_max_length": config.text_tokens,
    }


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Different numbers in the keys that match."""
    return len({match[1] for key in state if (match := re.fullmatch(pattern, key))})


def _check_ranks(state: Mapping[str, Tensor], ranks: Mapping[str, int], complaint: str) -> None:
    problems = []
    if missing := [key for key in ranks if key not in state]:
        problems.append(f"missing {names(missing)}")
    problems += [
        f"{key} has the shape {list(state[key].shape)}, expected {rank} dimensions"
        for key, rank in ranks.items()
        if key in state and state[key].dim() != rank
    ]
    if problems:
        raise ValueError(f"{complaint}: {'; '.join(problems)}")
