"""The paper's 8x: PixNerd against ADM-G, PixelFlow, DiT, SiT and Relay Diffusion, random weights, 256 x 256."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import provenance
from benchmarks.files import load, measuring, save
from benchmarks.gpu import gpu

#: What has to agree for a kept result to stand in for a new one.
SETTINGS = ("cpu", "gpu_name", "cores", "threads", "isa", "torch", "python", "commit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--case", nargs="+", default=[], metavar="NAME", help="cases or shell patterns; default: all")
    add(
        "--provider",
        nargs="+",
        default=[],
        metavar="NAME",
        help="of the PixNerds: eager, compile, ours, ours-compile; GPU: also compile-graph and ours-graph; "
        "default: all but ours-compile. The others run eager",
    )
    add(
        "--compile-baselines",
        action="store_true",
        help="run the other models under torch.compile too; GPU: and as CUDA graphs of that, at a step's batch",
    )
    add(
        "--prepare",
        type=_positive,
        default=0,
        metavar="N",
        help="compile first, N cases at a time, into inductor's cache on disk; then measure one after the other",
    )
    add(
        "--quick",
        action="store_true",
        help="under two minutes: L/16, ADM-G and PixelFlow, fewer calls, no compile",
    )
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, bfloat16 on a GPU")
    add(
        "--batch",
        nargs="+",
        type=_positive,
        default=[],
        metavar="N",
        help="more batch sizes; GPU: 32 by default",
    )
    add("--threads", type=_positive, default=0, help="default: torch's")
    add(
        "--out",
        type=Path,
        default=Path("demo"),
        metavar="DIR",
        help="claims[-quick].json and .md; default: demo",
    )
    add("--json", type=Path, metavar="FILE", help="where the JSON goes, in place of DIR/claims.json")
    add("--fresh", action="store_true", help="measure again what the JSON already has")
    add("--keep-commits", action="store_true", help="when resuming, keep what other commits measured")
    add("--list", action="store_true", help="list the cases and stop")
    add("--smoke", action="store_true", help="tiny sizes, to see that it works; the figures mean nothing")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Measure every case that the JSON does not have, each in a process of its own, and print the tables.

    Returns:
        0, or 1 where a case is wrong or failed, 2 for a bad argument, 130 when interrupted.
    """
    from benchmarks.claims import jobs, tables

    try:
        names = jobs.select(arguments.case, arguments.quick)
        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        providers = jobs.select_providers(arguments.provider, device)
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU here")
        if importlib.util.find_spec("diffusers") is None and not arguments.list:
            raise ValueError('the compared models need diffusers: pip install "pixnerd-kernels[claims]"')
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.list:
        print("\n".join(names))
        return 0
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.quick and not arguments.provider:
        providers = [name for name in providers if "compile" not in name]
    kind = "-smoke" if arguments.smoke else "-quick" if arguments.quick else ""
    path = arguments.json or arguments.out / f"claims{kind}.json"
    document = _document(path, arguments, device)
    provenance.announce(document["provenance"])
    planned = [_job(name, providers, device, arguments) for name in names]
    kept = {(r["case"], r["job"]) for r in document["results"] if r["status"] == "ok"}
    todo = [job for job in planned if (job.name, job.to_json()) not in kept]
    if len(todo) < len(planned):
        print(
            f"{len(planned) - len(todo)} of {len(planned)} cases are in {path} already: --fresh repeats them"
        )
    with measuring(document, f"; the same command goes on from {path}"):
        if arguments.prepare:
            prepare(todo, arguments.prepare)
        _measure(todo, document, path)
    save(path, document)
    text = tables.markdown(document)
    save(path.with_suffix(".md"), text)
    print(text)
    print(f"wrote {path} and {path.with_suffix('.md')}")
    if document["interrupted"]:
        return 130
    return int(any(result["status"] != "ok" for result in document["results"]))


def _document(path: Path, arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    """A new document, with the results of the file at `path` that this run may keep."""
    fresh: dict[str, Any] = {
        "schema": 1,
        "kind": "claims",
        "provenance": provenance.collect(sys.argv[1:]),
        "results": [],
    }
    if device == "cuda":
        fresh["provenance"].update(gpu_name=torch.cuda.get_device_name(), gpu=gpu())
    if arguments.fresh or not path.exists():
        return fresh
    settings = [s for s in SETTINGS if not (s == "commit" and arguments.keep_commits)]
    for result in load(path, "claims")["results"]:
        was = result["provenance"]
        if all(was.get(key) == fresh["provenance"].get(key) for key in settings):
            fresh["results"].append(result)
    return fresh


def _job(name: str, providers: list[str], device: str, arguments: argparse.Namespace) -> Any:
    from benchmarks.claims import jobs

    pixnerd = "PixNerd" in name
    baseline = ["eager"]
    if arguments.compile_baselines:
        baseline += ["compile", "compile-graph"] if device == "cuda" else ["compile"]
    chosen = providers if pixnerd or name == "ablations" else baseline
    extra = arguments.batch or ([32] if device == "cuda" else [])
    full, quick = (jobs.GPU_FULL, jobs.GPU_QUICK) if device == "cuda" else (jobs.FULL, jobs.QUICK)
    batches = jobs.batches(name, extra)
    if arguments.quick and not arguments.batch and not (pixnerd and name in jobs.PIXNERDS):
        batches = (1,)
    return jobs.Job(
        name,
        tuple(chosen),
        quick if arguments.quick else full,
        batches,
        device,
        arguments.dtype or ("bfloat16" if device == "cuda" else "float32"),
        arguments.threads,
        arguments.smoke,
    )


def _measure(todo: list[Any], document: dict[str, Any], path: Path) -> None:
    """Run each job and save after each: an interruption loses one job."""
    from tqdm import tqdm

    from benchmarks.claims import jobs

    bar = tqdm(todo, unit="case", dynamic_ncols=True)
    for job in bar:
        bar.set_description(job.name)
        begin = time.perf_counter()
        result = launch_process(job)
        where = document["provenance"]
        kept = (*SETTINGS, "date", "dirty", "load_average")
        result["provenance"] = {key: where[key] for key in kept if key in where}
        result["wall_s"] = time.perf_counter() - begin
        result["job"] = job.to_json()
        others = [r for r in document["results"] if r["case"] != job.name]
        document["results"] = sorted([*others, result], key=lambda r: jobs.names().index(r["case"]))
        if result["status"] != "ok":
            tqdm.write(f"{job.name} is {result['status']}: {result.get('reason', 'see its providers')}")
        save(path, document)


def prepare(todo: list[Any], at_once: int) -> None:
    """Compile what the jobs compile, several jobs at once; what fails here fails again when it is measured."""
    from benchmarks.baselines.networks import NETWORKS

    compiling = [
        job for job in todo if job.name in NETWORKS and {"compile", "ours-compile"} & {*job.providers}
    ]
    with ThreadPoolExecutor(at_once) as pool:
        for job, code in zip(compiling, pool.map(_prepare_process, compiling), strict=True):
            if code:
                print(f"preparing {job.name} ended with {code}", flush=True)


def _prepare_process(job: Any) -> int:
    command = [sys.executable, "-m", "benchmarks.claims.worker", job.to_json()]
    return subprocess.run(command, env=_environment(), cwd=provenance.ROOT, check=False).returncode


def _environment() -> dict[str, str]:
    return {"KINETO_LOG_LEVEL": "99", **os.environ}


def launch_process(job: Any) -> dict[str, Any]:
    """Run a job in a fresh process; one that dies becomes a result that says so."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.claims.worker", job.to_json(), str(file)]
        done = subprocess.run(command, env=_environment(), cwd=provenance.ROOT, check=False)
        if done.returncode in (130, -2):
            raise KeyboardInterrupt
        if file.exists():
            result: dict[str, Any] = json.loads(file.read_text())
            return result
    return died(job.name, done.returncode)


def died(name: str, code: int) -> dict[str, Any]:
    """The result of a process that left none."""
    killed = code == -9
    return {
        "case": name,
        "status": "out of memory" if killed else "error",
        "reason": "the process was killed, most likely for its memory"
        if killed
        else f"the process exited with {code}",
        "providers": {},
    }
