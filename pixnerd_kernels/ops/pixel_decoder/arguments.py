"""The arguments of `pixel_decoder` beside its parameters: a patch's size, the workspace, what fits an image."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pixnerd_kernels.checks import Problems
from pixnerd_kernels.ops.pixel_decoder import chunks


def scaled_patch(patch_size: int, decoder_scale: Sequence[float]) -> tuple[int, int]:
    """Pixels of a decoded patch (height, width): int(P * sh) x int(P * sw), exact for a scale of n / P."""
    height, width = (int(patch_size * scale + 1e-6) for scale in decoder_scale)
    return height, width


def check_patch(
    problems: Problems, patch_size: object, decoder_scale: Sequence[float]
) -> tuple[int, int] | None:
    """Height and width of a patch in pixels, where they can be told."""
    counted = problems.count("patch_size", patch_size)
    if not isinstance(decoder_scale, (tuple, list)) or len(decoder_scale) != 2:
        problems.add_type("decoder_scale", "a pair (sh, sw)", decoder_scale)
        return None
    numbers = [problems.number("decoder_scale", scale) for scale in decoder_scale]
    if not counted or not all(numbers):
        return None
    assert isinstance(patch_size, int)
    height, width = scaled_patch(patch_size, decoder_scale)
    if not height or not width:
        problems.add("decoder_scale", "at least one pixel a patch", decoder_scale)
        return None
    return height, width


def check_workspace(problems: Problems, workspace: object) -> int:
    """The workspace as the op takes it: bytes, or a number for "auto" or None."""
    if workspace is None:
        return chunks.UNCHUNKED
    if isinstance(workspace, str):
        problems.choice("workspace", workspace, ["auto"])
        return chunks.AUTO
    problems.count("workspace", workspace, maximum=2**62)
    return workspace  # type: ignore[return-value]


def check_tokens(problems: Problems, image: Tensor, hidden: Tensor, patch: tuple[int, int]) -> None:
    """The image is made of whole patches, and hidden has a row for each."""
    height, width = patch
    if image.shape[2] % height or image.shape[3] % width or 0 in image.shape[1:]:
        problems.add(
            "image", f"C above 0, and H and W multiples of the patch of {height} x {width} pixels", image
        )
        return
    expected = (image.shape[0], (image.shape[2] // height) * (image.shape[3] // width))
    if tuple(hidden.shape[:2]) != expected:
        problems.add("hidden", f"[{expected[0]}, {expected[1]}, D], a row for every patch", hidden)
