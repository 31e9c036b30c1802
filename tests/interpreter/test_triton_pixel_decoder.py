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
    with traced("pixel_decoder_forward") as traffic:
        run(case, plan=PLAN)
    seen = summary(traffic)
    assert seen["image"] == (ONCE, NEVER)
    assert seen["generated"] == (ONCE if case.d2 == PLAN.piece else {2}, NEVER)
    assert seen["out"] == (NEVER, ONCE)
    assert {name for name, (_, stores) in seen.items() if stores != NEVER} == {"out", "scratch"}
    handed_on = case.columns * case.patch**2 * case.d1 * (case.blocks - 1)
    assert traffic["scratch"].loads.sum() == traffic["scratch"].stores.sum() == handed_on


@pytest.mark.parametrize("saved", [False, True], ids=["recompute", "save"])
def test_backward_reads_the_image_twice_and_writes_every_gradient_once(saved):
    """The image for the embedding and for its weight's gradient; a block's weights on the way there, then twice."""
    with traced("pixel_decoder_backward") as traffic:
        run(PLAIN, plan=PLAN, save_weights=saved)
    seen = summary(traffic)
    assert seen["grad"] == (ONCE, NEVER)
    assert seen["image"] == ({2}, NEVER)
    # Without saved weights their gradient takes their place: both names see the accesses of both.
    assert seen["generated"] == ({3}, NEVER if saved else ONCE)
    assert seen["d_generated"] == (NEVER if saved else {3}, ONCE)
    assert seen["d_image"] == (NEVER, ONCE)
    assert seen["partial"] == (NEVER, ONCE)
    programs = traffic["scratch"].tensor.shape[0]
    patches = PLAIN.columns // programs
    assert seen["table_sum"] == ({patches}, {patches})
    # What the last block leaves makes way for its gradient, and that for the gradients of all blocks.
    assert traffic["scratch"].times("stores") == {patches, (2 + PLAIN.blocks) * patches}


def test_backward_in_chunks_writes_every_gradient_once():
    """Two chunks of hidden units, whose sums wait in scratch."""
    with traced("pixel_decoder_backward") as traffic:
        run(GATED, plan=PLAN, save_weights=True)
    seen = summary(traffic)
    for name in ("d_image", "d_generated", "partial"):
        assert seen[name] == (NEVER, ONCE), name
    assert seen["grad"] == (ONCE, NEVER)
    assert seen["scratch_x"] != (NEVER, NEVER)


@pytest.mark.parametrize("case", [PLAIN, GATED], ids=["plain", "gated"])
def test_scratch_is_bounded(case, monkeypatch):
    """One program after another where the bound is small, to the same bits where a sum does not change its order."""
    several = run(case)
    monkeypatch.setattr(launcher, "_SCRATCH", 1)
    for kernel in ("pixel_decoder_forward", "pixel_decoder_backward"):
        with traced(kernel) as traffic:
            alone = run(case)
        assert traffic["scratch"].tensor.shape[0] == 1, kernel
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
