"""The Triton kernels of neural_field_mlp: memory traffic, every launch plan, the fast activation, 64-bit addresses."""

import numpy as np
import pytest
import torch
from fields import ALL, Case, expected, fused_field, packed_field, packed_inputs, plain_and_exact, results
from test_neural_field_mlp_jvp import along, tangents
from test_neural_field_mlp_jvp import expected as expected_jvp
from tolerance import assert_within
from traffic import summary, traced

from pixnerd_kernels import use_backend
from pixnerd_kernels.ops.gpu import launch, pieces, tuned
from pixnerd_kernels.ops.neural_field_mlp.triton.policy import Plan

#: Patches enough for one program each.
HEAD = Case(n=8, s=256, d1=64, d2=128)
GATED = Case(n=8, s=256, d1=64, d2=256, gated=True)
ONCE, TWICE, NEVER = {1}, {2}, {0}


@pytest.fixture(autouse=True)
def triton():
    with use_backend("triton"):
        yield


def run(case, dtype=torch.float32, form=fused_field, plan=None):
    tensors = case.inputs(dtype) if form is fused_field else packed_inputs(case.inputs(dtype))
    with tuned.override(plan):
        return results(lambda **leaves: form(case, **leaves), tensors, case.upstream(dtype))


@pytest.mark.parametrize("case", [HEAD, GATED], ids=["plain", "gated"])
@pytest.mark.parametrize("tile", [64, 128])
def test_forward_reads_and_writes_everything_once(case, tile):
    """The norm's weight aside, which every program reads."""
    with traced("neural_field_mlp_forward") as traffic:
        run(case, plan=Plan(tile, 64, case.d2 // 64, 4))
    seen = summary(traffic)
    assert seen.pop("norm_weight")[0] == {case.n}
    names = ["x", "w1", "w2", "w_gate"] if case.gated else ["x", "w1", "w2"]
    if not case.gated:
        seen.pop("w_gate")  # w1 stands in for it
    assert seen == {**dict.fromkeys(names, (ONCE, NEVER)), "y": (NEVER, ONCE)}


def test_backward_reads_pixels_once_and_weights_twice():
    """The second time from the cache: what a program keeps on the chip are the gradients' sums."""
    with traced("neural_field_mlp_backward") as traffic:
        run(HEAD, plan=Plan(32, 128, 1, 8))
    seen = summary(traffic)
    assert seen.pop("norm_weight")[0] == {HEAD.n}
    for stand_in in ("w_gate", "d_gate"):
        seen.pop(stand_in)
    read = {"x": (ONCE, NEVER), "grad": (ONCE, NEVER), "w1": (TWICE, NEVER), "w2": (TWICE, NEVER)}
    assert seen == {**read, **dict.fromkeys(["dx", "d1", "d2", "d_norm"], (NEVER, ONCE))}


def test_backward_in_chunks_writes_every_gradient_once():
    """Four chunks of hidden units: pixels are read for each, and sums wait in scratch of one program's size."""
    with traced("neural_field_mlp_backward") as traffic:
        run(GATED, plan=Plan(64, 64, 1, 8))
    seen = summary(traffic)
    for name in ("dx", "d1", "d2", "d_gate", "d_norm"):
        assert seen[name] == (NEVER, ONCE), name
    for name in ("x", "grad"):
        assert seen[name] == ({4}, NEVER), name
    patches = GATED.n // traffic["scratch_x"].tensor.shape[0]
    assert seen["scratch_x"] == ({3 * patches}, {3 * patches})
    assert seen["scratch_2"] == ({patches}, {patches})


def jvp(case, names, dtype=torch.float32, plan=None):
    tensors = case.inputs(dtype)
    with tuned.override(plan):
        return tangents(lambda **all: fused_field(case, **all), tensors, along(case, tensors, names))


def test_jvp_reads_and_writes_everything_once():
    with traced("neural_field_mlp_jvp") as traffic:
        jvp(GATED.with_(s=128), ("x", *ALL), plan=Plan(64, 64, 4, 4))
    seen = summary(traffic)
    assert seen.pop("norm_weight")[0] == {GATED.n}
    read = ["x", "w1", "w2", "w_gate", "dx", "dw1", "dw2", "dw_gate"]
    assert seen == {**dict.fromkeys(read, (ONCE, NEVER)), "y": (NEVER, ONCE), "dy": (NEVER, ONCE)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("names", [("x", *ALL), ("x",), ALL], ids=["everything", "pixels", "weights"])
@pytest.mark.parametrize("plan", [None, Plan(16, 16, 1, 4)], ids=["at once", "piece by piece"])
def test_jvp(plan, names, dtype):
    case = Case(n=2, s=20, d1=12, d2=50, gated=dtype == torch.bfloat16, norm="fp32")
    assert_within(jvp(case, names, dtype, plan), *expected_jvp(case, names, dtype))


PLANS = [
    Plan(16, 16, 1, 4),
    Plan(32, 16, 3, 4),
    Plan(64, 32, 2, 4),
    Plan(16, 128, 1, 8),
    Plan(16, 64, 1, 4, late=True),
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("case", [Case(s=33, d1=17, d2=50), Case(s=33, d1=12, d2=50, gated=True)], ids=str)
def test_every_plan_is_right(case, plan):
    """One or several pieces and chunks, with and without padding."""
    for form in (fused_field, packed_field):
        same = (lambda r: r) if form is fused_field else packed_inputs
        assert_within(run(case, form=form, plan=plan), *map(same, expected(case)))


LATE = Plan(16, 32, 2, 4, late=True)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_a_late_divisor_is_right_in_bfloat16(gated, scale):
    """Of pixels a thousand times as large and as small, too, whose gradients it shrinks and stretches."""
    case = Case(s=33, d1=12, d2=50, gated=gated)
    tensors, upstream = case.inputs(torch.bfloat16), case.upstream(torch.bfloat16)
    tensors["x"] = tensors["x"] * scale
    with tuned.override(LATE):
        out = results(lambda **leaves: fused_field(case, **leaves), tensors, upstream)
    assert_within(out, *plain_and_exact(case, tensors, upstream))


@pytest.mark.parametrize("plan", [None, LATE], ids=str)
def test_padding_is_inert_where_eps_is_zero(plan):
    """1 / max(||w||, 0) is infinite in the padded columns, rsqrt(0 + 0) in the padded rows."""
    case = Case(s=5, d1=12, d2=20, gated=True, norm_eps=0.0, weight_eps=0.0)
    assert_within(run(case, plan=plan), *expected(case))


def test_spans_of_long_sums_where_eps_is_zero():
    """Tiles that do not divide a span of pixels: what lies behind it belongs to the next."""
    case = Case(n=1, s=1100, d1=12, d2=20, norm_eps=0.0)
    assert_within(run(case, plan=Plan(512, 32, 1, 4)), *expected(case))


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fast_tanh_keeps_the_accuracy_rule(dtype, activation, sign, monkeypatch):
    """With the largest error that the hardware's tanh may have, 2^-11 of its value, everywhere to the same side."""

    def worst(x):
        exact = np.tanh(x.handle.data.astype(np.float64))
        data = np.clip(exact * (1 + sign * 2.0**-11), -1, 1).astype(np.float32)
        return pieces.tl.core.tensor(type(x.handle)(data, x.handle.dtype), x.type)

    calls = []
    monkeypatch.setattr(pieces, "fast_tanh", lambda x: calls.append(1) or worst(x))
    monkeypatch.setattr(launch.Target, "fast_tanh", True)
    for case in (Case(s=196, d1=64, d2=48, activation=activation), Case(activation=activation, gated=True)):
        assert_within(run(case, dtype), *expected(case, dtype))
    assert calls


def test_fast_tanh_does_not_blow_up_large_values(monkeypatch):
    """With the hardware's largest error below 8; from there on it is exactly 1, as tests/gpu checks."""

    def worst(x):
        exact = pieces.sigmoid(2.0 * x)[0] * 2.0 - 1.0
        return pieces.tl.where(pieces.tl.abs(x) < 8.0, exact * (1 - 2.0**-11), exact)

    monkeypatch.setattr(pieces, "fast_tanh", worst)
    monkeypatch.setattr(launch.Target, "fast_tanh", True)
    for activation in ("silu", "gelu"):
        case = Case(activation=activation, normalize=())
        tensors = case.inputs(torch.bfloat16)
        tensors["w1"] *= 2.0**60
        out = results(
            lambda t=case, **leaves: fused_field(t, **leaves), tensors, case.upstream(torch.bfloat16)
        )
        exact = results(
            lambda t=case, **leaves: fused_field(t, **leaves),
            {name: tensor.float() for name, tensor in tensors.items()},
            case.upstream(),
        )
        for name, tensor in out.items():
            assert tensor.isfinite().all(), name
            torch.testing.assert_close(
                tensor.float(), exact[name], rtol=0.05, atol=0.05 * exact[name].abs().max().item()
            )


def test_addresses_beyond_32_bits():
    """Patches 2^31 elements apart in the address space: in one matrix of memory pages that are never touched."""
    case = Case(n=2, s=20, d1=16, d2=24)
    tensors, upstream = case.inputs(), case.upstream()
    far = torch.empty((1 << 31) + 4096)  # 8 GiB of address space
    spread = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        if tensor.dim() == 3:
            view = far[512 * index :].as_strided(tensor.shape, (1 << 31, tensor.stride(1), 1))
            spread[name] = view.copy_(tensor)
    out = results(lambda **leaves: fused_field(case, **leaves), {**tensors, **spread}, upstream)
    same = results(lambda **leaves: fused_field(case, **leaves), tensors, upstream)
    for name, tensor in out.items():
        assert torch.equal(tensor, same[name]), name


def test_rows_beyond_32_bits():
    """Pixels of a patch 2^31 elements apart."""
    case = Case(n=1, s=2, d1=16, d2=24)
    tensors, upstream = case.inputs(), case.upstream()
    far = torch.empty((1 << 31) + 4096)
    x = far.as_strided(tensors["x"].shape, (1, 1 << 31, 1)).copy_(tensors["x"])
    out = results(lambda **leaves: fused_field(case, **leaves), {**tensors, "x": x}, upstream)
    same = results(lambda **leaves: fused_field(case, **leaves), tensors, upstream)
    for name, tensor in out.items():
        assert torch.equal(tensor, same[name]), name


@pytest.mark.parametrize("setting", ["highest", "high"])
def test_tf32_only_where_the_user_allows_it(setting):
    before = torch.get_float32_matmul_precision()
    target = launch.Target("cuda", 90, 132, "H100")
    torch.set_float32_matmul_precision(setting)
    try:
        assert launch.precision(torch.float32, target) == ("ieee" if setting == "highest" else "tf32")
        assert launch.precision(torch.bfloat16, target) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
