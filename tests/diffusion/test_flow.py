"""The path, its target, the times, dropped classes and the loss."""

import math

import pytest
import torch

from pixnerd_kernels import models
from pixnerd_kernels.diffusion import flow, sample


def test_the_path_runs_from_noise_to_data_at_the_target_velocity():
    data, noise = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    assert torch.equal(flow.interpolate(data, noise, torch.zeros(3)), noise)
    assert torch.equal(flow.interpolate(data, noise, torch.ones(3)), data)
    t = torch.tensor([0.1, 0.5, 0.8])
    moved = flow.interpolate(data, noise, t) + (1 - t).view(3, 1, 1, 1) * flow.velocity_target(data, noise)
    torch.testing.assert_close(moved, data)


def test_noise_at_another_resolution_keeps_the_trained_pixels_and_unit_variance():
    coarse = torch.randn(3000, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    for size in (16, 20, 32):
        fine = flow.scale_noise(coarse, size)
        assert fine.shape == (3000, 2, size, size)
        assert (fine.var((0, 1)) - 1).abs().max() < 0.12  # every pixel, over 6000 drawings
        assert fine.mean((0, 1)).abs().max() < 0.08
        assert (fine[..., 0, 0] * fine[..., 0, 1]).mean() > 0.6  # neighbours go together
    torch.testing.assert_close(flow.scale_noise(coarse, 32)[..., ::4, ::4], coarse)
    torch.testing.assert_close(flow.scale_noise(coarse, 4), coarse[..., ::2, ::2])
    assert torch.equal(flow.scale_noise(coarse, 8), coarse)


def test_times_are_log_normal_and_shifted():
    t = flow.sample_times(20000, generator=torch.Generator().manual_seed(0))
    logits = t.logit()
    assert abs(logits.mean()) < 0.03
    assert abs(logits.std() - 1) < 0.03
    shifted = flow.sample_times(20000, shift=3.0, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(shifted, t / (t + 3 * (1 - t)))
    # A shift of s adds -log s to the logits.
    assert abs(shifted.logit().mean() + math.log(3)) < 0.03


def test_classes_are_dropped_at_the_given_probability():
    y = torch.arange(4).repeat(5000)
    dropped = flow.drop_conditions(y, 9, 0.1, generator=torch.Generator().manual_seed(0))
    hit = dropped == 9
    assert abs(hit.float().mean() - 0.1) < 0.01
    assert torch.equal(dropped[~hit], y[~hit])
    assert torch.equal(flow.drop_conditions(y, 9, 0.0), y)
    assert (flow.drop_conditions(y, 9, 1.0) == 9).all()


def test_texts_are_dropped_whole():
    y, null = torch.ones(1000, 3, 2), torch.full((3, 2), 9.0)
    dropped = flow.drop_conditions(y, null, 0.1, generator=torch.Generator().manual_seed(0))
    changed = (dropped == 9).flatten(1)
    assert torch.equal(changed.all(1), changed.any(1))
    assert 60 < changed.all(1).sum() < 140
    assert torch.equal(dropped[~changed.all(1)], y[~changed.all(1)])
    with pytest.raises(
        ValueError, match=r"null: expected the shape of one image's condition \[3, 2\], got 9"
    ):
        flow.loss(lambda x, t, y: x, torch.zeros(1000, 1, 2, 2), y, null=9)


def test_loss_of_the_true_velocity_is_zero_and_of_zero_its_variance():
    data = torch.full((4096, 1, 2, 2), 0.5)
    y = torch.zeros(4096, dtype=torch.long)

    def truth(x, t, y):
        t = t.view(-1, 1, 1, 1)
        return (data - x) / (1 - t)

    assert flow.loss(truth, data, y, null=1) < 1e-6
    zero = flow.loss(lambda x, t, y: torch.zeros_like(x), data, y, null=1)
    assert abs(zero - 1.25) < 0.05  # the noise's variance and the data's square


def test_loss_draws_from_the_generator_only():
    data, y = torch.randn(2, 1, 4, 4), torch.tensor([0, 1])

    def draw(seed):
        return flow.loss(
            lambda x, t, y: x * y.view(-1, 1, 1, 1),
            data,
            y,
            null=2,
            dropout=0.5,
            generator=torch.Generator().manual_seed(seed),
        )

    state = torch.random.get_rng_state()
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(ValueError, match="y: expected a tensor with a condition for each of the 2 images"):
        flow.loss(lambda x, t, y: x, data, torch.zeros(3, dtype=torch.long), null=2)
    with pytest.raises(ValueError, match=r"noise: expected a tensor of the shape of data \[2, 1, 4, 4\]"):
        flow.loss(lambda x, t, y: x, data, y, null=2, noise=torch.zeros(2, 1, 4, 5))
    exact = flow.loss(lambda x, t, y: data - 3, data, y, null=2, noise=torch.full((2, 1, 4, 4), 3.0))
    assert exact == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"data": torch.zeros(0, 1, 4, 4), "y": torch.zeros(0, dtype=torch.long)},
            "data: expected at least one image",
        ),
        ({"y": [0, 1]}, "y: expected a tensor with a condition"),
        ({"null": None}, "null: expected a class id"),
        ({"noise": 3}, "noise: expected a tensor"),
        ({"dropout": 2.0}, "dropout: expected a number from 0 to 1, got 2.0"),
        ({"shift": 0}, "shift: expected a number from 1e-30 to 1e\\+30, got 0"),
        ({"shift": float("inf")}, "shift: expected a number"),
        ({"model": lambda x, t, y: x[:, :, :1]}, "model: expected a velocity of the shape of data"),
        ({"model": lambda x, t, y: x.mean()}, "model: expected a velocity of the shape of data"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_a_loss_of_nonsense_is_refused(arguments, message):
    given = {
        "model": lambda x, t, y: x,
        "data": torch.zeros(2, 1, 4, 4),
        "y": torch.tensor([0, 1]),
        "null": 2,
    }
    with pytest.raises((TypeError, ValueError), match=message):
        flow.loss(**given | arguments)


def test_the_path_keeps_data_s_dtype_and_takes_floating_data_only():
    data, noise, t = torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.float64), torch.tensor([0.0, 0.5, 1.0])
    out = flow.interpolate(data, noise, t)
    assert out.dtype == torch.float32
    assert torch.equal(out[:, 0], t)
    for arguments, message in (
        ((data.byte(), noise, t), "data: expected a floating tensor"),
        ((data, noise[:1], t), r"noise: expected a tensor \[3, 2\]"),
        ((data, noise, t[:1]), r"t: expected a tensor \[3\]"),
        ((data, noise, 0.5), r"t: expected a tensor \[3\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            flow.interpolate(*arguments)


def test_images_of_one_pixel_are_enlarged():
    assert torch.equal(flow.scale_data(torch.full((1, 1, 1, 1), 3.0), 2), torch.full((1, 1, 2, 2), 3.0))
    for function in (flow.scale_data, flow.scale_noise):
        with pytest.raises(ValueError, match="size: expected an integer of at least 1"):
            function(torch.zeros(1, 1, 4, 4), 0)


def overfit(model, y, null, steps):
    """Train on two images, told apart by their conditions; the losses, and the drawn images' squared error."""
    rows = torch.linspace(-1, 1, 8)
    data = torch.stack([rows.expand(8, 8), -rows[:, None].expand(8, 8)])[:, None].repeat(16, 1, 1, 1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        loss = flow.loss(model, data, y.repeat(16, *(1,) * (y.dim() - 1)), null=null, generator=generator)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    noise = torch.randn(2, 1, 8, 8, generator=generator)
    drawn = sample(model, noise, y, solver="adams", num_steps=20)
    return losses, (drawn - data[:2]).square().mean()


def test_a_model_overfits_one_batch():
    """The loss falls on the way, and samples of each class end near the one image of that class."""
    torch.manual_seed(0)
    config = models.PixNerdConfig(32, 2, 2, 2, 8, 2, patch_size=4, in_channels=1, num_classes=2, max_freqs=3)
    losses, error = overfit(models.PixNerd(config), torch.arange(2), null=2, steps=150)
    assert sum(losses[-10:]) < 0.35 * sum(losses[:10])
    assert error < 0.1


def test_a_text_to_image_model_overfits_one_batch():
    torch.manual_seed(0)
    config = models.PixNerdT2IConfig(
        32,
        2,
        1,
        1,
        1,
        text_tokens=3,
        text_width=8,
        field_channels=8,
        patch_size=4,
        in_channels=1,
        max_freqs=4,
    )
    model = models.PixNerdT2I(config)
    losses, error = overfit(model, torch.randn(2, 3, 8), null=torch.randn(3, 8), steps=100)
    assert sum(losses[-10:]) < 0.35 * sum(losses[:10])
    assert error < 0.1
