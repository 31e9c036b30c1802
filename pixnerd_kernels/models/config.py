"""What a class-to-image PixNerd is made of, and the named configurations."""

from __future__ import annotations

from dataclasses import dataclass

from pixnerd_kernels.checks import Problems
from pixnerd_kernels.ops.coordinate_encoding import KINDS


@dataclass(frozen=True)
class PixNerdConfig:
    """Sizes of a class-to-image PixNerd.

    Attributes:
        hidden_size: D, channels of a token; a multiple of 4 * num_heads.
        num_heads: attention heads.
        num_blocks: DiT blocks.
        num_field_blocks: neural-field blocks of the pixel decoder.
        field_channels: D1, channels of a pixel in the neural field.
        field_ratio: D2 / D1.
        patch_size: P, pixels; a token is a patch of P x P.
        in_channels: C of the image.
        num_classes: classes without "no class", which is class number num_classes.
        max_freqs: frequencies per axis of the coordinate encoding. Those above P - 1 lie over the patch's
            Nyquist limit and alias when decoded finer: keep max_freqs below P for models meant to be
                upscaled.
        encoding: `coordinate_encoding`'s kind.

    Raises:
        TypeError, ValueError: every problem at once.
    """

    hidden_size: int
    num_heads: int
    num_blocks: int
    num_field_blocks: int
    field_channels: int = 64
    field_ratio: int = 2
    patch_size: int = 16
    in_channels: int = 3
    num_classes: int = 1000
    max_freqs: int = 8
    encoding: str = "dct"

    def __post_init__(self) -> None:
        problems = Problems("PixNerdConfig")
        sizes = {name: value for name, value in vars(self).items() if name != "encoding"}
        counted = [problems.count(name, value, minimum=name != "num_blocks") for name, value in sizes.items()]
        problems.choice("encoding", self.encoding, KINDS)
        if all(counted) and self.hidden_size % (4 * self.num_heads):
            expected = f"a multiple of 4 * num_heads = {4 * self.num_heads} (2-D rotary pairs)"
            problems.add("hidden_size", expected, self.hidden_size)
        problems.raise_if_any()


#: L/16 and XL/16 are the official models; the others are small enough to train on a CPU in minutes.
CONFIGS = {
    "XL/16": PixNerdConfig(1152, 16, 26, 4),
    "L/16": PixNerdConfig(1024, 16, 22, 2),
    "small/8": PixNerdConfig(256, 8, 8, 2, field_channels=32, patch_size=8, max_freqs=6),
    "small/7": PixNerdConfig(
        192, 6, 6, 2, field_channels=16, patch_size=7, in_channels=1, num_classes=10, max_freqs=4
    ),
    "tiny/4": PixNerdConfig(
        96, 3, 4, 2, field_channels=16, patch_size=4, in_channels=1, num_classes=10, max_freqs=3
    ),
}
