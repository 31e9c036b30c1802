"""Drawing and files: reproducible images, exact grids, readable animations."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pixnerd_kernels import models
from pixnerd_kernels.diffusion import pictures

CONFIG = models.PixNerdConfig(32, 2, 1, 1, 8, 2, patch_size=4, in_channels=1, num_classes=3, max_freqs=3)
TEXT = models.PixNerdT2IConfig(
    32, 2, 1, 1, 1, text_tokens=5, text_width=12, field_channels=8, patch_size=4, in_channels=1, max_freqs=4
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = models.PixNerd(CONFIG).requires_grad_(False)
    torch.nn.init.normal_(model.decoder.linear.weight)
    return model


def draw(model, classes, size=8, seed=0, **options):
    options = {"solver": "euler", "num_steps": 3, "guidance": 2.0, **options}
    return pictures.draw(model, classes, size, trained_size=8, seed=seed, **options)


def test_an_image_depends_on_seed_place_and_class_alone(model):
    images = draw(model, [0, 1, 2, 1])
    assert torch.equal(images, draw(model, [0, 1, 2, 1]))
    torch.testing.assert_close(draw(model, [0, 1]), images[:2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(images[1], images[3])
    assert not torch.allclose(draw(model, [2])[0], images[0])
    assert not torch.allclose(draw(model, [0], seed=1)[0], images[0])


def test_texts_are_drawn_like_classes(monkeypatch):
    torch.manual_seed(0)
    model = models.PixNerdT2I(TEXT).requires_grad_(False)
    torch.nn.init.normal_(model.decoder.linear.weight)
    texts, empty = torch.randn(3, 5, 12), torch.randn(5, 12)

    def drawn(features, null=empty, size=8, **options):
        options = {"solver": "euler", "num_steps": 3, "guidance": 2.0, **options}
        return pictures.draw_texts(model, features, null, size, trained_size=8, **options)

    images = drawn(texts)
    monkeypatch.setattr(pictures, "BATCH", 2)
    torch.testing.assert_close(drawn(texts.double()), images, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(drawn(texts[[1, 1]])[0], images[0])  # the text counts
    assert not torch.allclose(drawn(texts, texts[0]), images)  # and the empty one
    assert torch.equal(drawn(texts, None, guidance=1.0), drawn(texts, guidance=1.0))
    assert drawn(texts, size=12).shape == (3, 1, 12, 12)
    with pytest.raises(
        ValueError, match=r"null_features: expected those of an empty text \[5, 12\] \(guidance"
    ):
        drawn(texts, None)
    with pytest.raises(
        ValueError, match=r"features: expected the shape \[n, 5, 12\].*; null_features: expected the"
    ):
        drawn(texts[:, :4], empty[:4])


def test_a_finer_image_takes_its_trained_pixels_along(monkeypatch):
    """On a path that goes straight to one value the switch changes nothing but how many pixels there are."""
    aligned = replace(CONFIG, encoding="dct_aligned")
    model = models.PixNerd(aligned).requires_grad_(False)
    sizes = []

    def forward(x, t, y, decoder_scale):
        sizes.append(x.shape[-1])
        assert decoder_scale == (x.shape[-1] / 8,) * 2
        return (0.5 - x) / (1 - t).view(-1, 1, 1, 1)  # every pixel goes straight to 0.5

    monkeypatch.setattr(model, "forward", forward)
    options = {"solver": "adams", "num_steps": 10, "guidance": 1.0}
    frames = []
    images = draw(model, [0, 1], 24, on_step=lambda step, x: frames.append((step, x.shape[-1])), **options)
    assert sizes == [8] * 9 + [24] * 2  # one evaluation more, at the switch
    assert frames == [(step, 24) for step in range(1, 11)]
    torch.testing.assert_close(images, torch.full_like(images, 0.5))
    for fine_from, expected in ((0.0, [24] * 10), (0.35, [8] * 5 + [24] * 6), (0.99, [8] * 10 + [24])):
        sizes.clear()
        draw(model, [0], 24, fine_from=fine_from, **options)
        assert sizes == expected
    for coarser in (8, 4):
        sizes.clear()
        draw(model, [0], coarser, **options)
        assert sizes == [coarser] * 10


def test_an_official_model_is_decoded_finely_all_the_way(model):
    torch.testing.assert_close(draw(model, [0], 16), draw(model, [0], 16, fine_from=0.0))
    assert not torch.allclose(draw(model, [0], 16), draw(model, [0], 16, fine_from=0.5))
    for wrong in (1.0, -0.1):
        with pytest.raises(ValueError, match="fine_from: expected"):
            draw(model, [0], 16, fine_from=wrong)


def test_the_switch_keeps_the_trained_pixels():
    x, velocity = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    finer = pictures._finer(x, velocity, 0.7, 32)
    torch.testing.assert_close(finer[..., ::4, ::4], x, rtol=1e-4, atol=1e-4)


def test_batches_are_joined(model, monkeypatch):
    whole = draw(model, [0, 1, 2, 0, 1], size=16)
    assert whole.shape == (5, 1, 16, 16)
    monkeypatch.setattr(pictures, "BATCH", 2)
    steps = []
    parts = draw(model, [0, 1, 2, 0, 1], size=16, on_step=lambda step, x: steps.append((step, len(x))))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    assert steps == [(step, count) for count in (2, 2, 1) for step in (1, 2, 3)]


def test_sizes_that_patches_do_not_tile_are_refused(model):
    assert pictures.decoder_scale(model, 20, 8) == (2.5, 2.5)
    assert pictures.decoder_scale(model, 6, 8) == (0.75, 0.75)
    with pytest.raises(ValueError, match=r"a multiple of 2, .*\(such as 8 or 10\), got 9"):
        pictures.decoder_scale(model, 9, 8)
    with pytest.raises(ValueError, match="trained_size: expected a multiple of the patch size 4, got 10"):
        pictures.decoder_scale(model, 10, 10)
    assert draw(model, [np.int64(1)]).equal(draw(model, [1]))
    for label in (3, 1.5, "a"):
        with pytest.raises(ValueError, match=f"a class from 0 to 2, got {label!r}"):
            draw(model, [0, label])
    with pytest.raises(ValueError, match="num_steps: expected an integer of at least 1, got 0"):
        draw(model, [0], num_steps=0)
    with pytest.raises(ValueError, match="span: expected none"):
        draw(model, [0], span=(0, 1))


def test_a_grid_holds_every_image_in_its_place(tmp_path):
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 1, 3, 4).clone()
    images[4] = 7.0  # beyond white
    picture = pictures.grid(images, gap=1)
    assert picture.shape == (2 * 4 + 1, 3 * 5 + 1, 1)
    assert picture[0, 0, 0] == 128
    values = [picture[1 + 4 * (i // 3), 1 + 5 * (i % 3), 0].item() for i in range(5)]
    assert values == [0, 64, 128, 191, 255]
    pictures.save_png(tmp_path / "new" / "g.png", picture)
    assert np.array_equal(np.array(Image.open(tmp_path / "new" / "g.png")), picture[..., 0].numpy())
    assert pictures.grid(images, columns=9, gap=1).shape == (5, 26, 1)
    colour = pictures.grid(torch.rand(2, 3, 4, 4), columns=1)
    pictures.save_png(tmp_path / "c.png", colour)
    assert np.array_equal(np.array(Image.open(tmp_path / "c.png")), colour.numpy())


def test_an_animation_has_all_frames_and_rests_on_the_last(tmp_path):
    frames = [torch.full((4, 4, 1), value, dtype=torch.uint8) for value in (0, 100, 250)]
    pictures.save_gif(tmp_path / "a.gif", frames, seconds=0.3)
    film = Image.open(tmp_path / "a.gif")
    assert film.n_frames == 3
    for index, frame in enumerate(frames):
        film.seek(index)
        assert np.array_equal(np.array(film.convert("L")), frame[..., 0].numpy())
        assert film.info["duration"] == (1000 if index == 2 else 100)


def test_a_loss_curve_is_a_picture_of_any_length(tmp_path):
    for count in (1, 7, 1234):
        pictures.save_loss_curve(tmp_path / f"{count}.png", torch.rand(count) + 0.1)
        pixels = np.array(Image.open(tmp_path / f"{count}.png").convert("L"))
        assert pixels.min() < 100 < 250 < pixels.max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.zeros(0, 1, 4, 4)}, "images: expected at least one image"),
        ({"images": torch.zeros(4, 4)}, r"images: expected \[n, C, H, W\]"),
        ({"columns": 0}, "columns: expected an integer of at least 1"),
        ({"columns": -1}, "columns: expected an integer of at least 1"),
    ],
)
def test_a_grid_of_nothing_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        pictures.grid(**{"images": torch.zeros(2, 1, 4, 4)} | arguments)
