"""A ComfyUI node: Chroma Radiance's pixel head on pixnerd_kernels. Copy this folder to ComfyUI's custom_nodes.

ComfyUI is imported when the node runs, so that the folder can be looked at without it.
"""

from __future__ import annotations

import logging
from typing import Any

KEY = "pixnerd_kernels"
log = logging.getLogger(__name__)


def estimate(
    height: int, width: int, batch: int, *, channels: int, hidden: int, patch: int, tile: int, itemsize: int
) -> tuple[int, int]:
    """Bytes that the head takes up to its features, beside the weights, before and after the patch.

    For tiles of n patches (tile patches of every image, or all), P² pixels each, D1 channels, D2 hidden units, and
    features of F = D1 H W batch, in elements:

        before   the larger of  6 n D1 D2 (generated and normalised matrices) + n P² (3 D1 + 2 D2) (activations) + F
                 and 4 F (putting the tiles together)
        after    two chunks of generated matrices, of 256 MiB each at most (64 on a CPU), + F
    """
    patches = (height // patch) * (width // patch)
    n = batch * (min(tile, patches) if tile else patches)
    features = channels * height * width * batch
    block = 6 * n * channels * hidden + n * patch**2 * (3 * channels + 2 * hidden)
    chunk = min(256 << 20, 3 * batch * patches * channels * hidden * itemsize)
    return max(block + features, 4 * features) * itemsize, 2 * chunk + features * itemsize


def describe(model: Any, height: int, width: int, batch: int) -> str:
    """The estimate for a ChromaRadiance model, in words."""
    params, weight = model.params, model.nerf_blocks[0].param_generator.weight
    # Weights are cast to the dtype of the computation; nothing smaller than half precision is computed in.
    before, after = estimate(
        height, width, batch,
        channels=params.nerf_hidden_size, hidden=params.nerf_hidden_size * params.nerf_mlp_ratio,
        patch=params.patch_size, tile=params.nerf_tile_size, itemsize=max(2, weight.element_size()),
    )  # fmt: skip
    return (
        f"{width}x{height}, batch {batch}: the head takes about {before / 2**20:.0f} MiB with tiles of "
        f"{params.nerf_tile_size or 'all'} patches, and {after / 2**20:.0f} MiB patched (estimated)"
    )


class PatchChromaRadianceHead:
    """Patches the head whenever ComfyUI loads the model for sampling, and takes it back when it unloads it."""

    CATEGORY = "model_patches/chroma_radiance"
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "memory")
    FUNCTION = "patch"
    DESCRIPTION = (
        "Runs Chroma Radiance's pixel head on fused kernels; every replaced module is verified first."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        size = {"default": 1024, "min": 16, "max": 16384, "step": 16}
        return {
            "required": {
                "model": ("MODEL",),
                "enabled": ("BOOLEAN", {"default": True, "tooltip": "Off takes an earlier patch out again."}),
                "width": ("INT", {**size, "tooltip": "For the estimate only."}),
                "height": ("INT", {**size, "tooltip": "For the estimate only."}),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 4096}),
            }
        }

    def patch(self, model: Any, enabled: bool, width: int, height: int, batch_size: int) -> tuple[Any, str]:
        diffusion = model.model.diffusion_model
        if not hasattr(diffusion, "forward_nerf"):
            raise ValueError(f"expected a Chroma Radiance model, got {type(diffusion).__name__}")
        text = describe(diffusion, height, width, batch_size)
        model = model.clone()
        model.remove_injections(KEY)
        if enabled:
            model.set_injections(KEY, [_injection()])
        return model, text


def _injection() -> Any:
    """What ComfyUI calls once the model is loaded, and before it is unloaded or handed to another workflow."""
    from comfy.patcher_extension import PatcherInjection

    import pixnerd_kernels

    reports: list[pixnerd_kernels.patching.Report] = []

    def inject(patcher: Any) -> None:
        report = pixnerd_kernels.patch(
            patcher.model.diffusion_model, ops=["pixel_decoder", "neural_field_mlp_packed"]
        )
        reports.append(report)
        log.info("Chroma Radiance head:\n%s", report)

    def eject(patcher: Any) -> None:
        while reports:
            reports.pop().unpatch()

    return PatcherInjection(inject=inject, eject=eject)


NODE_CLASS_MAPPINGS = {"PixnerdPatchChromaRadianceHead": PatchChromaRadianceHead}
NODE_DISPLAY_NAME_MAPPINGS = {"PixnerdPatchChromaRadianceHead": "Patch Chroma Radiance head"}
