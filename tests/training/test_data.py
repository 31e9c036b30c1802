"""Images come from packages and folders; what cannot be read is named."""

import numpy as np
import pytest
import torch
from PIL import Image

from pixnerd_kernels.training import load_dataset


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes: red images of odd shapes, and a grey one in a sub-folder."""
    red = np.zeros((20, 30, 3))
    red[..., 0] = 200
    save(tmp_path / "b red" / "1.png", red)
    save(tmp_path / "b red" / "2.bmp", red.transpose(1, 0, 2))
    save(tmp_path / "a grey" / "deep" / "x.PNG", np.full((9, 9), 100))
    (tmp_path / "a grey" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def test_digits_and_mnist_are_what_their_packages_hold():
    digits = load_dataset("digits", 8, 1)
    assert digits.images.shape == (1797, 1, 8, 8)
    assert (digits.images.min(), digits.images.max()) == (0, 255)
    assert digits.labels[:5].tolist() == [0, 1, 2, 3, 4]
    mnist = load_dataset("mnist", 28, 1)
    assert mnist.images.shape == (5000, 1, 28, 28)
    assert mnist.labels.bincount().tolist() == [500] * 10
    assert 30 < mnist.images.float().mean() < 36
    large = load_dataset("digits", 16, 3)
    assert large.images.shape == (1797, 3, 16, 16)
    assert abs(large.images.float().mean() - digits.images.float().mean()) < 2
    assert digits.digest() != large.digest()
    assert digits.digest() == load_dataset("digits", 8, 1).digest()


def test_a_folder_gives_cropped_images_and_sorted_classes(folder):
    data = load_dataset(str(folder), 8, 3)
    assert data.classes == ("a grey", "b red")
    assert data.labels.tolist() == [0, 1, 1]
    assert data.skipped == ()
    assert (data.images[0] == 100).all()
    assert torch.equal(data.images[1:].amax((0, 2, 3)), torch.tensor([200, 0, 0], dtype=torch.uint8))
    grey = load_dataset(str(folder), 8, 1)
    assert grey.images.shape == (3, 1, 8, 8)
    assert (grey.images[1] == 60).all()  # the luminance of that red


def test_the_middle_of_an_image_is_taken(tmp_path):
    wide = np.zeros((10, 30))
    wide[:, 10:20] = 255
    save(tmp_path / "c" / "wide.png", wide)
    assert (load_dataset(str(tmp_path), 10, 1).images == 255).all()


def test_unreadable_images_are_skipped_and_named(folder):
    (folder / "b red" / "broken.jpg").write_bytes(b"no image")
    whole = (folder / "b red" / "1.png").read_bytes()
    (folder / "a grey" / "cut.png").write_bytes(whole[: len(whole) // 2])
    data = load_dataset(str(folder), 8, 3)
    assert len(data.labels) == 3
    assert len(data.skipped) == 2
    assert "cut.png" in data.skipped[0]
    assert "broken.jpg: UnidentifiedImageError" in data.skipped[1]


def test_folders_without_images_are_errors(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="digits or mnist or a folder, got 'nowhere'"):
        load_dataset("nowhere", 8, 3)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="one sub-folder for each class"):
        load_dataset(str(empty), 8, 3)
    (empty / "cats").mkdir()
    with pytest.raises(ValueError, match=r"no readable image in .*empty for cats$"):
        load_dataset(str(empty), 8, 3)
    (empty / "cats" / "x.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"for cats; not readable: .*x\.png"):
        load_dataset(str(empty), 8, 3)
    with pytest.raises(ValueError, match="channels: expected 1 or 3, got 2"):
        load_dataset("digits", 8, 2)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    (tmp_path / "a").mkdir()
    Image.fromarray(levels).save(tmp_path / "a" / "wide.png")
    data = load_dataset(str(tmp_path), 8, 1)
    assert (data.images[0, 0].numpy() == levels // 257).all()
    Image.fromarray(levels.astype(np.float32)).save(tmp_path / "a" / "floats.tiff")
    data = load_dataset(str(tmp_path), 8, 1)
    assert len(data.images) == 1
    assert "no known range" in data.skipped[0]
