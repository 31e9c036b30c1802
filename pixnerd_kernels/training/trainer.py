"""The state of a training run and one step of it."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from torch import Tensor

from pixnerd_kernels.diffusion import flow
from pixnerd_kernels.models import PixNerd
from pixnerd_kernels.nn import scaled_patch
from pixnerd_kernels.training import checkpoint
from pixnerd_kernels.training.data import Dataset
from pixnerd_kernels.training.muon import Muon
from pixnerd_kernels.training.settings import Settings


class Trainer:
    """A model, its average, its optimiser and its random numbers; equal settings and data give equal bits.

    A run that is saved, loaded and continued ends with the bits of an uninterrupted one, on the same machine
    and number of threads.

    Args:
        settings: what determines the run.
        dataset: as `settings.data` names it.
        device: where to train.

    Raises:
        ValueError: settings and data do not fit.
    """

    def __init__(self, settings: Settings, dataset: Dataset, device: torch.device | str = "cpu") -> None:
        channels, classes = settings.model.in_channels, settings.model.num_classes
        if dataset.images.shape[1:] != (channels, settings.size, settings.size):
            raise ValueError(
                f"data: expected images of {channels} x {settings.size} x {settings.size}, "
                f"got {list(dataset.images.shape[1:])}"
            )
        if len(dataset.classes) != classes:
            raise ValueError(f"data: expected {classes} classes, got {len(dataset.classes)}")
        self.settings = settings
        self.dataset = dataset
        self.digest = dataset.digest()
        self.device = torch.device(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = PixNerd(settings.model).to(self.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimisers = _optimisers(self.model, settings)
        self.generator = torch.Generator(self.device).manual_seed(settings.seed)
        self.losses: list[float] = []

    @property
    def steps_done(self) -> int:
        return len(self.losses)

    def step(self) -> float:
        """Train on one batch and return its loss.

        Raises:
            FloatingPointError: the loss is not finite; nothing was changed.
        """
        settings, step = self.settings, self.steps_done
        images, labels = self._batch(step)
        scale = self._draw_scale()
        size = self._size(scale)
        # Outside of autocast, which would round it.
        noise = flow.scale_noise(
            torch.randn(images.shape, generator=self.generator, device=self.device), size
        )
        targets = self._resized(images, size)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.autocast == "bf16"):
            loss = flow.loss(
                self.model,
                targets,
                labels,
                null=self.model.null_class,
                noise=noise,
                dropout=settings.class_dropout,
                shift=settings.timeshift,
                generator=self.generator,
                decoder_scale=(scale, scale),
            )
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss of step {step + 1} is {value}; try a lower learning rate")
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = settings.learning_rate_at(step)
            optimiser.step()
        with torch.no_grad():
            averages: list[Tensor] = list(self.ema.parameters())
            weights: list[Tensor] = list(self.model.parameters())
            torch._foreach_lerp_(averages, weights, 1 - settings.ema_at(step))
        self.losses.append(value)
        return value

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images in [-1, 1] and labels; every epoch is a permutation that its number and the seed determine."""
        count, size = len(self.dataset.labels), self.settings.batch_size
        chosen = torch.empty(0, dtype=torch.long, device="cpu")
        position = step * size
        while len(chosen) < size:
            epoch, offset = divmod(position + len(chosen), count)
            generator = torch.Generator().manual_seed(self.settings.seed + 1_000_003 * (epoch + 1))
            order = torch.randperm(count, generator=generator, device="cpu")
            chosen = torch.cat([chosen, order[offset : offset + size - len(chosen)]])
        images = self.dataset.images[chosen].to(self.device).float() / 127.5 - 1
        return images, self.dataset.labels[chosen].to(self.device)

    def _draw_scale(self) -> float:
        scales = self.settings.decoder_scales
        drawn = torch.randint(len(scales), (), generator=self.generator, device=self.device)
        return scales[int(drawn)]

    def _size(self, scale: float) -> int:
        """Pixels of an edge at this decoder scale."""
        patch = self.settings.model.patch_size
        return self.settings.size // patch * scaled_patch(patch, (scale, scale))[0]

    def _resized(self, images: Tensor, size: int) -> Tensor:
        """Targets; the transformer's nearest copy of them is the images themselves."""
        return images if size == self.settings.size else flow.scale_data(images, size).clamp(-1, 1)

    def save(self, path: str | Path) -> None:
        """Write everything that `load` needs; see `checkpoint.save`."""
        tensors = {f"ema.{name}": tensor for name, tensor in self.ema.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            tensors[f"model.{name}"] = parameter
            for optimiser in self.optimisers:
                for key, value in optimiser.state.get(parameter, {}).items():
                    tensors[f"optimiser.{name}.{key}"] = value
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        tensors["generator"] = self.generator.get_state()
        content = {
            "settings": self.settings.to_dict(),
            "steps_done": self.steps_done,
            "classes": list(self.dataset.classes),
            "data_digest": self.digest,
        }
        checkpoint.save(path, tensors, content)

    def load(self, path: str | Path) -> None:
        """Continue from a saved run of the same settings and data.

        Raises:
            FileNotFoundError, ValueError: no usable checkpoint, or one of another configuration; names every
                difference.
        """
        tensors, content = checkpoint.load(path)
        saved = Settings.from_dict(content["settings"])
        if differences := self.settings.differences(saved):
            raise ValueError(f"{path}: a run of another configuration: {'; '.join(differences)}")
        if content["data_digest"] != self.digest:
            raise ValueError(f"{path}: the images in {self.settings.data!r} have changed since it was saved")
        if tensors["generator"].shape != self.generator.get_state().shape:
            raise ValueError(
                f"{path}: its random numbers are those of another kind of device than {self.device.type}: it can go on "
                "where it began only"
            )
        self.model.load_state_dict(_group(tensors, "model."))
        self.ema.load_state_dict(_group(tensors, "ema."))
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimiser in self.optimisers:
            own = [parameter for group in optimiser.param_groups for parameter in group["params"]]
            state = {
                index: values
                for index, parameter in enumerate(own)
                if (values := _group(tensors, f"optimiser.{names[parameter]}."))
            }
            groups = optimiser.state_dict()["param_groups"]
            optimiser.load_state_dict({"state": state, "param_groups": groups})
        self.generator.set_state(tensors["generator"])
        self.losses = tensors["losses"].tolist()


def load_sampler(path: str | Path, device: torch.device | str = "cpu") -> tuple[PixNerd, Settings, list[str]]:
    """The averaged model of a training checkpoint, its settings, and the names of its classes.

    Raises:
        FileNotFoundError, ValueError: no usable checkpoint.
    """
    tensors, content = checkpoint.load(path, "ema.")
    settings = Settings.from_dict(content["settings"])
    with torch.device("meta"):
        model = PixNerd(settings.model)
    model.load_state_dict(tensors, assign=True)
    return model.to(device).requires_grad_(False), settings, content["classes"]


def _optimisers(model: PixNerd, settings: Settings) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the matrices between input and output and AdamW for the rest."""
    inner: list[Tensor] = []
    if settings.optimiser == "muon":
        outer = ("patch_embed.", "class_embed.", "decoder.embed.", "decoder.linear.")
        inner = [p for name, p in model.named_parameters() if p.ndim == 2 and not name.startswith(outer)]
    matrices = set(inner)
    rest = [p for p in model.parameters() if p not in matrices]
    adamw = torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=True)
    return [adamw, Muon(inner, lr=0.0, weight_decay=settings.weight_decay)] if inner else [adamw]


def _group(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
