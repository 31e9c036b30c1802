"""What a PixNerd is made of, and the named configurations."""

from __future__ import annotations

from dataclasses import dataclass

from pixnerd_kernels.checks import Problems
from pixnerd_kernels.ops.coordinate_encoding import EVEN_KINDS, KINDS


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
            Nyquist limit and alias when decoded finer: keep max_freqs below P for models meant to be upscaled.
        encoding: `coordinate_encoding`'s kind; "dct" is the official model's, "dct_aligned" keeps a pixel's place at
            every decoder scale, which decoding finer without seams between the patches wants.

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
        counted = [
            problems.count(name, value, minimum=int(name != "num_blocks")) for name, value in sizes.items()
        ]
        problems.choice("encoding", self.encoding, KINDS)
        if all(counted):
            _check_heads(problems, self.hidden_size, self.num_heads)
            if self.encoding in EVEN_KINDS and self.max_freqs % 2:
                problems.add(
                    "max_freqs", f"an even number for the encoding {self.encoding!r}", self.max_freqs
                )
        problems.raise_if_any()


@dataclass(frozen=True)
class PixNerdT2IConfig:
    """Sizes of a text-to-image PixNerd.

    Attributes:
        hidden_size, num_heads, num_blocks, num_field_blocks, field_channels, field_ratio, patch_size,
            in_channels: as in `PixNerdConfig`.
        num_text_blocks: blocks that refine the text alone.
        text_tokens, text_width: of the text features, [B, text_tokens, text_width].
        max_freqs: K, even; the coordinate encoding has K^2 columns.
        extent: the positions that a decoded patch spans along each axis, at any size. The official heavy
            decoder's is 16, the other official model's its patch_size: equal at 16 x 16 pixels only. Keep it
            below pi * patch_size: the highest frequency is 1, and reaches the Nyquist limit there.

    Raises:
        TypeError, ValueError: every problem at once.
    """

    hidden_size: int
    num_heads: int
    num_blocks: int
    num_field_blocks: int
    num_text_blocks: int = 4
    text_tokens: int = 128
    text_width: int = 2048
    field_channels: int = 64
    field_ratio: int = 2
    patch_size: int = 16
    in_channels: int = 3
    max_freqs: int = 8
    extent: float = 16.0

    def __post_init__(self) -> None:
        problems = Problems("PixNerdT2IConfig")
        sizes = {name: value for name, value in vars(self).items() if name != "extent"}
        empty = ("num_blocks", "num_text_blocks")
        counted = {
            name: problems.count(name, value, minimum=int(name not in empty)) for name, value in sizes.items()
        }
        problems.number("extent", self.extent)
        if all(counted.values()):
            _check_heads(problems, self.hidden_size, self.num_heads)
        if counted["max_freqs"] and self.max_freqs % 2:
            problems.add("max_freqs", "an even number", self.max_freqs)
        problems.raise_if_any()


def _check_heads(problems: Problems, hidden_size: int, num_heads: int) -> None:
    if hidden_size % (4 * num_heads):
        expected = f"a multiple of 4 * num_heads = {4 * num_heads} (2-D rotary pairs)"
        problems.add("hidden_size", expected, hidden_size)


#: L/16 and XL/16 are the official models; the others are small enough to train on a CPU in minutes.
CONFIGS = {
    "XL/16": PixNerdConfig(1152, 16, 26, 4),
    "L/16": PixNerdConfig(1024, 16, 22, 2),
    "small/8": PixNerdConfig(
        256, 8, 8, 2, field_channels=32, patch_size=8, max_freqs=6, encoding="dct_aligned"
    ),
    "small/7": PixNerdConfig(
        128, 4, 4, 2, field_channels=32, patch_size=7, in_channels=1, num_classes=10, max_freqs=6,
        encoding="dct_aligned",
    ),
    "tiny/4": PixNerdConfig(
        96, 3, 4, 2, field_channels=16, patch_size=4, in_channels=1, num_classes=10, max_freqs=3,
        encoding="dct_aligned",
    ),
}  # fmt: skip

#: XXL/16 is the official model; the others are small enough to train on a CPU.
T2I_CONFIGS = {
    "XXL/16": PixNerdT2IConfig(1536, 24, 16, 2),
    "small/8": PixNerdT2IConfig(
        256, 8, 6, 2, num_text_blocks=2, text_tokens=32, text_width=512, field_channels=32, patch_size=8
    ),
    "tiny/4": PixNerdT2IConfig(
        96, 3, 3, 2, num_text_blocks=1, text_tokens=8, text_width=64, field_channels=16, patch_size=4,
        max_freqs=4, extent=8.0,
    ),
}  # fmt: skip
