"""Muon: momentum whose update of a matrix is orthogonalised."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is replaced by the nearest matrix with equal singular values.

        m <- momentum * m + g
        p <- (1 - lr * weight_decay) p - lr * 0.2 * sqrt(max(rows, columns)) * orthogonalise(g + momentum * m)

    The factor gives an update the root mean square of AdamW's, so the two share a learning rate. Reaches the
    loss of AdamW in about half the steps here; `torch.optim.Muon` is the same method in bfloat16, which is
    slow on processors without such instructions, and needs torch 2.9.

    Args:
        params: matrices of floating dtype.
        lr: learning rate.
        momentum: decay of the momentum.
        weight_decay: decoupled, as AdamW's.

    Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the factor is
    from "Muon is scalable for LLM training" (arXiv 2502.16982).
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        if any(p.ndim != 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("params: expected matrices")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[tuple(p.shape)].append(p)
            for shape, params in alike.items():
                updates = []
                for p in params:
                    assert p.grad is not None
                    state = self.state[p]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].mul_(group["momentum"]).add_(p.grad)
                    updates.append(p.grad.add(state["momentum"], alpha=group["momentum"]))
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                for p, update in zip(params, orthogonalise(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=rate)


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """About U Vᵀ of each matrix g = U S Vᵀ in [n, rows, columns]: singular values of 0.7 to 1.2.

    A quintic Newton-Schulz iteration whose coefficients trade exactness for few steps.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[1] > g.shape[2]
    x = g.mT if tall else g
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
