"""pixel_decoder in forward mode: values and tangents, as MeanFlow and consistency models train on them."""

import functools

import pytest
import torch
from decoders import Case, _reversed, decode, op_arguments, plain_decoder
from derivatives import value_and_tangent as tangents
from test_pixel_decoder_memory import peak_beyond_results
from tolerance import assert_within

from pixnerd_kernels import use_backend

CASES = [
    Case(),
    Case(gated=True, encoding="dct_integer", outputs=None, patch=3, d1=12, d2=50, bias=False),
    Case(normalize=("w1",), final_norm=False, encoding="rope", scale=(1.25, 0.75)),
]
NAMES = ["c2i", "radiance", "t2i"]
MOVING = {"both": ("image", "hidden"), "image": ("image",), "hidden": ("hidden",)}
cases = pytest.mark.parametrize("case", CASES, ids=NAMES)
moving = pytest.mark.parametrize("moving", MOVING)


def along(case, names, dtype=torch.float32):
    others = case.inputs(dtype, seed=2)
    return {name: others[name] for name in names}


@functools.lru_cache(maxsize=64)
def expected(case, names, dtype):
    """Of the plain formula at the dtype, and in float64 with every sum in the opposite order."""
    with torch.device("cpu"):
        tensors, moving = case.inputs(dtype), along(case, names, dtype)
    plain = functools.partial(plain_decoder, case)
    wide = [{n: _reversed(case, n, t.double()) for n, t in each.items()} for each in (tensors, moving)]
    exact = {n: _reversed(case, "y", t) for n, t in tangents(plain, *wide).items()}
    return tangents(plain, tensors, moving), exact


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@moving
@cases
def test_jvp_of_families(backend, case, moving, dtype):
    names = MOVING[moving]
    function = functools.partial(decode, case, workspace=case.workspace(4, dtype))
    out = tangents(function, case.inputs(dtype), along(case, names, dtype))
    assert bool(backend.calls["neural_field_mlp_jvp"]) == backend.compiled
    assert_within(out, *expected(case, names, dtype))


@pytest.mark.parametrize("patches", [1, 3, None], ids=["one", "three", "all"])
@cases
def test_jvp_in_chunks(any_isa, case, patches):
    """Half as many patches a chunk as without a tangent: weights have tangents, in the same workspace."""
    workspace = None if patches is None else case.workspace(2 * patches)
    function = functools.partial(decode, case, workspace=workspace)
    out = tangents(function, case.inputs(), along(case, ("image", "hidden")))
    count = case.batch * case.rows * case.columns
    chunks = 1 if patches is None else -(-count // patches)
    assert any_isa.calls["neural_field_mlp_jvp"] == case.blocks * chunks * any_isa.compiled
    assert_within(out, *expected(case, ("image", "hidden"), torch.float32))


def meanflow_gradients(function, tensors, moving):
    """Of a loss whose target has the tangent in it."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    out = tangents(function, leaves, moving)
    loss = (out["y"] - out["dy"].detach()).square().sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("save_weights", [False, True], ids=["recompute", "save"])
@cases
def test_gradients_of_the_value_beside_a_tangent(any_isa, case, save_weights):
    """The kernels' own, chunk by chunk; weights are generated again whether or not they should be kept."""
    function = functools.partial(decode, case, workspace=case.workspace(2), save_weights=save_weights)
    plain = functools.partial(plain_decoder, case)
    tensors, moving = case.inputs(), along(case, ("image", "hidden"))
    wide = [{n: t.double() for n, t in each.items()} for each in (tensors, moving)]
    found = meanflow_gradients(function, tensors, moving)
    assert bool(any_isa.calls["pixel_decoder_backward"]) == any_isa.compiled
    with torch.device("cpu"):
        expected = meanflow_gradients(plain, tensors, moving), meanflow_gradients(plain, *wide)
    assert_within(found, *expected)


@cases
def test_gradients_of_a_tangent(any_isa, case):
    def gradients(function, tensors, moving):
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        out = tangents(function, leaves, moving)
        loss = (out["y"] + out["dy"]).square().sum()
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    tensors, moving = case.inputs(), along(case, ("image", "hidden"))
    wide = [{n: t.double() for n, t in each.items()} for each in (tensors, moving)]
    plain = functools.partial(plain_decoder, case)
    found = gradients(functools.partial(decode, case, workspace=case.workspace(2)), tensors, moving)
    assert_within(found, gradients(plain, tensors, moving), gradients(plain, *wide))


def test_a_tangent_of_a_parameter_is_the_formula_s(any_isa):
    any_isa.may_idle = True
    case = CASES[0]
    tensors = case.inputs()
    moving = along(case, ("image", "generator.1", "norm.0"))
    wide = [{n: t.double() for n, t in each.items()} for each in (tensors, moving)]
    plain = functools.partial(plain_decoder, case)
    out = tangents(functools.partial(decode, case), tensors, moving)
    assert_within(out, tangents(plain, tensors, moving), tangents(plain, *wide))


def test_vectorised_jacobians_in_forward_mode(any_isa):
    """Their tangents are batched, which no kernel reads."""
    any_isa.may_idle = True
    case = Case(batch=1, columns=1, patch=2, d=2, d1=3, d2=4, c=1, frequencies=2, outputs=1)
    tensors = {name: t.double() for name, t in case.inputs().items()}

    def run(hidden):
        return decode(case, tensors | {"hidden": hidden})

    found = torch.autograd.functional.jacobian(
        run, tensors["hidden"], strategy="forward-mode", vectorize=True
    )
    torch.testing.assert_close(found, torch.autograd.functional.jacobian(run, tensors["hidden"]))


def test_memory_of_a_tangent_is_the_workspace(core_calls):
    """A step on a tangent keeps nothing that grows with the number of images or blocks, beyond its results."""

    def peak(batch, blocks):
        case = Case(batch=batch, rows=4, columns=4, d=32, d1=32, d2=64, patch=2, blocks=blocks)
        tensors, moving = case.inputs(), along(case, ("image", "hidden"))
        function = functools.partial(decode, case, workspace=case.workspace(8))

        def call():
            leaves = {name: t.requires_grad_() for name, t in tensors.items()}
            out = tangents(function, leaves, moving)
            loss = (out["y"] * out["dy"].detach()).sum()
            return (*out.values(), *torch.autograd.grad(loss, list(leaves.values())))

        call()
        # Two images for the loss and its gradient.
        return peak_beyond_results(call) - case.workspace(8) - 2 * tensors["image"].nbytes

    with use_backend("cpu"):
        rest = peak(batch=2, blocks=2)
        # Pixels of a chunk's patches, and their tangents, before and behind a block, in and out.
        assert rest <= 8 * 4 * 32 * 4 * 8
        assert peak(batch=8, blocks=2) <= rest + rest // 8
        assert peak(batch=2, blocks=6) <= rest + rest // 4
    assert core_calls["neural_field_mlp_jvp"]


def test_jvp_of_no_images(any_isa):
    any_isa.may_idle = True
    case = Case(batch=0)
    out = tangents(functools.partial(decode, case), case.inputs(), along(case, ("image", "hidden")))
    assert out["y"].shape == out["dy"].shape == (0, 3, *case.size)


def test_jvp_compiles_as_one_graph(any_isa):
    case = CASES[0]
    tensors, moving = case.inputs(), along(case, ("image", "hidden"))
    torch.compiler.reset()
    run = functools.partial(tangents, functools.partial(decode, case))
    out = torch.compile(run, fullgraph=True, backend="aot_eager")(tensors, moving)
    torch.compiler.reset()
    assert bool(any_isa.calls["neural_field_mlp_jvp"]) == any_isa.compiled
    assert_within(out, *expected(case, ("image", "hidden"), torch.float32))


def test_opcheck_jvp(any_isa):  # twenty seconds each
    case = CASES[0]
    moving = along(case, ("image", "hidden"))
    torch.library.opcheck(
        torch.ops.pixnerd.pixel_decoder_jvp.default, (*moving.values(), *op_arguments(case, any_isa.name))
    )


def test_wrong_tangents_are_refused():
    case = CASES[0]
    arguments = op_arguments(case, "", leaves=False)
    op = torch.ops.pixnerd.pixel_decoder_jvp
    with pytest.raises(ValueError, match="tangent of image: expected"):
        op(arguments[0][:1], None, *arguments)
    with pytest.raises(ValueError, match="tangent of hidden: expected"):
        op(None, arguments[1].double(), *arguments)
    with pytest.raises(ValueError, match="a tangent of image or hidden"):
        op(None, None, *arguments)
