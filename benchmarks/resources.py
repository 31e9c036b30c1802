"""Compile every Triton kernel ahead of time, without a GPU: registers, spills, memory and tensor-core instructions."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

# `benchmarks.production` needs Triton, which the other commands do without.
if TYPE_CHECKING:
    from pixnerd_kernels.ops.gpu.launch import Launch, Target

TABLE = Path(__file__).parent / "results" / "static_resources.md"
#: Bytes of shared memory that one program may take.
SHARED_LIMITS = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
TENSOR_CORES = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
#: Kernels without matrix products.
_NO_PRODUCTS = {"pixel_decoder_output_grad", "pixel_decoder_input_grad"}
#: Spills that a backward may have: bytes, on gfx942 registers; a forward has `Production.spills`. Sums of weight
#: gradients take half of a backward's registers; what spills does so outside of the loop over pixels, and costs an H100
#: less than plans that keep everything in registers.
SPILLS_OF_BACKWARD = {"sm_80": 400, "sm_90": 600, "sm_100": 400, "gfx942": 64}
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
Job = tuple[str, str, int]


@dataclass(frozen=True)
class Row:
    """What one compiled launch takes. Memory in bytes; `tensor_memory` in columns of 32 bits; spills as stack bytes
    on NVIDIA GPUs and as registers on AMD's."""

    case: str
    kernel: str
    target: str
    plan: str
    warps: int
    registers: int
    spills: int
    shared: int
    tensor_memory: int
    tensor_core_instructions: int


def jobs() -> list[Job]:
    """(case, architecture, index of the launch) of everything to compile, each once for a case and architecture."""
    from benchmarks.production import PRODUCTION

    found = []
    for name, production in PRODUCTION.items():
        for target in production.targets:
            known = set()
            for index, launch in enumerate(production.launches(target)):
                key = repr((launch.name, _variant(launch), launch.options))
                if key not in known:
                    known.add(key)
                    found.append((name, target, index))
    return found


def _variant(launch: Launch) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """What the kernel is compiled for: the kinds of its arguments, constants, and what is known of the others."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value, divisible = launch.arguments[parameter.name], False
        specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and specialized):
            kind = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            kind, divisible = f"*{_TYPES[value.dtype]}", True
        elif isinstance(value, float):
            kind = "fp32"
        else:
            kind, divisible = "i32" if abs(value) < 2**31 else "i64", specialized and value % 16 == 0
        signature[parameter.name] = kind
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_launch(launch: Launch, target: Target) -> Any:
    """The kernel compiled as Triton would at the launch's first call."""
    from triton import compile as build
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _variant(launch)
    kind = ASTSource
    if getattr(launch.kernel, "is_gluon", bool)():
        from triton.experimental.gluon._runtime import GluonASTSource as kind
    source = kind(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    gpu = GPUTarget(target.backend, target.arch, 64 if target.backend == "hip" else 32)
    return build(source, target=gpu, options=launch.options.named())


def measure(job: Job) -> Row:
    """Compile one job and read what it takes from the binary."""
    from benchmarks.production import PRODUCTION, TARGETS

    case, name, index = job
    target = TARGETS[name]
    launch = PRODUCTION[case].launches(name)[index]
    compiled = compile_launch(launch, target)
    plan = " ".join(
        f"{key.lower()}={launch.arguments[key]}"
        for key in ("TILE", "PIECE", "PIECES", "BLOCK_R", "BLOCK_C", "BLOCK")
        if key in launch.arguments
    ) + (" keep" if launch.arguments.get("KEEP") else "")
    if target.backend == "cuda":
        usage = _cubin_usage(compiled.asm["cubin"])
        registers, spills, assembly = usage["REG"], usage["STACK"], compiled.asm["ptx"]
    else:
        assembly = compiled.asm["amdgcn"]
        registers, spills = (
            _number(rf"\.{key}:\s+(\d+)", assembly) for key in ("vgpr_count", "vgpr_spill_count")
        )
    return Row(
        case, launch.name, name, plan, launch.options.warps, registers, spills,
        compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0,
        assembly.count(TENSOR_CORES[name]),
    )  # fmt: skip


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, pattern
    return int(found[1])


def _cubin_usage(cubin: bytes) -> dict[str, int]:
    """Registers and stack bytes, by the cuobjdump that Triton brings along."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {key: _number(rf"{key}:(\d+)", done.stdout) for key in ("REG", "STACK")}


def collect(wanted: Sequence[Job] | None = None, processes: int = 2) -> list[Row]:
    """Every job's row, compiled by several processes; Triton caches what has been compiled before."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise RuntimeError("nothing can be compiled under TRITON_INTERPRET")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        return list(pool.map(measure, jobs() if wanted is None else wanted))


def problems(row: Row) -> list[str]:
    """What must hold of every row, whatever Triton's version."""
    from benchmarks.production import PRODUCTION

    name = f"{row.case}, {row.kernel} on {row.target}"
    found = []
    if row.registers < 16:
        found.append(f"{name}: {row.registers} registers: compiled to a stub")
    if row.shared > SHARED_LIMITS[row.target]:
        found.append(f"{name}: {row.shared} bytes of shared memory, {SHARED_LIMITS[row.target]} are there")
    if row.tensor_memory > 512:
        found.append(f"{name}: {row.tensor_memory} columns of tensor memory, 512 are there")
    production = PRODUCTION[row.case]
    allowed = SPILLS_OF_BACKWARD[row.target] if "backward" in row.kernel else production.spills
    if row.spills > allowed and not production.may_spill:
        found.append(f"{name}: spills {row.spills}, {allowed} are allowed")
    if production.tensor_cores and row.kernel not in _NO_PRODUCTS and not row.tensor_core_instructions:
        found.append(f"{name}: no {TENSOR_CORES[row.target]}")
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The committed table."""
    import triton

    columns = list(asdict(rows[0]))
    lines = [
        f"`python -m benchmarks resources`: compiled ahead of time with Triton {triton.__version__}.",
        "Memory in bytes, tensor memory in columns; spills are stack bytes on NVIDIA GPUs, registers on AMD's.",
        "",
        "| " + " | ".join(name.replace("_", " ") for name in columns) + " |",
        "|" + "---|" * 4 + "---:|" * (len(columns) - 4),
        *("| " + " | ".join(str(value) for value in asdict(row).values()) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def differences(committed: str, rows: Sequence[Row]) -> list[str]:
    """Lines of the committed table that the rows contradict; none where another Triton wrote it."""
    ours = markdown(rows).splitlines()
    theirs = committed.splitlines()
    if theirs[0] != ours[0]:
        return []
    return [f"- {a}\n+ {b}" for a, b in zip(theirs, ours, strict=False) if a != b] + (
        [] if len(theirs) == len(ours) else [f"{len(theirs)} lines, now {len(ours)}"]
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--check", action="store_true", help="compare with the committed table, write nothing"
    )
    parser.add_argument("--processes", type=int, default=2, help="compile this many kernels at a time")


def run(arguments: argparse.Namespace) -> int:
    """Write the table, or compare with it; 1 where a kernel does not fit or the table differs."""
    rows = collect(processes=arguments.processes)
    wrong = [problem for row in rows for problem in problems(row)]
    if arguments.check:
        wrong += differences(TABLE.read_text(), rows)
    else:
        TABLE.write_text(markdown(rows))
    print(markdown(rows))
    for problem in wrong:
        print(problem, file=sys.stderr)
    return int(bool(wrong))
