"""Draws a tiny image from a transformer out of a checkout of the diffusers port, before and after the patch.

python -m pixnerd_kernels.patching.adapters.diffusers.example PATH/TO/PixNerd-diffusers
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from pixnerd_kernels.patching.adapters.diffusers import patch_pipeline
from pixnerd_kernels.patching.check import KINDS, checkout


@torch.no_grad()
def draw(transformer: nn.Module, noise: Tensor, label: Tensor, steps: int) -> Tensor:
    """Euler's method from noise at t = 0 to the image at t = 1."""
    image = noise
    for step in range(steps):
        (velocity,) = transformer(image, torch.full((len(noise),), step / steps), label, return_dict=False)
        image = image + velocity / steps
    return image


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="the checkout")
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    with checkout(args.path.resolve()) as load:
        _, transformer, inputs = next(KINDS["diffusers"](load))
    label = inputs["encoder_hidden_states"]
    before = draw(transformer, inputs["sample"], label, args.steps)
    report = patch_pipeline(SimpleNamespace(transformer=transformer))
    print(report)
    after = draw(transformer, inputs["sample"], label, args.steps)
    print(f"largest difference of a pixel: {(after - before).abs().max():.1e}")
    report.unpatch()


if __name__ == "__main__":
    main()
