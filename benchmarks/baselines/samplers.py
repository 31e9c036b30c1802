"""How many network evaluations an image takes with each model's default sampler.

Counted by running the schedule or the sampler, so that no number has to be believed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pixnerd_kernels.diffusion import sample


def pixnerd_evaluations(
    solver: str = "euler",
    num_steps: int = 100,
    guidance: float = 3.5,
    interval: tuple[float, float] = (0.1, 1.0),
    order: int = 2,
    exact_heun: bool = False,
) -> tuple[int, int]:
    """(calls with guidance, calls without) of the package's own sampler; a guided call has twice the batch."""
    batches: list[int] = []

    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        batches.append(len(x))
        return x

    one = torch.zeros(1, dtype=torch.long)
    sample(
        velocity, torch.zeros(1, 1), one, one, solver=solver, num_steps=num_steps, order=order,
        guidance=guidance, guidance_interval=interval, exact_heun=exact_heun,
    )  # fmt: skip
    return batches.count(2), batches.count(1)


def edm_steps(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Noise levels of EDM's schedule (arXiv 2206.00364, equation 5), from sigma_max down to sigma_min."""
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


def second_order_evaluations(steps: int) -> int:
    """Heun's method: two evaluations a step, but one in the last, which goes to sigma 0."""
    return 2 * steps - 1


def rdm_evaluations() -> tuple[int, int]:
    """Calls of Relay Diffusion's two networks on ImageNet: 256 steps, and 200 from which those above
    sigma 0.9 are cut off. The second stage's calls are guided: two forwards each."""
    second = edm_steps(200, sigma_min=0.008, sigma_max=80, rho=100)
    return second_order_evaluations(256), second_order_evaluations(int((second < 0.9).sum()))
