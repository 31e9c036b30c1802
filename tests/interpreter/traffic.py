"""Counts how often a kernel in Triton's interpreter loads and stores every element of its arguments."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from triton.runtime import interpreter

from pixnerd_kernels.ops.gpu.launch import Launch, watch


@dataclass
class Traffic:
    """Loads and stores of every element of one argument, in its storage's order from its first element on."""

    tensor: torch.Tensor
    loads: np.ndarray
    stores: np.ndarray

    def times(self, kind: str) -> set[int]:
        """How often the tensor's own elements were accessed, each number that occurs."""
        counts = torch.from_numpy(getattr(self, kind))
        view = counts.as_strided(self.tensor.shape, self.tensor.stride())
        return set(view.unique().tolist())


@contextmanager
def traced(kernel: str) -> Iterator[dict[str, Traffic]]:
    """The traffic of the launches of `kernel` inside the block, by argument; absent tensors' stand-ins left out.

    An access outside of every argument is an error: the kernel reads or writes what it should not.
    """
    found: dict[str, Traffic] = {}
    tracing = False
    builder = interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store

    def seen(launch: Launch) -> bool:
        nonlocal tracing
        tracing = launch.name == kernel
        if tracing:
            for name, tensor in launch.arguments.items():
                if isinstance(tensor, torch.Tensor) and tensor.numel():
                    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
                    found[name] = Traffic(tensor, *(np.zeros(span, np.int64) for _ in range(2)))
        return True

    def count(pointers, mask, kind: str) -> None:
        if not tracing:
            return
        addresses = np.broadcast_to(pointers.data, mask.shape)[mask].astype(np.int64)
        known = np.zeros(addresses.shape, bool)
        ours = {}
        for name, traffic in found.items():
            tensor = traffic.tensor
            places = (addresses - tensor.data_ptr()) // tensor.element_size()
            inside = (places >= 0) & (places < len(traffic.loads))
            known |= inside
            ours[name] = places[inside]
        for name, places in ours.items():
            counts = getattr(found[name], kind)
            counts += np.bincount(places, minlength=len(counts))
        assert known.all(), f"{(~known).sum()} of {known.size} {kind} lie outside of every argument"

    def counting_load(pointers, mask, *rest):
        count(pointers, np.broadcast_to(mask.data, np.shape(pointers.data)), "loads")
        return load(pointers, mask, *rest)

    def counting_store(pointers, value, mask, *rest):
        count(pointers, np.broadcast_to(mask.data, np.shape(pointers.data)), "stores")
        return store(pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counting_load, counting_store
    try:
        with watch(seen):
            yield found
    finally:
        del builder.create_masked_load, builder.create_masked_store


def summary(traffic: dict[str, Traffic]) -> dict[str, tuple[set[int], set[int]]]:
    """Loads and stores of each element, by argument that was touched at all."""
    counts = {name: (t.times("loads"), t.times("stores")) for name, t in traffic.items()}
    return {name: both for name, both in counts.items() if both != ({0}, {0})}
