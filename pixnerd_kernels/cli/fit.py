"""`pixnerd fit`: a photograph becomes neural fields, one for every patch, decoded at any resolution."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixnerd_kernels.cli import machine, pictures
from pixnerd_kernels.cli.arguments import (
    MAX_SEED,
    Subparsers,
    UsageError,
    chosen_backend,
    integer,
    make_writable,
    optional_package,
    positive_number,
)

if TYPE_CHECKING:
    import torch

    from pixnerd_kernels.cli.fields import PatchFields, Shape

#: Timed steps of each kind, and untimed ones before them.
_PAIRS, _WARM_UP = 7, 2


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser("fit", help="fit neural fields to a photograph and decode it at 2x and 4x")
    parser.add_argument("image", metavar="IMAGE", help=f"an image file, or {' or '.join(pictures.SAMPLES)}")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results (./demo)")
    parser.add_argument("--size", type=integer(1), default=448, help="longest side in pixels (448)")
    parser.add_argument("--steps", type=integer(1), default=150, help="optimisation steps (150)")
    parser.add_argument("--patch", type=integer(2), default=16, help="pixels of a patch's side (16)")
    parser.add_argument("--channels", type=integer(1), default=64, help="D1 of the fields (64)")
    parser.add_argument("--hidden", type=integer(1), default=128, help="D2 of the fields (128)")
    parser.add_argument("--blocks", type=integer(1), default=1, help="MLP blocks of a field (1)")
    parser.add_argument(
        "--frequencies",
        type=integer(1),
        help="frequencies of the encoding per axis (half the patch, at most 8)",
    )
    parser.add_argument("--lr", type=positive_number, default=0.2, help="Adam's learning rate (0.2)")
    parser.add_argument(
        "--seed", type=integer(0, MAX_SEED), default=0, help="seed of the initial weights (0)"
    )
    parser.add_argument(
        "--crop",
        type=integer(0),
        nargs=2,
        metavar=("LEFT", "TOP"),
        help="corner of the enlarged detail, pixels",
    )
    parser.add_argument("--no-compare", action="store_true", help="do not time eager PyTorch beside it")


def _shape(args: argparse.Namespace) -> Shape:
    from pixnerd_kernels.cli.fields import Shape

    frequencies = args.frequencies or max(1, min(8, args.patch // 2))
    if frequencies >= args.patch:
        raise UsageError(
            f"--frequencies: expected fewer than the patch's {args.patch} pixels (more would alias in a finer "
            f"decode), got {frequencies}"
        )
    return Shape(args.patch, args.channels, args.hidden, args.blocks, frequencies)


def _train(fields: PatchFields, steps: int) -> float:
    """Run the steps under a progress bar; returns the seconds they took."""
    from pixnerd_kernels.cli.fields import psnr

    start = time.perf_counter()
    with optional_package("tqdm").tqdm(total=steps, desc="fit", unit="step") as bar:
        for step in range(steps):
            error = fields.step()
            if step % 5 == 4 or step == steps - 1:
                bar.set_postfix_str(f"PSNR {psnr(error.item()):.2f} dB", refresh=False)
            bar.update()
    return time.perf_counter() - start


def _compare(image: torch.Tensor, shape: Shape, lr: float) -> dict[str, Any]:
    """Median seconds of a step of ours and of eager PyTorch's, taken in turns in this process."""
    from pixnerd_kernels.cli.fields import PatchFields, eager_block, fused_block

    total = _PAIRS + _WARM_UP
    kinds = {"ours": fused_block, "eager": eager_block}
    fields = {name: PatchFields(image, shape, total, lr, block) for name, block in kinds.items()}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in optional_package("tqdm").trange(total, desc="compare", unit="pair"):
        for name in sorted(kinds, reverse=bool(turn % 2)):
            start = time.perf_counter()
            fields[name].step().item()
            if turn >= _WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    ours, eager = (statistics.median(seconds[name]) for name in ("ours", "eager"))
    return {
        "ours_seconds_per_step": ours,
        "eager_seconds_per_step": eager,
        "ratio": eager / ours,
        "timed_pairs": _PAIRS,
    }


def _footer(report: dict[str, Any]) -> list[str]:
    sizes = report["fields"]
    lines = [
        f"{sizes['count']} fields ({sizes['channels']} channels, {sizes['hidden']} hidden, one per "
        f"{sizes['patch']} x {sizes['patch']} patch), {report['steps']} Adam steps in "
        f"{report['seconds']:.0f} s on {report['machine']['cpu']}, {report['machine']['threads']} threads, "
        f"backend {report['backend']}."
    ]
    if timing := report["compare"]:
        lines.append(
            f"A step takes {timing['ours_seconds_per_step'] * 1e3:.0f} ms; eager PyTorch takes "
            f"{timing['eager_seconds_per_step'] * 1e3:.0f} ms for the same work ({timing['ratio']:.1f}x)."
        )
    return lines


def run(args: argparse.Namespace) -> int:
    photograph = pictures.prepare(pictures.load(args.image), args.size, args.patch)
    for package in ("tqdm", "matplotlib"):
        optional_package(package)
    make_writable("--out", args.out)

    import numpy as np
    import torch

    from pixnerd_kernels.cli.fields import PatchFields, psnr

    shape = _shape(args)
    if args.crop and not (args.crop[0] < photograph.width and args.crop[1] < photograph.height):
        size = f"{photograph.width}x{photograph.height}"
        raise UsageError(f"--crop: expected a corner inside the {size} pixels, got {args.crop}")
    images = optional_package("PIL.Image")
    backend = chosen_backend("cpu")
    torch.manual_seed(args.seed)
    image = torch.from_numpy(np.asarray(photograph).copy()).float() / 255
    fields = PatchFields(image, shape, args.steps, args.lr)
    size = f"{photograph.width} x {photograph.height}"
    print(f"{args.image}: {size} pixels, {fields.count} patches, backend {backend}")
    seconds = _train(fields, args.steps)
    if not fields.offset.isfinite().all():
        raise UsageError(f"--lr: expected a rate at which the fit converges, got {args.lr:g} (it diverged)")

    decoded, files = {}, {}
    for factor in (1, 2, 4):
        pixels = (fields.decode(factor) * 255).round().byte().numpy()
        decoded[factor] = images.fromarray(pixels)
        files[f"{factor}x"] = "reconstruction.png" if factor == 1 else f"decoded_{factor}x.png"
        decoded[factor].save(args.out / files[f"{factor}x"])
    reconstruction = torch.from_numpy(np.asarray(decoded[1]).copy()).float() / 255
    quality = psnr((reconstruction - image).square().mean().item())
    report: dict[str, Any] = {
        "image": args.image,
        "size": list(photograph.size),
        "fields": {"count": fields.count, **vars(shape)},
        "steps": args.steps,
        "learning_rate": args.lr,
        "seed": args.seed,
        "psnr_db": quality,
        "seconds": seconds,
        "backend": backend,
        "compare": None if args.no_compare else _compare(image, shape, args.lr),
        "machine": machine.summary(),
        "files": {**files, "side_by_side": "side_by_side.png"},
    }
    crop = tuple(args.crop) if args.crop else None
    pictures.side_by_side(photograph, decoded, quality, _footer(report), crop).save(
        args.out / "side_by_side.png"
    )
    (args.out / "fit.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"PSNR {quality:.2f} dB after {args.steps} steps, {seconds:.1f} s")
    for line in _footer(report)[1:]:
        print(line)
    for name in (*report["files"].values(), "fit.json"):
        print(f"  {args.out / name}")
    return 0
