"""`pixnerd info`: what is installed, what the machine offers, and which backend each op takes."""

from __future__ import annotations

import argparse
import json
import os
import warnings
from typing import TYPE_CHECKING, Any

from pixnerd_kernels.cli import machine
from pixnerd_kernels.cli.arguments import Subparsers, table

if TYPE_CHECKING:
    import torch


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("info", help="versions, hardware, and the backend of every op")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _native() -> dict[str, Any]:
    """The compiled core: what it is built for, or why it is not there."""
    from pixnerd_kernels import backends

    try:
        core = backends.native()
    except NotImplementedError as error:
        return {"available": False, "reason": str(error)}
    return {
        "available": True,
        "isa": core.isa(),
        "isas": list(core.isas()),
        "openmp_runtime": core.openmp_runtime(),
    }


def _gpus() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            return {"devices": [], "reason": f"torch {torch.__version__} is built without GPU support"}
        return {"devices": [], "reason": "torch is built for GPUs but finds none (no device, or no driver)"}
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return {"devices": devices, "reason": None}


def _choice(op: str, device: torch.device) -> dict[str, Any]:
    """The backend that `op` takes for float32 on this device, and for each other one, why not."""
    import torch

    from pixnerd_kernels import backends

    refused: str | None = None
    with warnings.catch_warnings():
        # The missing core is part of the answer below, so its warning would only say it twice.
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            chosen = backends.select(op, device, torch.float32, backends.forced_backend())
        except NotImplementedError as error:
            chosen, refused = "none", str(error)
    others = {}
    for name in backends.BACKENDS:
        if name != chosen:
            reasons = backends.not_supported_reasons(op, name, device)
            if not reasons and chosen != "none":
                forced = f"PIXNERD_BACKEND forces {chosen}" if backends.forced_backend() else ""
                reasons = [forced or f"it can run, but {chosen} is preferred"]
            others[name] = reasons
    return {"op": op, "device": device.type, "backend": chosen, "error": refused, "others": others}


def _attention(device: torch.device) -> dict[str, Any]:
    """The kernel that attention takes for heads of 72 channels, in bfloat16 on a GPU, and why not the others."""
    import torch

    from pixnerd_kernels.ops.attention import BACKENDS, not_supported_reasons, select

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    q = torch.empty(0, 1, 1, 72, device=device, dtype=dtype)
    chosen = select(q)
    others = {
        name: not_supported_reasons(name, q) or [f"it can run, but {chosen} is preferred"]
        for name in BACKENDS
        if name != chosen
    }
    return {"op": "attention", "device": device.type, "backend": chosen, "error": None, "others": others}


def _linear() -> dict[str, Any]:
    """What large float32 products of linear layers take on a CPU."""
    from pixnerd_kernels.ops.linear import core_reasons

    reasons = core_reasons()
    chosen, other = ("torch", "cpu") if reasons else ("cpu", "torch")
    others = {other: reasons or ["it can run, but the core is preferred for large float32 products"]}
    return {"op": "linear", "device": "cpu", "backend": chosen, "error": None, "others": others}


def collect() -> dict[str, Any]:
    """Everything `pixnerd info` prints, as plain data."""
    import torch

    from pixnerd_kernels import backends

    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    ops = sorted(backends.CPU_OPS | backends.TRITON_OPS)
    return {
        "versions": machine.versions(),
        "cpu": {
            "model": machine.cpu_model(),
            "features": machine.cpu_features(),
            "count": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "core": _native(),
        "gpu": _gpus(),
        "forced_backend": backends.forced_backend() or None,
        "ops": [_choice(op, device) for device in devices for op in ops],
        "libraries": [*(_attention(device) for device in devices), _linear()],
    }


def _text(data: dict[str, Any]) -> str:
    lines = [f"{name:16} {version or 'not installed'}" for name, version in data["versions"].items()]
    cpu, core, gpu = data["cpu"], data["core"], data["gpu"]
    lines.append(
        f"{'CPU':16} {cpu['model']}, {cpu['count']} logical cores, torch uses {cpu['torch_threads']}"
    )
    lines.append(f"{'CPU features':16} {' '.join(cpu['features']) or 'unknown'}")
    if core["available"]:
        lines.append(f"{'CPU core':16} {core['isa']} (can run: {', '.join(core['isas'])})")
        lines.append(f"{'OpenMP':16} {core['openmp_runtime']}")
    else:
        lines.append(f"{'CPU core':16} none: {core['reason']}")
    for device in gpu["devices"]:
        capability = f"compute capability {device['capability']}"
        lines.append(f"{'GPU':16} {device['name']}, {device['memory_gib']} GiB, {capability}")
    if not gpu["devices"]:
        lines.append(f"{'GPU':16} none: {gpu['reason']}")
    if data["forced_backend"]:
        lines.append(f"{'PIXNERD_BACKEND':16} {data['forced_backend']}")
    rows = [["op", "on", "takes", "not", "because"]]
    for choice in [*data["ops"], *data["libraries"]]:
        cells = [choice["op"], choice["device"], choice["backend"]]
        for name, reasons in choice["others"].items():
            for index, reason in enumerate(reasons):
                rows.append([*cells, name if index == 0 else "", reason])
                cells = ["", "", ""]
    return "\n".join([*lines, "", table(rows)])


def run(args: argparse.Namespace) -> int:
    data = collect()
    print(json.dumps(data, indent=2) if args.json else _text(data))
    return 0
