"""Neural fields for the tests: sizes and options of a case, its inputs, and the formula in plain PyTorch."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from tolerance import assert_within
from torch import Tensor

from pixnerd_kernels import neural_field_mlp, neural_field_mlp_packed

ALL = ("w1", "w2", "w_gate")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
}
Tensors = dict[str, Tensor]


def _norm_at_eps() -> float:
    """The least norm, in eps, that F.normalize differentiates: 1 up to torch 2.13, from 2.14 on what is above it."""
    tie = torch.tensor(0.25, requires_grad=True)
    (slope,) = torch.autograd.grad(tie.clamp_min(0.25), tie)
    return 1.0 if slope else 1.0 + 2**-20


AT_LEAST_EPS = _norm_at_eps()


def drawn(*shape: int, generator: torch.Generator) -> Tensor:
    """Normal numbers in float64, the same on every device, on torch's default one."""
    numbers = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
    return numbers.to(torch.get_default_device())


@dataclass(frozen=True)
class Case:
    """N patches of S pixels, D1 channels, D2 hidden; `norm` is None, "same" (x's dtype) or "fp32"."""

    n: int = 3
    s: int = 20
    d1: int = 16
    d2: int = 24
    gated: bool = False
    norm: str | None = "same"
    activation: str = "silu"
    normalize: tuple[str, ...] = ALL
    residual: bool = True
    norm_eps: float = 1e-6
    weight_eps: float = 1e-12

    def __str__(self) -> str:
        """The test's name: the sizes, and what is not the default."""
        parts = [f"{self.n}x{self.s}x{self.d1}x{self.d2}"]
        for option in fields(self)[4:]:
            value = getattr(self, option.name)
            if value != option.default:
                value = "+".join(value) or "none" if isinstance(value, tuple) else value
                parts.append(f"{option.name}={value}")
        return "-".join(parts)

    @property
    def options(self) -> dict:
        names = ("activation", "normalize", "residual", "norm_eps", "weight_eps")
        return {name: getattr(self, name) for name in names}

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
        """Random x, w1, w2, and w_gate and norm_weight where the case has them."""
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
            return drawn(*shape, generator=draw).to(to)

        tensors = {
            "x": normal(self.n, self.s, self.d1),
            "w1": normal(self.n, self.d1, self.d2) * self.d1**-0.5,
            "w2": normal(self.n, self.d2, self.d1) * self.d2**-0.5,
        }
        if self.gated:
            tensors["w_gate"] = normal(self.n, self.d1, self.d2) * self.d1**-0.5
        if self.norm:
            tensors["norm_weight"] = (
                1 + normal(self.d1, to=torch.float32 if self.norm == "fp32" else dtype) / 4
            )
        return tensors

    def upstream(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
        """The incoming gradient."""
        draw = torch.Generator().manual_seed(seed)
        return drawn(self.n, self.s, self.d1, generator=draw).to(dtype)

    def with_(self, **changes) -> "Case":
        return replace(self, **changes)


def plain_field(case: Case, x, w1, w2, w_gate=None, norm_weight=None) -> Tensor:
    """The block as one writes it in PyTorch, at the dtype of its inputs."""

    def scaled(name: str, w: Tensor) -> Tensor:
        return F.normalize(w, dim=-2, eps=case.weight_eps) if name in case.normalize else w

    n = x
    if norm_weight is not None:
        n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + case.norm_eps)
        n = (n * norm_weight).to(x.dtype)
    act = ACTIVATIONS[case.activation]
    z = torch.bmm(n, scaled("w1", w1))
    h = act(z) if w_gate is None else act(torch.bmm(n, scaled("w_gate", w_gate))) * z
    y = torch.bmm(h, scaled("w2", w2))
    return x + y if case.residual else y


def fused_field(case: Case, **tensors: Tensor) -> Tensor:
    return neural_field_mlp(**tensors, **case.options)


def pack(w1: Tensor, w2: Tensor, w_gate: Tensor | None = None) -> Tensor:
    """The packed parameters: w1, w2, or w_gate, w1, w2."""
    matrices = [w1, w2] if w_gate is None else [w_gate, w1, w2]
    return torch.cat([matrix.flatten(1) for matrix in matrices], 1)


def packed_field(case: Case, *, x: Tensor, params: Tensor, norm_weight: Tensor | None = None) -> Tensor:
    return neural_field_mlp_packed(
        x, params, hidden=case.d2, gated=case.gated, norm_weight=norm_weight, **case.options
    )


def packed_inputs(tensors: Mapping[str, Tensor]) -> Tensors:
    """The same inputs for `packed_field`."""
    weights = {name: tensor for name, tensor in tensors.items() if name in ALL}
    rest = {name: tensor for name, tensor in tensors.items() if name not in ALL}
    return {**rest, "params": pack(**weights)}


def results(function: Callable[..., Tensor], tensors: Mapping[str, Tensor], upstream: Tensor) -> Tensors:
    """The output "y" and the gradient of every input, each input a leaf that keeps its strides."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    y = function(**leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def plain_and_exact(case: Case, tensors: Tensors, upstream: Tensor) -> tuple[Tensors, Tensors]:
    """Results of the plain formula at the inputs' dtype, and in float64.

    For float64, every dimension is reversed, so that each sum runs in the opposite order: at float64 too, plain and
    exact then differ by what rounding does.
    """

    def reverse(tensor: Tensor) -> Tensor:
        return tensor.flip(tuple(range(tensor.dim())))

    def plain(**leaves: Tensor) -> Tensor:
        return plain_field(case, **leaves)

    reversed_tensors = {name: reverse(tensor).double() for name, tensor in tensors.items()}
    exact = results(plain, reversed_tensors, reverse(upstream).double())
    return results(plain, tensors, upstream), {name: reverse(tensor) for name, tensor in exact.items()}


@functools.lru_cache(maxsize=128)
def expected(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensors, Tensors]:
    """`plain_and_exact` of the case's own inputs, computed once for all backends."""
    with torch.device("cpu"):
        return plain_and_exact(case, case.inputs(dtype), case.upstream(dtype))


def assert_case_within(case: Case, dtype: torch.dtype, out: Tensors) -> None:
    """Results on the case's own inputs lie within the tolerance.

    A normalised number is its sign: its gradient is zero, up to the rounding of what cancels.
    """
    with torch.device("cpu"):
        tensors, upstream = case.inputs(dtype), case.upstream(dtype)
    plain, exact = expected(case, dtype)
    unit = {name: F.normalize(w, dim=-2) if name in ALL else w for name, w in tensors.items()}
    _, unscaled = plain_and_exact(case.with_(normalize=()), unit, upstream)
    for name, tensor in out.items():
        if name in ALL and tensor.shape[1] == 1:
            cancelling = (unscaled[name] / tensors[name].double()).norm()
            limit = 2 * (plain[name].double() - exact[name]).norm() + 4 * torch.finfo(dtype).eps * cancelling
            assert (tensor.double().cpu() - exact[name]).norm() <= limit, name
        else:
            assert_within({name: tensor}, {name: plain[name]}, {name: exact[name]})
