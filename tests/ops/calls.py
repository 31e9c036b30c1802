"""What the tests of the transformer's ops share: a call, its plain formula, and what has to hold for every one."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from derivatives import BY_KERNELS, KINDS, assert_derivatives, jvp_along
from fields import drawn
from tolerance import assert_within
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pixnerd_kernels import use_backend

Tensors = dict[str, Tensor]
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def by_name(out: Any) -> Tensors:
    """One result or several as "out0" and so on."""
    return {f"out{i}": t for i, t in enumerate(out if isinstance(out, (tuple, list)) else (out,))}


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an op: the shapes of its tensors, the op, and the same formula in plain PyTorch.

    Both take the tensors by name and return one tensor or several. `weights` are drawn around 1 and keep float32 at
    half dtypes where `wide_weights`; `constants` get no gradient.
    """

    name: str
    op: Callable[..., Any]
    plain: Callable[..., Any]
    shapes: Mapping[str, tuple[int, ...]]
    weights: tuple[str, ...] = ()
    wide_weights: bool = False
    constants: Mapping[str, Tensor] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def inputs(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
        draw = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, shape in self.shapes.items():
            values = drawn(*shape, generator=draw)
            half = dtype in (torch.bfloat16, torch.float16)
            own = torch.float32 if name in self.weights and self.wide_weights and half else dtype
            tensors[name] = (1 + values / 4 if name in self.weights else values).to(own)
        return tensors

    def fixed(self) -> Tensors:
        """The constants on torch's default device."""
        return {name: tensor.to(torch.get_default_device()) for name, tensor in self.constants.items()}

    def outputs(self, function: Callable[..., Any], tensors: Tensors) -> Tensors:
        """The results by name, "out0" and so on."""
        return by_name(function(**tensors, **self.fixed()))

    def upstream(self, dtype: torch.dtype = torch.float32) -> Tensors:
        """The incoming gradients of all outputs."""
        shapes = {name: out.shape for name, out in self.outputs(self.plain, self.inputs()).items()}
        draw = torch.Generator().manual_seed(1)
        return {name: drawn(*shape, generator=draw).to(dtype) for name, shape in shapes.items()}

    def results(
        self, function: Callable[..., Any], tensors: Mapping[str, Tensor], upstream: Tensors
    ) -> Tensors:
        """Outputs and the gradient of every tensor, each a leaf that keeps its strides."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        out = self.outputs(function, leaves)
        gradients = torch.autograd.grad(tuple(out.values()), tuple(leaves.values()), tuple(upstream.values()))
        return {name: t.detach() for name, t in out.items()} | dict(zip(leaves, gradients, strict=True))

    def moving(self) -> tuple[str, ...]:
        """The tensors along which kernels know tangents: all but the weights."""
        return tuple(name for name in self.shapes if name not in self.weights)

    def along(self, dtype: torch.dtype = torch.float32, names: tuple[str, ...] | None = None) -> Tensors:
        """A tangent of each of these, or of all that move."""
        others = self.inputs(dtype, seed=2)
        return {name: others[name] for name in (self.moving() if names is None else names)}

    def jvp(
        self, function: Callable[..., Any], tensors: Mapping[str, Tensor], along: Tensors
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Values and tangents; what does not move is a constant."""
        return jvp_along(lambda named: tuple(self.outputs(function, named).values()), tensors, along)

    def tangents(self, function: Callable[..., Any], tensors: Tensors, along: Tensors) -> Tensors:
        """`jvp` by name: "out0", "tangent0" and so on."""
        values, tangents = self.jvp(function, tensors, along)
        named = {f"out{i}": t for i, t in enumerate(values)}
        named |= {f"tangent{i}": t for i, t in enumerate(tangents)}
        return {name: t.detach() for name, t in named.items()}

    def expected(self, tensors: Tensors, upstream: Tensors) -> tuple[Tensors, Tensors]:
        """The plain formula at the tensors' dtype, and in float64 (at float64 both are the same)."""
        wide = {name: t.double() for name, t in tensors.items()}
        wide_upstream = {name: t.double() for name, t in upstream.items()}
        return self.results(self.plain, tensors, upstream), self.results(self.plain, wide, wide_upstream)


@functools.lru_cache(maxsize=256)
def expected_tangents(
    call: Call, dtype: torch.dtype, names: tuple[str, ...] | None = None
) -> tuple[Tensors, Tensors]:
    """`Call.tangents` of the plain formula at the dtype, and in float64."""
    with torch.device("cpu"):
        each = call.inputs(dtype), call.along(dtype, names)
        wide = [{name: t.double() for name, t in tensors.items()} for tensors in each]
        return call.tangents(call.plain, *each), call.tangents(call.plain, *wide)


@functools.lru_cache(maxsize=256)
def expected(call: Call, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    """`Call.expected` of the call's own inputs, computed once for all backends."""
    with torch.device("cpu"):
        return call.expected(call.inputs(dtype), call.upstream(dtype))


def spread(tensor: Tensor) -> Tensor:
    """The same values in memory where no dimension is dense but the last, amid NaN."""
    if tensor.dim() < 2:
        return tensor
    room = tensor.new_full([size + 1 for size in tensor.shape], torch.nan)
    view = room[tuple(slice(0, size) for size in tensor.shape)]
    view.copy_(tensor)
    return view


def sparse(tensor: Tensor) -> Tensor:
    """The same values with every second element of memory in between."""
    return tensor.repeat_interleave(2, -1)[..., ::2]


SENTINEL = 12345.0
MARGIN = 256  # elements: what lies behind is aligned like a fresh allocation on a GPU


@contextlib.contextmanager
def between_sentinels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """What the ops allocate in here is NaN between sentinels, which have to be there at the end."""
    rooms: list[Tensor] = []

    def room(like, shape, dtype=None, device=None):
        options = {"dtype": dtype or like.dtype, "device": device or like.device}
        rooms.append(torch.full((math.prod(shape) + 2 * MARGIN,), SENTINEL, **options))
        inner = rooms[-1][MARGIN:-MARGIN]
        return inner.fill_(torch.nan).view(shape)

    def empty_like(like, *, dtype=None, device=None, memory_format=torch.contiguous_format):
        assert memory_format is torch.contiguous_format
        return room(like, tuple(like.shape), dtype, device)

    def new_empty(like, *shape, dtype=None, device=None):
        return room(like, tuple(shape[0]) if isinstance(shape[0], (tuple, list)) else shape, dtype, device)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", empty_like)
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        yield rooms
    for each in rooms:
        assert (each[:MARGIN] == SENTINEL).all()
        assert (each[-MARGIN:] == SENTINEL).all()


class _Recorder(TorchDispatchMode):
    """The pixnerd ops that run, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "pixnerd":
            self.seen.append((function, args))
        return function(*args, **(kwargs or {}))


class Matrix:
    """What holds for every op: a test module derives a class from this, and lists its calls in CALLS.

    `call` takes each of them; `first` is the module's first one.
    """

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_values_and_gradients(self, backend, call, dtype):
        out = call.results(call.op, call.inputs(dtype), call.upstream(dtype))
        assert_within(out, *expected(call, dtype))
        assert all(tensor.is_contiguous() for tensor in out.values())

    @pytest.mark.parametrize("layout", [spread, sparse], ids=lambda layout: layout.__name__)
    def test_strided(self, backend, call, layout):
        tensors = {name: layout(tensor) for name, tensor in call.inputs().items()}
        upstream = {name: layout(tensor) for name, tensor in call.upstream().items()}
        assert_within(call.results(call.op, tensors, upstream), *expected(call, torch.float32))

    @pytest.mark.float64
    def test_gradcheck(self, any_isa, call, threads):
        threads(1)  # hundreds of tiny calls
        leaves = {name: tensor.requires_grad_() for name, tensor in call.inputs(torch.float64).items()}

        def function(*tensors):
            return tuple(call.outputs(call.op, dict(zip(leaves, tensors, strict=True))).values())

        assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)

    @pytest.mark.parametrize("index", [0, 1])
    def test_opcheck(self, any_isa, calls, index):
        call = calls[index]
        leaves = {name: tensor.requires_grad_() for name, tensor in call.inputs().items()}
        with _Recorder() as recorder:
            call.results(call.op, leaves, call.upstream())
        assert [op.name().endswith("_backward") for op, _ in recorder.seen] == [False, True]
        for op, args in recorder.seen:
            backward = op.name().endswith("_backward")
            fresh = [
                a.detach().requires_grad_(not backward and a.requires_grad) if isinstance(a, Tensor) else a
                for a in args
            ]
            torch.library.opcheck(op, fresh)

    def test_only_the_results_are_written(self, backend, call, monkeypatch):
        """Results lie between sentinels and are filled with NaN beforehand; the inputs stay as they were."""
        tensors, upstream = call.inputs(), call.upstream()
        before = {name: tensor.clone() for name, tensor in (tensors | upstream).items()}
        plain = call.results(call.op, tensors, upstream)
        with between_sentinels(monkeypatch) as rooms:
            out = call.results(call.op, tensors, upstream)
        assert rooms or not backend.compiled
        for name, tensor in out.items():
            assert torch.equal(tensor, plain[name]), name
        for name, tensor in (tensors | upstream).items():
            assert torch.equal(tensor, before[name]), name

    def test_the_same_bits_on_any_number_of_threads(self, compiled, call, threads):
        threads(1)
        first = call.results(call.op, call.inputs(), call.upstream())
        for count in (2, 3):
            threads(count)
            out = call.results(call.op, call.inputs(), call.upstream())
            assert all(torch.equal(out[name], first[name]) for name in first)

    def test_nan_in_gives_nan_out(self, backend, first):
        for name in first.shapes:
            tensors = first.inputs()
            tensors[name].view(-1)[0] = torch.nan
            assert any(out.isnan().any() for out in first.outputs(first.op, tensors).values()), name

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    def test_derivatives(self, any_isa, call, kind, dtype):
        any_isa.may_idle = kind not in BY_KERNELS
        op, plain = (lambda f=f, **tensors: call.outputs(f, tensors).values() for f in (call.op, call.plain))
        assert_derivatives(kind, op, plain, call.inputs(dtype))

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_tangents(self, backend, call, dtype):
        """Of all that moves; a kernel computes them with the values."""
        out = call.tangents(call.op, call.inputs(dtype), call.along(dtype))
        assert any(name.endswith("_jvp") for name in backend.calls) == backend.compiled
        assert_within(out, *expected_tangents(call, dtype))
        assert all(tensor.is_contiguous() for tensor in out.values())

    def test_tangents_of_one_alone(self, backend, call):
        for name in call.moving():
            before = backend.calls.total()
            out = call.tangents(call.op, call.inputs(), call.along(names=(name,)))
            assert bool(backend.calls.total() - before) == backend.compiled
            assert_within(out, *expected_tangents(call, torch.float32, (name,)))

    @pytest.mark.parametrize("layout", [spread, sparse], ids=lambda layout: layout.__name__)
    def test_strided_tangents(self, backend, call, layout):
        each = ({name: layout(t) for name, t in tensors.items()} for tensors in (call.inputs(), call.along()))
        out = call.tangents(call.op, *each)
        assert any(name.endswith("_jvp") for name in backend.calls) == backend.compiled
        assert_within(out, *expected_tangents(call, torch.float32))

    def test_only_the_results_of_tangents_are_written(self, backend, call, monkeypatch):
        plain = call.tangents(call.op, call.inputs(), call.along())
        with between_sentinels(monkeypatch) as rooms:
            out = call.tangents(call.op, call.inputs(), call.along())
        assert rooms or not backend.compiled
        assert all(torch.equal(tensor, plain[name]) for name, tensor in out.items())

    def test_gradients_beside_tangents(self, backend, call):
        """Those of the values are the ops' own, bit for bit, and nothing is saved but the inputs."""
        tensors, upstream = call.inputs(), call.upstream()
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        along, constants, kept = call.along(), call.fixed(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            values, _ = call.jvp(lambda **tensors: call.op(**(tensors | constants)), leaves, along)
        own = {t.data_ptr() for t in (*leaves.values(), *along.values(), *constants.values())}
        assert kept
        assert {t.data_ptr() for t in kept} <= own
        found = torch.autograd.grad(values, tuple(leaves.values()), tuple(upstream.values()))
        expected = call.results(call.op, tensors, upstream)
        out = dict(zip(leaves, found, strict=True))
        if "gated_residual_rms_norm" in call.op.__name__ or not backend.one_kernel:
            assert_within(out, *({name: e[name] for name in out} for e in call.expected(tensors, upstream)))
        else:
            assert all(torch.equal(gradient, expected[name]) for name, gradient in out.items())

    @pytest.mark.float64
    def test_gradients_of_one_value_beside_tangents(self, any_isa, call):
        """What is not in the loss gets no gradient, or zero."""
        tensors, upstream = call.inputs(), call.upstream()
        count = len(upstream)
        for index in range(count):
            found = []
            for function in (call.op, call.plain):
                leaves = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
                values, _ = call.jvp(function, leaves, call.along(torch.float64))
                found.append(
                    torch.autograd.grad(
                        values[index], tuple(leaves.values()), upstream[f"out{index}"].double(), materialize_grads=True,
                        allow_unused=True,
                    )
                )  # fmt: skip
            for own, plain in zip(*found, strict=True):
                torch.testing.assert_close(own, plain, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("index", [0, 1])
    def test_opcheck_of_tangents(self, any_isa, calls, index):
        call = calls[index]
        with _Recorder() as recorder:
            call.tangents(call.op, call.inputs(), call.along())
        (jvp,) = [seen for seen in recorder.seen if seen[0].name().endswith("_jvp")]
        torch.library.opcheck(jvp[0], jvp[1])

    def test_tangents_of_another_dtype(self, any_isa, first):
        """As PyTorch's own functions take them."""
        any_isa.may_idle = True
        wide = {name: tensor.double() for name, tensor in first.along().items()}
        out, plain = (first.tangents(f, first.inputs(), wide) for f in (first.op, first.plain))
        for name, tensor in out.items():
            torch.testing.assert_close(tensor, plain[name], check_dtype=False, rtol=1e-4, atol=1e-5)

    def test_strides_of_tangents_alone(self, any_isa, first):
        """The op itself, whose tangents lie in memory as they please, amid NaN, beside dense values."""
        with _Recorder() as recorder:
            first.tangents(first.op, first.inputs(), first.along())
        (jvp,) = [seen for seen in recorder.seen if seen[0].name().endswith("_jvp")]
        named = [argument.name for argument in jvp[0]._schema.arguments]
        for layout in (spread, sparse):
            moved = [
                layout(value) if name.endswith("_tangent") and value is not None else value
                for name, value in zip(named, jvp[1], strict=True)
            ]
            for own, dense in zip(jvp[0](*moved), jvp[0](*jvp[1]), strict=True):
                assert torch.equal(own, dense)

    def test_tangents_that_do_not_fit(self, any_isa, first):
        any_isa.may_idle = True
        with _Recorder() as recorder:
            first.tangents(first.op, first.inputs(), first.along())
        (jvp,) = [seen for seen in recorder.seen if seen[0].name().endswith("_jvp")]
        for i, name in enumerate(jvp[0]._schema.arguments):
            if name.name.endswith("_tangent") and jvp[1][i] is not None:
                for wrong in (jvp[1][i][..., :-1], jvp[1][i].double()):
                    with pytest.raises(ValueError, match=f"tangent of {name.name.removesuffix('_tangent')}"):
                        jvp[0](*jvp[1][:i], wrong, *jvp[1][i + 1 :])

    def test_tangents_compile(self, core_calls, first):
        """Under torch.compile the op of tangents is in the one graph."""
        torch.compiler.reset()
        fixed = first.fixed()

        def step(tensors, along):
            return jvp_along(
                lambda named: tuple(by_name(first.op(**named, **fixed)).values()), tensors, along
            )

        arguments = first.inputs(), first.along()
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
        expected = step(*arguments)
        for own, eager in zip(found, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(own, eager, strict=True))
        assert sum(count for name, count in core_calls.items() if name.endswith("_jvp")) == 2
        torch.compiler.reset()

    def test_autocast(self, any_isa, first):
        """Inputs are cast first, weights are not, and gradients come back in the inputs' own dtypes."""
        tensors, upstream = first.inputs(), first.upstream(torch.bfloat16)
        half = {name: t if name in first.weights else t.bfloat16() for name, t in tensors.items()}
        by_hand = first.results(first.op, half, upstream)
        with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
            out = first.results(first.op, tensors, upstream)
        for name, tensor in out.items():
            assert tensor.dtype == (tensors[name].dtype if name in tensors else torch.bfloat16)
            assert torch.equal(tensor, by_hand[name].to(tensor.dtype)), name

    def test_backward_takes_the_backend_of_its_forward(self, core_calls, first):
        for name in ("cpu", "reference"):
            core_calls.clear()
            leaves = {name: tensor.requires_grad_() for name, tensor in first.inputs().items()}
            with use_backend(name):
                out = first.outputs(first.op, leaves)
            with use_backend("reference" if name == "cpu" else "cpu"):
                torch.autograd.backward(tuple(out.values()), tuple(first.upstream().values()))
            assert core_calls.total() == (2 if name == "cpu" else 0)

    def test_compile(self, core_calls, calls):
        """One graph without breaks, for shape after shape."""
        torch.compiler.reset()
        compiled = {}
        for call in calls[:3]:
            if call.op not in compiled:
                compiled[call.op] = torch.compile(call.op, fullgraph=True, backend="aot_eager")
            out = call.results(compiled[call.op], call.inputs(), call.upstream())
            eager = call.results(call.op, call.inputs(), call.upstream())
            assert all(torch.equal(out[name], eager[name]) for name in eager)
        assert core_calls.total() == 4 * len(calls[:3])
        torch.compiler.reset()

    def test_export(self, any_isa, first):
        """The exported program holds the op, and runs on another batch size."""

        fixed = first.fixed()

        class Block(torch.nn.Module):
            def forward(self, tensors):
                return tuple(by_name(first.op(**tensors, **fixed)).values())

        tensors = first.inputs()
        shapes = {name: None if name in first.weights else {0: torch.export.Dim.AUTO} for name in tensors}
        program = torch.export.export(Block(), (tensors,), dynamic_shapes=(shapes,))
        assert any("pixnerd" in str(node.target) for node in program.graph.nodes)
        more = {
            name: t if name in first.weights else torch.cat([t, t.flip(0)]) for name, t in tensors.items()
        }
        expected = first.outputs(first.op, more).values()
        for out, eager in zip(program.module()(more), expected, strict=True):
            assert torch.equal(out, eager)
