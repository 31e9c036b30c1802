"""The Triton kernels of pixel_decoder: memory traffic, gradients in the weights' place, few programs, every plan."""

import functools

import pytest
import torch
from decoders import Case, decode, expected, results
from tolerance import assert_within
from traffic import summary, traced

from pixnerd_kernels import use_backend
from pixnerd_kernels.ops.gpu import tuned
from pixnerd_kernels.ops.neural_field_mlp.triton.policy import Plan
from pixnerd_kernels.ops.pixel_decoder import triton as launcher

#: Channels and hidden units without padding, two tiles for each patch.
PLAIN = Case(batch=1, columns=4, patch=8, d1=16, d2=32, bias=False)
GATED = Case(batch=1, columns=4, patch=8, d1=16, d2=64, gated=True, outputs=None, bias=False)
PLAN = Plan(32, 32, 1, 8)
ONCE, NEVER = {1}, {0}


@pytest.fixture(autouse=True)
def triton():
    with use_backend("triton"):
        yield


def run(case, dtype=torch.float32, plan=None, **options):
    with tuned.override(plan):
        return results(functools.partial(decode, case, **options), case.inputs(dtype), case.upstream(dtype))


@pytest.mark.parametrize("case", [PLAIN, GATED], ids=["plain", "gated"])
def test_forward_reads_the_image_and_the_weights_and_writes_the_result_once(case):
    """Hidden units that do not fit at once are read for each of two tiles; what blocks hand on waits in scratch.

    Neither what enters the first block nor what leaves the last one does.
    """
    with traced("pixel_decoder_forward") as traffic, tuned.override(PLAN), torch.no_grad():
        decode(case, case.inputs())
    seen = summary(traffic)
    assert seen["image"] == (ONCE, NEVER)
    assert seen["generated"] == (ONCE if case.d2 == PLAN.piece else {2}, NEVER)
    assert seen["out"] == (NEVER, ONCE)
    assert {name for name, (_, stores) in seen.items() if stores != NEVER} == {"out", "scratch"}
    handed_on = case.columns * case.patch**2 * case.d1 * (case.blocks - 1)
    assert traffic["scratch"].loads.sum() == traffic["scratch"].stores.sum() == handed_on


def backward_traffic(case, kernel, **options):
    """The traffic of the last launch of one of the backward's kernels."""
    with traced(kernel) as traffic:
        run(case, plan=PLAN, **options)
    return traffic


@pytest.mark.parametrize("saved", [False, True], ids=["recompute", "save"])
def test_backward_keeps_what_enters_each_block(saved):
    """The image and the weights are read once; the first block's input is not read again, nor is the result written."""
    traffic = backward_traffic(PLAIN, "pixel_decoder_forward", save_weights=saved)
    seen = summary(traffic)
    assert seen["image"] == seen["generated"] == (ONCE, NEVER)
    assert traffic["scratch"].times("stores") == ONCE
    places = traffic["scratch"].loads.reshape(PLAIN.blocks + 1, -1)
    assert [set(place) for place in places] == [{0}, *[{1}] * (PLAIN.blocks - 1), {0}]


@pytest.mark.parametrize("case", [PLAIN, GATED], ids=["plain", "gated"])
def test_backward_passes_over_everything_once(case):
    """The gradient of what a block leaves takes its place; those of the weights are each written once."""
    seen = summary(backward_traffic(case, "pixel_decoder_output_grad"))
    assert seen["grad"] == (ONCE, NEVER)
    assert seen["last"] == (ONCE, ONCE)
    assert seen["partial"] == (ONCE, ONCE)
    seen = summary(backward_traffic(case, "neural_field_mlp_backward", save_weights=True))
    chunks = case.d2 // PLAN.piece
    # Two names of one gradient, read for each chunk of hidden units and overwritten.
    assert seen["grad"] == seen["dx"] == ({chunks}, ONCE)
    assert seen["x"] == ({chunks}, NEVER)
    for name in ("d1", "d2", "d_gate") if case.gated else ("d1", "d2"):
        assert seen[name] == (NEVER, ONCE), name
    seen = summary(backward_traffic(case, "pixel_decoder_input_grad"))
    assert seen["dx"] == seen["image"] == (ONCE, NEVER)
    assert seen["d_image"] == (NEVER, ONCE)
    assert seen["table_sum"] == seen["partial"] == (ONCE, ONCE)


@pytest.mark.parametrize("case", [PLAIN, GATED], ids=["plain", "gated"])
def test_scratch_is_bounded(case, monkeypatch):
    """One patch after another where the bound is small, to the same bits where a sum does not change its order."""
    several = run(case)
    monkeypatch.setattr(launcher, "_SCRATCH", 1)
    monkeypatch.setattr(launcher, "_KEPT", 1)
    # The last launch is the backward's: a patch at a time.
    with traced("pixel_decoder_forward") as traffic:
        alone = run(case)
    assert traffic["scratch"].tensor.shape[:2] == (case.blocks + 1, 1)
    with traced("pixel_decoder_forward") as traffic, torch.no_grad():
        decode(case, case.inputs())
    assert traffic["scratch"].tensor.shape[:2] == (2, 1)
    for name in ("y", "image", "hidden", "generator.0", "norm.1"):
        assert torch.equal(alone[name], several[name]), name
    assert_within(alone, *expected(case))


PLANS = [Plan(16, 16, 1, 4), Plan(64, 32, 2, 4), Plan(16, 16, 3, 8), Plan(16, 32, 2, 4, late=True)]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize(
    "case", [Case(patch=5, d1=17, d2=50), Case(patch=5, d1=12, d2=50, gated=True, outputs=None)], ids=str
)
def test_every_plan_is_right(case, plan):
    """One or several pieces and chunks, with and without padding, pixels that fill no tile."""
    assert_within(run(case, plan=plan), *expected(case))


def test_blocks_beyond_32_bits():
    """Blocks' weights 2^30 numbers apart in the address space, of which hardly any page is touched."""
    case = Case(batch=1, columns=2, blocks=4, d1=16, d2=16)
    seen = []
    new_empty = torch.Tensor.new_empty

    def spread(like, *shape, **options):
        if len(shape) == 3 and shape[0] == case.blocks:
            seen.append(shape)
            return torch.empty_strided(shape, (1 << 30, shape[2], 1), dtype=like.dtype)
        return new_empty(like, *shape, **options)

    close = run(case, torch.float16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", spread)
        far = run(case, torch.float16)
    assert len(seen) == 2
    for name, tensor in far.items():
        assert torch.equal(tensor, close[name]), name
