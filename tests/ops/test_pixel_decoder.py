"""pixel_decoder against float64: every backend, dtype, family, odd size, stride and chunking."""

import functools

import pytest
import torch
from calls import between_sentinels
from decoders import Case, decode, expected, plain_decoder, results
from fields import FLOATS
from tolerance import assert_same, assert_within

from pixnerd_kernels import use_backend
from pixnerd_kernels.ops import tables
from pixnerd_kernels.ops.pixel_decoder import chunks, reference

FAMILIES = [
    Case(),
    Case(normalize=("w1",), final_norm=False, encoding="rope", extent=16.0, scale=(1.25, 0.75), d1=12, d2=50),
    Case(gated=True, encoding="dct_integer", outputs=None, bias=False, d1=20, d2=10),
]
SIZES = [
    Case(batch=1, columns=2, patch=16, d=20, d1=64, d2=65, blocks=1),
    Case(patch=14, d1=33, d2=20, c=1, outputs=1, activation="gelu", gated=True),
    Case(batch=3, rows=2, patch=1, c=17, d=1, d1=12, d2=9, outputs=40, frequencies=1),
    Case(final_norm=False, outputs=None, activation="relu", normalize=(), scale=(2, 3)),
]
families = pytest.mark.parametrize("case", FAMILIES, ids=["c2i", "t2i", "radiance"])


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", [*FAMILIES, *SIZES], ids=str)
def test_result_and_every_gradient(backend, case, dtype):
    out = results(functools.partial(decode, case), case.inputs(dtype), case.upstream(dtype))
    assert_within(out, *expected(case, dtype))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
def test_the_official_sizes(backend, dtype):
    """Some GPUs have kernels of their own for them."""
    case = Case(batch=1, columns=4, patch=16, d=20, d1=64, d2=128, blocks=3)
    out = results(functools.partial(decode, case), case.inputs(dtype), case.upstream(dtype))
    assert_within(out, *expected(case, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("save_weights", [False, True], ids=["recompute", "save"])
@pytest.mark.parametrize("patches", [1, 3, 4, None], ids=str)
@families
def test_every_chunking(any_isa, case, patches, save_weights, dtype):
    """Chunks of one, of three, of three with a rest and of all six patches."""
    workspace = None if patches is None else case.workspace(patches, dtype) + 1
    options = {"workspace": workspace, "save_weights": save_weights}
    tensors, upstream = case.inputs(dtype), case.upstream(dtype)
    out = results(functools.partial(decode, case, **options), tensors, upstream)
    assert_within(out, *expected(case, dtype))
    if any_isa.compiled:
        runs = {1: 6, 3: 2, 4: 2, None: 1}[patches]
        calls = [any_isa.calls[f"pixel_decoder_{way}"] for way in ("forward", "backward")]
        if any_isa.name == "triton":
            # Chunks are multiples of what runs at once; and products are torch's, whose sums depend on the rows.
            assert all(runs <= number <= 6 for number in calls)
        else:
            assert calls == [runs, runs]
            whole = results(functools.partial(decode, case, workspace=None), tensors, upstream)
            for name in ("y", "image", "hidden"):
                assert torch.equal(out[name], whole[name]), name


@families
def test_strided_inputs(backend, case):
    """Slices, reversed dimension orders and a broadcast upstream; nothing beside them is read."""

    def placed(name, tensor):
        if name == "image":
            room = torch.full(
                (tensor.shape[0], *(size + 3 for size in tensor.shape[2:]), tensor.shape[1] + 2), torch.nan
            )
            view = room.permute(0, 3, 1, 2)[:, 1:-1, 1:-2, 2:-1]
        elif name == "hidden":
            view = torch.full((tensor.shape[1] + 1, tensor.shape[0], tensor.shape[2] + 2), torch.nan)[
                1:, :, 1:-1
            ]
            view = view.transpose(0, 1)
        elif tensor.dim() == 2:
            view = torch.full(tensor.shape[::-1], torch.nan).T
        else:
            view = torch.full((len(tensor), 2), torch.nan)[:, 1]
        return view.copy_(tensor)

    tensors = {name: placed(name, tensor) for name, tensor in case.inputs().items()}
    upstream = case.upstream()[:, :1, :1].expand(case.upstream().shape)
    dense = {name: tensor.contiguous() for name, tensor in tensors.items()}
    exact = {name: tensor.double() for name, tensor in dense.items()}
    plain = functools.partial(plain_decoder, case)
    out = results(functools.partial(decode, case), tensors, upstream)
    assert_within(out, results(plain, dense, upstream), results(plain, exact, upstream.double()))


def test_parameters_may_be_wider_than_the_image(backend):
    """Half images and generators with float32 for the rest: the gradients come back in each parameter's dtype."""
    case = FAMILIES[0]
    half = {n: t.bfloat16() for n, t in case.inputs().items()}
    small = {
        n: t.float() for n, t in half.items() if not n.startswith(("image", "hidden", "generator", "bias"))
    }
    upstream = case.upstream(torch.bfloat16)
    out = results(functools.partial(decode, case), {**half, **small}, upstream)
    plain, exact = expected(case, torch.bfloat16)
    for name in small:
        assert out[name].dtype == torch.float32
    assert_within({n: t.bfloat16() for n, t in out.items()}, plain, exact)


@families
def test_empty_batch(any_isa, case):
    any_isa.may_idle = True
    tensors = case.inputs()
    tensors.update(image=tensors["image"][:0], hidden=tensors["hidden"][:0])
    out = results(functools.partial(decode, case), tensors, case.upstream()[:0])
    assert out["y"].shape == (0, *case.upstream().shape[1:])
    assert not any(tensor.any() for tensor in out.values())
    assert all(out[name].shape == tensor.shape for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "name", ["image", "hidden", "generator.1", "bias.0", "norm.0", "embed_bias", "linear_weight"]
)
@pytest.mark.parametrize("save_weights", [False, True], ids=["recompute", "save"])
def test_a_gradient_alone_is_the_same(any_isa, name, save_weights):
    """Only what is needed is computed, and it has the same bits where one kernel computes both."""
    case = FAMILIES[0]
    tensors, upstream = case.inputs(), case.upstream()
    every = results(functools.partial(decode, case, workspace=case.workspace(3)), tensors, upstream)
    any_isa.calls.clear()
    leaf = tensors[name].requires_grad_()
    y = decode(case, tensors, workspace=case.workspace(3), save_weights=save_weights)
    (gradient,) = torch.autograd.grad(y, leaf, upstream)
    assert_same({name: gradient}, {name: every[name]}, any_isa.one_kernel, lambda: expected(case))
    if any_isa.compiled and any_isa.name != "triton":
        # Two chunks of two blocks each: generated once or twice, then the products of this gradient.
        products = {"hidden": 4, "generator.1": 2}.get(name, 0)
        assert any_isa.calls["matmul"] == (4 if save_weights else 8) + products


@pytest.mark.float64
@pytest.mark.parametrize("save_weights", [False, True], ids=["recompute", "save"])
@families
def test_gradcheck(any_isa, case, save_weights, threads):
    threads(1)  # hundreds of tiny calls
    leaves = {name: tensor.requires_grad_() for name, tensor in case.inputs(torch.float64).items()}

    def function(*tensors):
        named = dict(zip(leaves, tensors, strict=True))
        options = {"workspace": case.workspace(4, torch.float64), "save_weights": save_weights}
        return decode(case, named, **options)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("save_weights", [False, True], ids=["recompute", "save"])
@families
def test_only_the_results_are_written(any_isa, case, save_weights, monkeypatch):
    """Results and workspace lie between sentinels and are filled with NaN beforehand; the inputs stay as they were."""
    tensors, upstream = case.inputs(), case.upstream()
    before = {name: tensor.clone() for name, tensor in {**tensors, "upstream": upstream}.items()}
    function = functools.partial(decode, case, workspace=case.workspace(4), save_weights=save_weights)
    plain = results(function, tensors, upstream)
    with between_sentinels(monkeypatch) as rooms:
        out = results(function, tensors, upstream)
    assert len(rooms) >= 2  # the result and the workspace
    for name, tensor in out.items():
        assert torch.equal(tensor, plain[name]), name
    for name, tensor in {**tensors, "upstream": upstream}.items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("patches", [4, None], ids=str)
def test_biases_whose_gradients_come_with_the_weights(monkeypatch, patches, dtype):
    """By a column of ones beside the hidden states, as on a GPU; and where only some are wanted."""
    case = FAMILIES[0]
    monkeypatch.setattr(reference, "columns_of_ones", lambda call: 3)
    options = {"workspace": None if patches is None else case.workspace(patches, dtype)}
    tensors, upstream = case.inputs(dtype), case.upstream(dtype)
    with use_backend("reference"):
        out = results(functools.partial(decode, case, **options), tensors, upstream)
        assert_within(out, *expected(case, dtype))
        for names in (["bias.0"], ["generator.1", "bias.0"], ["generator.0", "generator.1", "bias.1"]):
            leaves = {name: tensor.clone().requires_grad_(name in names) for name, tensor in tensors.items()}
            found = torch.autograd.grad(
                decode(case, leaves, **options), [leaves[name] for name in names], upstream
            )
            some = dict(zip(names, found, strict=True))
            assert_within(some, *({name: part[name] for name in names} for part in expected(case, dtype)))
    assert all(gradient.is_contiguous() for gradient in out.values())


def test_a_kept_encoding_stays(monkeypatch):
    """A captured CUDA graph reads it in every replay: others must not take its place."""
    monkeypatch.setattr(chunks, "_encodings", {})
    arguments = (3, "dct", 1.0, 1.0, torch.device("cpu"), torch.float32)
    first = chunks._positions(4, 4, *arguments)
    for size in range(1, 100):
        assert chunks._positions(1, size, *arguments).shape == (size, 9)
    assert chunks._positions(4, 4, *arguments) is first
    assert len(chunks._encodings) == tables.MOST
