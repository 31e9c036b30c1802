"""PixNerd's two halves, the transformer and the pixel head, as calls of their own: the plain model's and ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines.pixnerd import PlainPixNerd
from pixnerd_kernels.models import PixNerd


class _Passing(nn.Module):
    """Stands in for the head: keeps what it is given and returns the hidden states."""

    def forward(self, image: Tensor, hidden: Tensor, *rest: Any) -> Tensor:
        self.given = (image, hidden, *rest)
        return hidden


def halves(
    model: PixNerd, plain: PlainPixNerd, x: Tensor, t: Tensor, y: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """Calls "transformer, eager", "head, eager", "transformer, ours" and "head, ours" without gradients.

    Both models have the same weights. The transformer is the model with its head taken out, so everything is in one
    half or the other.
    """
    head, passing = model.decoder, _Passing()
    body = copy.copy(model)
    body.__dict__["_modules"] = {**model._modules, "decoder": passing}
    with torch.no_grad():
        states = body(x, t, y)
    given = passing.given
    calls: dict[str, Callable[[], Tensor]] = {
        "transformer, eager": lambda: plain.transformer(x, t, y),
        "head, eager": lambda: plain.head(x, states),
        "transformer, ours": lambda: body(x, t, y),
        "head, ours": lambda: head(*given),
    }
    return {name: torch.no_grad()(call) for name, call in calls.items()}
