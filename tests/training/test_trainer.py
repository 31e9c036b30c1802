"""A run learns, is reproducible, and continues to the same bits after any interruption."""

import itertools
import json
import signal
from dataclasses import replace

import pytest
import torch

from pixnerd_kernels.diffusion import flow
from pixnerd_kernels.models import PixNerdConfig
from pixnerd_kernels.training import Dataset, Settings, Trainer, checkpoint, load_dataset, load_sampler, train

MODEL = PixNerdConfig(32, 2, 1, 1, 8, 2, patch_size=4, in_channels=1, num_classes=10, max_freqs=3)
SETTINGS = Settings(
    "digits", 8, MODEL, steps=8, batch_size=16, learning_rate=1e-3, warmup=2, decoder_scales=(1.0, 2.0)
)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", 8, 1)


def tensors(path):
    return checkpoint.load(path)[0]


def assert_same_files(first, second):
    one, other = tensors(first), tensors(second)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.fixture(scope="module", params=["muon", "adamw"])
def settings(request):
    return replace(SETTINGS, optimiser=request.param)


@pytest.fixture(scope="module")
def uninterrupted(settings, digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert train(Trainer(settings, digits), folder, save_every=0, sample_every=0, sample_steps=2, quiet=True)
    return folder / "checkpoint.safetensors"


def test_the_loss_falls(digits):
    trainer = Trainer(replace(SETTINGS, steps=150, learning_rate=3e-3, decoder_scales=(1.0,)), digits)
    for _ in range(150):
        trainer.step()
    assert sum(trainer.losses[-20:]) < 0.7 * sum(trainer.losses[:20])


@pytest.mark.parametrize("cut", [1, 5])
def test_saving_and_resuming_changes_no_bit(digits, settings, uninterrupted, tmp_path, cut):
    first = Trainer(settings, digits)
    for _ in range(cut):
        first.step()
    first.save(tmp_path / "cut.safetensors")
    torch.manual_seed(99)  # the process's own random numbers play no part
    second = Trainer(settings, digits)
    second.load(tmp_path / "cut.safetensors")
    assert second.steps_done == cut
    train(second, tmp_path, save_every=0, sample_every=0, sample_steps=2, quiet=True)
    assert_same_files(tmp_path / "checkpoint.safetensors", uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_finishes_the_step_and_saves(digits, settings, uninterrupted, tmp_path, number):
    class Interrupted(Trainer):
        def _batch(self, step):
            if step == 3:
                signal.raise_signal(number)
            return super()._batch(step)

    options = {"save_every": 0, "sample_every": 2, "sample_steps": 2, "quiet": True}
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert not train(Interrupted(settings, digits), tmp_path, **options)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    resumed = Trainer(settings, digits)
    resumed.load(tmp_path / "checkpoint.safetensors")
    assert resumed.steps_done == 4
    assert train(resumed, tmp_path, **options)
    assert_same_files(tmp_path / "checkpoint.safetensors", uninterrupted)
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_another_seed_gives_other_weights(digits, settings, uninterrupted):
    trainer = Trainer(replace(settings, seed=1), digits)
    weight = tensors(uninterrupted)["model.patch_embed.weight"]
    assert not torch.equal(trainer.model.patch_embed.weight, weight)


def test_the_optimiser_takes_every_parameter_and_the_schedule(digits):
    settings = replace(SETTINGS, steps=100, warmup=10, cooldown=0.5, learning_rate=1.0)
    rates = [settings.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:50] == [1.0] * 41
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[50:]))
    assert rates[75] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.01
    trainer = Trainer(SETTINGS, digits)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for _ in range(3):  # the output layer starts at zero, so other gradients come later
        trainer.step()
    assert all(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    for optimiser in trainer.optimisers:
        assert [group["lr"] for group in optimiser.param_groups] == [SETTINGS.learning_rate_at(2)]


def test_the_average_follows_the_weights(digits):
    trainer = Trainer(replace(SETTINGS, ema=0.9), digits)
    expected = trainer.model.patch_embed.weight.clone()
    for step in range(4):
        trainer.step()
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * trainer.model.patch_embed.weight
    torch.testing.assert_close(trainer.ema.patch_embed.weight, expected.detach())


def test_every_epoch_shows_every_image_once_in_another_order():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 1, 8, 8)
    data = Dataset(images, torch.arange(10), tuple("abcdefghij"))
    trainer = Trainer(replace(SETTINGS, batch_size=4), data)
    seen = torch.cat([trainer._batch(step)[1] for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    batch, labels = trainer._batch(0)
    torch.testing.assert_close(batch[:, 0, 0, 0], labels / 127.5 - 1)
    wide = Trainer(replace(SETTINGS, batch_size=25), data)._batch(0)[1]  # more than two epochs at once
    assert torch.equal(wide[:20], seen)


def test_enlarged_targets_keep_the_trained_pixels(digits):
    """The transformer sees the nearest pixels of the enlarged image: they are the image."""
    trainer = Trainer(SETTINGS, digits)
    images = digits.images[:4].float() / 127.5 - 1
    for scale in (2, 3):
        assert trainer._size(scale) == 8 * scale
        fine = trainer._resized(images, 8 * scale)
        assert fine.shape[-1] == 8 * scale
        coarse = torch.nn.functional.interpolate(fine, (8, 8))
        torch.testing.assert_close(coarse, images, rtol=0, atol=1e-5)
    assert trainer._resized(images, 8) is images


def test_the_averaged_model_is_what_is_sampled(digits, settings, uninterrupted):
    model, saved, names = load_sampler(uninterrupted)
    assert saved == settings
    assert names == list("0123456789")
    assert torch.equal(model.patch_embed.weight, tensors(uninterrupted)["ema.patch_embed.weight"])
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_settings_survive_json():
    assert Settings.from_dict(json.loads(json.dumps(SETTINGS.to_dict()))) == SETTINGS


def test_another_configuration_or_other_images_are_refused(digits, settings, uninterrupted):
    other = replace(settings, learning_rate=2e-3, model=replace(MODEL, num_blocks=2))
    expected = r"learning_rate is 0\.002, the run has 0\.001; model\.num_blocks is 2, the run has 1"
    with pytest.raises(ValueError, match=expected):
        Trainer(other, digits).load(uninterrupted)
    changed = replace(digits, images=255 - digits.images)
    with pytest.raises(ValueError, match="the images in 'digits' have changed"):
        Trainer(settings, changed).load(uninterrupted)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_weights(digits, tmp_path):
    trainer = Trainer(SETTINGS, digits)
    trainer.step()
    trainer.save(tmp_path / "checkpoint.safetensors")
    with torch.no_grad():
        trainer.model.decoder.linear.bias.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="the loss of step 2 is inf"):
        train(trainer, tmp_path, quiet=True)
    assert len(tensors(tmp_path / "checkpoint.safetensors")["losses"]) == 1


def test_bad_settings_are_named_together(digits):
    with pytest.raises(ValueError, match=r"steps: .*ema: .*autocast: .*size: .*decoder_scales: "):
        Settings("digits", 10, MODEL, steps=0, ema=2.0, autocast="fp8", decoder_scales=(0.5,))
    with pytest.raises(ValueError, match="expected images of 1 x 12 x 12"):
        Trainer(replace(SETTINGS, size=12), digits)
    with pytest.raises(ValueError, match="expected 3 classes, got 10"):
        Trainer(replace(SETTINGS, model=replace(MODEL, num_classes=3)), digits)


def test_noise_is_not_rounded_under_autocast(digits, monkeypatch):
    seen, loss = [], flow.loss
    monkeypatch.setattr(
        flow, "loss", lambda *args, **options: seen.append(options["noise"]) or loss(*args, **options)
    )
    trainer = Trainer(replace(SETTINGS, autocast="bf16"), digits)
    for _ in range(3):
        trainer.step()
    assert all(noise.dtype == torch.float32 for noise in seen)
    assert any(noise.shape[-1] == 16 for noise in seen)


def test_another_device_s_random_numbers_are_refused(digits, tmp_path):
    trainer = Trainer(SETTINGS, digits)
    trainer.save(tmp_path / "run.safetensors")
    content = tensors(tmp_path / "run.safetensors")
    weights = {name: p.clone() for name, p in trainer.model.named_parameters()}
    content["generator"] = torch.zeros(16, dtype=torch.uint8)  # a CUDA generator's
    checkpoint.save(tmp_path / "gpu.safetensors", content, checkpoint.load(tmp_path / "run.safetensors")[1])
    with pytest.raises(ValueError, match="another kind of device than cpu"):
        trainer.load(tmp_path / "gpu.safetensors")
    assert all(torch.equal(p, weights[name]) for name, p in trainer.model.named_parameters())


def test_a_picture_that_cannot_be_drawn_costs_no_steps(digits, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("no space left")

    monkeypatch.setattr("pixnerd_kernels.training.loop._draw", fails)
    with pytest.raises(OSError, match="no space left"):
        train(Trainer(SETTINGS, digits), tmp_path, save_every=4, sample_every=4, sample_steps=2, quiet=True)
    trainer = Trainer(SETTINGS, digits)
    trainer.load(tmp_path / "checkpoint.safetensors")
    assert trainer.steps_done == 4
