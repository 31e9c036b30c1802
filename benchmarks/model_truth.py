"""What the whole model's providers are held against on a GPU."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]

#: Numbers of each gradient that are compared.
_COMPARED = 4096


class Run(Protocol):
    """A setting, and how a provider's gradients are taken there: `benchmarks.model_gpu.Bench`."""

    setting: Any
    training: bool

    def gradients(self, forward: Forward) -> tuple[Tensor, ...]: ...


class Truth:
    """The plain model's results in float64, and the error that plain PyTorch's own dtype makes.

    Of a forward two images are compared, the batch's first and last; of a training step the first numbers of every
    gradient, each parameter's by itself. float64 takes the batch in small parts.

    Attributes:
        allowed: of a forward, its relative error by the house rule. Of a training step 1, the bound that the rule sets
            for each parameter, of which `error` tells the largest fraction.
    """

    def __init__(self, bench: Run) -> None:
        setting = self.setting = bench.setting
        self.bench = bench
        batch = len(setting.x)
        self.images = sorted({0, batch - 1})
        exact = copy.deepcopy(setting.plain).double()
        if bench.training:
            self.exact = self._gradients(exact, min(2, batch))
            plain, part = None, batch
            while plain is None:
                try:
                    plain = self._gradients(setting.plain, part)
                except torch.OutOfMemoryError:
                    part //= 2
                    if not part:
                        raise
        else:
            images = self.images
            x, t, y = setting.x[images], setting.t[images], setting.y[images]
            self.exact = [exact(x.double(), t.double(), y)]
            plain = [setting.plain(x, t, y)]
        del exact
        clean()
        eps = torch.finfo(setting.x.dtype).eps
        self.norms = [each.norm().item() for each in self.exact]
        self.bounds = [
            2 * error + 4 * eps * norm for error, norm in zip(self._errors(plain), self.norms, strict=True)
        ]
        self.allowed = 1.0 if bench.training else self.bounds[0] / self.norms[0]

    def error(self, forward: Forward) -> float:
        """Of a provider on the whole batch, to be held against `allowed`; not finite where its results are not."""
        setting = self.setting
        if not self.bench.training:
            (error,) = self._errors([forward(setting.x, setting.t, setting.y)[self.images]])
            return error / self.norms[0]
        errors = self._errors([_head(g) for g in self.bench.gradients(forward)])
        # A gradient that is zero in float64 has to be zero.
        parts = [
            e / b if b else (0.0 if not e else math.inf) for e, b in zip(errors, self.bounds, strict=True)
        ]
        return max(parts, key=lambda part: math.inf if math.isnan(part) else part)

    def _gradients(self, model: nn.Module, part: int) -> list[Tensor]:
        setting = self.setting
        total: list[Tensor] = []
        named = dict(model.named_parameters())
        parameters = [named[name] for name in setting.parameters]
        dtype = parameters[0].dtype
        for at in range(0, len(setting.x), part):
            x, target = (v[at : at + part].to(dtype) for v in (setting.x, setting.target))
            t = setting.t[at : at + part].to(torch.promote_types(dtype, setting.t.dtype))
            difference = model(x, t, setting.y[at : at + part]) - target
            loss = difference.square().sum() / setting.x.numel()
            found = [_head(g) for g in torch.autograd.grad(loss, parameters)]
            total = [a + b for a, b in zip(total, found, strict=True)] if total else found
        return total

    def _errors(self, found: Sequence[Tensor]) -> list[float]:
        """||found - exact|| of each tensor."""
        return [(out.double() - exact).norm().item() for out, exact in zip(found, self.exact, strict=True)]


def _head(gradient: Tensor) -> Tensor:
    """A copy, so that the rest is not kept."""
    return gradient.flatten()[:_COMPARED].double().clone()


def clean() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    with contextlib.suppress(RuntimeError):  # after an illegal access every call to CUDA raises
        torch.cuda.empty_cache()
