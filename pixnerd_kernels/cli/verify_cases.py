"""The cases of `pixnerd verify`: each runs one op and its plain formula on the same inputs.

A case returns, for every output and gradient, the op's result, the plain formula's in float64 on the same,
already rounded inputs, and the error that the plain formula makes at the op's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pixnerd_kernels as pk
from pixnerd_kernels.cli import plain

#: S, D1, D2: pixels per patch, channels, hidden channels.
SIZES = ((1, 12, 20), (20, 16, 33), (196, 12, 72), (256, 64, 128))
OPTIONS: tuple[Mapping[str, Any], ...] = (
    {},
    {"activation": "gelu", "normalize": ("w1",), "residual": False},
    {"activation": "relu", "norm": False},
)
#: Rows, columns, K, scale ("rope" only).
GRIDS = ((1, 1, 2, (1.0, 1.0)), (4, 5, 4, (0.5, 1.0)), (14, 14, 8, (1.0, 1.0)), (16, 16, 8, (1.0, 1.0)))
KINDS = ("dct", "dct_integer", "dct_paper", "dct_aligned", "rope", "sincos")


@dataclass(frozen=True)
class Result:
    """One tensor of one case: what came out, the truth, and the error that plain PyTorch makes."""

    name: str
    out: Tensor
    truth: Tensor
    plain_error: float
    dtype: torch.dtype

    @property
    def error(self) -> float:
        return torch.linalg.vector_norm(self.out - self.truth).item()

    @property
    def relative(self) -> float:
        """||out - truth|| / ||truth||, or the absolute error where the truth is zero."""
        return self.error / (torch.linalg.vector_norm(self.truth).item() or 1.0)

    @property
    def of_bound(self) -> float:
        """The error as a fraction of 2 ||plain - truth|| + 4 eps ||truth||; a miss above 1 and at NaN."""
        bound = 2 * self.plain_error
        bound += 4 * torch.finfo(self.dtype).eps * torch.linalg.vector_norm(self.truth).item()
        return self.error / bound if bound > 0 else (0.0 if self.error == 0 else math.nan)


@dataclass(frozen=True)
class Case:
    """One call of an op; `run` gives the results for a device and a dtype.

    `kernel` is the op that `backends` knows: the packed form runs the kernels of the plain one.
    """

    op: str
    kernel: str
    label: str
    run: Callable[[torch.device, torch.dtype], list[Result]]


Function = Callable[..., Tensor]


def _evaluate(function: Function, inputs: dict[str, Tensor], upstream: Tensor) -> dict[str, Tensor]:
    """The output and the gradient of every input for this upstream gradient, as float64 on the CPU."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    out = function(**leaves)
    gradients = torch.autograd.grad(out, list(leaves.values()), upstream)
    named = {f"grad of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {name: t.detach().double().cpu() for name, t in {"output": out, **named}.items()}


def _expect(
    formula: Function, inputs: dict[str, Tensor], upstream: Tensor
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The truth of the output and every gradient, and the error of plain PyTorch at the op's dtype."""
    truth = _evaluate(formula, _cast(inputs, torch.float64), upstream.double().cpu())
    if upstream.dtype != torch.float64:
        return truth, _errors(_evaluate(formula, inputs, upstream), truth)
    # No wider type stands beside float64, but rounding errors are proportional to eps: what plain float64
    # makes is what plain float32 makes, scaled. The truth carries one such error too: 3 of them, not 2.
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    narrow = _cast(inputs, torch.float32)
    narrow_truth = _evaluate(formula, _cast(narrow, torch.float64), upstream.float().double().cpu())
    errors = _errors(_evaluate(formula, narrow, upstream.float().cpu()), narrow_truth)
    return truth, {name: 1.5 * ratio * error for name, error in errors.items()}


class Comparison:
    """Holds an op against its formula; what is expected is computed once for all backends."""

    def __init__(self, op: Function, formula: Function) -> None:
        self.op, self.formula = op, formula
        self.expected: dict[tuple[torch.device, torch.dtype], tuple[dict[str, Tensor], dict[str, float]]] = {}

    def __call__(self, inputs: dict[str, Tensor], upstream: Tensor) -> list[Result]:
        key = (upstream.device, upstream.dtype)
        if key not in self.expected:
            self.expected[key] = _expect(self.formula, inputs, upstream)
        truth, plain_error = self.expected[key]
        out = _evaluate(self.op, inputs, upstream)
        dtypes = {"output": upstream.dtype}
        dtypes |= {f"grad of {name}": tensor.dtype for name, tensor in inputs.items()}
        return [Result(name, out[name], truth[name], plain_error[name], dtypes[name]) for name in truth]


def _cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to("cpu", dtype) for name, tensor in inputs.items()}


def _errors(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    return {name: torch.linalg.vector_norm(results[name] - truth[name]).item() for name in truth}


def _field_case(size: tuple[int, int, int], gated: bool, packed: bool, options: Mapping[str, Any]) -> Case:
    pixels, channels, hidden = size
    patches = 2
    settings = {name: value for name, value in options.items() if name != "norm"}
    normed = options.get("norm", True)

    def weights(t: dict[str, Tensor]) -> pk.FieldParams:
        if packed:
            return pk.split_params(t["params"], channels, hidden, gated)
        return pk.FieldParams(t["w1"], t["w2"], t.get("w_gate"))

    def formula(**t: Tensor) -> Tensor:
        w1, w2, w_gate = weights(t)
        return plain.neural_field_mlp(
            t["x"], w1, w2, w_gate=w_gate, norm_weight=t.get("norm_weight"), **settings
        )

    def op(**t: Tensor) -> Tensor:
        if packed:
            return pk.neural_field_mlp_packed(**t, hidden=hidden, gated=gated, **settings)  # type: ignore[arg-type]
        return pk.neural_field_mlp(**t, **settings)  # type: ignore[arg-type]

    compare = Comparison(op, formula)

    def run(device: torch.device, dtype: torch.dtype) -> list[Result]:
        generator = torch.Generator().manual_seed(pixels * 1000 + channels + hidden)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        inputs = {"x": draw(patches, pixels, channels)}
        if packed:
            inputs["params"] = draw(patches, (3 if gated else 2) * channels * hidden)
        else:
            inputs["w1"], inputs["w2"] = draw(patches, channels, hidden), draw(patches, hidden, channels)
            if gated:
                inputs["w_gate"] = draw(patches, channels, hidden)
        if normed:
            inputs["norm_weight"] = 1 + draw(channels) / 4
        results = compare(inputs, draw(patches, pixels, channels))
        if options.get("activation") == "relu" and dtype.itemsize == 2:
            # relu's slope jumps at zero, where half types round some hidden values to either side: one of them is a
            # gradient's error of several percent. float32 tells whether the gradients are right.
            return [result for result in results if result.name == "output"]
        return results

    name = "neural_field_mlp_packed" if packed else "neural_field_mlp"
    label = f"S={pixels} D1={channels} D2={hidden}{' gated' if gated else ''} {dict(options) or ''}".rstrip()
    return Case(name, "neural_field_mlp", label, run)


def _weights_case(shape: tuple[int, ...], dim: int) -> Case:
    compare = Comparison(
        lambda w: pk.normalize_weights(w, dim), lambda w: plain.normalize_weights(w, dim, 1e-12)
    )

    def run(device: torch.device, dtype: torch.dtype) -> list[Result]:
        generator = torch.Generator().manual_seed(sum(shape))
        w, upstream = (
            torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(2)
        )
        return compare({"w": w}, upstream)

    return Case("normalize_weights", "normalize_weights", f"{list(shape)} dim={dim}", run)


def _encoding_case(kind: str, grid: tuple[int, int, int, tuple[float, float]]) -> Case:
    height, width, count, scale = grid
    factors = scale if kind == "rope" else None

    def run(device: torch.device, dtype: torch.dtype) -> list[Result]:
        out = pk.coordinate_encoding(
            height, width, count, kind, scale=factors, device=device, dtype=dtype
        )  # fmt: skip
        # The op promises float64 rounded once; the truth differs from `formula` by float64's rounding only.
        formula = plain.coordinate_encoding(height, width, count, kind, scale, linspace=False)
        truth = plain.coordinate_encoding(height, width, count, kind, scale)
        plain_error = torch.linalg.vector_norm(formula.to(dtype).double() - truth).item()
        return [Result("output", out.double().cpu(), truth, plain_error, dtype)]

    label = f"{kind} {height}x{width} K={count}"
    return Case("coordinate_encoding", "coordinate_encoding", label, run)


def cases() -> Iterator[Case]:
    """Every case: sizes x (gated or not) x (packed or not) under turning options, weights, encodings, blocks."""
    turn = 0
    for size in SIZES:
        for gated in (False, True):
            for packed in (False, True):
                yield _field_case(size, gated, packed, OPTIONS[turn % len(OPTIONS)])
                turn += 1
    for shape, dim in (((3, 12, 20), -2), ((3, 64, 128), -2), ((5, 33), 1), ((7,), 0)):
        yield _weights_case(shape, dim)
    for kind in KINDS:
        for grid in GRIDS:
            yield _encoding_case(kind, grid)
    from pixnerd_kernels.cli.verify_blocks import cases as block_cases

    yield from block_cases()
