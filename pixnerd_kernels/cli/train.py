"""`pixnerd train`: train a small class-to-image model on real images."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixnerd_kernels.cli.arguments import (
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
    from pixnerd_kernels.models import PixNerdConfig
    from pixnerd_kernels.training import Settings

#: For each data set that ships in a package: pixels, channels, model. A folder takes the last line.
_DEFAULTS = {"digits": (8, 1, "tiny/4"), "mnist": (28, 1, "small/7"), "": (64, 3, "small/8")}

#: Arguments that are settings of the same name, and those that are sizes of the model.
_SETTINGS = (
    "steps", "batch_size", "optimiser", "learning_rate", "warmup", "cooldown", "weight_decay", "ema", "clip",
    "class_dropout", "timeshift", "autocast", "seed", "decoder_scales",
)  # fmt: skip
_SIZES = (
    "hidden_size", "num_heads", "num_blocks", "num_field_blocks", "field_channels", "field_ratio",
    "patch_size", "max_freqs", "encoding",
)  # fmt: skip


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a class-to-image model on a folder of images or a small data set",
        description="Train a class-to-image model. Ctrl-C saves and ends; --resume goes on, to the same bits. "
        "Options that are left out take the defaults in brackets, or with --resume those of the run.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--data", help="digits, mnist, or a folder with one sub-folder of images for each class"
    )
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the run (./runs)")
    parser.add_argument("--resume", action="store_true", default=False, help="continue the run in --out")
    parser.add_argument("--size", type=integer(1), help="pixels of an edge (digits 8, mnist 28, folder 64)")
    parser.add_argument("--channels", type=integer(1), help="1 grey, 3 colour (digits, mnist 1, folder 3)")
    parser.add_argument(
        "--model", help="a named configuration (digits tiny/4, mnist small/7, folder small/8)"
    )
    sizes = parser.add_argument_group("sizes that differ from the named configuration")
    for name in _SIZES:
        kind: Any = str if name == "encoding" else integer(0 if name == "num_blocks" else 1)
        sizes.add_argument(_flag(name), type=kind)
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=integer(1), help="optimiser steps of the whole run (1500)")
    group.add_argument("--batch-size", type=integer(1), help="images of a step (48)")
    group.add_argument("--optimiser", choices=("muon", "adamw"), help="(muon)")
    group.add_argument("--learning-rate", type=positive_number, help="the optimiser's peak rate (0.003)")
    group.add_argument("--warmup", type=integer(0), help="steps of linear warm-up (100)")
    group.add_argument("--cooldown", type=number, help="share of the steps over which the rate falls (0.6)")
    group.add_argument("--weight-decay", type=number, help="decoupled (0)")
    group.add_argument("--ema", type=number, help="decay of the averaged weights (0.998)")
    group.add_argument("--clip", type=positive_number, help="largest norm of the gradients (1)")
    group.add_argument("--class-dropout", type=number, help="share of images trained without class (0.1)")
    group.add_argument("--timeshift", type=positive_number, help="above 1 trains more at noisy times (1)")
    group.add_argument(
        "--decoder-scales",
        type=positive_number,
        nargs="+",
        help="resolutions to train at, as multiples of --size, each as often as it is named (1 1 2)",
    )
    group.add_argument(
        "--autocast", choices=("auto", "off", "bf16"), help="bf16 on a GPU, off on a CPU (auto)"
    )
    group.add_argument("--seed", type=integer(0), help="of weights, order and noise (0)")
    group.add_argument("--device", type=device, default="cpu", help="where to train (cpu)")
    output = parser.add_argument_group("on the way")
    output.add_argument("--save-every", type=integer(0), default=500, help="steps between checkpoints (500)")
    output.add_argument("--sample-every", type=integer(0), default=500, help="steps between grids (500)")
    output.add_argument("--sample-steps", type=integer(1), default=20, help="solver steps of the grids (20)")
    output.add_argument("--guidance", type=number, default=2.0, help="guidance of the grids (2)")
    output.add_argument("--quiet", action="store_true", default=False, help="no progress bar")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _given(args: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if name in args}


def _model(args: argparse.Namespace, name: str, channels: int, classes: int) -> PixNerdConfig:
    from pixnerd_kernels.models import CONFIGS

    name = getattr(args, "model", name)
    if name not in CONFIGS:
        raise UsageError(f"--model: expected one of {', '.join(CONFIGS)}, got {name!r}")
    return replace(CONFIGS[name], in_channels=channels, num_classes=classes, **_given(args, _SIZES))


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Settings that were given, in the form that Settings takes."""
    given = _given(args, _SETTINGS)
    if "decoder_scales" in given:
        given["decoder_scales"] = tuple(given["decoder_scales"])
    if "autocast" in given:
        given["autocast"] = _autocast(args)
    return given


def _autocast(args: argparse.Namespace) -> str:
    choice: str = getattr(args, "autocast", "auto")
    if choice == "auto":
        return "off" if args.device.startswith("cpu") else "bf16"
    return choice


def _resumed(args: argparse.Namespace, path: Path) -> Settings:
    """The settings of the saved run; what was given must agree with them."""
    from pixnerd_kernels.training import checkpoint
    from pixnerd_kernels.training.settings import Settings

    _, content = checkpoint.load(path, "losses")
    saved = Settings.from_dict(content["settings"])
    model = saved.model
    if "model" in args:
        model = _model(args, "", saved.model.in_channels, saved.model.num_classes)
    model = replace(model, **_given(args, _SIZES), in_channels=getattr(args, "channels", model.in_channels))
    asked = replace(saved, model=model, **_given(args, ("data", "size")), **_options(args))
    if differences := asked.differences(saved):
        raise UsageError(f"--resume: {path} is a run of another configuration: {'; '.join(differences)}")
    return saved


def run(args: argparse.Namespace) -> int:
    for package in ("safetensors", "tqdm", "PIL", "matplotlib"):
        optional_package(package)
    from pixnerd_kernels.training import Trainer, load_dataset, train
    from pixnerd_kernels.training.loop import CHECKPOINT
    from pixnerd_kernels.training.settings import Settings

    chosen_backend(args.device)
    path = args.out / CHECKPOINT
    try:
        if args.resume:
            settings = _resumed(args, path)
            dataset = load_dataset(settings.data, settings.size, settings.model.in_channels)
        else:
            if "data" not in args:
                raise UsageError("--data: expected digits, mnist or a folder of images, got nothing")
            if path.exists():
                raise UsageError(
                    f"--out: {args.out} holds a run already; add --resume, or choose another folder"
                )
            size, channels, name = _DEFAULTS.get(args.data, _DEFAULTS[""])
            size, channels = getattr(args, "size", size), getattr(args, "channels", channels)
            # Before the images are read, which takes a while; the classes are counted in them.
            model = _model(args, name, channels, classes=1)
            settings = Settings(args.data, size, model, **{"autocast": _autocast(args), **_options(args)})
            dataset = load_dataset(args.data, size, channels)
            settings = replace(settings, model=replace(model, num_classes=len(dataset.classes)))
        _report_skipped(dataset.skipped)
        trainer = Trainer(settings, dataset, args.device)
        if args.resume:
            trainer.load(path)
        make_writable("--out", args.out)
        finished = train(
            trainer,
            args.out,
            save_every=args.save_every,
            sample_every=args.sample_every,
            sample_steps=args.sample_steps,
            guidance=args.guidance,
            quiet=args.quiet,
        )
    except (
        ValueError, TypeError, OSError, FloatingPointError, ModuleNotFoundError, NotImplementedError,
    ) as error:  # fmt: skip
        raise UsageError(str(error)) from error
    if finished:
        print(f"{trainer.steps_done} steps done: {path}")
        return 0
    print(f"stopped after {trainer.steps_done} of {settings.steps} steps and saved {path}; --resume goes on")
    return 130


def _report_skipped(skipped: tuple[str, ...]) -> None:
    if skipped:
        print(f"skipped {len(skipped)} unreadable images:", file=sys.stderr)
        for line in skipped:
            print(f"  {line}", file=sys.stderr)
