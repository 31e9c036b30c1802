"""normalize_weights: the values and gradients of torch.nn.functional.normalize."""

import pytest
import torch
import torch.nn.functional as F
from derivatives import BY_KERNELS, KINDS, assert_derivatives
from fields import AT_LEAST_EPS, drawn
from tolerance import assert_within

from pixnerd_kernels import normalize_weights, use_backend

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    ((3, 16, 24), -2),
    ((3, 16, 24), -1),
    ((3, 16, 24), 0),
    ((2, 64, 128), 1),
    ((7,), 0),
    ((5, 33), -2),
    ((2, 3, 5, 7), 2),
    ((2, 3, 2, 5, 7), -4),
    ((2, 256, 1), -2),
    ((129, 65), 0),
    ((70000, 1), 0),  # long sums, over rows and along one
    ((70000, 3), 0),
    ((3, 70000), 1),
]
shapes = pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=lambda value: str(value).replace(" ", ""))


def normal(*shape, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return drawn(*shape, generator=draw).to(dtype)


def run(function, w, upstream):
    leaf = w.detach().requires_grad_()
    out = function(leaf)
    return {"out": out.detach(), "w": torch.autograd.grad(out, leaf, upstream)[0]}


def plain_and_exact(w, upstream, dim, eps):
    """F.normalize at w's dtype, and in float64 with every sum in the opposite order."""

    def reverse(tensor):
        return tensor.flip(tuple(range(tensor.dim())))

    exact = run(lambda w: F.normalize(w, dim=dim, eps=eps), reverse(w).double(), reverse(upstream).double())
    plain = run(lambda w: F.normalize(w, dim=dim, eps=eps), w, upstream)
    return plain, {name: reverse(tensor) for name, tensor in exact.items()}


def check(w, upstream, dim=-2, eps=1e-12):
    out = run(lambda w: normalize_weights(w, dim, eps), w, upstream)
    assert_within(out, *plain_and_exact(w, upstream, dim, eps))
    return out


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@shapes
def test_like_normalize(backend, shape, dim, dtype):
    out = check(normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1), dim)
    assert out["out"].is_contiguous()
    assert out["w"].is_contiguous()


@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (5, 1, 17), (40, 1, 1)], ids=str)
def test_columns_of_one_row(backend, shape):
    """Normalised they are 1 or -1, whatever the weight: the gradient is zero and not what rounding leaves of it."""
    w = normal(*shape) * 1e-9
    upstream = normal(*shape, seed=1)
    out = run(normalize_weights, w, upstream)
    torch.testing.assert_close(out["out"], w.sign())
    assert torch.equal(out["w"], torch.zeros(shape))
    out = run(lambda w: normalize_weights(w, eps=1e-3), w, upstream)
    torch.testing.assert_close(out["w"], upstream / 1e-3)


def test_defaults(backend):
    w = normal(3, 16, 24)
    assert torch.equal(normalize_weights(w), normalize_weights(w, -2, 1e-12))
    torch.testing.assert_close(normalize_weights(w).norm(dim=-2), torch.ones(3, 24))


@pytest.mark.parametrize(
    "layout",
    [
        lambda w: w.mT.contiguous().mT,
        lambda w: w.repeat_interleave(2, -1)[..., ::2],
        lambda w: F.pad(w, (1, 2, 3, 4), value=torch.nan)[:, 3:-4, 1:-2],
        lambda w: w[:1].expand_as(w),
    ],
    ids=["transposed", "every second", "padded", "broadcast"],
)
def test_strided(backend, layout):
    check(layout(normal(3, 16, 24)), layout(normal(3, 16, 24, seed=1)))


def test_gradient_of_a_sum(backend):
    w = normal(3, 16, 24).requires_grad_()
    normalize_weights(w).sum().backward()
    plain, exact = plain_and_exact(w.detach(), torch.ones(3, 16, 24), -2, 1e-12)
    assert_within({"w": w.grad}, {"w": plain["w"]}, {"w": exact["w"]})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_clamped_columns(backend, dtype):
    """Norms of zero, below, at and above eps; a column of zeros has a gradient of g / eps."""
    w, upstream, eps = normal(2, 8, 6, dtype=dtype), normal(2, 8, 6, dtype=dtype, seed=1), 0.25
    w = F.normalize(w, dim=-2)
    w[:, :, 1] = 0
    w[:, :, 2] *= 0.125
    w[:, :, 3] = torch.eye(8, dtype=dtype)[3] * eps * AT_LEAST_EPS
    w[:, :, 4] *= 0.2499
    out = run(lambda w: normalize_weights(w, eps=eps), w, upstream)
    plain, exact = plain_and_exact(w, upstream, -2, eps)
    columns = [{f"{n}[{i}]": t[:, :, i] for n, t in r.items() for i in range(6)} for r in (out, plain, exact)]
    assert_within(*columns)
    torch.testing.assert_close(out["w"][:, :, 1], upstream[:, :, 1] / eps)
    w[:] = 0
    zero = run(normalize_weights, w, upstream)
    assert torch.equal(zero["out"], w)
    torch.testing.assert_close(zero["w"], upstream / 1e-12)


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0), (0,)], ids=str)
def test_empty(backend, shape):
    backend.may_idle = True
    w = torch.zeros(shape)
    out = run(lambda w: normalize_weights(w, dim=0 if len(shape) == 1 else -2), w, w)
    assert out["out"].shape == out["w"].shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@shapes
def test_only_the_output_is_written(backend, shape, dim, dtype, monkeypatch):
    """Allocations filled with NaN change nothing, and the inputs stay as they were."""
    w, upstream = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1)
    before = w.clone(), upstream.clone()
    expected = run(lambda w: normalize_weights(w, dim), w, upstream)
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, f=allocate, **k: f(*a, **k).fill_(torch.nan))
    out = run(lambda w: normalize_weights(w, dim), w, upstream)
    for name, tensor in out.items():
        assert torch.equal(tensor, expected[name]), name
    assert torch.equal(w, before[0])
    assert torch.equal(upstream, before[1])


@shapes
def test_sentinels_around_the_output(compiled, shape, dim, monkeypatch):
    w, upstream = normal(*shape), normal(*shape, seed=1)
    expected = run(lambda w: normalize_weights(w, dim), w, upstream)
    rooms = []

    def roomy(like, **options):
        rooms.append(torch.full((like.numel() + 64,), 12345.0))
        return rooms[-1][32:-32].view(like.shape)

    monkeypatch.setattr(torch, "empty_like", roomy)
    out = run(lambda w: normalize_weights(w, dim), w, upstream)
    monkeypatch.undo()
    assert len(rooms) == 2
    for name, room in zip(("out", "w"), rooms, strict=True):
        assert torch.equal(out[name], expected[name])
        assert (room[:32] == 12345.0).all()
        assert (room[-32:] == 12345.0).all()


def test_the_same_bits_on_any_number_of_threads(compiled, threads):
    w, upstream = normal(40, 64, 128), normal(40, 64, 128, seed=1)
    threads(1)
    first = run(normalize_weights, w, upstream)
    for count in (1, 2, 3):
        threads(count)
        out = run(normalize_weights, w, upstream)
        assert all(torch.equal(out[name], first[name]) for name in first)


def test_nan_stays_in_its_column(backend):
    w, upstream = normal(3, 8, 5), normal(3, 8, 5, seed=1)
    clean = run(normalize_weights, w, upstream)
    w[1, 2, 3] = torch.nan
    out = run(normalize_weights, w, upstream)
    for name, tensor in out.items():
        assert tensor[1, :, 3].isnan().all(), name
        tensor[1, :, 3] = clean[name][1, :, 3]
        assert torch.equal(tensor, clean[name]), name


@pytest.mark.float64
@shapes
def test_gradcheck(backend, shape, dim, threads):
    threads(1)  # hundreds of tiny calls
    small = tuple(min(size, 4) for size in shape)
    w = normal(*small, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: normalize_weights(w, dim), w)


def test_opcheck(any_isa):
    for w in (normal(2, 3, 4).requires_grad_(), normal(5, 2, dtype=torch.bfloat16), normal(4, 3).T):
        torch.library.opcheck(torch.ops.pixnerd.normalize_weights.default, (w, 1, 1e-12, any_isa.name))
    arguments = (normal(2, 3, 4, seed=1), normal(2, 3, 4), 1, 1e-12, any_isa.name)
    torch.library.opcheck(torch.ops.pixnerd.normalize_weights_backward.default, arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(any_isa, compiler):
    torch.compiler.reset()
    function = torch.compile(lambda w: normalize_weights(w) * 2, fullgraph=True, backend=compiler)
    for shape in [(2, 8, 6), (3, 5, 7), (4, 8)][: 3 if compiler == "aot_eager" else 1]:
        w, upstream = normal(*shape), normal(*shape, seed=1)
        out, eager = run(function, w, upstream), run(lambda w: normalize_weights(w) * 2, w, upstream)
        assert all(torch.equal(out[name], eager[name]) for name in out)
    torch.compiler.reset()


def test_autocast_leaves_it_alone(backend):
    """Normalising is no matmul: the dtype stays, and so do the bits."""
    w = normal(3, 16, 24)
    expected = normalize_weights(w)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        assert torch.equal(normalize_weights(w), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives(any_isa, kind, dtype):
    any_isa.may_idle = kind not in BY_KERNELS
    for dim in (0, -2):
        assert_derivatives(
            kind,
            lambda w, dim=dim: (normalize_weights(w, dim),),
            lambda w, dim=dim: (F.normalize(w, dim=dim),),
            {"w": normal(3, 4, 5, dtype=dtype)},
        )


def test_backward_keeps_its_backend_and_saves_only_w(core_calls):
    for name in ("cpu", "reference"):
        core_calls.clear()
        w, saved = normal(3, 4, 5).requires_grad_(), []
        with (
            use_backend(name),
            torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: saved.append(t) or t, lambda t: t
            ),
        ):
            out = normalize_weights(w)
        out.sum().backward()
        assert core_calls["normalize_weights"] == (2 if name == "cpu" else 0)
        assert [t.data_ptr() for t in saved] == [w.data_ptr()]


WRONG = [
    (([1.0],), TypeError, "w: expected a float32, float64, bfloat16 or float16 tensor, got [1.0] (list)"),
    ((torch.zeros(2, 3).int(),), TypeError, "got [2, 3] torch.int32 on cpu"),
    (
        (torch.ones(2, 3).to_sparse(),),
        TypeError,
        "w: expected a dense (strided) tensor, got torch.sparse_coo",
    ),
    ((torch.ones(2, 3).to_mkldnn(),), TypeError, "w: expected a dense (strided) tensor, got torch._mkldnn"),
    ((torch.tensor(1.0),), ValueError, "w: expected at least one dimension"),
    ((torch.zeros(3),), ValueError, "dim: expected a dimension of w, -1 to 0, got -2 (int)"),
    ((torch.zeros(2, 3), 2), ValueError, "dim: expected a dimension of w, -2 to 1, got 2 (int)"),
    ((torch.zeros(2, 3), 1.0), TypeError, "dim: expected an integer, got 1.0 (float)"),
    ((torch.zeros(2, 3), 0, -1e-12), ValueError, "eps: expected a finite number of at least 0, got -1e-12"),
    ((torch.zeros(2, 3), 0, None), TypeError, "eps: expected a number, got None"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), WRONG)
def test_errors(arguments, kind, message):
    with pytest.raises(kind) as caught:
        normalize_weights(*arguments)
    assert message in str(caught.value)


def test_every_problem_is_told_at_once():
    with pytest.raises(TypeError, match=r"dim: expected .*; eps: expected"):
        normalize_weights(torch.zeros(2, 3), dim=5, eps="tiny")
