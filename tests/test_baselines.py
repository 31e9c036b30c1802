"""The baselines are the models that they are named after: parameters, FLOPs, outputs and evaluations."""

from __future__ import annotations

import sys
from pathlib import Path

import golden
import pytest
import torch

# Last, so that an installed package is not shadowed by the checkout.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.baselines import networks, pixelflow, samplers
from benchmarks.baselines.pixnerd import PlainPixNerd
from pixnerd_kernels.models import PixNerdConfig, load_official


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_counts_match_the_published_ones(name: str) -> None:
    """Within 1%. Without diffusers this fails: it belongs to the `dev` extra."""
    network, counted = networks.NETWORKS[name], networks.count(name)
    if network.parameters is not None:
        assert counted.parameters == pytest.approx(network.parameters, rel=0.01)
    if network.gflop is not None:
        assert counted.forward == pytest.approx(network.gflop, rel=0.01)
    # A gradient of the input alone repeats every product of the forward but once.
    assert counted.total == pytest.approx(counted.forward * (2 if network.differentiates else 1), rel=0.02)


def test_relay_diffusion_is_what_its_training_script_builds() -> None:
    """Not the paper's 553M + 553M: the script's first stage is EDM's ADM at 64 px, published at 296M."""
    assert networks.count("RDM-1").parameters == pytest.approx(296e6, rel=0.01)
    assert networks.count("RDM-2").forward == pytest.approx(networks.count("ADM-256").forward, rel=0.01)


@pytest.mark.parametrize("name", ["c2i_tiny", "c2i_d64_p16"])
def test_plain_pixnerd_is_the_official_one(name: str) -> None:
    _, tensors = golden.load(name)
    weights = {
        key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")
    }
    plain = PlainPixNerd(load_official(weights).config)
    plain.load_state_dict(weights)
    with torch.no_grad():
        out = plain(*(tensors[f"input.{key}"] for key in ("x", "t", "y")))
    assert (out - tensors["output"]).norm() <= 1e-5 * tensors["output"].norm()


def test_plain_pixnerd_compiles_whole() -> None:
    """As one graph: the baseline must not lose to graph breaks."""
    plain = PlainPixNerd(PixNerdConfig(24, 1, 1, 2, patch_size=4, field_channels=8, num_classes=3))
    x, t, y = torch.randn(2, 3, 8, 12), torch.rand(2), torch.tensor([1, 2])
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, t, y), plain(x, t, y))


def test_evaluations() -> None:
    assert samplers.pixnerd_evaluations(interval=(-1, 2)) == (100, 0)
    guided, single = samplers.pixnerd_evaluations()
    times = torch.arange(100) / 100
    assert guided == int((times > 0.1 + 1e-6).sum())
    assert guided + single == 100
    assert samplers.pixnerd_evaluations("heun", 10, exact_heun=True) == (19, 0)
    first, second = samplers.rdm_evaluations()
    assert first == 511
    # rho = 100 is close to a geometric schedule: the share of log(0.9 / 0.008) in log(80 / 0.008).
    assert second == pytest.approx(2 * 200 * 0.513 - 1, rel=0.1)


def test_pixelflow_block_noise() -> None:
    """Blocks have mean 0, variance 1 and neighbours' covariance -1/3, so that a block's sum is 0."""
    assert pixelflow.blocks_per_image() == 3 * (32**2 + 64**2 + 128**2)
    torch.manual_seed(0)
    noise = pixelflow.draw_blocks(500)
    assert noise.sum(-1).abs().max() < 0.05
    spread = 5 * (2 / 500) ** 0.5  # five standard deviations of a sample variance
    assert torch.allclose(noise.T.cov(), torch.eye(4) * 4 / 3 - 1 / 3, atol=spread)


def test_pixelflow_takes_every_stage() -> None:
    """One network at each resolution, which it is told: another class, time or size changes the output."""
    torch.manual_seed(0)
    model = pixelflow.PixelFlow(depth=2, heads=2, size=16, classes=3).eval()
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([10.0, 10.0]), torch.tensor([0, 0])
    with torch.no_grad():
        out = model(x, t, y)
        assert out.shape == x.shape
        # Images do not mix.
        torch.testing.assert_close(out[:1], model(x[:1], t[:1], y[:1]), rtol=1e-4, atol=1e-5)
        for other in (model(x, t + 300, y), model(x, t, y + 1)):
            assert (out - other).abs().max() > 1e-4
        # The same network at another resolution.
        assert model(torch.randn(1, 3, 8, 8), t[:1], y[:1]).shape == (1, 3, 8, 8)
