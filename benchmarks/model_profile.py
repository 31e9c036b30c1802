"""Where a forward of the model spends its time: ops by kind, their share, and the speed of their products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

from pixnerd_kernels.models import PixNerdConfig

#: Ops whose time is spent in matrix products, and in attention. The rest is normalisation, gates and copies.
_PRODUCTS = (
    "aten::addmm",
    "aten::bmm",
    "aten::mm",
    "pixnerd::linear",
    "pixnerd::neural_field_mlp_packed",
    "pixnerd::pixel_decoder",
)
_ATTENTION = ("aten::_scaled_dot_product_flash_attention_for_cpu",)
#: Parts of the names of GPU kernels that compute attention, and of those that compute matrix products.
_ATTENTION_KERNELS = ("flash", "fmha", "sdpa", "attention")
_PRODUCT_KERNELS = (
    "gemm", "gemv", "nvjet", "cutlass", "cublas", "xmma", "splitk", "triton_tem", "neural_field_mlp",
    "pixel_decoder_forward",
)  # fmt: skip
#: Rows of a profile on a GPU; the rest is summed.
_ROWS = 30


def profile(run: Callable[[], object], config: PixNerdConfig, size: int, batch: int) -> dict[str, Any]:
    """Rows of one call, longest first, and the share of its time in matrix products and attention."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.inference_mode():  # with gradients every op would be recorded twice
        run()
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
            run()
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.self_cpu_time_total <= 0:
            continue
        flops = event.count * _flops(event.key, event.input_shapes, config, size, batch)
        label = event.key + (" " + _shapes(event.input_shapes) if flops else "")
        row = rows.setdefault((event.key, label), {"op": label, "calls": 0, "seconds": 0.0, "flops": 0})
        row["calls"] += event.count
        row["seconds"] += event.self_cpu_time_total / 1e6
        row["flops"] += flops
        row["kind"] = _kind(event.key)
    total = sum(row["seconds"] for row in rows.values())
    ordered = sorted(rows.values(), key=lambda row: -row["seconds"])
    shares = {
        kind: sum(row["seconds"] for row in ordered if row["kind"] == kind) / total
        for kind in ("product", "attention", "other")
    }
    return {
        "seconds": total,
        "flops": sum(row["flops"] for row in ordered),
        "shares": shares,
        "rows": ordered,
    }


def kernels(run: Callable[[], object]) -> dict[str, Any]:
    """What one call runs on the GPU: the number of kernels and of copies and fills, and their time by name.

    Raises:
        RuntimeError: the profiler saw nothing.
    """
    for _ in range(2):  # the first starts the profiler's own machinery, and may miss what it should see
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
    return kernel_rows(
        [
            (event.name, event.time_range.elapsed_us() / 1e6)
            for event in profiler.events()
            if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        ]
    )


def kernel_rows(events: list[tuple[str, float]]) -> dict[str, Any]:
    """`kernels` from names and seconds."""
    events = [(name, seconds) for name, seconds in events if "Sync" not in name]
    if not events:
        raise RuntimeError("the profiler saw nothing on the GPU")
    rows: dict[str, dict[str, Any]] = {}
    for name, seconds in events:
        row = rows.setdefault(
            name, {"kernel": name[:160], "calls": 0, "seconds": 0.0, "kind": kernel_kind(name)}
        )
        row["calls"] += 1
        row["seconds"] += seconds
    moved = sum(row["calls"] for row in rows.values() if row["kind"] == "copy")
    total = sum(row["seconds"] for row in rows.values())
    ordered = sorted(rows.values(), key=lambda row: -row["seconds"])
    for row in ordered:
        row["share"] = row["seconds"] / total
    shares = {
        kind: sum(row["share"] for row in ordered if row["kind"] == kind)
        for kind in ("product", "attention", "other", "copy")
    }
    rest = ordered[_ROWS:]
    return {
        "kernels": len(events) - moved,
        "copies": moved,
        "seconds": total,
        "shares": shares,
        "rows": ordered[:_ROWS],
        "others": {"names": len(rest), "calls": sum(row["calls"] for row in rest),
                   "seconds": sum(row["seconds"] for row in rest)},
    }  # fmt: skip


def kernel_kind(name: str) -> str:
    """Of a GPU kernel: "attention", "product", "copy" (also fills), or "other": norms, gates and the like."""
    lower = name.lower()
    if name.startswith(("Memcpy", "Memset")):
        return "copy"
    if any(part in lower for part in _ATTENTION_KERNELS):
        return "attention"
    return "product" if any(part in lower for part in _PRODUCT_KERNELS) else "other"


def kernel_table(result: dict[str, Any], least: float = 0.005) -> str:
    """Rows above a share of `least`, and the sums."""
    lines = [f"  {'kernel':100} {'calls':>5} {'ms':>9} {'share':>6}"]
    for row in result["rows"]:
        if row["share"] >= least:
            lines.append(
                f"  {row['kernel'][:100]:100} {row['calls']:5} {row['seconds'] * 1e3:9.3f} {row['share']:6.1%}"
            )
    shares = result["shares"]
    lines.append(
        f"  {result['kernels']} kernels, {result['copies']} copies and fills: {result['seconds'] * 1e3:.3f} ms; matrix "
        f"products {shares['product']:.1%}, attention {shares['attention']:.1%}, everything else "
        f"{shares['other'] + shares['copy']:.1%}"
    )
    return "\n".join(lines)


def _kind(op: str) -> str:
    return "product" if op in _PRODUCTS else "attention" if op in _ATTENTION else "other"


def _shapes(shapes: list[list[int]]) -> str:
    return "x".join(str(list(shape)) for shape in shapes if len(shape) > 1)


def _flops(op: str, shapes: list[list[int]], config: PixNerdConfig, size: int, batch: int) -> int:
    """2 for each multiply-add of one call; 0 for ops without products."""
    dims = [shape for shape in shapes if len(shape) > 1]
    if op in ("aten::addmm", "aten::mm"):
        return 2 * dims[0][0] * dims[0][1] * dims[1][1]
    if op == "aten::bmm":
        return 2 * dims[0][0] * dims[0][1] * dims[0][2] * dims[1][2]
    if op == "pixnerd::linear":
        return 2 * dims[0][0] * dims[0][1] * dims[1][0]
    if op in _ATTENTION:
        images, heads, queries, channels = dims[0]
        return 4 * images * heads * queries * dims[1][2] * channels
    patches = batch * (size // config.patch_size) ** 2
    generated = 2 * config.field_channels**2 * config.field_ratio
    fields = 2 * patches * config.patch_size**2 * generated
    if op == "pixnerd::neural_field_mlp_packed":
        return fields
    if op == "pixnerd::pixel_decoder":
        ends = 4 * patches * config.patch_size**2 * config.in_channels * config.field_channels
        return ends + config.num_field_blocks * (fields + 2 * patches * config.hidden_size * generated)
    return 0


def profile_table(result: dict[str, Any], least: float = 0.002) -> str:
    """Rows above a share of `least`, and the sums."""
    lines = [f"  {'op':88} {'calls':>5} {'ms':>8} {'share':>6} {'GFLOP/s':>8}"]
    for row in result["rows"]:
        share = row["seconds"] / result["seconds"]
        if share >= least:
            speed = f"{row['flops'] / row['seconds'] / 1e9:8.0f}" if row["flops"] else ""
            lines.append(
                f"  {row['op'][:88]:88} {row['calls']:5} {row['seconds'] * 1e3:8.1f} {share:6.1%} {speed}"
            )
    shares = result["shares"]
    lines.append(
        f"  matrix products {shares['product']:.1%}, attention {shares['attention']:.1%}, everything else "
        f"{shares['other']:.1%} of {result['seconds']:.3f} s under the profiler; "
        f"{result['flops'] / 1e9:.1f} GFLOP at {result['flops'] / result['seconds'] / 1e9:.0f} GFLOP/s"
    )
    return "\n".join(lines)


class _Counter(TorchDispatchMode):
    """Counts the ops that compute something: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        aliases = any(result.alias_info is not None for result in function._schema.returns)
        if not aliases and "empty" not in function.name():
            self.count += 1
        return function(*args, **(kwargs or {}))


def computing_ops(function: Callable[[], object]) -> int:
    """Ops of one call that compute something, each at least one launch on a GPU; a compiled graph's are not seen."""
    with _Counter() as counter:
        function()
    return counter.count


def launches(make: Callable[[int], Any]) -> dict[str, dict[str, int]]:
    """Ops that compute, of the plain model and of ours: those of one DiT block, and those of the rest of a step.

    `make` gives a model with that many blocks, with functions `eager` and `ours`. The count does not depend on sizes.
    """
    counts: dict[str, list[int]] = {"eager": [], "ours": []}
    for blocks in (1, 2):
        setting = make(blocks)
        for name, entry in counts.items():
            run = getattr(setting, name)
            with torch.inference_mode():
                run()
                entry.append(computing_ops(run))
    return {name: {"block": two - one, "rest": 2 * one - two} for name, (one, two) in counts.items()}
