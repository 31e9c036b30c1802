"""The CUDA-graph sampler, with capture and replay played by Python, and the compiled one: what is copied when."""

import pytest
import torch

from pixnerd_kernels.diffusion import graphs, sample
from pixnerd_kernels.models import PixNerd, PixNerdConfig

CONFIG = PixNerdConfig(32, 2, 1, 1, 8, 2, patch_size=4, in_channels=1, num_classes=3, max_freqs=3)


@pytest.fixture
def captures(monkeypatch):
    """What a graph does: it keeps the addresses of one call, and overwrites the same output at every replay."""
    made = []

    def capture(function):
        output = torch.full_like(function(), torch.nan)
        made.append(0)
        index = len(made) - 1

        def replay():
            made[index] += 1
            output.copy_(function())

        return output, replay

    monkeypatch.setattr(graphs, "capture", capture)
    # The check of the device is what is being played around.
    check = "pixnerd_kernels.diffusion.solvers._check"
    monkeypatch.setattr(check, lambda *args: None)
    return made


@pytest.mark.parametrize(
    ("options", "replays"),
    [
        ({"solver": "euler", "num_steps": 3}, [3]),
        ({"solver": "adams", "order": 3, "num_steps": 5, "guidance": 2.0}, [1, 4]),
        ({"solver": "heun", "num_steps": 3, "guidance": 2.0}, [3]),
    ],
    ids=["euler", "adams, unguided at t = 0", "heun"],
)
def test_replays_draw_what_calls_draw(captures, options, replays):
    torch.manual_seed(0)
    model = PixNerd(CONFIG)
    torch.nn.init.normal_(model.decoder.linear.weight)
    noise, y, null = torch.randn(2, 1, 8, 8), torch.tensor([0, 1]), torch.tensor([3, 3])
    expected = sample(model, noise, y, null, **options)
    before = noise.clone()
    assert torch.equal(sample(model, noise, y, null, cuda_graph=True, **options), expected)
    assert captures == replays
    assert torch.equal(noise, before)


def test_a_cpu_is_refused():
    noise, y = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    with pytest.raises(
        ValueError, match="cuda_graph: expected noise on a CUDA device, which is on cpu, got True"
    ):
        sample(PixNerd(CONFIG), noise, y, num_steps=2, cuda_graph=True)


def test_a_compiled_velocity_draws_the_same(monkeypatch):
    """Through inductor, in one graph; a second drawing compiles nothing."""
    torch.manual_seed(0)
    model = PixNerd(CONFIG)
    torch.nn.init.normal_(model.decoder.linear.weight)
    noise, y, null = torch.randn(2, 1, 8, 8), torch.tensor([0, 1]), torch.tensor([3, 3])
    options = {"solver": "adams", "num_steps": 4, "guidance": 2.0}
    expected = sample(model, noise, y, null, **options)
    torch.compiler.reset()
    out = sample(model, noise, y, null, compile_mode="default", **options)
    assert (out - expected).norm() <= 1e-5 * expected.norm()
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(sample(model, noise, y, null, compile_mode="default", **options), out)
    torch.compiler.reset()


def test_results_of_a_compiled_velocity_are_kept(monkeypatch):
    """Adams needs the velocities of earlier steps; a CUDA graph's output is overwritten by the next call."""
    output = torch.zeros(2, 1, 8, 8)

    def compile(velocity, **options):
        assert options == {"mode": "reduce-overhead", "fullgraph": True, "dynamic": False}
        return lambda *arguments: output.copy_(velocity(*arguments))

    monkeypatch.setattr(torch, "compile", compile)
    noise, y = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    options = {"solver": "adams", "order": 3, "num_steps": 5}

    def velocity(x, t, condition):
        return x * (1 + t).view(-1, 1, 1, 1) + condition.view(-1, 1, 1, 1)

    expected = sample(velocity, noise, y, **options)
    assert torch.equal(sample(velocity, noise, y, compile_mode="reduce-overhead", **options), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile_mode": "fast"}, "compile_mode: expected one of 'default', 'reduce-overhead'.*got 'fast'"),
        (
            {"compile_mode": "default", "cuda_graph": True},
            "cuda_graph: expected False where compile_mode is given",
        ),
    ],
)
def test_modes_that_cannot_be(options, message):
    noise, y = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=message):
        sample(PixNerd(CONFIG), noise, y, num_steps=2, **options)


def test_any_number_of_shapes_is_compiled(monkeypatch):
    """torch gives up at the ninth otherwise; and the user's own limit stays."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, **options: compile_(f, backend="eager", **options))
    torch.compiler.reset()
    before = torch._dynamo.config.cache_size_limit
    velocity = graphs.CompiledVelocity(lambda x, t, y: x * t[:, None] + y[:, None], "default")
    for batch in range(1, 12):
        x, t, y = torch.randn(batch, 3), torch.rand(batch), torch.rand(batch)
        torch.testing.assert_close(velocity(x, t, y), x * t[:, None] + y[:, None])
    assert torch._dynamo.config.cache_size_limit == before
