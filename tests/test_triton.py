"""Triton without a GPU: the ops' own tests in Triton's interpreter, and every kernel compiled ahead of time.

Under TRITON_INTERPRET=1 kernels are NumPy functions and nothing can be compiled: the interpreter has its own process.
"""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from processes import PACKAGE, environment

from benchmarks import production, resources

TESTS = Path(__file__).parent
#: Left out: what happens around a kernel and not in it; and two kernels at once, which the interpreter cannot run.
AROUND = [
    "inductor",
    "opcheck",
    "export",
    "derivatives",
    "with_aot_eager",
    "compile_for_any_batch",
    "normalized_before",
    "only_the_output_is_written",
    "only_the_results_are_written",
    "same_bits_every_time",  # the interpreter has one thread
    "written_in_place",  # the interpreter itself copies arguments
    "views_of_packed_parameters",
    "threads_at_once",
    "mlp_jvp",  # interpreter/ has some
    # Seconds each, and like others that stay.
    "(decoder_jvp and not (families and (c2i-both or radiance-hidden) and bfloat16))",
    "(every_chunking and not radiance-3-recompute)",
    "(every_gradient and batch and float16)",
    "(gradient_alone and save)",
    "(pixel_decoder_memory and radiance)",
    "(pixel_decoder_golden and (three or all or tiny or conv))",
    "(gradient_alone and (norm or linear_weight or hidden or image))",
    "(pixel_decoder_memory and every_element and (t2i-bfloat16 or c2i-float32))",
    "(test_sizes and 40000 and not float32)",
    "(mlp_memory and 2x196x64x65 and bfloat16)",
    "(mlp_memory and nan_stays and inf)",
    "(golden_blocks and (tiny or conv))",
    "(strided_inputs and fp32 and (padded or second))",
    "(tangents and (beside or strides or another or not_fit))",
]


@pytest.mark.timeout(1800)  # three minutes on one machine have been ten on another
def test_the_ops_in_the_interpreter():
    """Values and gradients, strides, autocast and torch.compile, with what failed in this test's message.

    Two processes share the tests: the interpreter has one thread.
    """
    pytest.importorskip("triton")
    chosen = " and ".join(["triton", *(f"not {name}" for name in AROUND)])
    options = ["-q", "-rf", "--tb=short", "--timeout=120", "-p", "no:cacheprovider"]
    path = os.pathsep.join([str(PACKAGE.parent), str(TESTS), str(TESTS / "ops")])
    halves = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", "-k", f"{chosen} and {half}", "ops", "interpreter", *options],
            env=environment(TRITON_INTERPRET="1", PYTHONPATH=path, OMP_NUM_THREADS="1"),
            cwd=TESTS,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for half in ("pixel_decoder", "not pixel_decoder")
    ]
    try:
        told = [half.communicate()[0] for half in halves]
    finally:
        for half in halves:
            half.kill()
    assert [half.returncode for half in halves] == [0, 0], "\n".join(out[-8000:] for out in told)


def test_every_kernel_compiles_and_fits():
    """For every architecture, at production shapes; the committed table shows a change of any number in review."""
    pytest.importorskip("triton")
    rows = resources.collect()
    assert {row.kernel for row in rows} >= {"neural_field_mlp_forward", "neural_field_mlp_backward"}
    wrong = [problem for row in rows for problem in resources.problems(row)]
    wrong += resources.differences(resources.TABLE.read_text(), rows)
    assert not wrong, "\n".join(wrong) + "\nIf this is meant: python -m benchmarks resources"


def test_a_stub_a_spill_and_missing_tensor_cores_are_told():
    """What an invalid plan compiles to does not pass for a kernel that fits."""
    good = resources.Row(
        "field 64x128 bf16", "neural_field_mlp_forward", "sm_100", "", 4, 150, 0, 1 << 15, 256, 16
    )
    assert not resources.problems(good)
    bad = replace(good, registers=4, spills=8, shared=1 << 20, tensor_memory=544, tensor_core_instructions=0)
    told = "\n".join(resources.problems(bad))
    for part in ("compiled to a stub", "spills 8", "shared memory", "544 columns", "no tcgen05.mma"):
        assert part in told


def test_scratch_is_read_behind_a_barrier():
    """The backward in chunks hands sums from one thread to another through memory, which the interpreter cannot see."""
    pytest.importorskip("triton")
    launch = production.PRODUCTION["field 64x256 gated bf16"].launches("sm_90")[1]
    assert launch.arguments["PIECE"] * launch.arguments["PIECES"] < launch.arguments["HIDDEN"]
    intermediate = resources.compile_launch(launch, production.TARGETS["sm_90"]).asm["ttgir"]
    assert re.search(r"\b(gpu|ttg)\.barrier\b", intermediate)
