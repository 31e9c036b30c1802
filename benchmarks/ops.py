"""Time and memory of each op: eager PyTorch, torch.compile and ours, checked against float64 first."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import breakdown, compare, plot, provenance, tables
from benchmarks.files import load, measuring, save
from benchmarks.providers import PROVIDERS, select_providers
from benchmarks.registry import Case, select_cases
from benchmarks.timing import QUICK, Budget
from benchmarks.worker import Job

#: Above every block that the cases allocate, so that glibc keeps and reuses freed pages.
_NEVER = str(4 << 30)
MALLOC: dict[str, dict[str, str]] = {
    "default": {},
    "tuned": {"MALLOC_MMAP_THRESHOLD_": _NEVER, "MALLOC_TRIM_THRESHOLD_": _NEVER},
}
ISAS = ("portable", "avx2", "avx512", "avx512_bf16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--case", nargs="+", default=[], metavar="NAME", help="cases, ops or shell patterns; default: all")
    add("--provider", nargs="+", default=[], metavar="NAME", help="eager, compile, ours; default: all")
    add(
        "--accept",
        nargs="+",
        default=[],
        metavar="NAME",
        help="time these baselines even where they miss the accuracy rule, and mark them inexact",
    )
    add(
        "--malloc",
        choices=[*MALLOC, "both"],
        help="default: both for the headline cases, default for the rest",
    )
    add("--size", choices=["full", "smoke"], default="full", help="smoke: tiny shapes, to see that it works")
    add("--quick", action="store_true", help="few rounds, and no resident-set measurement")
    add("--threads", type=_positive, help="threads of torch and of the core; default: torch's")
    add("--isa", choices=ISAS, help="the core's instruction set; default: the best that this CPU has")
    add("--profile", action="store_true", help="where the time of a plain block or a decoder goes")
    add(
        "--base",
        metavar="REF",
        help="compare with another commit's package: ours alone, in alternating processes",
    )
    add("--json", type=Path, metavar="FILE", help="write the results, after every case")
    add("--markdown", type=Path, metavar="FILE", help="write a Markdown table")
    add("--plot", type=Path, metavar="FILE", help="write a bar chart (PNG)")
    add("--out", type=Path, metavar="DIR", help="all three: ops.json, ops.md and ops.png in DIR")
    add("--resume", action="store_true", help="keep what the JSON has of this commit, machine and setting")
    add("--list", action="store_true", help="list the cases and stop")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Measure what was asked for, each case in a process of its own."""
    try:
        cases, providers = select_cases(arguments.case), select_providers(arguments.provider)
        if "ours" in arguments.accept or any(name not in PROVIDERS for name in arguments.accept):
            baselines = ", ".join(name for name in PROVIDERS if name != "ours")
            raise ValueError(f"--accept: expected baselines ({baselines}), got {', '.join(arguments.accept)}")
        _set_isa(arguments.isa)
        if arguments.base and not arguments.list:
            return _compare(arguments, cases)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.list:
        print("\n".join(case.name for case in cases))
        return 0
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.out:
        for name, file in (("json", "ops.json"), ("markdown", "ops.md"), ("plot", "ops.png")):
            setattr(arguments, name, getattr(arguments, name) or arguments.out / file)
    jobs = _jobs(arguments, cases, providers)
    document: dict[str, Any] = {
        "schema": 1,
        "provenance": provenance.collect(sys.argv[1:]),
        "results": [],
    }
    kept = _kept(arguments, document["provenance"])
    provenance.announce(document["provenance"])
    with measuring(document, f" of {len(jobs)}"):
        for index, job in enumerate(jobs, 1):
            print(f"[{index}/{len(jobs)}] {job.case}, malloc {job.malloc}", file=sys.stderr, flush=True)
            result = kept.get(job.to_json()) or launch_process(job)
            document["results"].append({**result, "job": job.to_json()})
            print("\n" + tables.text(document["results"][-1]) + "\n", flush=True)
            if arguments.json:
                save(arguments.json, document)
    _write(arguments, document)
    if document["interrupted"]:
        return 130
    return int(any(result["status"] not in ("ok", "inexact") for result in document["results"]))


def _kept(arguments: argparse.Namespace, here: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Results of an interrupted run by their job, where --resume asks for them and they stem from what is here now."""
    if not (arguments.resume and arguments.json and arguments.json.exists()):
        return {}
    try:
        document = load(arguments.json)
    except ValueError as error:
        print(f"nothing to resume: {error}", file=sys.stderr)
        return {}
    was = document["provenance"]
    if any(
        was.get(key) != here[key]
        for key in ("cpu", "cores", "threads", "isa", "torch", "python", "commit", "dirty")
    ):
        print(
            f"nothing to resume: {arguments.json} is from another commit, machine or version", file=sys.stderr
        )
        return {}
    return {r["job"]: r for r in document["results"] if r.get("status") in ("ok", "inexact") and "job" in r}


def _compare(arguments: argparse.Namespace, cases: list[Case]) -> int:
    """Ours on another commit and on this tree; 1 where one of them cannot run a case.

    Raises:
        ValueError: there is no such commit, or its core cannot be built.
    """
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    commit = compare.resolve(arguments.base)
    root = compare.checkout(commit, compare.folder())
    document: dict[str, Any] = {
        "schema": 1,
        "kind": "comparison",
        "base": commit,
        "provenance": provenance.collect(sys.argv[1:]),
    }
    jobs = [
        dataclasses.replace(job, resident=False, breakdown=False) for job in _jobs(arguments, cases, ["ours"])
    ]
    document["results"] = compare.measure(jobs, commit, root, launch_process)
    path = arguments.json or (arguments.out / "comparison.json" if arguments.out else None)
    text = compare.table(document)
    if path:
        save(path, document)
        save(path.with_suffix(".md"), text)
    print(text)
    return int(any(result["status"] != "ok" for result in document["results"]))


def _jobs(arguments: argparse.Namespace, cases: list[Case], providers: list[str]) -> list[Job]:
    jobs = []
    for case in cases:
        chosen = arguments.malloc or ("both" if case.headline else "default")
        for malloc in MALLOC if chosen == "both" else [chosen]:
            first = malloc == "default" or chosen != "both"
            job = Job(
                case=case.name,
                providers=tuple(providers),
                accept=tuple(arguments.accept),
                budget=QUICK if arguments.quick else Budget(),
                size=arguments.size,
                malloc=malloc,
                threads=arguments.threads or 0,
                resident=first and case.headline and not arguments.quick,
                breakdown=arguments.profile and breakdown.supports(case),
            )
            jobs.append(job)
    return jobs


def _set_isa(isa: str | None) -> None:
    """Choose the core's instruction set before it is loaded, here and in the processes started from here."""
    if not isa:
        return
    os.environ["PIXNERD_ISA"] = isa
    if (running := provenance.core_isa()) != isa:
        raise ValueError(f"--isa {isa}: the core runs {running or 'not at all (it is not available)'}")


def launch_process(job: Job, root: Path = provenance.ROOT) -> dict[str, Any]:
    """Run a job in a fresh process under its malloc setting; one that dies becomes a result that says so.

    The process imports the package and the benchmarks from `root`.
    """
    environment = {name: value for name, value in os.environ.items() if name not in MALLOC["tuned"]}
    environment.update(MALLOC[job.malloc])
    environment.setdefault("KINETO_LOG_LEVEL", "99")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.worker", job.to_json(), str(file)]
        code = subprocess.run(command, env=environment, cwd=root, check=False).returncode
        if code in (130, -2):
            raise KeyboardInterrupt
        if file.exists():
            result: dict[str, Any] = json.loads(file.read_text())
            return result
    return _died(job, code)


def _died(job: Job, code: int) -> dict[str, Any]:
    killed = code == -9
    return {
        "case": job.case,
        "size": job.size,
        "shape": dict(next(iter(select_cases([job.case]))).size(job.size)),
        "dtype": "",
        "malloc": job.malloc,
        "backend": "",
        "status": "out of memory" if killed else "error",
        "reason": "the process was killed, most likely for its memory"
        if killed
        else f"the process exited with {code}",
        "providers": {},
    }


def _write(arguments: argparse.Namespace, document: dict[str, Any]) -> None:
    """Files first: a closed stdout must not cost them."""
    if arguments.json:
        save(arguments.json, document)
    if arguments.markdown:
        save(arguments.markdown, tables.markdown(document))
    if arguments.plot:
        try:
            plot.bars(document, arguments.plot)
        except (ValueError, ImportError) as error:
            print(f"no plot: {error}", file=sys.stderr)
    print(tables.LEGEND)
    for path in (arguments.json, arguments.markdown, arguments.plot):
        if path and path.exists():
            print(f"wrote {path}")
