"""What pixel_decoder touches and keeps: bounded memory, everything written, no input, the same bits each time."""

import functools
from types import SimpleNamespace

import pytest
import torch
from decoders import Case, decode, results

from pixnerd_kernels import use_backend
from pixnerd_kernels.ops.pixel_decoder import chunks

CASES = [
    Case(),
    Case(gated=True, encoding="dct_integer", outputs=None, patch=5, d1=12, d2=50, bias=False),
    Case(normalize=("w1",), final_norm=False, encoding="rope", scale=(1.25, 0.75)),
]
cases = pytest.mark.parametrize("case", CASES, ids=["c2i", "radiance", "t2i"])
half_and_full = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def run(case, tensors, upstream, patches=2, **options):
    workspace = case.workspace(patches, tensors["image"].dtype)
    return results(functools.partial(decode, case, workspace=workspace, **options), tensors, upstream)


def assert_same_bits(out, expected):
    assert out.keys() == expected.keys()
    for name, tensor in out.items():
        assert torch.equal(tensor, expected[name]), name


def peak_beyond_results(function):
    """Bytes at the peak of a call, by torch's allocations, without what it returns."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        returned = function()
    events = sorted(
        (e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"
    )
    live = peak = 0
    for _, nbytes in events:
        live += nbytes
        peak = max(peak, live)
    return peak - sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in returned}.values()
    )


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_memory_is_the_workspace(core_calls, training):
    """Nothing grows with the number of images: beyond results only the workspace and what all patches share."""

    def peak(batch, blocks, patches):
        case = Case(batch=batch, rows=4, columns=4, d=32, d1=32, d2=64, patch=2, blocks=blocks)
        tensors = {name: t.requires_grad_(training) for name, t in case.inputs().items()}
        upstream = case.upstream()

        def call():
            y = decode(case, tensors, workspace=case.workspace(patches))
            return (
                (y.detach(), *torch.autograd.grad(y, list(tensors.values()), upstream)) if training else (y,)
            )

        call()
        return peak_beyond_results(call) - case.workspace(patches)

    with use_backend("cpu"):
        rest = peak(batch=2, blocks=2, patches=8)
        assert rest <= 30_000
        # An eighth more for more of the small buffers that are made for every chunk.
        assert peak(batch=8, blocks=2, patches=8) <= rest + rest // 8
        assert peak(batch=2, blocks=6, patches=8) <= rest + 4 * 6 * 8 * 32 * 4
        assert peak(batch=2, blocks=2, patches=16) <= rest + rest // 8
    assert core_calls["pixel_decoder_backward"] >= training
    assert core_calls["pixel_decoder_forward"]


@pytest.mark.parametrize("save_weights", [False, True], ids=["recompute", "save"])
@cases
def test_saved_for_backward(any_isa, case, save_weights):
    """The inputs, and with save_weights the generated weights in their dtype; nothing else."""
    leaves = {name: tensor.requires_grad_() for name, tensor in case.inputs(torch.bfloat16).items()}
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = decode(case, leaves, save_weights=save_weights)
    known = {tensor.untyped_storage().data_ptr() for tensor in leaves.values()}
    new = [t for t in saved if t.numel() and t.untyped_storage().data_ptr() not in known]
    weights = (case.blocks, case.batch * case.rows * case.columns, case.generated)
    assert [(t.shape, t.dtype) for t in new] == [(weights, torch.bfloat16)] * save_weights
    y.sum().backward()


def test_saved_weights_survive_backward(any_isa):
    case = CASES[0]
    leaves = {name: tensor.requires_grad_() for name, tensor in case.inputs().items()}
    y = decode(case, leaves, save_weights=True)
    first, second = (
        torch.autograd.grad(y, list(leaves.values()), case.upstream(), retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@half_and_full
@cases
def test_every_element_is_written(any_isa, case, dtype, monkeypatch):
    """Allocations filled with NaN change nothing."""
    tensors, upstream = case.inputs(dtype), case.upstream(dtype)
    expected = run(case, tensors, upstream)
    poisoned = []

    def poison(allocate):
        def call(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            poisoned.append(tuple(tensor.shape))
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    assert_same_bits(run(case, tensors, upstream), expected)
    assert tuple(upstream.shape) in poisoned
    assert (case.blocks, 2, case.generated) in poisoned


@cases
def test_inputs_and_the_incoming_gradient_are_not_modified(backend, case):
    tensors, upstream = case.inputs(), case.upstream()
    before = {name: tensor.clone() for name, tensor in tensors.items()}, upstream.clone()
    run(case, tensors, upstream)
    run(case, tensors, upstream, save_weights=True)
    assert_same_bits(tensors, before[0])
    assert torch.equal(upstream, before[1])


@half_and_full
@cases
def test_the_same_bits_every_time_and_on_any_number_of_threads(compiled, case, dtype, threads):
    tensors, upstream = case.inputs(dtype), case.upstream(dtype)
    first = run(case, tensors, upstream, patches=5)
    assert_same_bits(run(case, tensors, upstream, patches=5), first)
    if dtype == torch.float32:  # half types generate through torch, which promises nothing
        for count in (1, 3):
            threads(count)
            assert_same_bits(run(case, tensors, upstream, patches=5), first)


@pytest.mark.parametrize("name", ["image", "hidden", "upstream"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_nan_stays_in_its_patch(backend, name, value):
    """A value that is not finite spoils its own patch only, and does not pass for a number there."""
    case = CASES[0]
    everything = {**case.inputs(), "upstream": case.upstream()}
    everything[name].flatten()[-1] = value  # the last pixel, or the last patch's state
    upstream = everything.pop("upstream")
    out = results(functools.partial(decode, case), everything, upstream)
    y, d_image, d_hidden = out["y"], out["image"], out["hidden"]
    fine = (y[:1], d_image[:1], d_hidden[:1], y[1:, ..., :-4], d_image[1:, ..., :-4], d_hidden[1:, :-1])
    assert all(tensor.isfinite().all() for tensor in fine)
    spoiled = {
        "image": (y[1, :, -1, -1],),
        "hidden": (y[1, ..., -4:], d_image[1, ..., -4:]),
        "upstream": (d_hidden[1, -1],),
    }
    assert not any(tensor.isfinite().any() for tensor in spoiled[name])


@pytest.mark.parametrize(("gigabytes", "expected"), [(4, 64 << 20), (24, 240 << 20), (80, 768 << 20)])
def test_auto_is_a_hundredth_of_a_gpu(monkeypatch, gigabytes, expected):
    """At least what a CPU has, and no more than pays."""
    properties = SimpleNamespace(total_memory=gigabytes * (100 << 20) * 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    chunks.default_workspace.cache_clear()
    try:
        assert chunks.default_workspace(torch.device("cuda", 0)) == expected
        assert chunks.default_workspace(torch.device("cpu")) == 64 << 20
    finally:
        chunks.default_workspace.cache_clear()
