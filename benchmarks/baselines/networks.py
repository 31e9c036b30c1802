"""Every network of the comparison: how it is built, what it is fed, and what was published about it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pixnerd_kernels.models import CONFIGS


@dataclass(frozen=True)
class Network:
    """One network: `build` makes it, `shape` is one image's input.

    Attributes:
        parameters, gflop: as published or counted over the official code (batch 1, one forward, 1 MAC = 2
            FLOP); None where nothing is known.
        differentiates: its output is a gradient, so a forward also runs a backward; `gflop` is the forward's.
        note: what a reader of the table has to know.
        smoke: edge of the smallest input that tests run.
    """

    label: str
    build: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    parameters: float | None
    gflop: float | None
    differentiates: bool = False
    note: str = ""
    smoke: int = 32

    def inputs(self, batch: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """(x, t, y) for `build`'s module, on the default device."""
        x = torch.randn(batch, *self.shape, dtype=dtype)
        return x, torch.full((batch,), 0.5), torch.zeros(batch, dtype=torch.long)


def _plain_pixnerd(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from benchmarks.baselines.pixnerd import PlainPixNerd

        return PlainPixNerd(CONFIGS[name])

    return build


def _adm(size: int, width: int, multipliers: tuple[float, ...], **options: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from benchmarks.baselines.unet import ADM

        return ADM(size, width, multipliers, **options)

    return build


def _classifier() -> nn.Module:
    from benchmarks.baselines.unet import GuidanceClassifier

    return GuidanceClassifier()


def _pixelflow() -> nn.Module:
    from benchmarks.baselines.pixelflow import PixelFlow

    return PixelFlow()


def _dit(depth: int, head: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from benchmarks.baselines.latent import DiT

        return DiT(depth, 16, head)

    return build


def _vae() -> nn.Module:
    from benchmarks.baselines.latent import VAEDecoder

    return VAEDecoder()


class FastRandom(TorchDispatchMode):
    """Random initialisation at the speed of a copy: of every tensor the first 65,536 numbers are drawn, and repeated.

    Timings do not tell the difference.
    """

    _DRAWN = 1 << 16
    _OPS = (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensor = args[0] if args else None
        if func not in self._OPS or tensor.numel() <= self._DRAWN or not tensor.is_contiguous():
            return func(*args, **kwargs or {})
        flat = tensor.view(-1)
        func(flat[: self._DRAWN], *args[1:], **kwargs or {})
        done = self._DRAWN
        while done < flat.numel():
            more = min(done, flat.numel() - done)
            flat[done : done + more] = flat[:more]
            done += more
        return tensor


_IMAGE = (3, 256, 256)
_ADM256 = (1, 1, 2, 2, 4, 4)

NETWORKS: dict[str, Network] = {
    "PixNerd-L/16": Network("PixNerd-L/16", _plain_pixnerd("L/16"), _IMAGE, 452.1e6, 170.4),
    "PixNerd-XL/16": Network("PixNerd-XL/16", _plain_pixnerd("XL/16"), _IMAGE, 700.6e6, 268.6),
    "ADM-256": Network("ADM 256, UNet", _adm(256, 256, _ADM256), _IMAGE, 553.8e6, 2239.7),
    "ADM-classifier": Network(
        "ADM 256, guidance classifier with its input gradient", _classifier, _IMAGE, 54.1e6, 146.7,
        differentiates=True, smoke=256,
    ),
    "ADM-512": Network(
        "ADM 512, UNet", _adm(512, 256, (0.5, 1, 1, 2, 2, 4, 4)), (3, 512, 512), 559.0e6, 3964.7,
        note="diffusers' sinusoids have 128 channels here, not 256: 0.02% of the parameters",
    ),
    **{
        f"PixelFlow-{edge}": Network(f"PixelFlow-XL/4, {edge} px", _pixelflow, (3, edge, edge), 676.6e6, gflop)
        for edge, gflop in ((32, 58.1), (64, 237.3), (128, 1049.2), (256, 5818.9))
    },
    "DiT-XL/2": Network("DiT-XL/2", _dit(28, 72), (4, 32, 32), 675.1e6, 237.2),
    "SiT-L/2": Network("SiT-L/2", _dit(24, 64), (4, 32, 32), 458.1e6, 161.4),
    "VAE-decoder": Network("SD-VAE decoder", _vae, (4, 32, 32), 49.5e6, 622.2, smoke=8),
    "VAE-decoder-512": Network("SD-VAE decoder, 512 px", _vae, (4, 64, 64), 49.5e6, 2514.5),
    "RDM-1": Network(
        "RDM stage 1, UNet at 64 px", _adm(64, 192, (1, 2, 3, 4), layers=3, out=3), (3, 64, 64), None, None,
        note="built as the training script says (EDM's ADM: 3 blocks a level), which is 296M; the paper says 553M",
    ),
    "RDM-2": Network(
        "RDM stage 2, UNet at 256 px", _adm(256, 256, _ADM256, out=3), _IMAGE, 553e6, None
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Counted:
    """Parameters, and GFLOP of one call at batch 1: of the forward, and with the gradient where there is one."""

    parameters: int
    forward: float
    total: float


@functools.cache
def count(name: str) -> Counted:
    """Build a network on the meta device and count. Every FLOP is a matrix product's or a convolution's."""
    network = NETWORKS[name]
    with torch.device("meta"):
        module = network.build().eval().requires_grad_(False)
        x, t, y = network.inputs()
    with FlopCounterMode(display=False) as whole, torch.no_grad():
        module(x, t, y)
    total = whole.get_total_flops() / 1e9
    forward = total
    if network.differentiates:
        with FlopCounterMode(display=False) as part, torch.no_grad():
            module.logits(x, t)
        forward = part.get_total_flops() / 1e9
    return Counted(sum(p.numel() for p in module.parameters()), forward, total)
