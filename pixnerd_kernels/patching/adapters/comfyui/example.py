"""The node at work without ComfyUI: a small head of ChromaRadiance's structure, loaded and unloaded as ComfyUI would.

python -m pixnerd_kernels.patching.adapters.comfyui.example
"""

from __future__ import annotations

import copy
import sys
from itertools import chain
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixnerd_kernels import coordinate_encoding
from pixnerd_kernels.patching.adapters.comfyui.pixnerd_radiance import NODE_CLASS_MAPPINGS


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale, 1e-6)


class Embedder(nn.Module):
    max_freqs = 8

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.embedder = nn.Sequential(nn.Linear(3 + self.max_freqs**2, channels))

    def forward(self, pixels: Tensor) -> Tensor:
        side = round(pixels.shape[1] ** 0.5)
        table = coordinate_encoding(side, side, self.max_freqs, "dct_integer")
        out: Tensor = self.embedder(torch.cat([pixels, table.expand(len(pixels), -1, -1)], -1))
        return out


class Block(nn.Module):
    def __init__(self, hidden_size: int, channels: int, mlp_ratio: int) -> None:
        super().__init__()
        self.param_generator = nn.Linear(hidden_size, 3 * channels**2 * mlp_ratio)
        self.norm = Norm(channels)
        self.mlp_ratio = mlp_ratio

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        count, _, size = x.shape
        gate, value, out = self.param_generator(s).chunk(3, dim=-1)
        gate, value = (F.normalize(w.view(count, size, -1), dim=-2) for w in (gate, value))
        out = F.normalize(out.view(count, -1, size), dim=-2)
        n = self.norm(x)
        return x + torch.bmm(F.silu(torch.bmm(n, gate)) * torch.bmm(n, value), out)


class FinalLayer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels)
        self.conv = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(self.norm(x.movedim(1, -1)).movedim(-1, 1))
        return out


class Head(nn.Module):
    """ChromaRadiance's pixel head; the transformer is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.params = SimpleNamespace(
            patch_size=8, hidden_size=32, nerf_hidden_size=16, nerf_mlp_ratio=4, nerf_tile_size=32
        )
        self.nerf_image_embedder = Embedder(16)
        self.nerf_blocks = nn.ModuleList(Block(32, 16, 4) for _ in range(2))
        self.nerf_final_layer_conv = FinalLayer(16)

    def forward_nerf(self, image: Tensor, hidden: Tensor, params: Any) -> Tensor:
        batch, size = len(image), params.patch_size
        states = hidden.flatten(0, 1)
        pixels = (
            F.unfold(image, size, stride=size).transpose(1, 2).reshape(len(states), 3, -1).transpose(1, 2)
        )
        x = self.nerf_image_embedder(pixels)
        for block in self.nerf_blocks:
            x = block(x, states)
        x = x.transpose(1, 2).reshape(batch, hidden.shape[1], -1).transpose(1, 2)
        out: Tensor = self.nerf_final_layer_conv(F.fold(x, image.shape[2:], size, stride=size))
        return out


class ModelPatcher:
    """As much of ComfyUI's as the node uses: clones share the model, injections come and go with loading."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.injections: dict[str, list[Any]] = {}

    def clone(self) -> ModelPatcher:
        twin = ModelPatcher(self.model)
        twin.injections = copy.copy(self.injections)
        return twin

    def set_injections(self, key: str, injections: list[Any]) -> None:
        self.injections[key] = injections

    def remove_injections(self, key: str) -> None:
        self.injections.pop(key, None)

    def load(self) -> None:
        for injection in chain.from_iterable(self.injections.values()):
            injection.inject(self)

    def unload(self) -> None:
        for injection in chain.from_iterable(self.injections.values()):
            injection.eject(self)


def stand_in() -> None:
    """ComfyUI's `PatcherInjection`, where ComfyUI is not there."""
    extension: Any = ModuleType("comfy.patcher_extension")
    extension.PatcherInjection = SimpleNamespace
    sys.modules.setdefault("comfy", ModuleType("comfy"))
    sys.modules.setdefault("comfy.patcher_extension", extension)


def main() -> None:
    stand_in()
    torch.manual_seed(0)
    head = Head()
    image, hidden = torch.randn(1, 3, 64, 64), torch.randn(1, 64, 32)
    node = NODE_CLASS_MAPPINGS["PixnerdPatchChromaRadianceHead"]()
    patcher, memory = node.patch(ModelPatcher(SimpleNamespace(diffusion_model=head)), True, 64, 64, 1)
    print(memory)
    with torch.inference_mode():
        before = head.forward_nerf(image, hidden, head.params)
        patcher.load()
        print(f"loaded: forward_nerf is {type(head)._pixnerd_replacement.op}")  # type: ignore[attr-defined]
        after = head.forward_nerf(image, hidden, head.params)
        patcher.unload()
        again = head.forward_nerf(image, hidden, head.params)
    print(
        f"largest difference {(after - before).abs().max():.1e}; unloaded: {(again - before).abs().max():.1e}"
    )


if __name__ == "__main__":
    main()
