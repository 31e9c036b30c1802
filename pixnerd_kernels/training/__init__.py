"""Training a class-to-image model: data, settings, checkpoints and the loop."""

from pixnerd_kernels.training.data import Dataset, load_dataset
from pixnerd_kernels.training.loop import train
from pixnerd_kernels.training.settings import Settings
from pixnerd_kernels.training.trainer import Trainer, load_sampler

__all__ = ["Dataset", "Settings", "Trainer", "load_dataset", "load_sampler", "train"]
