"""`pixnerd sample`: draw images from a checkpoint, at any resolution."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixnerd_kernels.cli.arguments import (
    MAX_SEED,
    Subparsers,
    UsageError,
    chosen_backend,
    device,
    integer,
    make_writable,
    number,
    optional_package,
    positive_number,
)

if TYPE_CHECKING:
    from torch import Tensor

    from pixnerd_kernels.models import PixNerd, PixNerdT2I


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
    parser.add_argument(
        "--features",
        type=Path,
        metavar="FILE",
        help="for a text-to-image checkpoint: a .safetensors or .pt file with `features` [n, tokens, width] of a "
        "text encoder, and `null_features` [tokens, width], those of an empty text, for guidance",
    )
    parser.add_argument(
        "--variant",
        choices=("auto", "c2i", "t2i", "t2i_heavydecoder"),
        default="auto",
        help="of an official checkpoint, where its keys do not tell (auto)",
    )
    parser.add_argument("--n", type=integer(1), help="images (16; one for each text)")
    parser.add_argument("--size", type=integer(1), help="pixels of an edge (as trained)")
    parser.add_argument("--trained-size", type=integer(1), help="of an official checkpoint (256; text 512)")
    parser.add_argument(
        "--fine-from", type=number, metavar="TIME",
        help="above the trained size, the time from which images have --size; 0 is all the way (0.8; official 0)",
    )  # fmt: skip
    parser.add_argument("--solver", choices=("euler", "heun", "adams"), default="adams", help="(adams)")
    parser.add_argument("--steps", type=integer(1), default=25, help="solver steps (25)")
    parser.add_argument("--order", type=integer(1, 4), default=2, help="of adams, 1 to 4 (2)")
    parser.add_argument("--guidance", type=number, help="1 is none (2; text 4)")
    parser.add_argument(
        "--guidance-interval", type=number, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"),
        help="times between which guidance holds (0 1)",
    )  # fmt: skip
    parser.add_argument("--timeshift", type=positive_number, help="above 1: more noisy steps (1; text 3)")
    parser.add_argument("--seed", type=integer(0, MAX_SEED), default=0, help="of the noise (0)")
    parser.add_argument("--columns", type=integer(1), help="of the grid (nearly square)")
    parser.add_argument("--out", type=Path, default=Path("grid.png"), help="the grid, a PNG (./grid.png)")
    parser.add_argument("--gif", type=Path, help="also the way from noise to images, a GIF")
    parser.add_argument("--device", type=device, default="cpu", help="where to draw (cpu)")


def _load(args: argparse.Namespace) -> tuple[PixNerd | PixNerdT2I, int, list[str]]:
    """The model, the size that it was trained at, and the names of its classes."""
    from pixnerd_kernels.models import PixNerd, load_official
    from pixnerd_kernels.training import checkpoint, load_sampler

    path = args.checkpoint
    if path.suffix == ".safetensors" and (not path.is_file() or checkpoint.is_checkpoint(path)):
        model, settings, names = load_sampler(path, args.device)
        return model, settings.size, names
    official = load_official(path, variant=args.variant).to(args.device).requires_grad_(False)
    if isinstance(official, PixNerd):
        return official, args.trained_size or 256, [str(label) for label in range(official.null_class)]
    return official, args.trained_size or 512, []


def _classes(args: argparse.Namespace, names: list[str]) -> list[int]:
    """The class of each image: those asked for, in turn."""
    if args.features:
        raise UsageError(f"--features: {args.checkpoint} is a class-to-image checkpoint, which takes --class")
    asked = []
    for text in args.classes or names:
        if text in names:
            asked.append(names.index(text))
        elif text.isdecimal() and int(text) < len(names):
            asked.append(int(text))
        else:
            shown = ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")
            raise UsageError(f"--class: expected 0 to {len(names) - 1} or one of {shown}, got {text!r}")
    return [asked[index % len(asked)] for index in range(args.n or 16)]


def _texts(args: argparse.Namespace) -> tuple[Tensor, Tensor | None]:
    """The features of each image's text, those in the file in turn, and those of an empty one."""
    from torch import Tensor

    from pixnerd_kernels.checks import describe
    from pixnerd_kernels.models.files import read

    if args.classes:
        raise UsageError(f"--class: {args.checkpoint} is a text-to-image checkpoint, which takes --features")
    if not args.features:
        raise UsageError(
            f"--features: {args.checkpoint} is a text-to-image checkpoint, and needs a file with the features "
            "of a text encoder"
        )
    content = read(args.features, "features file")
    features, null = content.get("features"), content.get("null_features")
    if not isinstance(features, Tensor) or not features.dim() or not len(features):
        raise UsageError(
            f"{args.features}: expected a tensor `features` [n, tokens, width], got {describe(features)}; "
            f"the file holds {', '.join(map(str, content)) or 'nothing'}"
        )
    return features[[index % len(features) for index in range(args.n or len(features))]], null


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
    from pixnerd_kernels.models import PixNerd

    chosen_backend(args.device)
    if args.out.suffix.lower() != ".png":
        raise UsageError(f"--out: expected a .png file, got {str(args.out)!r}")
    if args.gif is not None and args.gif.suffix.lower() != ".gif":
        raise UsageError(f"--gif: expected a .gif file, got {str(args.gif)!r}")
    if args.fine_from is not None and not 0 <= args.fine_from < 1:
        raise UsageError(f"--fine-from: expected a time from 0 to below 1, got {args.fine_from:g}")
    low, high = args.guidance_interval
    if low > high:
        raise UsageError(f"--guidance-interval: expected LOW up to HIGH, got {low:g} {high:g}")
    make_writable("--out", args.out.parent)
    if args.gif is not None:
        make_writable("--gif", args.gif.parent)
    frames: list[Tensor] = []
    try:
        model, trained_size, names = _load(args)
        size = args.size or trained_size
        by_class = isinstance(model, PixNerd)
        options: dict[str, Any] = {
            "trained_size": trained_size,
            "fine_from": args.fine_from,
            "seed": args.seed,
            "on_step": _recorder(frames) if args.gif else None,
            "solver": args.solver,
            "num_steps": args.steps,
            "order": args.order,
            "guidance": (2.0 if by_class else 4.0) if args.guidance is None else args.guidance,
            "guidance_interval": (low, high),
            "timeshift": args.timeshift or (1.0 if by_class else 3.0),
        }
        if isinstance(model, PixNerd):
            images = pictures.draw(model, _classes(args, names), size, **options)
        else:
            images = pictures.draw_texts(model, *_texts(args), size, **options)
        pictures.save_png(args.out, pictures.grid(images, args.columns))
        print(f"{len(images)} images of {size} x {size}: {args.out}")
        if args.gif:
            pictures.save_gif(args.gif, [pictures.grid(frame, args.columns) for frame in frames])
            print(f"the way there: {args.gif}")
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        raise UsageError(str(error)) from error
    return 0
