"""neural_field_mlp in forward mode, where a kernel computes the value and its tangent: against float64, and around."""

import functools

import pytest
import torch
from derivatives import KINDS, assert_derivatives, value_and_tangent
from fields import ALL, FLOATS, Case, fused_field, pack, packed_field, packed_inputs, plain_field
from tolerance import assert_within
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad

from pixnerd_kernels import neural_field_mlp, use_backend
from pixnerd_kernels.ops.neural_field_mlp import cpu, reference

SIZES = [
    Case(s=1, d1=12, d2=24),
    Case(s=20, d1=16, d2=50, gated=True),
    Case(s=196, d1=64, d2=24, norm="fp32"),
    Case(n=2, s=256, d1=64, d2=128),
    Case(n=1, s=256, d1=64, d2=256, gated=True, norm="fp32"),
    Case(n=7, s=5, d1=3, d2=9, gated=True, norm=None),
]
OPTIONS = [
    Case(activation="gelu", norm=None),
    Case(activation="relu", gated=True),
    Case(activation="gelu", gated=True, residual=False, norm="fp32"),
    Case(normalize=()),
    Case(normalize=("w2",), norm=None, residual=False),
    Case(normalize=("w_gate",), gated=True),
    Case(normalize=("w2", "w1"), gated=True, norm="fp32"),
    Case(norm_eps=0.5, weight_eps=0.25),
]
MOVING = {"everything": ("x", *ALL), "pixels": ("x",), "weights": ALL}
moving = pytest.mark.parametrize("moving", MOVING)


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def along(case, tensors, names, seed=2):
    """A tangent for each tensor of these names."""
    others = case.inputs(tensors["x"].dtype, seed)
    return {name: others[name] for name in names if name in tensors}


def tangents(function, tensors, moving):
    """`value_and_tangent` of a function that takes the tensors as keywords."""
    return value_and_tangent(lambda named: function(**named), tensors, moving)


def reverse(tensor):
    return tensor.flip(tuple(range(tensor.dim())))


@functools.lru_cache(maxsize=64)
def expected(case, names, dtype):
    """Of the plain formula at the dtype, and in float64 with every sum in the opposite order."""
    with torch.device("cpu"):
        tensors = case.inputs(dtype)
        moving = along(case, tensors, names)
    plain = functools.partial(plain_field, case)
    wide = [{name: reverse(t.double()) for name, t in each.items()} for each in (tensors, moving)]
    return tangents(plain, tensors, moving), {name: reverse(t) for name, t in tangents(plain, *wide).items()}


def assert_case(case, names, dtype, backend, form=fused_field):
    tensors = case.inputs(dtype)
    moving = along(case, tensors, names)
    if form is packed_field:
        weights = {name: t for name, t in moving.items() if name in ALL}
        moving = {name: t for name, t in moving.items() if name == "x"}
        tensors, moving = packed_inputs(tensors), moving | ({"params": pack(**weights)} if weights else {})
    out = tangents(functools.partial(form, case), tensors, moving)
    assert bool(backend.calls["neural_field_mlp_jvp"]) == backend.compiled
    assert_within(out, *expected(case, names, dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
@moving
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_jvp_of_sizes(backend, case, moving, dtype):
    assert_case(case, MOVING[moving], dtype, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@moving
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_jvp_of_options(backend, case, moving, dtype):
    assert_case(case, MOVING[moving], dtype, backend)


@moving
@pytest.mark.parametrize("case", [SIZES[0], SIZES[1]], ids=str)
def test_jvp_of_packed_parameters(backend, case, moving):
    assert_case(case, MOVING[moving], torch.float32, backend, packed_field)


@pytest.mark.parametrize("case", [Case(d1=1, d2=5, norm=None), Case(d1=7, d2=1, gated=True)], ids=str)
def test_jvp_of_columns_of_one_number(backend, case):
    """A normalised number is its sign, and does not move."""
    name = "w1" if case.d1 == 1 else "w2"
    tensors = case.inputs()
    moving = along(case, tensors, [name])
    out = tangents(functools.partial(fused_field, case), tensors, moving)
    assert torch.equal(out["dy"], torch.zeros_like(out["dy"]))


def test_jvp_of_one_weight_alone(backend):
    case = Case(gated=True)
    assert_case(case, ("w2",), torch.float32, backend)


def test_jvp_of_views(backend):
    """Kernels read rows whose neighbours are neighbours in memory; of tangents too."""
    case = Case(gated=True)
    tensors = case.inputs()
    moving = along(case, tensors, ("x", *ALL))
    apart = [
        {name: t.mT.contiguous().mT for name, t in each.items() if t.dim() > 1} for each in (tensors, moving)
    ]
    out = tangents(functools.partial(fused_field, case), tensors | apart[0], apart[1])
    assert_within(out, *expected(case, ("x", *ALL), torch.float32))


def test_jvp_of_nothing(backend):
    backend.may_idle = True
    case = Case(n=0)
    out = tangents(
        functools.partial(fused_field, case), case.inputs(), along(case, case.inputs(), ("x", *ALL))
    )
    assert out["dy"].shape == out["y"].shape == (0, case.s, case.d1)


def test_jvp_has_the_same_bits_on_any_number_of_threads(compiled):
    case, results = Case(n=1, s=256), []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            results.append(
                tangents(
                    functools.partial(fused_field, case),
                    case.inputs(),
                    along(case, case.inputs(), ("x", *ALL)),
                )
            )
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(one[name], results[0][name]) for one in results for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("form", [fused_field, packed_field], ids=["separate", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_jvp_derivatives(any_isa, kind, form, dtype):
    """With a norm whose weight is a constant, in the direction of which the formula alone can go."""
    any_isa.may_idle = True
    case = Case(s=5, d1=4, d2=6, gated=True)
    tensors = case.inputs(dtype)
    norm_weight = tensors.pop("norm_weight")
    if form is packed_field:
        tensors = packed_inputs(tensors)

    def plain(params=None, **tensors):
        weights = {}
        if params is not None:
            gate, w1, w2 = params.split(case.d1 * case.d2, 1)
            wide, tall = (case.n, case.d1, case.d2), (case.n, case.d2, case.d1)
            weights = {"w_gate": gate.view(wide), "w1": w1.view(wide), "w2": w2.view(tall)}
        return (plain_field(case, **tensors, **weights, norm_weight=norm_weight.to(tensors["x"].dtype)),)

    assert_derivatives(
        kind, lambda **tensors: (form(case, **tensors, norm_weight=norm_weight),), plain, tensors
    )


def test_jvp_keeps_only_its_inputs(any_isa):
    case = Case(gated=True, norm="fp32")
    leaves = {name: tensor.requires_grad_() for name, tensor in case.inputs().items()}
    moving = along(case, leaves, ("x", *ALL))
    known = {t.untyped_storage().data_ptr() for t in (*leaves.values(), *moving.values())}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = tangents(
            functools.partial(fused_field, case), leaves, {n: t.detach() for n, t in moving.items()}
        )
    assert saved
    assert {t.untyped_storage().data_ptr() for t in saved} <= known
    out["y"].sum().backward()


def test_the_value_has_the_kernel_s_own_gradients(any_isa):
    """Where the tangent is part of a target: as without a tangent, bit for bit."""
    case = Case(gated=True, norm="fp32")
    leaves = {name: tensor.requires_grad_() for name, tensor in case.inputs().items()}
    moving = along(case, leaves, ("x", *ALL))
    y = tangents(functools.partial(fused_field, case), leaves, moving)["y"]
    found = torch.autograd.grad(y, list(leaves.values()), case.upstream())
    by_itself = torch.autograd.grad(fused_field(case, **leaves), list(leaves.values()), case.upstream())
    assert all(torch.equal(a, b) for a, b in zip(found, by_itself, strict=True))
    assert any_isa.calls["neural_field_mlp_backward"] == 2 * any_isa.compiled


def test_jvp_by_dual_numbers_takes_the_kernel(any_isa):
    case = Case()
    tensors = case.inputs()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(tensors["x"], case.inputs(seed=2)["x"])
        y = fused_field(case, **tensors | {"x": dual})
        out = dict(zip(("y", "dy"), forward_ad.unpack_dual(y), strict=True))
    assert bool(any_isa.calls["neural_field_mlp_jvp"]) == any_isa.compiled
    assert_within(out, *expected(case, ("x",), torch.float32))


@pytest.mark.parametrize("used", ["neither", "value", "tangent"])
def test_results_of_a_jvp_that_get_no_gradient(any_isa, used):
    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    case = Case()
    leaves = {name: tensor.requires_grad_() for name, tensor in case.inputs().items()}
    out = tangents(functools.partial(fused_field, case), leaves, along(case, leaves, ("x",)))
    parts = {"value": out["y"], "tangent": out["dy"]}
    total = sum((part if name == used else NoGradient.apply(part)).sum() for name, part in parts.items())
    (total + leaves["w1"].sum()).backward()
    assert (leaves["w2"].grad is None) == (used == "neither")
    if used == "neither":
        assert torch.equal(leaves["w1"].grad, torch.ones_like(leaves["w1"]))


@pytest.mark.parametrize("forward", [fused_field, packed_field], ids=["separate", "packed"])
def test_vectorised_jacobians_in_forward_mode(any_isa, forward):
    """Their tangents are batched, which no kernel reads."""
    any_isa.may_idle = True
    case = Case(n=1, s=2, d1=3, d2=4)
    tensors = {name: t.double() for name, t in case.inputs().items()}
    if forward is packed_field:
        tensors = packed_inputs(tensors)
    rest = {name: t for name, t in tensors.items() if name != "x"}

    def run(x):
        return forward(case, x=x, **rest)

    found = torch.autograd.functional.jacobian(run, tensors["x"], strategy="forward-mode", vectorize=True)
    torch.testing.assert_close(found, torch.autograd.functional.jacobian(run, tensors["x"]))


def test_jvp_under_autocast(any_isa):
    """Tangents are cast with what they belong to."""
    case, device = Case(gated=True, norm="fp32"), torch.get_default_device().type
    tensors = case.inputs()
    moving = along(case, tensors, ("x", *ALL))
    half = [
        {n: t if n == "norm_weight" else t.bfloat16() for n, t in each.items()} for each in (tensors, moving)
    ]
    by_hand = tangents(functools.partial(fused_field, case), *half)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = tangents(functools.partial(fused_field, case), tensors, moving)
    assert all(torch.equal(out[name], by_hand[name]) for name in by_hand)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_jvp_compiles_as_one_graph(any_isa, fresh_compiler):
    """With aot_eager, which leaves the op as it is."""
    case = Case(gated=True)
    tensors = case.inputs()
    moving = along(case, tensors, ("x", *ALL))
    graphs = []

    def look(graph, _):
        graphs.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiler = aot_autograd(fw_compiler=look)
    run = functools.partial(tangents, functools.partial(fused_field, case))
    out = torch.compile(run, fullgraph=True, backend=compiler)(tensors, moving)
    assert_within(out, *expected(case, ("x", *ALL), torch.float32))
    assert "pixnerd.neural_field_mlp_jvp.default" in graphs


@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_opcheck_jvp(any_isa, packed):
    case = Case(s=5, d1=4, d2=6, gated=True)
    tensors = case.inputs()
    moving = along(case, tensors, ("x", *ALL))
    options = ([True] * 3, "silu", True, 1e-6, 1e-12, any_isa.name)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    if packed:
        params = packed_inputs({name: t.detach() for name, t in tensors.items()})["params"].requires_grad_()
        weights = (leaves["x"], params, leaves["norm_weight"], case.d2, True)
        arguments = (*weights, moving.pop("x"), pack(**moving), *options)
        op = torch.ops.pixnerd.neural_field_mlp_packed_jvp
    else:
        names = ("x", "w1", "w2", "w_gate")
        arguments = (*(leaves[n] for n in (*names, "norm_weight")), *(moving[n] for n in names), *options)
        op = torch.ops.pixnerd.neural_field_mlp_jvp
    torch.library.opcheck(op.default, arguments)


def test_jvp_of_a_float32_input_with_half_weights(compiled):
    """As the decoder runs its blocks."""
    case = Case(gated=True)
    tensors, moving = case.inputs(), along(case, case.inputs(), ("x", *ALL))
    half = [{n: t.bfloat16() if n in ALL else t for n, t in each.items()} for each in (tensors, moving)]
    names = ("x", "w1", "w2", "w_gate")
    arguments = [half[0][n] for n in (*names, "norm_weight")] + [half[1][n] for n in names]
    options = ([True] * 3, "silu", True, 1e-6, 1e-12)
    wide = [t.double() for t in arguments]
    out, plain, exact = (
        dict(zip(("y", "dy"), call, strict=True))
        for call in (
            cpu.jvp(*arguments, *options),
            reference.jvp(*(t.float() for t in arguments), *options),
            reference.jvp(*wide, *options),
        )
    )
    assert_within(out, plain, exact)


def test_what_a_kernel_would_read_out_of_bounds_is_refused(compiled):
    case = Case()
    compiled.may_idle = True
    tensors = case.inputs()
    call = [tensors["x"], tensors["w1"], tensors["w2"], None, tensors["norm_weight"]]
    options = ([True] * 3, "silu", True, 1e-6, 1e-12, "cpu")
    op = torch.ops.pixnerd.neural_field_mlp_jvp
    for wrong in (tensors["x"][:, 1:], tensors["x"].double(), tensors["x"][:1]):
        with pytest.raises(ValueError, match="tangent of x: expected"):
            op(*call, wrong, None, None, None, *options)
    with pytest.raises(ValueError, match="all or none"):
        op(*call, None, tensors["w1"], None, None, *options)
    with pytest.raises(ValueError, match="a tangent of x or of the weights, got none"):
        op(*call, None, None, None, None, *options)
    wide = [None if t is None else t.double() for t in call]
    with pytest.raises(ValueError, match="w1: expected"):
        op(call[0], *wide[1:], call[0], None, None, None, *options)
    with pytest.raises(ValueError, match="w1: expected"):
        op(wide[0], *call[1:], wide[0], None, None, None, *options)
    params = packed_inputs(tensors)["params"]
    packed = torch.ops.pixnerd.neural_field_mlp_packed_jvp
    with pytest.raises(ValueError, match="tangent of params: expected"):
        packed(call[0], params, call[4], case.d2, False, None, params[:, :-7], *options)
    with pytest.raises(ValueError, match="tangent of w_gate: expected None"):
        op(*call, tensors["x"], tensors["w1"], tensors["w2"], tensors["w1"], *options)


def test_a_deeper_transform_takes_the_formula(core_calls):
    """A tangent of a tangent."""
    case = Case()
    tensors = case.inputs()
    rest = {name: t for name, t in tensors.items() if name != "x"}

    def tangent(function):
        return lambda x: torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]

    with use_backend("cpu"):
        found = tangent(tangent(lambda x: neural_field_mlp(x, **rest)))(tensors["x"])
    exact = {name: t.double() for name, t in rest.items()}
    expected = tangent(tangent(lambda x: plain_field(case, x, **exact)))(tensors["x"].double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert not core_calls
