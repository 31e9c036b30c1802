"""Attention with normalised queries and keys: the official class-to-image, text-to-image and text-refining kinds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pixnerd_kernels.ops.attention import attention
from pixnerd_kernels.ops.qk_norm_rope import qk_norm_rope
from pixnerd_kernels.patching.probe import Candidate, Form, Formula, Inputs, probe_dtype
from pixnerd_kernels.patching.rules.base import (
    Left,
    acts_as_linear,
    eps_at,
    first_parameter,
    inert,
    norm_eps,
    norm_weight,
    observed,
    own_tensors,
    rows,
)
from pixnerd_kernels.patching.rules.rms_norm import rms_norm
from pixnerd_kernels.patching.swap import Replacement, arguments

_TOKENS, _TEXT = 6, 3
#: What an argument of the attention stands for, by its name.
_ROLES = {
    **dict.fromkeys(("pos", "freqs_cis", "rope", "rotary"), "pos"),
    **dict.fromkeys(("y", "text", "context", "txt"), "text"),
    **dict.fromkeys(("mask", "attn_mask"), "mask"),
}


@dataclass(frozen=True)
class QKNormAttention(Replacement):
    """x [B, L, D] through the module's own projections, with `qk_norm_rope` between them and `attention`."""

    op: ClassVar[str] = "qk_norm_rope"
    #: Of every argument: "x", "pos", "text" or "mask".
    roles: tuple[str, ...]
    qkv: str
    kv: str
    norms: tuple[str, str]
    weights: tuple[str, str]
    eps: float | None
    proj: str
    heads: int

    def accepts(self, module: Any, *args: Any) -> bool:
        given = dict(zip(self.roles, args, strict=False))
        x, pos = given["x"], given.get("pos")
        rotated = "pos" not in self.roles or (
            isinstance(pos, Tensor) and pos.is_complex() and pos.dim() == 2 and pos.device == x.device
        )
        usual = rotated and x.dim() == 3 and given.get("mask") is None
        return usual and not any(observed(getattr(module, name)) for name in self.norms)

    def run(self, module: Any, *args: Any) -> Tensor:
        given = dict(zip(self.roles, args, strict=False))
        qkv = _split(getattr(module, self.qkv)(given["x"]), 3, self.heads)
        kv = _split(getattr(module, self.kv)(given["text"]), 2, self.heads) if self.kv else None
        rope = torch.view_as_real(given["pos"]) if "pos" in given else None
        q_weight = getattr(getattr(module, self.norms[0]), self.weights[0])
        k_weight = getattr(getattr(module, self.norms[1]), self.weights[1])
        q, k, v = qk_norm_rope(qkv, q_weight, k_weight, rope, kv, eps_at(self.eps, qkv.dtype))
        out: Tensor = getattr(module, self.proj)(attention(q, k, v).flatten(2))
        return out


def _split(packed: Tensor, parts: int, heads: int) -> Tensor:
    """[B, L, parts * D] -> [B, L, parts, heads, d]."""
    return packed.unflatten(-1, (parts, heads, -1))


def _rotate(x: Tensor, pos: Tensor, halves: bool) -> Tensor:
    """Neighbouring channels as pairs, or the two halves of the channels."""
    cos, sin = pos.real[:, None].to(x.dtype), pos.imag[:, None].to(x.dtype)
    a, b = x.chunk(2, -1) if halves else (x[..., ::2], x[..., 1::2])
    turned = [a * cos - b * sin, a * sin + b * cos]
    return torch.cat(turned, -1) if halves else torch.stack(turned, -1).flatten(-2)


@dataclass(frozen=True)
class _Formula:
    """What the module gives its last layer, whose result `last` is; qkv and kv are its first layers'."""

    proj: str
    heads: int
    eps: float
    text: bool
    pos: bool
    normed: bool = True
    halves: bool = False
    text_rotated: bool = False

    def __call__(
        self, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, last: Tensor, *rest: Tensor
    ) -> dict[str, Tensor]:
        values = list(rest)
        kv = _split(values.pop(0), 2, self.heads) if self.text else None
        pos = values.pop(0) if self.pos else None
        q, k, v = _split(qkv, 3, self.heads).unbind(2)
        q, k = self._normed(q, q_weight), self._normed(k, k_weight)
        if pos is not None:
            q, k = _rotate(q, pos, self.halves), _rotate(k, pos, self.halves)
        if kv is not None:
            more = self._normed(kv[:, :, 0], k_weight)
            if self.text_rotated and pos is not None:
                more = _rotate(more, pos[: more.shape[1]], self.halves)
            k, v = torch.cat([k, more], 1), torch.cat([v, kv[:, :, 1]], 1)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        logits = q @ k.mT * q.shape[-1] ** -0.5
        attended = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return {"output": last, f"{self.proj}<": attended}

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.eps) if self.normed else x


@dataclass(frozen=True)
class _Parts:
    """The children by what they do: projections by their size, the norms in their order (queries first)."""

    size: int
    qkv: str
    kv: str
    proj: str
    norms: tuple[str, str]
    weights: tuple[str, str]
    channels: int


def _parts(module: nn.Module) -> _Parts | None:
    children = dict(module.named_children())
    linear = {name: child for name, child in children.items() if acts_as_linear(child)}
    norms = {name: weight for name, child in children.items() if (weight := norm_weight(child))}
    if len(norms) != 2 or own_tensors(module) or len(linear) not in (2, 3):
        return None
    others = [child for name, child in children.items() if name not in linear and name not in norms]
    size = int(next(iter(linear.values())).in_features)  # type: ignore[arg-type]
    found = {
        int(layer.out_features) / size: name  # type: ignore[arg-type]
        for name, layer in linear.items()
        if layer.in_features == size
    }
    channels = {children[name].get_parameter(weight).shape[0] for name, weight in norms.items()}
    if len(found) != len(linear) or not {3, 1} <= found.keys() <= {3, 2, 1} or len(channels) != 1:
        return None
    (width,) = channels
    if size % width or not all(map(inert, others)):
        return None
    q, k = norms
    return _Parts(size, found[3], found.get(2, ""), found[1], (q, k), (norms[q], norms[k]), width)


def roles(module: nn.Module) -> tuple[str, ...] | None:
    """What every argument of the attention's forward stands for; None where one is not known."""
    first, *others = [p.name for p in arguments(type(module).forward)] or [""]
    named = ["x", *(_ROLES.get(name, "") for name in others)]
    return tuple(named) if first and all(named) and len(set(named)) == len(named) else None


def role_inputs(parts: _Parts, wanted: tuple[str, ...], rng: torch.Generator) -> Inputs:
    """Random values for each role."""
    angles = 6.3 * torch.rand(_TOKENS, parts.channels // 2, generator=rng)
    made: Inputs = {
        "x": rows(2, parts.size, rng),
        "text": torch.randn(2, _TEXT, parts.size, generator=rng),
        "pos": torch.polar(torch.ones_like(angles), angles),
        "mask": None,
    }
    return {role: made[role] for role in wanted}


class AttentionRule:
    op = QKNormAttention.op

    def match(self, module: nn.Module) -> Candidate | Left | None:
        parts, wanted = _parts(module), roles(module)
        if parts is None:
            return None
        if wanted is None:
            return Left("its forward takes arguments that are not known")
        if bool(parts.kv) != ("text" in wanted):
            return Left("its forward's arguments do not fit its projections")
        eps = [norm_eps(module.get_submodule(name)) for name in parts.norms]
        if eps[0] != eps[1]:
            return Left(f"its norms have different eps: {eps[0]} and {eps[1]}")
        names = [p.name for p in arguments(type(module).forward)]
        by_role = dict(zip(wanted, names, strict=True))
        (q, k), (q_weight, k_weight) = parts.norms, parts.weights
        tensors = [f"{parts.qkv}()", f"{q}.{q_weight}", f"{k}.{k_weight}", f"{parts.proj}()"]
        tensors += [f"{parts.kv}()"] if parts.kv else []
        tensors += [by_role["pos"]] if "pos" in wanted else []
        heads, parameter = parts.size // parts.channels, first_parameter(module, parts.qkv)
        at = eps_at(eps[0], probe_dtype(module, parameter))
        block = QKNormAttention(
            wanted, parts.qkv, parts.kv, parts.norms, parts.weights, eps[0], parts.proj, heads
        )

        def form(function: str, replacement: Replacement | None, **options: bool) -> Form:
            formula: Formula = _Formula(parts.proj, heads, at, bool(parts.kv), "pos" in wanted, **options)
            return Form(function, formula, tuple(tensors), replacement)

        usual = "normalised" + (", pairs rotated" if "pos" in wanted else "")
        forms = [form(usual, block), form("queries and keys not normalised", None, normed=False)]
        if "pos" in wanted:
            forms.append(form("halves rotated in place of pairs", None, halves=True))
            if parts.kv:
                forms.append(form("text keys rotated", None, text_rotated=True))

        def inputs(rng: torch.Generator) -> Inputs:
            made = role_inputs(parts, wanted, rng)
            return {by_role[role]: value for role, value in made.items()}

        children = (parts.qkv, *([parts.kv] if parts.kv else []))
        return Candidate(tuple(forms), inputs, children, parameter, (parts.proj,))
