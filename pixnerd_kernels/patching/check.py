"""Tries `patch` on the models of a checkout: small ones, with random weights, before and after.

Runs the checkout's own code. A kind is a function that gives labelled models with their inputs.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pixnerd_kernels.patching.api import patch

#: Largest relative difference of an output, and of a gradient (float32, norm-wise).
OUTPUT, GRADIENT = 1e-4, 1e-3

Sample = tuple[str, nn.Module, dict[str, Any]]


def _official(load: Callable[[str], ModuleType]) -> Iterator[Sample]:
    """MCG-NJU/PixNerd and its forks."""
    for size in (8, 16):
        x, t = torch.randn(2, 3, 2 * size, 3 * size), torch.rand(2)
        shared = {"in_channels": 3, "num_groups": 4, "hidden_size": 32, "patch_size": size}
        model = load("src.models.transformer.pixnerd_c2i").PixNerDiT(
            **shared, hidden_size_x=16, nerf_mlpratio=2, num_blocks=4, num_cond_blocks=2, num_classes=10
        )
        yield f"class-to-image, patches of {size}", model, {"x": x, "t": t, "y": torch.tensor([1, 10])}
        for name in ("pixnerd_t2i", "pixnerd_t2i_heavydecoder"):
            model = load(f"src.models.transformer.{name}").PixNerDiT(
                **shared, decoder_hidden_size=16, num_encoder_blocks=2, num_decoder_blocks=2, num_text_blocks=1,
                txt_embed_dim=24, txt_max_length=7,
            )  # fmt: skip
            yield f"{name}, patches of {size}", model, {"x": x, "t": t, "y": torch.randn(2, 7, 24)}


def _flow(load: Callable[[str], ModuleType]) -> Iterator[Sample]:
    """Chroma1-Radiance in lodestone-rock/flow."""
    module = load("src.models.chroma.model_dct")
    fields = {
        "in_channels": 3, "context_in_dim": 16, "hidden_size": 24, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1,
        "depth_single_blocks": 1, "axes_dim": [4, 4, 4], "theta": 10_000, "qkv_bias": True, "guidance_embed": True,
        "approximator_in_dim": 64, "approximator_depth": 1, "approximator_hidden_size": 16, "patch_size": 8,
        "nerf_hidden_size": 16, "nerf_mlp_ratio": 4, "nerf_depth": 2, "nerf_max_freqs": 8, "_use_compiled": False,
        "use_x0": False, "use_patch_size_32": False,
    }  # fmt: skip
    model = module.Chroma(module.ChromaParams(**fields)).eval()
    batch, tokens, text = 1, 6, 4
    inputs = {
        "img": torch.randn(batch, 3, 16, 24),
        "img_ids": torch.zeros(batch, tokens, 3),
        "txt": torch.randn(batch, text, 16),
        "txt_ids": torch.zeros(batch, text, 3),
        "txt_mask": torch.ones(batch, text),
        "timesteps": torch.rand(batch),
        "guidance": torch.zeros(batch),
    }
    yield "Chroma1-Radiance", model, inputs


def _diffusers(load: Callable[[str], ModuleType]) -> Iterator[Sample]:
    """PixNerd-diffusers: a pipeline's transformer."""
    module = load("src.diffusers.models.transformers.transformer_pixnerd")
    model = module.PixNerdTransformer2DModel(
        in_channels=3, patch_size=8, num_groups=4, hidden_size=32, hidden_size_x=16, num_blocks=4,
        num_cond_blocks=2, nerf_mlpratio=2, num_classes=10, use_ema=False,
    )  # fmt: skip
    inputs = {"sample": torch.randn(2, 3, 32, 48), "timestep": torch.rand(2)}
    yield (
        "transformer",
        model,
        {**inputs, "encoder_hidden_states": torch.tensor([1, 10]), "return_dict": False},
    )


KINDS: dict[str, Callable[[Callable[[str], ModuleType]], Iterator[Sample]]] = {
    "official": _official,
    "flow": _flow,
    "diffusers": _diffusers,
}


@contextmanager
def checkout(path: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Imports modules from the checkout, and forgets them afterwards: such repositories all call theirs `src`."""
    before = set(sys.modules)
    sys.path.insert(0, str(path))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(path))
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "src":
                del sys.modules[name]


def check(path: Path, kind: str) -> list[dict[str, Any]]:
    """Build every model of a kind from a checkout, patch it, and compare output and gradients before and after.

    Returns:
        For every model its "label", the patch's "report", the largest relative difference of the "output" and of a
        "gradient", whether unpatching gave the old output "restored" bit for bit, and whether all that "passed".
    """
    with checkout(path) as load, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [_check(*sample) for sample in KINDS[kind](load)]


def _check(label: str, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # zero-initialised layers would hide everything before them
                parameter.normal_(std=0.2)
    before = _evaluate(model, inputs)
    report = patch(model)
    after = _evaluate(model, inputs)
    report.unpatch()
    again = _evaluate(model, inputs)
    output = _difference(after[0], before[0])
    gradient = max(_difference(ours, theirs) for ours, theirs in zip(after[1], before[1], strict=True))
    restored = torch.equal(again[0], before[0])
    return {
        "label": label,
        "report": report,
        "output": output,
        "gradient": gradient,
        "restored": restored,
        "passed": bool(report.replaced) and output <= OUTPUT and gradient <= GRADIENT and restored,
    }


def _evaluate(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    out = model(**inputs)
    out = out[0] if isinstance(out, tuple) else out
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((out * weights).sum(), parameters, allow_unused=True)
    return out.detach(), [g for g in gradients if g is not None]


def _difference(a: Tensor, b: Tensor) -> float:
    norm = torch.linalg.vector_norm
    return (norm(a.double() - b.double()) / norm(b.double()).clamp_min(1e-30)).item()
