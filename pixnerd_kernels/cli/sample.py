"""`pixnerd sample`: draw images from a checkpoint, at any resolution."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixnerd_kernels.cli.arguments import Subparsers, UsageError, integer, optional_package, positive_number

if TYPE_CHECKING:
    from torch import Tensor

    from pixnerd_kernels.models import PixNerd


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "sample",
        help="draw images from a checkpoint at any resolution",
        description="Draw images into one grid. The same seed draws the same images on every run.",
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="of `pixnerd train`, or an official one (.ckpt)"
    )
    parser.add_argument(
        "--class",
        dest="classes",
        nargs="+",
        metavar="CLASS",
        help="numbers or names of classes, taken in turn (all of them)",
    )
    parser.add_argument("--n", type=integer(1), default=16, help="images (16)")
    parser.add_argument("--size", type=integer(1), help="pixels of an edge (as trained)")
    parser.add_argument("--trained-size", type=integer(1), help="of an official checkpoint (256)")
    parser.add_argument("--solver", choices=("euler", "heun", "adams"), default="adams", help="(adams)")
    parser.add_argument("--steps", type=integer(1), default=25, help="solver steps (25)")
    parser.add_argument("--order", type=integer(1), default=2, help="of adams, 1 to 4 (2)")
    parser.add_argument("--guidance", type=float, default=2.0, help="1 is none (2)")
    parser.add_argument(
        "--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"),
        help="times between which guidance holds (0 1)",
    )  # fmt: skip
    parser.add_argument(
        "--timeshift", type=positive_number, default=1.0, help="above 1: more noisy steps (1)"
    )
    parser.add_argument("--seed", type=integer(0), default=0, help="of the noise (0)")
    parser.add_argument("--columns", type=integer(1), help="of the grid (nearly square)")
    parser.add_argument("--out", type=Path, default=Path("grid.png"), help="the grid, a PNG (./grid.png)")
    parser.add_argument("--gif", type=Path, help="also the way from noise to images, a GIF")
    parser.add_argument("--device", default="cpu", help="where to draw (cpu)")


def _load(args: argparse.Namespace) -> tuple[PixNerd, int, list[str]]:
    """The model, the size that it was trained at, and the names of its classes."""
    from pixnerd_kernels.models import PixNerd, load_official
    from pixnerd_kernels.training import checkpoint, load_sampler

    path = args.checkpoint
    if path.suffix == ".safetensors" and (not path.is_file() or checkpoint.is_checkpoint(path)):
        model, settings, names = load_sampler(path, args.device)
        return model, settings.size, names
    official = load_official(path)
    if not isinstance(official, PixNerd):
        raise UsageError(f"{path}: a text-to-image checkpoint; this command draws classes only")
    official = official.to(args.device).requires_grad_(False)
    return official, args.trained_size or 256, [str(label) for label in range(official.null_class)]


def _classes(args: argparse.Namespace, names: list[str]) -> list[int]:
    """The class of each image: those asked for, in turn."""
    asked = []
    for text in args.classes or names:
        if text in names:
            asked.append(names.index(text))
        elif text.isdecimal() and int(text) < len(names):
            asked.append(int(text))
        else:
            shown = ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")
            raise UsageError(f"--class: expected 0 to {len(names) - 1} or one of {shown}, got {text!r}")
    return [asked[index % len(asked)] for index in range(args.n)]


def _recorder(frames: list[Tensor]) -> Callable[[int, Tensor], None]:
    """Keeps the images after every solver step, the batches of one step joined."""

    def record(step: int, images: Tensor) -> None:
        import torch

        images = images.float().cpu()
        if step > len(frames):
            frames.append(images)
        else:
            frames[step - 1] = torch.cat([frames[step - 1], images])

    return record


def run(args: argparse.Namespace) -> int:
    for package in ("safetensors", "PIL"):
        optional_package(package)
    from pixnerd_kernels.diffusion import pictures

    if args.out.suffix.lower() != ".png":
        raise UsageError(f"--out: expected a .png file, got {str(args.out)!r}")
    if args.gif is not None and args.gif.suffix.lower() != ".gif":
        raise UsageError(f"--gif: expected a .gif file, got {str(args.gif)!r}")
    frames: list[Tensor] = []
    try:
        model, trained_size, names = _load(args)
        size = args.size or trained_size
        options: dict[str, Any] = {
            "solver": args.solver,
            "num_steps": args.steps,
            "order": args.order,
            "guidance": args.guidance,
            "guidance_interval": tuple(args.guidance_interval),
            "timeshift": args.timeshift,
        }
        images = pictures.draw(
            model,
            _classes(args, names),
            size,
            trained_size=trained_size,
            seed=args.seed,
            on_step=_recorder(frames) if args.gif else None,
            **options,
        )
        pictures.save_png(args.out, pictures.grid(images, args.columns))
        print(f"{len(images)} images of {size} x {size}: {args.out}")
        if args.gif:
            pictures.save_gif(args.gif, [pictures.grid(frame, args.columns) for frame in frames])
            print(f"the way there: {args.gif}")
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error
    return 0
