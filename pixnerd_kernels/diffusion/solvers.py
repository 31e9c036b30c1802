"""Solvers that follow a velocity field from noise (t = 0) to data (t = 1).

Source: the samplers of the official PixNerd (EulerSampler, HeunSampler, AdamLMSampler).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pixnerd_kernels.checks import Problems, describe
from pixnerd_kernels.diffusion.flow import shift_time
from pixnerd_kernels.diffusion.graphs import CompiledVelocity, GraphedVelocity

SOLVERS = ("euler", "heun", "adams")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def sample(
    velocity: Velocity,
    noise: Tensor,
    condition: Tensor,
    uncondition: Tensor | None = None,
    *,
    solver: str = "euler",
    num_steps: int,
    order: int = 2,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    timeshift: float = 1.0,
    last_step: float | None = None,
    exact_heun: bool = False,
    span: tuple[int, int] | None = None,
    cuda_graph: bool = False,
    compile_mode: str | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw samples by integrating dx/dt = velocity(x, t, condition) over `time_steps`.

    Guided, the velocity is v(uncondition) + guidance * (v(condition) - v(uncondition)), both from one call
    with twice the batch. Where there is nothing to guide (guidance 1, or t outside the interval) only the
    condition is evaluated.

    Args:
        velocity: called with x [B, ...], t [B] and a condition of batch B (2B when guided); any callable that returns a
            tensor of x's shape.
        noise: [B, ...], x at t = 0, and the dtype of x at every step.
        condition, uncondition: [B, ...], of one shape where both are needed; uncondition may be None at guidance 1.
        solver: "euler"; "heun" (second order; from the second step on it takes the predictor's velocity from
            the step before, which halves the evaluations); "adams" (Adams-Bashforth on the uneven steps).
        num_steps: steps; also the evaluations, but 2 * num_steps - 1 for the exact Heun.
        order: Adams' order, 1 to 4, reached after as many steps.
        guidance_interval: guidance holds for low < t < high, open at both ends; Heun ignores it.
        timeshift: above 1 spends more steps near the noise, see `flow.shift_time`.
        last_step: length of the last step before the shift; None is 1 / num_steps. Every step must have some length in
            float32.
        exact_heun: evaluate the predictor's velocity anew in every step.
        span: (first, last) makes the steps first to last - 1 of the num_steps alone, from noise, which is then x at
            the first one's time, to the result, x at the last one's end; Adams and Heun start anew. None is all.
        cuda_graph: capture one evaluation as a CUDA graph (two where only some steps are guided), and replay it in
            every step; noise must be on a CUDA device.
        compile_mode: evaluate velocity through torch.compile in this mode, as one graph; "reduce-overhead" replays CUDA
            graphs on a GPU. Compiled once for each batch size; later calls with the same velocity find it there.
        on_step: called with the number of steps done (from 1; the steps before the span count) and x.

    Returns:
        x at t = 1 (the span's end), in noise's shape and dtype. No gradients are recorded.

    Raises:
        TypeError, ValueError: every problem with the arguments at once.
    """
    _check(
        velocity, noise, condition, uncondition, solver, num_steps, order, guidance, guidance_interval, timeshift,
        last_step, span, cuda_graph, compile_mode, on_step,
    )  # fmt: skip
    if compile_mode is not None:
        velocity = CompiledVelocity(velocity, compile_mode)
    if cuda_graph:
        velocity = GraphedVelocity(velocity)
    first, last = (0, num_steps) if span is None else span
    times = time_steps(num_steps, timeshift=timeshift, last_step=last_step)[first : last + 1]
    low, high = guidance_interval
    inside = ((times > low) & (times < high)).tolist()
    always = solver == "heun"

    def field(x: Tensor, index: int) -> Tensor:
        t = times[index].to(noise.device, torch.promote_types(noise.dtype, torch.float32))
        if guidance == 1 or uncondition is None or not (inside[index] or always):
            return evaluate(x, t, condition)
        both = torch.cat([uncondition, condition])
        without, with_ = evaluate(torch.cat([x, x]), t, both).chunk(2)
        return without + guidance * (with_ - without)

    def evaluate(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        v = velocity(x, t.expand(len(x)), condition)
        if not isinstance(v, Tensor) or v.shape != x.shape:
            raise ValueError(
                f"sample: velocity: expected a result of x's shape {list(x.shape)}, got {describe(v)}"
            )
        return v

    if solver == "euler":
        steps = _adams(field, noise, times, 1)
    elif solver == "adams":
        steps = _adams(field, noise, times, order)
    else:
        steps = _heun(field, noise, times, exact_heun)
    x = noise
    for done, x in enumerate(steps, start=first + 1):
        if on_step is not None:
            on_step(done, x)
    return x


def time_steps(num_steps: int, *, timeshift: float = 1.0, last_step: float | None = None) -> Tensor:
    """The num_steps + 1 times from 0 to 1, float32: even up to 1 - last_step, then shifted.

    Raises:
        TypeError, ValueError: num_steps is no integer of at least 1.
    """
    problems = Problems("time_steps")
    problems.count("num_steps", num_steps)
    problems.raise_if_any()
    if last_step is None or num_steps == 1:
        last_step = 1 / num_steps
    even = torch.cat([torch.linspace(0, 1 - last_step, num_steps), torch.ones(1)])
    return shift_time(even, timeshift)


def adams_weights(times: Tensor, order: int) -> Tensor:
    """Weights of the velocities at the last `order` of times[:-1] for their mean over times[-2] to times[-1].

    They integrate the polynomial through those velocities exactly: sum_j w_j u_j^m = mean of u^m for m <
    order, with u the time in units of the step.
    """
    nodes = times[-1 - order : -1].double()
    step = times[-1].double() - nodes[-1]
    powers = torch.arange(order, dtype=torch.float64)
    moments = 1 / (powers + 1)
    return torch.linalg.solve(((nodes - nodes[-1]) / step) ** powers[:, None], moments)


def _adams(field: Callable[[Tensor, int], Tensor], x: Tensor, times: Tensor, order: int) -> Iterator[Tensor]:
    """Adams-Bashforth; order 1 is Euler."""
    lengths = times.diff().tolist()
    velocities: list[Tensor] = []
    for index, length in enumerate(lengths):
        velocities = [*velocities[1 - order :], field(x, index)] if order > 1 else [field(x, index)]
        weights = adams_weights(times[: index + 2], len(velocities)).tolist()
        there = x
        for weight, v in zip(weights, velocities, strict=True):
            there = there + (weight * length) * v
        x = there.to(x.dtype)  # rounded once a step
        yield x


def _heun(field: Callable[[Tensor, int], Tensor], x: Tensor, times: Tensor, exact: bool) -> Iterator[Tensor]:
    lengths = times.diff().tolist()
    ahead: Tensor | None = None
    for index, length in enumerate(lengths):
        v = field(x, index) if ahead is None or exact else ahead
        if index + 1 < len(lengths):
            ahead = field((x + length * v).to(x.dtype), index + 1)
            v = (v + ahead) / 2
        x = (x + length * v).to(x.dtype)
        yield x


def _check(
    velocity: Velocity,
    noise: Tensor,
    condition: Tensor,
    uncondition: Tensor | None,
    solver: str,
    num_steps: int,
    order: int,
    guidance: float,
    guidance_interval: tuple[float, float],
    timeshift: float,
    last_step: float | None,
    span: tuple[int, int] | None,
    cuda_graph: bool,
    compile_mode: str | None,
    on_step: Callable[[int, Tensor], None] | None,
) -> None:
    problems = Problems("sample")
    for name, function in (("velocity", velocity), ("on_step", on_step)):
        if not callable(function) and not (name == "on_step" and function is None):
            problems.add_type(name, "a function", function)
    problems.choice("solver", solver, SOLVERS)
    if compile_mode is not None:
        problems.choice("compile_mode", compile_mode, COMPILE_MODES)
        if cuda_graph:
            problems.add("cuda_graph", "False where compile_mode is given", cuda_graph)
    counted = problems.count("num_steps", num_steps)
    if span is not None:
        whole = isinstance(span, tuple) and len(span) == 2 and all(isinstance(step, int) for step in span)
        if not whole:
            problems.add_type("span", "a pair of integers (first, last)", span)
        elif counted and not 0 <= span[0] <= span[1] <= num_steps:
            problems.add("span", f"0 <= first <= last <= num_steps = {num_steps}", span)
    if problems.count("order", order) and order > 4:
        problems.add("order", "at most 4", order)
    problems.number("guidance", guidance, minimum=-1e300)
    if not isinstance(guidance_interval, (tuple, list)) or len(guidance_interval) != 2:
        problems.add_type("guidance_interval", "a pair of times (low, high)", guidance_interval)
    else:
        numbers = [
            problems.number("guidance_interval", time, -math.inf, math.inf) for time in guidance_interval
        ]
        if all(numbers) and guidance_interval[0] > guidance_interval[1]:
            problems.add("guidance_interval", "low not above high", guidance_interval)
    _check_steps(problems, num_steps if counted else 1, timeshift, last_step)
    if not isinstance(noise, Tensor) or not noise.is_floating_point() or noise.dim() == 0:
        problems.add_type("noise", "a floating tensor [B, ...]", noise)
    else:
        if cuda_graph and noise.device.type != "cuda":
            problems.add("cuda_graph", f"noise on a CUDA device, which is on {noise.device}", cuda_graph)
        for name, value in (("condition", condition), ("uncondition", uncondition)):
            if value is None and name == "uncondition" and guidance == 1:
                continue
            if not isinstance(value, Tensor) or value.shape[:1] != noise.shape[:1]:
                problems.add(name, f"a tensor with batch {noise.shape[0]}", value)
            elif guidance != 1 and isinstance(condition, Tensor) and value.shape != condition.shape:
                problems.add(name, f"the shape of condition {list(condition.shape)}", value)
    problems.raise_if_any()


def _check_steps(problems: Problems, num_steps: int, timeshift: float, last_step: float | None) -> None:
    """Both are numbers that leave no step without length."""
    before = len(problems.lines)
    if problems.number("timeshift", timeshift) and timeshift == 0:
        problems.add("timeshift", "more than 0", timeshift)
    if last_step is not None and problems.number("last_step", last_step) and not 0 < last_step <= 1:
        problems.add("last_step", "more than 0 and at most 1", last_step)
    if len(problems.lines) > before:
        return
    if not (time_steps(num_steps, timeshift=timeshift, last_step=last_step).diff() > 0).all():
        at_fault: list[tuple[str, object]] = [("timeshift", timeshift)] if timeshift != 1 else []
        at_fault += [("last_step", last_step)] if last_step is not None else []
        for name, value in at_fault or [("num_steps", num_steps)]:
            problems.add(name, f"values that leave each of {num_steps} steps some length in float32", value)
