"""neural_field_mlp against float64: values and every gradient over sizes, dtypes, options and strides."""

import pytest
import torch
import torch.nn.functional as F
from fields import (
    ALL,
    AT_LEAST_EPS,
    FLOATS,
    Case,
    assert_case_within,
    expected,
    fused_field,
    packed_field,
    packed_inputs,
    plain_and_exact,
    results,
)
from tolerance import assert_same, assert_within, relative

from pixnerd_kernels import neural_field_mlp, neural_field_mlp_packed, split_params

SIZES = [
    Case(s=1, d1=12, d2=24),
    Case(s=20, d1=16, d2=50, gated=True),
    Case(s=196, d1=64, d2=24, norm="fp32"),
    Case(s=256, d1=64, d2=128),
    Case(n=2, s=256, d1=64, d2=256, gated=True, norm="fp32"),
    Case(s=20, d1=1, d2=5, gated=True, norm=None, normalize=("w2",)),
    Case(s=1, d1=7, d2=1, normalize=("w1",)),
    Case(s=196, d1=7, d2=50, gated=True, norm=None),
    Case(n=1, s=33, d1=17, d2=65),
    Case(n=7, s=5, d1=3, d2=9, gated=True),
    Case(n=1, s=40000, d1=8, d2=16),  # long sums in the gradients of weights and norm_weight
]
OPTIONS = [
    Case(activation="gelu", norm=None),
    Case(activation="relu", gated=True),
    Case(activation="gelu", gated=True, residual=False, norm="fp32"),
    Case(activation="relu", residual=False),
    Case(normalize=()),
    Case(normalize=("w1",)),
    Case(normalize=("w2",), norm=None, residual=False),
    Case(normalize=("w_gate",), gated=True),
    Case(normalize=("w2", "w1"), gated=True, norm="fp32"),
    Case(normalize=(), gated=True, activation="gelu"),
    Case(norm_eps=0.5, weight_eps=0.25),
    Case(norm_eps=0.0, gated=True),
]
VIEWS = [Case(), Case(s=33, d1=12, d2=50, gated=True, norm="fp32")]


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


all_dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)


@all_dtypes
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_sizes(backend, case, dtype):
    tensors, upstream = case.inputs(dtype), case.upstream(dtype)
    out = results(lambda **leaves: fused_field(case, **leaves), tensors, upstream)
    assert_within(out, *expected(case, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_options(backend, case, dtype):
    tensors, upstream = case.inputs(dtype), case.upstream(dtype)
    out = results(lambda **leaves: fused_field(case, **leaves), tensors, upstream)
    assert_within(out, *expected(case, dtype))


@all_dtypes
@pytest.mark.parametrize("case", [*SIZES[:3], *OPTIONS[2:4]], ids=str)
def test_packed_parameters(backend, case, dtype):
    tensors, upstream = case.inputs(dtype), case.upstream(dtype)
    out = results(lambda **leaves: packed_field(case, **leaves), packed_inputs(tensors), upstream)
    assert_within(out, *map(packed_inputs, expected(case, dtype)))


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
@pytest.mark.parametrize("size", [1e3, 1e9, 1e18])
def test_large_raw_weights(backend, activation, size):
    """Where the activation saturates its slope is 0 or 1, whatever powers of z multiply it."""
    case = Case(normalize=(), activation=activation)
    tensors = case.inputs()
    tensors["w1"] = tensors["w1"] * size
    out = results(lambda **leaves: fused_field(case, **leaves), tensors, case.upstream())
    assert_within(out, *plain_and_exact(case, tensors, case.upstream()))


def test_a_gate_that_is_absent_may_be_named(backend):
    tensors = Case().inputs()
    assert torch.equal(
        neural_field_mlp(**tensors, normalize=("w_gate", "w1")), neural_field_mlp(**tensors, normalize=["w1"])
    )


def test_defaults_are_the_official_block(backend):
    case = Case()
    assert_within(results(neural_field_mlp, case.inputs(), case.upstream()), *expected(case))


@all_dtypes
@pytest.mark.parametrize(
    "case", [Case(d1=1, d2=5, norm=None), Case(d1=7, d2=1, gated=True), Case(d1=1, d2=1, norm=None)], ids=str
)
def test_columns_of_one_number(backend, case, dtype):
    """Normalised to a sign: see `assert_case_within`."""
    tensors, upstream = case.inputs(dtype), case.upstream(dtype)
    out = results(lambda **leaves: fused_field(case, **leaves), tensors, upstream)
    assert_case_within(case, dtype, out)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_split_params_are_views_in_the_official_order(gated):
    params = torch.arange(2 * (3 if gated else 2) * 12.0).view(2, -1)
    split = split_params(params, 3, 4, gated)
    chunks = [chunk.data_ptr() for chunk in params.split(12, 1)]
    names = ["w_gate", "w1", "w2"] if gated else ["w1", "w2"]
    assert [getattr(split, name).data_ptr() for name in names] == chunks
    for name, values in zip(names, params.split(12, 1), strict=True):
        assert torch.equal(getattr(split, name), values.reshape(2, *((4, 3) if name == "w2" else (3, 4))))
    assert gated or split.w_gate is None


def padded(tensor):
    """The same values in the middle of NaN, with gaps between rows and between patches."""
    shape = [size + 3 for size in tensor.shape]
    room = tensor.new_full(shape, torch.nan)
    view = room[tuple(slice(1, 1 + size) for size in tensor.shape)]
    return view.copy_(tensor)


LAYOUTS = {
    "padded": padded,
    "transposed": lambda tensor: tensor.mT.contiguous().mT,
    "every second": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
    "patches inside": lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
    "broadcast": lambda tensor: tensor[:1].expand_as(tensor),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", VIEWS, ids=str)
def test_strided_inputs(backend, case, layout):
    """Views give the bits of their dense copies, in the output and in every gradient, where one kernel takes both."""
    lay = LAYOUTS[layout]
    tensors = {name: lay(tensor) if tensor.dim() == 3 else tensor for name, tensor in case.inputs().items()}
    upstream = lay(case.upstream())
    dense = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    dense_upstream = upstream.clone(memory_format=torch.contiguous_format)
    out = results(lambda **leaves: fused_field(case, **leaves), tensors, upstream)
    same = results(lambda **leaves: fused_field(case, **leaves), dense, dense_upstream)
    references = plain_and_exact(case, dense, dense_upstream)
    assert_within(out, *references)
    if backend.compiled:
        assert_same(out, same, backend.one_kernel, lambda: references)


def test_norm_weight_with_gaps(backend):
    case = Case(norm="fp32")
    tensors, upstream = case.inputs(), case.upstream()
    tensors["norm_weight"] = tensors["norm_weight"].repeat_interleave(3)[::3]
    out = results(lambda **leaves: fused_field(case, **leaves), tensors, upstream)
    assert_within(out, *plain_and_exact(case, tensors, upstream))


@pytest.mark.parametrize("case", VIEWS, ids=str)
def test_views_of_packed_parameters(backend, case):
    """Gradients arrive in the packed tensor through the views that split_params makes."""
    tensors, upstream = case.inputs(), case.upstream()
    packed = packed_inputs(tensors)
    packed["params"] = padded(packed["params"])

    def through_views(x, params, norm_weight):
        weights = split_params(params, case.d1, case.d2, case.gated)._asdict()
        return neural_field_mlp(x, norm_weight=norm_weight, **weights)

    plain, exact = map(packed_inputs, plain_and_exact(case, tensors, upstream))
    assert_within(results(through_views, packed, upstream), plain, exact)
    assert_within(results(lambda **leaves: packed_field(case, **leaves), packed, upstream), plain, exact)


def test_gradient_of_a_sum(backend):
    """.sum() hands back a gradient with zero strides."""
    case = Case(gated=True)
    tensors = case.inputs()
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    fused_field(case, **leaves).sum().backward()
    out = {name: leaf.grad for name, leaf in leaves.items()}
    ones = torch.ones_like(tensors["x"])
    plain, exact = plain_and_exact(case, tensors, ones)
    assert_within(out, *({name: r[name] for name in out} for r in (plain, exact)))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("sizes", [(0, 20), (3, 0), (0, 0)], ids=["no patches", "no pixels", "nothing"])
def test_empty_batches(backend, sizes, gated):
    backend.may_idle = True
    case = Case(n=sizes[0], s=sizes[1], gated=gated)
    tensors, upstream = case.inputs(), case.upstream()
    for function, inputs in [(fused_field, tensors), (packed_field, packed_inputs(tensors))]:
        out = results(lambda f=function, **leaves: f(case, **leaves), inputs, upstream)
        assert out.pop("y").shape == (*sizes, case.d1)
        for name, gradient in out.items():
            assert torch.equal(gradient, torch.zeros_like(inputs[name])), name


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_clamped_columns(backend, gated):
    """Columns whose norm is zero, below, at and above weight_eps have F.normalize's values and gradients."""
    case = Case(gated=gated, weight_eps=0.25)
    tensors, upstream = case.inputs(), case.upstream()
    names = [name for name in ALL if name in tensors]
    unit = torch.zeros(case.d1)
    for name in names:
        w = tensors[name]
        w.copy_(F.normalize(w, dim=-2))
        w[:, :, 1] *= 0.0
        w[:, :, 2] *= 0.125
        unit = torch.zeros(w.shape[1])
        unit[3] = case.weight_eps * AT_LEAST_EPS
        w[:, :, 3] = unit
        w[:, :, 4] *= 0.2499
    out = results(lambda **leaves: fused_field(case, **leaves), tensors, upstream)
    plain, exact = plain_and_exact(case, tensors, upstream)
    assert_within(out, plain, exact)
    for name in names:
        columns = [{f"{name}[{i}]": r[name][:, :, i] for i in range(6)} for r in (out, plain, exact)]
        assert_within(*columns)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_name)
def test_a_zero_column_at_the_default_eps(backend, dtype):
    """The gradient of a zero column is g / eps: huge, but finite and the same as F.normalize's."""
    case = Case()
    tensors, upstream = case.inputs(dtype), case.upstream(dtype)
    for name in ("w1", "w2"):
        tensors[name][:, :, 5] = 0
    out = results(lambda **leaves: fused_field(case, **leaves), tensors, upstream)
    plain, exact = plain_and_exact(case, tensors, upstream)
    for name in ("w1", "w2"):
        assert exact[name][:, :, 5].abs().max() > 1e9
        rest = [i for i in range(tensors[name].shape[2]) if i != 5]
        for r in (out, plain, exact):
            r[f"{name}.zero"], r[name] = r[name][:, :, 5], r[name][:, :, rest]
    assert_within(out, plain, exact)


@pytest.mark.parametrize(
    "case",
    [
        Case(n=2, s=3, d1=4, d2=5),
        Case(n=2, s=3, d1=4, d2=5, gated=True, activation="gelu"),
        Case(n=2, s=3, d1=4, d2=5, gated=True, normalize=("w1",), norm=None, residual=False),
        Case(n=1, s=2, d1=3, d2=18, normalize=("w2",), activation="gelu"),
        Case(n=2, s=2, d1=3, d2=4, activation="relu", norm_eps=0.1),
    ],
    ids=str,
)
@pytest.mark.float64
def test_gradcheck(backend, case, threads):
    threads(1)  # hundreds of tiny calls
    tensors = case.inputs(torch.float64)
    for function, inputs in [(fused_field, tensors), (packed_field, packed_inputs(tensors))]:
        leaves = [tensor.requires_grad_() for tensor in inputs.values()]
        names = list(inputs)
        assert torch.autograd.gradcheck(
            lambda *args, f=function, n=names: f(case, **dict(zip(n, args, strict=True))), leaves
        )


@pytest.mark.parametrize(
    "wanted", [["x"], ["w1", "w2", "w_gate"], ["w2"], ["norm_weight"], ["x", "norm_weight"]]
)
def test_any_subset_of_gradients(backend, wanted):
    """A gradient does not depend on which others are asked for."""
    case = Case(gated=True, norm="fp32")
    tensors, upstream = case.inputs(), case.upstream()
    full = results(lambda **leaves: fused_field(case, **leaves), tensors, upstream)
    leaves = {name: tensor.clone().requires_grad_(name in wanted) for name, tensor in tensors.items()}
    fused_field(case, **leaves).backward(upstream)
    out = {name: leaf.grad for name, leaf in leaves.items() if name in wanted}
    same = {name: full[name] for name in wanted}
    assert_same(out, same, backend.one_kernel, lambda: expected(case))
    assert all(leaf.grad is None for name, leaf in leaves.items() if name not in wanted)


@pytest.mark.parametrize("wanted", [["x"], ["params"], ["norm_weight"]])
def test_any_subset_of_packed_gradients(backend, wanted):
    case = Case(norm="fp32")
    inputs, upstream = packed_inputs(case.inputs()), case.upstream()
    full = results(lambda **leaves: packed_field(case, **leaves), inputs, upstream)
    leaves = {name: tensor.clone().requires_grad_(name in wanted) for name, tensor in inputs.items()}
    packed_field(case, **leaves).backward(upstream)
    out, same = {name: leaves[name].grad for name in wanted}, {name: full[name] for name in wanted}
    assert_same(out, same, backend.one_kernel, lambda: tuple(map(packed_inputs, expected(case))))


def test_many_patches_over_threads_equal_each_patch_alone(core, threads):
    """The real head's shape: the bits of a patch do not depend on the batch that it is part of."""
    case = Case(n=24, s=256, d1=64, d2=128)
    inputs, upstream = packed_inputs(case.inputs()), case.upstream()
    norm_weight = inputs.pop("norm_weight")

    def run(rows):
        return results(
            lambda x, params: neural_field_mlp_packed(x, params, hidden=128, norm_weight=norm_weight),
            {name: tensor[rows] for name, tensor in inputs.items()},
            upstream[rows],
        )

    threads(2)
    together = run(slice(None))
    for patch in range(case.n):
        alone = run(slice(patch, patch + 1))
        for name, tensor in alone.items():
            assert torch.equal(tensor[0], together[name][patch]), (patch, name)
    plain, exact = plain_and_exact(case, case.inputs(), upstream)
    for name in ("y", "x"):
        assert relative(together[name], exact[name]) < 4 * relative(plain[name], exact[name])


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_columns_of_one_row(any_isa, gated):
    """A weight of one row is 1 or -1 once normalised, and has no gradient."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 20, 1, generator=draw).requires_grad_()
    params = torch.randn(3, 3 if gated else 2, generator=draw).requires_grad_()
    y = neural_field_mlp_packed(x, params, hidden=1, gated=gated)
    y.square().sum().backward()
    assert x.grad.abs().min() > 0
    assert torch.equal(params.grad, torch.zeros_like(params))


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_nan_reaches_the_gradients(backend, activation):
    """As in plain PyTorch, whose relu lets gradients pass at NaN: no zero may say that all is well."""
    act = {"silu": F.silu, "gelu": lambda z: F.gelu(z, approximate="tanh"), "relu": F.relu}[activation]
    found = []
    for ours in (True, False):
        x = torch.full((1, 4, 2), torch.nan, requires_grad=True)
        w1, w2 = (torch.ones(shape, requires_grad=True) for shape in ((1, 2, 3), (1, 3, 2)))
        if ours:
            y = neural_field_mlp(x, w1, w2, activation=activation, residual=False, normalize=())
        else:
            y = act(x @ w1) @ w2
        y.sum().backward()
        found.append([x.grad, w1.grad, w2.grad])
    for ours, theirs in zip(*found, strict=True):
        assert theirs.isnan().any() or theirs.all()
        assert (ours.isnan() | (ours == theirs)).all()
        assert ours.isnan()[theirs.isnan()].all()


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_what_is_left_of_a_saturated_unit_does_not_grow(backend, activation):
    """Zero, as in plain PyTorch, where exp has no more float32: no weight brings it back."""
    x = torch.full((1, 3, 1), -200.0)
    w1, w2 = torch.ones(1, 1, 4), torch.full((1, 4, 1), 1e35)
    out = neural_field_mlp(x, w1, w2, normalize=(), activation=activation, residual=False)
    assert torch.equal(out, torch.zeros(1, 3, 1))
