"""The solvers against the official samplers, how often they call the model, their order of convergence."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pixnerd_kernels.diffusion import sample
from pixnerd_kernels.diffusion.solvers import adams_weights, time_steps

GOLDEN = Path(__file__).parents[1] / "data" / "samplers.safetensors"
with safe_open(GOLDEN, "pt") as _file:
    CASES = json.loads(_file.metadata()["cases"])
    TENSORS = {key: _file.get_tensor(key) for key in _file.keys()}  # noqa: SIM118


def velocity(x, t, condition):
    t, condition = t.view(-1, 1, 1, 1), condition.view(-1, 1, 1, 1)
    return x * torch.cos(3 * t) + torch.sin(condition * (1 + t)) + 0.1 * x**2 / (1 + x**2)


def arguments(case):
    """Our names for the golden case's arguments."""
    case = dict(case)
    case["solver"] = {"adam": "adams"}.get(case["solver"], case["solver"])
    low, high = case.pop("guidance_interval_min", 0.0), case.pop("guidance_interval_max", 1.0)
    return {
        **{("exact_heun" if key == "exact_henu" else key): value for key, value in case.items()},
        "guidance_interval": (low, high),
    }


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_official_sampler(name):
    case = arguments(CASES[name])
    drawn = sample(velocity, TENSORS["noise"], TENSORS["cond"], TENSORS["uncond"], **case)
    expected = TENSORS[f"{name}.x"]
    assert (drawn - expected).norm() / expected.norm() < 1e-5
    times = time_steps(case["num_steps"], timeshift=case.get("timeshift", 1), last_step=case.get("last_step"))
    torch.testing.assert_close(times, TENSORS[f"{name}.timesteps"], rtol=0, atol=1e-6)


class Counter:
    """Counts the model's calls and the rows that it saw."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, condition):
        assert x.shape[0] == t.shape[0] == condition.shape[0]
        self.calls.append(x.shape[0])
        return velocity(x, t, condition)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"guidance": 1.0}, [2] * 10),
        ({"guidance": 2.0}, [2] + [4] * 9),  # the interval is open: t = 0 is not guided
        ({"guidance": 2.0, "guidance_interval": (0.25, 0.55)}, [2] * 3 + [4] * 3 + [2] * 4),
        (
            {"guidance": 2.0, "solver": "adams", "guidance_interval": (0.25, 0.55)},
            [2] * 3 + [4] * 3 + [2] * 4,
        ),
        ({"guidance": 2.0, "solver": "heun", "guidance_interval": (0.25, 0.55)}, [4] * 10),
        ({"guidance": 2.0, "solver": "heun", "exact_heun": True}, [4] * 19),
        ({"guidance": 1.0, "solver": "heun"}, [2] * 10),
    ],
)
def test_the_model_is_called_no_more_than_needed(options, rows):
    counter = Counter()
    sample(counter, TENSORS["noise"], TENSORS["cond"], TENSORS["uncond"], num_steps=10, **options)
    assert counter.calls == rows


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({"solver": "euler"}, 1),
        ({"solver": "heun", "exact_heun": True}, 2),
        ({"solver": "adams", "order": 2}, 2),
        ({"solver": "adams", "order": 3}, 2),  # the low order of its first steps remains
    ],
)
def test_the_error_falls_with_the_order(options, order):
    """On dx/dt = -3 x cos(t), whose solution is exp(-3 sin t)."""

    def field(x, t, condition):
        return -3 * x * torch.cos(t.view(-1, 1))

    start = torch.ones(1, 1, dtype=torch.float64)
    exact = torch.exp(-3 * torch.sin(torch.tensor(1.0, dtype=torch.float64)))
    errors = [
        abs(sample(field, start, torch.zeros(1), num_steps=steps, **options).item() - exact)
        for steps in (80, 160)
    ]
    # Heun's last step is an Euler step, whose single error is of second order.
    assert errors[0] / errors[1] > 0.85 * 2**order


def test_adams_weights_integrate_polynomials_exactly():
    times = torch.tensor([0.0, 0.1, 0.35, 0.5, 0.9], dtype=torch.float64)
    for order in range(1, 5):
        weights = adams_weights(times, order)
        for power in range(order):
            nodes = times[-1 - order : -1]
            mean = (
                (times[-1] ** (power + 1) - times[-2] ** (power + 1)) / (power + 1) / (times[-1] - times[-2])
            )
            torch.testing.assert_close((weights * nodes**power).sum(), mean)


def test_steps_are_reported_and_noise_is_left_alone():
    noise = TENSORS["noise"].clone()
    seen = []
    drawn = sample(
        velocity, noise, TENSORS["cond"], num_steps=4, on_step=lambda step, x: seen.append((step, x.clone()))
    )
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert torch.equal(seen[-1][1], drawn)
    assert torch.equal(noise, TENSORS["noise"])
    parameter = torch.ones(1, requires_grad=True)
    assert not sample(lambda x, t, c: x * parameter, noise, TENSORS["cond"], num_steps=1).requires_grad


@pytest.mark.parametrize("solver", ["euler", "heun", "adams"])
def test_spans_make_the_whole_way(solver):
    """Euler in two parts is Euler; the others start anew and still converge to the same place."""
    noise, condition, n = TENSORS["noise"].double(), TENSORS["cond"].double(), 200
    whole = sample(velocity, noise, condition, solver=solver, num_steps=n, timeshift=2.0)
    seen = []
    options = {
        "solver": solver,
        "num_steps": n,
        "timeshift": 2.0,
        "on_step": lambda step, _: seen.append(step),
    }
    middle = sample(velocity, noise, condition, span=(0, 70), **options)
    end = sample(velocity, middle, condition, span=(70, n), **options)
    assert seen == list(range(1, n + 1))
    torch.testing.assert_close(end, whole, rtol=0, atol=1e-12 if solver == "euler" else 1e-3)
    assert not torch.allclose(middle, whole, atol=1e-2)
    assert torch.equal(sample(velocity, noise, condition, span=(3, 3), **options), noise)


def test_bad_arguments_are_named_together():
    noise, condition = TENSORS["noise"], TENSORS["cond"]
    with pytest.raises(ValueError, match=r"solver: .*num_steps: .*order: .*timeshift: .*last_step: "):
        sample(velocity, noise, condition, solver="rk4", num_steps=0, order=5, timeshift=0, last_step=2.0)
    with pytest.raises(ValueError, match="uncondition: expected a tensor with batch 2"):
        sample(velocity, noise, condition, num_steps=2, guidance=2.0)
    with pytest.raises(ValueError, match="condition: expected a tensor with batch 2"):
        sample(velocity, noise, condition[:1], num_steps=2)
    with pytest.raises(ValueError, match=r"span: expected 0 <= first <= last <= num_steps = 2, got \(1, 3\)"):
        sample(velocity, noise, condition, num_steps=2, span=(1, 3))
    with pytest.raises(TypeError, match=r"span: expected a pair of integers"):
        sample(velocity, noise, condition, num_steps=2, span=(0, 1.5))


@pytest.mark.parametrize("solver", ["euler", "heun", "adams"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_x_keeps_the_dtype_of_noise(solver, dtype):
    """Whatever the velocity's, in every step: a model takes x in its weights' dtype."""
    seen = []

    def wide(x, t, condition):
        seen.append(x.dtype)
        return velocity(x.double(), t.double(), condition)

    out = sample(wide, TENSORS["noise"].to(dtype), TENSORS["cond"], solver=solver, num_steps=3)
    assert {out.dtype, *seen} == {dtype}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"velocity": None}, "velocity: expected a function"),
        ({"on_step": 3}, "on_step: expected a function"),
        ({"guidance": -float("inf")}, "guidance: expected a finite number"),
        ({"guidance_interval": 0.5}, "guidance_interval: expected a pair of times"),
        ({"guidance_interval": ("a", 1)}, "guidance_interval: expected a number"),
        ({"guidance_interval": (1, 0)}, "guidance_interval: expected low not above high"),
        ({"guidance_interval": (0, float("nan"))}, "guidance_interval: expected a number from -inf to inf"),
        ({"last_step": "x"}, "last_step: expected a number"),
        ({"last_step": 1e-9}, "last_step: expected values that leave each of 4 steps some length"),
        ({"last_step": 1e-9}, "^sample: last_step: [^;]*$"),
        ({"num_steps": 20_000_000}, "^sample: num_steps: expected values that leave each"),
        ({"last_step": 1.0}, "last_step: expected values that leave each of 4 steps some length"),
        ({"timeshift": 1e39}, "timeshift: expected values that leave each of 4 steps some length"),
        ({"timeshift": 1e-300}, "timeshift: expected values that leave each of 4 steps some length"),
        (
            {"guidance": 2.0, "uncondition": TENSORS["cond"][..., None]},
            "uncondition: expected the shape of condition",
        ),
        ({"velocity": lambda x, t, c: x[:, :1]}, "velocity: expected a result of x's shape"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_a_nonsensical_argument_is_named(arguments, message):
    given = {"velocity": velocity, "noise": TENSORS["noise"], "condition": TENSORS["cond"], "num_steps": 4}
    with pytest.raises((TypeError, ValueError), match=message):
        sample(**given | arguments)


def test_an_interval_may_be_open():
    """Guidance at every time."""
    noise, condition = TENSORS["noise"], TENSORS["cond"]
    given = {"noise": noise, "condition": condition, "uncondition": condition + 1, "num_steps": 4}
    out = sample(velocity, **given, guidance=2.0, guidance_interval=(-float("inf"), float("inf")))
    assert torch.equal(out, sample(velocity, **given, guidance=2.0, guidance_interval=(-1.0, 2.0)))


@pytest.mark.parametrize("count", [0, 1.5, None])
def test_a_number_of_steps_is_named(count):
    with pytest.raises((TypeError, ValueError), match="num_steps: expected an integer"):
        time_steps(count)
