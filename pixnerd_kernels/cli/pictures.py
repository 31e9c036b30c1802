"""Photographs in, comparison pictures out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixnerd_kernels.cli.arguments import UsageError, optional_package

if TYPE_CHECKING:
    from PIL.Image import Image

#: Photographs that scikit-learn ships.
SAMPLES = ("china", "flower")

_GAP = 16
_WIDTH = 1560
_ZOOM = 8
_BACKGROUND, _INK, _MUTED, _MARK = (255, 255, 255), (24, 24, 27), (95, 95, 105), (255, 214, 10)


def load(name: str) -> Image:
    """A photograph as RGB, by the path of its file or the name of a sample.

    Transparency is laid on white, 16-bit grey is scaled to 8 bits, and the camera's orientation is applied.

    Raises:
        UsageError: there is no such file, or it cannot be read as an image.
    """
    images, operations = optional_package("PIL.Image"), optional_package("PIL.ImageOps")
    if name in SAMPLES:
        datasets = optional_package("sklearn.datasets")
        sample: Image = images.fromarray(datasets.load_sample_image(f"{name}.jpg"))
        return sample
    path = Path(name)
    expected = f"IMAGE: expected an image file, or one of {', '.join(SAMPLES)}, got"
    if path.is_dir():
        raise UsageError(f"{expected} the directory {name!r}")
    if not path.exists():
        raise UsageError(f"{expected} {name!r}, which does not exist")
    try:
        with images.open(path) as file:
            return _rgb(operations.exif_transpose(file), images)
    except (OSError, SyntaxError, ValueError, images.DecompressionBombError) as error:
        raise UsageError(f"{expected} {name!r}, which cannot be read ({error})") from error


def _rgb(image: Image, images: Any) -> Image:
    if image.mode.startswith(("I", "F")):
        import numpy as np

        values = np.asarray(image, dtype=np.float64)
        wide = 65535.0 if image.mode.startswith("I") and values.max() > 255 else 255.0
        image = images.fromarray((values.clip(0, wide) * (255 / wide)).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = images.new("RGBA", image.size, (255, 255, 255, 255))
        image = images.alpha_composite(white, image)
    return image.convert("RGB")


def prepare(image: Image, size: int, patch: int) -> Image:
    """Downscale to a longest side of `size` at most, and crop the middle to multiples of `patch`.

    Raises:
        UsageError: not even one patch is left.
    """
    images = optional_package("PIL.Image")
    longest = max(image.size)
    if longest > size:
        shape = [max(1, round(side * size / longest)) for side in image.size]
        image = image.resize((shape[0], shape[1]), images.LANCZOS)
    width, height = (side - side % patch for side in image.size)
    if not (width and height):
        raise UsageError(
            f"IMAGE: expected at least one patch of {patch}x{patch} pixels, got {image.width}x{image.height}"
        )
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def bicubic(image: Image, factor: int) -> Image:
    """Bicubic enlargement with sample j at pixel j / factor, where the fields are decoded too."""
    images = optional_package("PIL.Image")
    shift = 0.5 - 0.5 / factor
    size = (image.width * factor, image.height * factor)
    transform = (1 / factor, 0, shift, 0, 1 / factor, shift)
    enlarged: Image = image.transform(size, images.AFFINE, transform, resample=images.BICUBIC)
    return enlarged


def detail(image: Image, side: int) -> tuple[int, int]:
    """The corner (left, top) of the side x side window whose smoothed hues vary most."""
    import numpy as np

    filters = optional_package("PIL.ImageFilter")
    smooth = np.asarray(image.filter(filters.GaussianBlur(2)), dtype=np.float64) / 255
    # Grey is the same in all three channels and drops out of their differences.
    pixels = smooth - np.roll(smooth, 1, axis=-1)
    if not pixels.any():
        pixels = smooth

    def box(values: Any) -> Any:
        sums = np.pad(values.cumsum(0).cumsum(1), ((1, 0), (1, 0), (0, 0)))
        total = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
        return total / side**2

    variance = (box(pixels**2) - box(pixels) ** 2).sum(-1)
    top, left = np.unravel_index(variance.argmax(), variance.shape)
    return int(left), int(top)


def _font(points: int) -> Any:
    fonts, matplotlib = optional_package("PIL.ImageFont"), optional_package("matplotlib")
    return fonts.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), points)


def side_by_side(
    original: Image,
    decoded: dict[int, Image],
    psnr: float,
    footer: list[str],
    crop: tuple[int, int] | None = None,
) -> Image:
    """The picture that tells the story: original and reconstruction, below them one detail enlarged four ways.

    Args:
        original: the fitted photograph.
        decoded: the fields at 1, 2 and 4 times the resolution.
        psnr: of the reconstruction, in dB.
        footer: lines of text under the picture.
        crop: left and top of the detail in pixels of the original; None looks for a lively place.
    """
    images, drawing = optional_package("PIL.Image"), optional_package("PIL.ImageDraw")
    title, text = _font(24), _font(20)
    panel = (_WIDTH - 3 * _GAP) // 4
    side = min(panel // _ZOOM, *original.size)
    left, top = crop or detail(original, side)
    left, top = min(left, original.width - side), min(top, original.height - side)
    half = (_WIDTH - _GAP) // 2
    tall = round(half * original.height / original.width)
    caption, line = 44, 30
    height = 2 * _GAP + 2 * caption + tall + panel + _GAP + line * len(footer) + _GAP
    canvas: Image = images.new("RGB", (_WIDTH + 2 * _GAP, height), _BACKGROUND)
    draw = drawing.Draw(canvas)

    def place(image: Image, x: int, y: int, size: tuple[int, int], filter: int, words: str) -> None:
        draw.text((x, y + 6), words, fill=_INK, font=title if size[0] > panel else text)
        canvas.paste(image.resize(size, filter), (x, y + caption))

    y = _GAP
    size = original.size
    first = [f"Photograph, {size[0]} x {size[1]}", f"One neural field per patch, {psnr:.1f} dB PSNR"]
    for index, (image, words) in enumerate(zip((original, decoded[1]), first, strict=True)):
        x = _GAP + index * (half + _GAP)
        place(image, x, y, (half, tall), images.BICUBIC, words)
        scale = half / original.width
        box = [x + left * scale, y + caption + top * scale]
        corner = [box[0] + side * scale, box[1] + side * scale]
        draw.rectangle([*box, *corner], outline=_INK, width=5)
        draw.rectangle([box[0] + 1, box[1] + 1, corner[0] - 1, corner[1] - 1], outline=_MARK, width=3)
    y += caption + tall + _GAP
    details = [
        (original, 1, "Photograph, its pixels"),
        (decoded[2], 2, "Fields decoded at 2x"),
        (decoded[4], 4, "Fields decoded at 4x"),
        (bicubic(original, 4), 4, "Photograph, bicubic 4x"),
    ]
    for index, (image, factor, words) in enumerate(details):
        window = image.crop(
            (left * factor, top * factor, (left + side) * factor, (top + side) * factor)
        )  # fmt: skip
        place(window, _GAP + index * (panel + _GAP), y, (panel, panel), images.NEAREST, words)
    y += caption + panel + _GAP
    for index, words in enumerate(footer):
        draw.text((_GAP, y + index * line), words, fill=_MUTED, font=text)
    return canvas
