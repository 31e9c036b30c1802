"""The short way past the dispatcher: taken only where nobody but the op would have seen the call."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pixnerd_kernels import modulated_rms_norm, swiglu, use_backend
from pixnerd_kernels.ops import library


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.fixture
def x():
    return torch.randn(2, 3, 8)


def test_plain_tensors(x):
    weight = torch.nn.Parameter(torch.ones(8))
    assert library.plain(x, None, weight) == (
        x.shape,
        x.dtype,
        x.device,
        None,
        (8,),
        weight.dtype,
        weight.device,
    )
    with torch.device("cpu"), torch.no_grad():
        assert library.plain(x)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3).as_subclass(Subclass),
        torch.zeros(3, device="meta"),
        torch.zeros(3, 3).to_sparse(),
        torch._neg_view(torch.zeros(3)),
        torch._efficientzerotensor((3,)),
        3.0,
    ],
    ids=["subclass", "meta", "sparse", "negated", "zero", "number"],
)
def test_other_tensors(x, tensor):
    assert library.plain(x, tensor) is None


def test_who_watches(x):
    assert not library.watched()
    with Dispatched():
        assert library.watched()
    with Functions():
        assert library.watched()
    with torch.profiler.profile():
        assert library.watched()
    with torch.autograd.forward_ad.dual_level():
        assert library.watched()
    assert torch.func.vmap(lambda row: row * library.watched())(x).equal(x)
    assert torch.jit.trace(lambda row: row * int(library.watched()), x, check_trace=False)(x).equal(x)
    assert torch.compile(lambda row: row * library.watched(), backend="eager", fullgraph=True)(x).equal(x)


def test_a_mode_sees_both_ops(x):
    x.requires_grad_()
    with Dispatched() as mode:
        modulated_rms_norm(x, torch.ones(8)).sum().backward()
    ours = [name for name in mode.seen if name.startswith("pixnerd")]
    assert ours == ["pixnerd::modulated_rms_norm", "pixnerd::modulated_rms_norm_backward"]


def test_a_profile_has_the_op(x):
    with torch.profiler.profile() as profile:
        swiglu(x)
    assert "pixnerd::swiglu_packed" in {event.key for event in profile.key_averages()}


def test_negated_views_are_resolved(backend, x):
    """Lazily negated tensors share the memory of what they negate."""
    negated, weight = torch._neg_view(x), torch.randn(8)
    torch.testing.assert_close(modulated_rms_norm(negated, weight), modulated_rms_norm(-x, weight))
    gradient = torch.randn_like(x)
    out = {}
    for name, upstream in (("lazy", torch._neg_view(gradient)), ("eager", -gradient)):
        leaf = x.clone().requires_grad_()
        out[name] = torch.autograd.grad(modulated_rms_norm(leaf, weight), leaf, upstream)[0]
    torch.testing.assert_close(out["lazy"], out["eager"])


def test_both_ways_agree(any_isa, x):
    """With a mode on the stack and without: the same values and gradients, for the tensors that want them."""
    weight, row = torch.randn(8), torch.randn(2, 1, 8)
    results = []
    for mode in (Functions(), torch.no_grad()):
        leaves = [x.clone().requires_grad_(), weight.clone(), row.clone().requires_grad_()]
        with mode, torch.enable_grad():
            out = modulated_rms_norm(leaves[0], leaves[1], leaves[2])
        out.sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert results[0][2] is results[1][2] is None
    for a, b in zip(*results, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_no_graph_where_no_gradient_is_wanted(x):
    assert not modulated_rms_norm(x, torch.ones(8)).requires_grad
    with torch.no_grad():
        assert not modulated_rms_norm(x.requires_grad_(), torch.ones(8)).requires_grad
    with torch.inference_mode():
        assert modulated_rms_norm(x, torch.ones(8)).is_inference()


def test_calls_like_those_that_passed_are_still_checked(x):
    """True equals 1 and hashes like it."""
    modulated_rms_norm(x, torch.ones(8), eps=1)
    modulated_rms_norm(x, torch.ones(8), eps=1.0)
    with pytest.raises(TypeError, match="eps: expected a number"):
        modulated_rms_norm(x, torch.ones(8), eps=True)
    with pytest.raises(TypeError, match="eps: expected a number"):
        modulated_rms_norm(x, torch.ones(8), eps=[1.0])
    modulated_rms_norm(x, torch.ones(8))
    with pytest.raises(ValueError, match="weight: expected"):
        modulated_rms_norm(x, torch.ones(7))
    with pytest.raises(TypeError, match="weight: expected"):
        modulated_rms_norm(x, torch.ones(8).int())


def test_passed_calls_do_not_fill_the_memory():
    passed = library.Passed()
    for i in range(10000):
        passed.add((i,))
    assert (9999,) in passed
    assert len(passed._calls) <= 4096
    passed.add(([],))
    assert ([],) not in passed


def test_gradients_several_at_a_time(x):
    """PyTorch batches them in tensors without memory, which look ordinary otherwise."""
    x.requires_grad_()
    y = swiglu(x)
    upstream = torch.randn(5, *y.shape)
    (batched,) = torch.autograd.grad(y, x, upstream, is_grads_batched=True, retain_graph=True)
    for each, grad in zip(batched, upstream, strict=True):
        torch.testing.assert_close(each, torch.autograd.grad(y, x, grad, retain_graph=True)[0])
    rows = torch.randn(2, 4)
    looped = torch.autograd.functional.jacobian(swiglu, rows)
    torch.testing.assert_close(torch.autograd.functional.jacobian(swiglu, rows, vectorize=True), looped)


def test_zero_tensors_have_no_memory_to_read(x):
    x.requires_grad_()
    assert not swiglu(torch._efficientzerotensor((2, 8))).any()
    y = swiglu(x)
    assert not torch.autograd.grad(y, x, torch._efficientzerotensor(y.shape))[0].any()


def test_kernels_compute_what_has_no_tangent(core_calls, x):
    """Within a level of dual numbers too; a tensor with a tangent goes through the formula."""
    with use_backend("cpu"), torch.autograd.forward_ad.dual_level():
        out = swiglu(x)
        assert core_calls["swiglu_forward"] == 1
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        found = torch.autograd.forward_ad.unpack_dual(swiglu(dual))
        assert core_calls["swiglu_forward"] == 1
    torch.testing.assert_close(found.primal, out)
    assert found.tangent.any()


def test_a_tensor_that_is_two_arguments_has_both_gradients(any_isa, x):
    """Of the second order, too: the gradients of silu(x) * x."""
    x.requires_grad_()
    for function in (swiglu, lambda gate, up: torch.nn.functional.silu(gate) * up):
        (first,) = torch.autograd.grad(function(x, x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        if function is swiglu:
            own = second
    torch.testing.assert_close(own, second)
