"""Trains a tiny class-to-image model out of a checkout of the official repository for a few steps, patched.

python -m pixnerd_kernels.patching.adapters.official.example PATH/TO/PixNerd
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import torch

from pixnerd_kernels.patching.adapters.official import PatchPixNerd
from pixnerd_kernels.patching.check import KINDS, checkout


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="the checkout")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    with checkout(args.path.resolve()) as load:
        _, denoiser, inputs = next(KINDS["official"](load))
    # What Lightning does: setup, then configure_model and the steps.
    module, callback = SimpleNamespace(denoiser=denoiser), PatchPixNerd(models=("denoiser",))
    callback.setup(SimpleNamespace(), module, "fit")
    print(callback.reports["denoiser"])
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-3, weight_decay=0.0)
    velocity = torch.randn_like(inputs["x"])
    for step in range(args.steps):
        loss = (denoiser(**inputs) - velocity).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}")
    callback.teardown(SimpleNamespace(), module, "fit")


if __name__ == "__main__":
    main()
