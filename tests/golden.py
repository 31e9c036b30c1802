"""The golden tensors in tests/data: recorded from the public implementations that the ops must agree with."""

import functools
import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

DATA = Path(__file__).parent / "data"


@functools.cache
def load(name: str) -> tuple[dict, dict[str, Tensor]]:
    """The recorded configuration and the tensors of tests/data/<name>.safetensors; do not write into them."""
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        config = json.loads((file.metadata() or {}).get("config", "{}"))
        return config, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def load_here(name: str) -> tuple[dict, dict[str, Tensor]]:
    """The same with the tensors on torch's default device."""
    config, golden = load(name)
    return config, {key: tensor.to(torch.get_default_device()) for key, tensor in golden.items()}
