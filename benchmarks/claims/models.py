"""The models of the comparison as samplers: which networks they run, how often, and what the paper says.

A *step* is one evaluation of the velocity (or noise) that the solver asks for, guidance included.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.baselines import samplers
from benchmarks.baselines.networks import NETWORKS

#: Steps per image in the paper's Table 1, by its seconds per image over its seconds per step (PixelFlow's is 120).
EQUAL_STEPS = 50


@dataclass(frozen=True)
class Stage:
    """`evaluations` times the networks in turn; each entry is a network and the images that it is given."""

    networks: tuple[tuple[str, int], ...]
    evaluations: int


@dataclass(frozen=True)
class Paper:
    """A row of the paper's Table 1 (arXiv 2507.23268): torch.compile; GPU and batch are not stated."""

    image_s: float
    step_s: float
    inference_gb: float


@dataclass(frozen=True)
class Model:
    """A model at its default sampler.

    Attributes:
        stages: run one after the other. guided: the stages that a step is taken from; all, unless given.
        once: networks that run once an image.
        noise_blocks: blocks of noise that PixelFlow's sampler draws one by one.
        sampler: the default sampler in words.
    """

    label: str
    stages: tuple[Stage, ...]
    sampler: str
    paper: Paper | None = None
    once: tuple[str, ...] = ()
    noise_blocks: int = 0
    note: str = ""
    guided: tuple[Stage, ...] = field(default=())

    def networks(self) -> list[str]:
        """Every network that has to be in memory."""
        names = [name for stage in self.stages for name, _ in stage.networks]
        return list(dict.fromkeys([*names, *self.once]))

    def step_stages(self) -> tuple[Stage, ...]:
        return self.guided or self.stages


def _models() -> dict[str, Model]:
    from benchmarks.baselines.pixelflow import STAGES, blocks_per_image

    papers = {"PixNerd-L/16": Paper(0.51, 0.010, 2.1), "PixNerd-XL/16": Paper(0.65, 0.012, 3.1)}
    guided, single = samplers.pixnerd_evaluations()
    models = {}
    for name, paper in papers.items():
        both = Stage(((name, 2),), guided)
        models[name] = Model(
            name,
            (both, Stage(((name, 1),), single)),
            f"Euler, 100 steps: {guided} guided, {single} outside the guidance interval",
            paper,
            guided=(both,),
        )
    models["ADM-G"] = Model(
        "ADM-G 256",
        (Stage((("ADM-256", 1), ("ADM-classifier", 1)), 250),),
        "250 steps, classifier gradient in each",
        Paper(4.21, 0.08, 2.23),
    )
    models["PixelFlow-XL/4"] = Model(
        "PixelFlow-XL/4",
        tuple(Stage(((f"PixelFlow-{edge}", 2),), 30) for edge in STAGES),
        "Euler, 4 stages of 30 guided steps",
        Paper(10.1, 0.084, 4.0),
        noise_blocks=blocks_per_image(),
    )
    for name, paper in (("DiT-XL/2", None), ("SiT-L/2", Paper(0.51, 0.0097, 2.9))):
        models[name] = Model(
            f"{name} + VAE", (Stage(((name, 2),), 250),), "250 guided steps", paper, once=("VAE-decoder",)
        )
    first, second = samplers.rdm_evaluations()
    models["RDM"] = Model(
        "Relay Diffusion",
        (Stage((("RDM-1", 1),), first), Stage((("RDM-2", 2),), second)),
        f"second order: {first} evaluations at 64 px, {second} guided ones at 256 px",
        note=NETWORKS["RDM-1"].note,
    )
    return models


MODELS = _models()
