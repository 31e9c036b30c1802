"""What neural_field_mlp touches: everything it should write, nothing beside it, no input, the same bits each time."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from fields import Case, assert_case_within, expected, fused_field, packed_field, packed_inputs, results
from tolerance import assert_within

from pixnerd_kernels import use_backend

CASES = [
    Case(s=33, d1=12, d2=50),
    Case(s=20, d1=16, d2=24, gated=True, norm="fp32"),
    Case(n=2, s=196, d1=64, d2=65),
    Case(s=1, d1=7, d2=1, gated=True, norm=None),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
half_and_full = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
SENTINEL = 0x5A


def both_forms(case, tensors, upstream):
    """Results of the op on separate and on packed weights."""
    out = results(lambda **leaves: fused_field(case, **leaves), tensors, upstream)
    packed = results(lambda **leaves: packed_field(case, **leaves), packed_inputs(tensors), upstream)
    return {**out, **{f"packed.{name}": tensor for name, tensor in packed.items()}}


def assert_both_forms_within(case, dtype, out):
    """What `both_forms` returned lies within the tolerance."""
    packed = {name.removeprefix("packed."): t for name, t in out.items() if name.startswith("packed.")}
    assert_case_within(case, dtype, {name: t for name, t in out.items() if not name.startswith("packed.")})
    assert_within(packed, *map(packed_inputs, expected(case, dtype)))


def assert_same_bits(out, other):
    assert out.keys() == other.keys()
    for name, tensor in out.items():
        assert torch.equal(tensor, other[name]), name


@half_and_full
@cases
def test_every_element_is_written(backend, case, dtype, monkeypatch):
    """Allocations filled with NaN change nothing."""
    tensors, upstream = case.inputs(dtype), case.upstream(dtype)
    first = both_forms(case, tensors, upstream)
    poisoned = []

    def poison(allocate):
        def call(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            poisoned.append(tensor.shape)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return call

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    assert_same_bits(both_forms(case, tensors, upstream), first)
    assert tensors["w1"].shape in poisoned


@half_and_full
@cases
def test_nothing_is_written_beside_an_output(backend, case, dtype, monkeypatch):
    """Every output lies between sentinels, which stay as they were."""
    tensors, upstream = case.inputs(dtype), case.upstream(dtype)
    first = both_forms(case, tensors, upstream)
    rooms = []
    margin = 1024

    def roomy(like, *, dtype=None, memory_format=torch.contiguous_format):
        assert memory_format is torch.contiguous_format
        size = like.numel() * (dtype or like.dtype).itemsize
        room = torch.full((size + 2 * margin,), SENTINEL, dtype=torch.uint8, device=like.device)
        rooms.append((room, size))
        return room[margin : margin + size].view(dtype or like.dtype).view(like.shape)

    if backend.compiled:
        monkeypatch.setattr(torch, "empty_like", roomy)
    out = both_forms(case, tensors, upstream)
    monkeypatch.undo()
    assert_same_bits(out, first)
    assert bool(rooms) == backend.compiled
    for room, size in rooms:
        assert (room[:margin] == SENTINEL).all()
        assert (room[margin + size :] == SENTINEL).all()


@half_and_full
@cases
def test_nothing_is_read_beside_an_input(backend, case, dtype):
    """Every input and the incoming gradient sit in NaN, rows and patches apart and packed without gaps."""
    tensors, upstream = case.inputs(dtype), case.upstream(dtype)
    alone = both_forms(case, tensors, upstream)
    if not backend.one_kernel:
        assert_both_forms_within(case, dtype, alone)

    def surrounded(tensor):
        room = tensor.new_full((tensor.numel() + 256,), torch.nan)
        return room[128 : 128 + tensor.numel()].view(tensor.shape).copy_(tensor)

    def apart(tensor):
        room = tensor.new_full([size + 5 for size in tensor.shape], torch.nan)
        return room[tuple(slice(2, 2 + size) for size in tensor.shape)].copy_(tensor)

    for place in (surrounded, apart):
        placed = {name: place(tensor) for name, tensor in tensors.items()}
        out = both_forms(case, placed, place(upstream))
        if not backend.one_kernel:
            assert_both_forms_within(case, dtype, out)
        elif backend.compiled or place is surrounded:
            assert_same_bits(out, alone)
        else:
            for name, tensor in out.items():
                torch.testing.assert_close(tensor, alone[name], msg=name)


@cases
def test_inputs_and_the_incoming_gradient_are_not_modified(backend, case):
    tensors, upstream = case.inputs(), case.upstream()
    before = {name: tensor.clone() for name, tensor in tensors.items()}, upstream.clone()
    versions = [tensor._version for tensor in (*tensors.values(), upstream)]
    both_forms(case, tensors, upstream)
    assert_same_bits(tensors, before[0])
    assert torch.equal(upstream, before[1])
    assert versions == [tensor._version for tensor in (*tensors.values(), upstream)]


@half_and_full
@cases
def test_the_same_bits_every_time(backend, case, dtype):
    tensors, upstream = case.inputs(dtype), case.upstream(dtype)
    first = both_forms(case, tensors, upstream)
    for _ in range(3):
        assert_same_bits(both_forms(case, tensors, upstream), first)


@half_and_full
@pytest.mark.parametrize("case", [*CASES, Case(n=40, s=64, d1=16, d2=32, norm="fp32")], ids=str)
def test_the_same_bits_on_any_number_of_threads(compiled, case, dtype, threads):
    tensors, upstream = case.inputs(dtype), case.upstream(dtype)
    threads(1)
    first = both_forms(case, tensors, upstream)
    for count in (2, 3):
        threads(count)
        assert_same_bits(both_forms(case, tensors, upstream), first)


def test_two_python_threads_at_once(backend):
    """The core releases the interpreter's lock; calls do not share scratch memory."""
    case = Case(n=8, s=64, d1=16, d2=32, gated=True)
    work = [(case.inputs(seed=seed), case.upstream(seed=seed)) for seed in range(2)]
    alone = [both_forms(case, *inputs) for inputs in work]
    wrong = []

    def run(index):
        for _ in range(5):
            try:
                assert_same_bits(both_forms(case, *work[index]), alone[index])
            except AssertionError as error:
                wrong.append(error)

    runners = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    assert not wrong


SCRATCH = """
import os, sys, torch
sys.path[:0] = {folders!r}
from fields import Case, fused_field, results
from pixnerd_kernels import backends, use_backend
case = Case(s=33, d1=17, d2=50, gated=True, norm="fp32")
core = backends.native()
with use_backend("cpu"):
    for isa in core.isas():
        core.set_isa(isa)
        for _ in range(2):
            out = results(lambda **leaves: fused_field(case, **leaves), case.inputs(), case.upstream())
            print(isa, [tensor.double().sum().item().hex() for tensor in out.values()])
"""


def test_scratch_memory_is_written_before_it_is_read(core):
    """glibc fills fresh and freed memory with a pattern; results do not change."""
    here = os.path.dirname(__file__)
    script = SCRATCH.format(folders=[here, os.path.dirname(here)])

    def run(pattern):
        environment = {**os.environ, "MALLOC_PERTURB_": pattern}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("128") == run("0") != ""


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("name", ["x", "w1", "w2", "upstream"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_nan_stays_in_its_patch(backend, name, value, gated):
    """A value that is not finite spoils its own patch only, and does not pass for a number there."""
    case = Case(gated=gated, norm=None)
    tensors, upstream = case.inputs(), case.upstream()
    clean = results(lambda **leaves: fused_field(case, **leaves), tensors, upstream)
    everything = {**tensors, "upstream": upstream}
    everything[name][1, 0, 0] = value
    out = results(lambda **leaves: fused_field(case, **leaves), tensors, upstream)
    for key, tensor in out.items():
        assert torch.equal(tensor[::2], clean[key][::2]), key
    if name == "x":
        spoiled = out["y"][1, 0]
    elif name == "upstream":
        spoiled = torch.stack([out["x"][1, 0].sum(), out["w1"][1].sum(), out["w2"][1, :, 0].sum()])
    elif name == "w1":
        spoiled = out["y"][1].sum(-1)
    else:
        spoiled = out["y"][1, :, 0]
    if value != value or name in ("w1", "w2"):
        assert spoiled.isnan().all()
    else:
        assert not spoiled.isfinite().any()


@pytest.mark.parametrize("name", ["x", "w1", "w2", "w_gate"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_non_finite_values_agree_with_plain_pytorch(backend, name, activation):
    """The same elements are finite as in plain PyTorch: no crash, and nothing not finite is lost."""
    case = Case(gated=True, activation=activation, normalize=())
    for value in (float("nan"), float("inf"), -float("inf")):
        tensors = case.inputs()
        tensors[name][1, 0, 0] = value
        with use_backend("reference"):
            reference = fused_field(case, **tensors)
        assert torch.equal(fused_field(case, **tensors).isfinite(), reference.isfinite()), value


@pytest.mark.parametrize("function", [fused_field, packed_field], ids=["separate", "packed"])
@cases
def test_saved_for_backward(any_isa, case, function):
    """x, the raw weights and norm_weight are saved; nothing else is."""
    tensors = case.inputs() if function is fused_field else packed_inputs(case.inputs())
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = function(case, **leaves)
    assert sorted(t.data_ptr() for t in saved) == sorted(t.data_ptr() for t in leaves.values())
    assert sum(t.nbytes for t in saved) == sum(t.nbytes for t in leaves.values())
    y.sum().backward()


@cases
def test_packed_gradient_is_written_in_place(any_isa, case):
    """One tensor of the packed shape is allocated for it, and no concatenation or copy follows."""
    tensors = {name: tensor.requires_grad_() for name, tensor in packed_inputs(case.inputs()).items()}
    y = packed_field(case, **tensors)
    upstream = case.upstream()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gradient = torch.autograd.grad(y, tensors["params"], upstream)[0]
    assert gradient.shape == tensors["params"].shape
    assert gradient.is_contiguous()
    operations = {event.name for event in profile.events()}
    assert "pixnerd::neural_field_mlp_packed_backward" in operations
    assert "aten::empty" in operations or "aten::empty_like" in operations
    assert not operations & {"aten::cat", "aten::stack", "aten::concat"}
    if any_isa.compiled:
        assert "aten::copy_" not in operations
        assert any_isa.calls["neural_field_mlp_backward"] == 1
