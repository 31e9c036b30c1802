"""The cases of `pixnerd verify` for the ops of a transformer block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import pixnerd_kernels as pk
from pixnerd_kernels.cli import plain
from pixnerd_kernels.cli.verify_cases import Case, Comparison, Result
from pixnerd_kernels.nn import rotary_table

Shapes = Mapping[str, tuple[int, ...]]
#: Tensors drawn around 1.
_WEIGHTS = ("weight", "q_weight", "k_weight")


def _flat(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """The function with all its results in one row."""

    def call(**tensors: Tensor) -> Tensor:
        out = function(**tensors)
        return torch.cat([part.flatten() for part in (out if isinstance(out, tuple) else (out,))])

    return call


def _case(op: str, kernel: str, label: str, ours: Callable, formula: Callable, shapes: Shapes) -> Case:
    compare = Comparison(_flat(ours), _flat(formula))

    def run(device: torch.device, dtype: torch.dtype) -> list[Result]:
        generator = torch.Generator().manual_seed(sum(map(sum, shapes.values())))

        def draw(name: str, *shape: int) -> Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return (1 + values / 4 if name in _WEIGHTS else values).to(device, dtype)

        inputs = {name: draw(name, *shape) for name, shape in shapes.items()}
        with torch.no_grad():
            size = _flat(formula)(**{name: tensor.cpu() for name, tensor in inputs.items()}).numel()
        return compare(inputs, draw("upstream", size))

    return Case(op, kernel, label, run)


def cases() -> Iterator[Case]:
    """Each op at a small and an odd size, and at XL/16's widths."""
    for batch, tokens, channels in ((2, 20, 24), (3, 33, 17), (1, 5, 1152)):
        full, row = (batch, tokens, channels), (batch, 1, channels)
        label = f"B={batch} L={tokens} D={channels}"
        norm: Shapes = {"x": full, "weight": (channels,), "shift": row, "scale": row}
        residual: Shapes = {"x": full, "y": full, "gate": row}
        name = "modulated_rms_norm"
        yield _case(name, name, label, pk.modulated_rms_norm, plain.modulated_rms_norm, norm)
        name = "gated_residual"
        yield _case(name, name, label, pk.gated_residual, plain.gated_residual, residual)
        fused, formula = pk.gated_residual_rms_norm, plain.gated_residual_rms_norm
        yield _case("gated_residual_rms_norm", name, label, fused, formula, {**residual, **norm})
        name = "swiglu"
        yield _case(name, name, label, pk.swiglu, plain.swiglu, {"gate": full, "up": full})
    for heads, channels, text in ((2, 24, 0), (3, 72, 7)):
        table = rotary_table(3, 4, channels)
        shapes = {"qkv": (2, 12, 3, heads, channels), "q_weight": (channels,), "k_weight": (channels,)}
        if text:
            shapes["text_kv"] = (2, text, 2, heads, channels)
        yield _case(
            "qk_norm_rope",
            "qk_norm_rope",
            f"B=2 L=12 heads={heads} d={channels}{f' text={text}' if text else ''}",
            lambda table=table, **t: pk.qk_norm_rope(**t, rope=table.to(t["qkv"].device)),
            lambda table=table, **t: plain.qk_norm_rope(**t, rope=table.to(t["qkv"].device)),
            shapes,
        )
