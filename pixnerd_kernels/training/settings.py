"""What determines a training run, to the bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from pixnerd_kernels.checks import Problems
from pixnerd_kernels.models import PixNerdConfig


@dataclass(frozen=True)
class Settings:
    """Everything that changes the weights that a run ends with, apart from the images themselves.

    Attributes:
        data: the source given to `load_dataset`.
        size: pixels of an edge of the (square) images.
        model: sizes of the model.
        steps: optimiser steps of the whole run.
        batch_size: images of a step.
        optimiser: "muon" (for the matrices between input and output, AdamW for the rest) or "adamw".
        learning_rate: the optimiser's peak rate, reached linearly over `warmup` steps and brought to zero over the
            last `cooldown` (a share of the steps) along a cosine.
        weight_decay: decoupled, of every parameter.
        ema: decay of the averaged weights per step; lower at first, (1 + step) / (10 + step).
        clip: largest norm of the gradients.
        class_dropout: probability of training an image without its class.
        timeshift: above 1 trains more at noisy times.
        decoder_scales: each batch is decoded at one of these scales, 1 or more, drawn evenly; targets
            are enlarged bicubically.
        autocast: "off" or "bf16".
        seed: of the weights, the order of the images, and the noise.

    Raises:
        TypeError, ValueError: every problem at once.
    """

    data: str
    size: int
    model: PixNerdConfig
    steps: int = 1500
    batch_size: int = 48
    optimiser: str = "muon"
    learning_rate: float = 3e-3
    warmup: int = 100
    cooldown: float = 0.6
    weight_decay: float = 0.0
    ema: float = 0.998
    clip: float = 1.0
    class_dropout: float = 0.1
    timeshift: float = 1.0
    decoder_scales: tuple[float, ...] = (1.0, 1.0, 2.0)
    autocast: str = "off"
    seed: int = 0

    def __post_init__(self) -> None:
        problems = Problems("training settings")
        for name in ("steps", "batch_size"):
            problems.count(name, getattr(self, name))
        for name in ("warmup", "seed"):
            problems.count(name, getattr(self, name), minimum=0)
        for name in ("learning_rate", "weight_decay", "clip", "timeshift"):
            problems.number(name, getattr(self, name))
        for name in ("ema", "class_dropout", "cooldown"):
            if not 0 <= getattr(self, name) <= 1:
                problems.add(name, "a number from 0 to 1", getattr(self, name))
        problems.choice("optimiser", self.optimiser, ("muon", "adamw"))
        problems.choice("autocast", self.autocast, ("off", "bf16"))
        patch = self.model.patch_size
        if problems.count("size", self.size) and self.size % patch:
            problems.add("size", f"a multiple of the patch size {patch}", self.size)
        if not self.decoder_scales:
            problems.add("decoder_scales", "at least one scale", self.decoder_scales)
        for scale in self.decoder_scales:
            problems.number("decoder_scales", scale, minimum=1)
        problems.raise_if_any()

    def learning_rate_at(self, step: int) -> float:
        """The rate of step number `step`, counted from 0."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        length = self.cooldown * self.steps
        left = self.steps - step
        cool = 0.5 - 0.5 * math.cos(math.pi * left / length) if left < length else 1.0
        return self.learning_rate * warm * cool

    def ema_at(self, step: int) -> float:
        """The averaged weights' decay at step number `step`, counted from 0."""
        return min(self.ema, (1 + step) / (10 + step))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """The inverse of `to_dict`."""
        model = PixNerdConfig(**values["model"])
        return cls(**{**values, "model": model, "decoder_scales": tuple(values["decoder_scales"])})

    def differences(self, run: Settings) -> list[str]:
        """What differs from a saved run's, a phrase for each setting: "steps is 100, the run has 200"."""
        mine, theirs = self._flat(), run._flat()
        return [
            f"{name} is {mine[name]!r}, the run has {theirs[name]!r}"
            for name in mine
            if mine[name] != theirs[name]
        ]

    def _flat(self) -> dict[str, Any]:
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "model"}
        return {**own, **{f"model.{name}": value for name, value in asdict(self.model).items()}}
