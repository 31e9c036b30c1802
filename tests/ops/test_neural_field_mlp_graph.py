"""neural_field_mlp under autograd, autocast, opcheck, torch.compile and torch.export."""

import threading

import pytest
import torch
from derivatives import BY_KERNELS, KINDS, assert_derivatives
from fields import Case, expected, fused_field, packed_field, packed_inputs, plain_field, results
from tolerance import assert_same, assert_within

from pixnerd_kernels import neural_field_mlp, split_params, use_backend

CASES = [
    Case(s=5, d1=4, d2=6),
    Case(s=5, d1=4, d2=6, gated=True, norm="fp32"),
    Case(s=5, d1=4, d2=6, norm=None),
]
FORMS = {"separate": fused_field, "packed": packed_field}
cases = pytest.mark.parametrize("case", CASES, ids=str)
forms = pytest.mark.parametrize("form", FORMS)


def inputs_of(form, case, dtype=torch.float32):
    return case.inputs(dtype) if form == "separate" else packed_inputs(case.inputs(dtype))


def leaves_of(form, case):
    return {name: tensor.requires_grad_() for name, tensor in inputs_of(form, case).items()}


def other(backend):
    return "cpu" if backend.name == "reference" else "reference"


def op_arguments(form, case, dtype, forced):
    """Arguments of the registered op, up to the options, and the options."""
    tensors = inputs_of(form, case, dtype)
    norm_weight = tensors.get("norm_weight")
    if form == "separate":
        weights = (tensors["w1"], tensors["w2"], tensors.get("w_gate"), norm_weight)
    else:
        weights = (tensors["params"], norm_weight, case.d2, case.gated)
    options = ([name in case.normalize for name in ("w1", "w2", "w_gate")], case.activation, case.residual)
    return (tensors["x"], *weights), (*options, case.norm_eps, case.weight_eps, forced)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@cases
@forms
def test_opcheck(any_isa, form, case, dtype):
    tensors, options = op_arguments(form, case, dtype, any_isa.name)
    leaves = [t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in tensors]
    op = "neural_field_mlp" if form == "separate" else "neural_field_mlp_packed"
    torch.library.opcheck(getattr(torch.ops.pixnerd, op).default, (*leaves, *options))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
@cases
@forms
def test_opcheck_backward(any_isa, form, case, needs):
    tensors, options = op_arguments(form, case, torch.float32, any_isa.name)
    op = "neural_field_mlp_backward" if form == "separate" else "neural_field_mlp_packed_backward"
    torch.library.opcheck(
        getattr(torch.ops.pixnerd, op).default, (case.upstream(), *tensors, *needs, *options)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@cases
@forms
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives(any_isa, form, case, kind, dtype):
    any_isa.may_idle = kind not in BY_KERNELS

    def op(**tensors):
        return (FORMS[form](case, **tensors),)

    def plain(params=None, **tensors):
        weights = {} if params is None else split_params(params, case.d1, case.d2, case.gated)._asdict()
        return (plain_field(case, **tensors, **weights),)

    assert_derivatives(kind, op, plain, inputs_of(form, case, dtype))


def test_gradients_that_depend_on_nothing_have_gradients_of_zero(any_isa):
    """Those of a linear function."""
    x, w1, w2 = torch.randn(2, 4, 3), torch.randn(2, 3, 5), torch.randn(2, 5, 3)
    scale = torch.ones(3, requires_grad=True)
    h = x * scale
    y = neural_field_mlp(h, w1, w2, activation="relu", normalize=())
    (g,) = torch.autograd.grad(y.sum(), h, create_graph=True)
    assert torch.equal(torch.autograd.grad(g.square().sum(), scale)[0], torch.zeros(3))


def test_the_result_is_contiguous_by_every_way(backend):
    """Also where the pixels are not: the kernels', the reference's, and that of forward mode."""
    x, w1, w2 = torch.randn(2, 8, 4).mT, torch.randn(2, 8, 3), torch.randn(2, 3, 8)
    assert neural_field_mlp(x, w1, w2).is_contiguous()
    out, tangent = torch.func.jvp(lambda x: neural_field_mlp(x, w1, w2).view(-1), (x,), (x,))
    assert out.shape == tangent.shape == (64,)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same thread", "another thread"])
@forms
def test_backward_takes_the_backend_of_its_forward(any_isa, core, form, elsewhere):
    """After the block, in another block, and on another thread."""
    case = CASES[0]
    leaves = leaves_of(form, case)
    y = FORMS[form](case, **leaves)
    upstream, before = case.upstream(), any_isa.calls["neural_field_mlp_backward"]

    def backward():
        with use_backend(other(any_isa)):
            y.backward(upstream)

    if elsewhere:
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    else:
        backward()
    assert leaves["x"].grad is not None
    assert any_isa.calls["neural_field_mlp_backward"] - before == any_isa.compiled


@pytest.mark.parametrize("wide", [torch.float32, torch.float16], ids=["float32", "float16"])
@forms
def test_autocast(backend, form, wide):
    """Inputs are cast first: the output is bfloat16, and gradients come back in the inputs' own dtypes."""
    case = Case(gated=True, norm="fp32")
    tensors = inputs_of(form, case, wide)
    upstream = case.upstream(torch.bfloat16)
    half = {name: t if name == "norm_weight" else t.bfloat16() for name, t in tensors.items()}
    by_hand = results(lambda **leaves: FORMS[form](case, **leaves), half, upstream)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        out = results(lambda **leaves: FORMS[form](case, **leaves), tensors, upstream)
    assert out["y"].dtype == torch.bfloat16
    for name, tensor in out.items():
        assert name == "y" or tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, by_hand[name].to(tensor.dtype)), name


@pytest.mark.float64
def test_autocast_leaves_float64_alone(any_isa):
    case = Case()
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        out = results(
            lambda **leaves: fused_field(case, **leaves),
            case.inputs(torch.float64),
            case.upstream(torch.float64),
        )
    assert_within(out, *expected(case, torch.float64))


SHAPES = [Case(n=2, s=20, d1=16, d2=24), Case(n=3, s=7, d1=16, d2=24), Case(n=5, s=33, d1=12, d2=50)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_compiled_equals_eager(function, form, case, dtype=torch.float32, bits=True):
    def eager(**leaves):
        return FORMS[form](case, **leaves) * 2

    tensors, upstream = inputs_of(form, case), case.upstream(dtype)
    out = results(lambda **leaves: function(case, **leaves), tensors, upstream)
    by_hand = results(eager, tensors, upstream)

    def references():
        whole = expected(case, dtype) if form == "separate" else map(packed_inputs, expected(case, dtype))
        return tuple({name: 2 * tensor for name, tensor in each.items()} for each in whole)

    assert_same(out, by_hand, bits, references)


def doubled(form):
    return lambda case, **leaves: FORMS[form](case, **leaves) * 2


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dynamic", [None, True], ids=["shapes as they come", "dynamic shapes"])
@forms
def test_compile_with_aot_eager(any_isa, form, dynamic, gated):
    function = torch.compile(doubled(form), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for case in SHAPES:
        assert_compiled_equals_eager(function, form, case.with_(gated=gated))


@pytest.mark.parametrize("form", ["packed"])
def test_compile_with_inductor(any_isa, form):
    function = torch.compile(doubled(form), fullgraph=True)
    case = Case(gated=True, norm="fp32")
    assert_compiled_equals_eager(function, form, case, bits=any_isa.one_kernel)


def test_compile_of_views_of_packed_parameters(any_isa):
    case = Case(gated=True)
    inputs, upstream = packed_inputs(case.inputs()), case.upstream()

    def block(x, params, norm_weight):
        w_gate, w1, w2 = params.chunk(3, 1)
        weights = {
            "w1": w1.view(case.n, case.d1, case.d2),
            "w2": w2.view(case.n, case.d2, case.d1),
            "w_gate": w_gate.view(case.n, case.d1, case.d2),
        }
        return neural_field_mlp(x, norm_weight=norm_weight, **weights)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    out, eager = results(compiled, inputs, upstream), results(block, inputs, upstream)
    for name, tensor in out.items():
        assert torch.equal(tensor, eager[name]), name


def test_compile_under_autocast(any_isa):
    case = Case(gated=True, norm="fp32")
    function = torch.compile(doubled("packed"), fullgraph=True, backend="aot_eager")
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        assert_compiled_equals_eager(function, "packed", case, torch.bfloat16)


def test_forcing_another_backend_recompiles(core_calls):
    """The forced backend is part of the graph, for the backward too."""
    case = CASES[0]
    function = torch.compile(doubled("separate"), fullgraph=True, backend="aot_eager")
    for name in ("cpu", "reference", "cpu"):
        core_calls.clear()
        with use_backend(name):
            y = function(case, **leaves_of("separate", case))
        y.sum().backward()
        ran = {"neural_field_mlp_forward": 1, "neural_field_mlp_backward": 1} if name == "cpu" else {}
        assert core_calls == ran, name


@forms
def test_export(any_isa, form):
    """The exported program holds the op, and runs on another batch size."""

    class Block(torch.nn.Module):
        def forward(self, case_tensors):
            return FORMS[form](case, **case_tensors) + 1

    case = CASES[1]
    patches = torch.export.Dim("patches", min=2, max=64)
    tensors = inputs_of(form, case)
    shapes = {name: {0: patches} if tensor.dim() > 1 else None for name, tensor in tensors.items()}
    program = torch.export.export(Block(), (tensors,), dynamic_shapes=(shapes,))
    op = "neural_field_mlp" if form == "separate" else "neural_field_mlp_packed"
    assert [node.target for node in program.graph.nodes if "pixnerd" in str(node.target)] == [
        getattr(torch.ops.pixnerd, op).default
    ]
    larger = inputs_of(form, case.with_(n=7))
    assert torch.equal(program.module()(larger), FORMS[form](case, **larger) + 1)


def test_meta_tensors_run_no_kernel():
    case = Case(gated=True)
    tensors = {name: tensor.to("meta") for name, tensor in case.inputs(torch.bfloat16).items()}
    y = fused_field(case, **tensors)
    assert (y.device.type, y.dtype, y.shape) == ("meta", torch.bfloat16, tensors["x"].shape)
