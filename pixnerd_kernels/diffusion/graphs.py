"""A velocity model as a CUDA graph, captured at its first call and replayed at every other; or compiled.

At small batches a GPU waits for Python to launch hundreds of small kernels; a replay launches them all at once.
Captures have run on an H100, where XL/16 on one image takes 2.3 ms in place of 28; compiled modes on no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_UNLIMITED = 1 << 30


class GraphedVelocity:
    """Calls `velocity` through CUDA graphs, one for each combination of shapes and dtypes.

    Every call copies its arguments into the graph's own tensors, replays, and returns a copy of the result: a solver
    may keep it. The model must not synchronise with the CPU, and its weights must stay where they are.

    Args:
        velocity: called with x, t and a condition, all on one CUDA device.
    """

    def __init__(self, velocity: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self.velocity = velocity
        self.graphs: dict[tuple[object, ...], tuple[list[Tensor], Tensor, Callable[[], None]]] = {}

    def __call__(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        arguments = (x, t, condition)
        key = tuple((tuple(argument.shape), argument.dtype, argument.device) for argument in arguments)
        if key not in self.graphs:
            # Dense copies: an expanded t has one element of memory.
            inputs = [argument.clone(memory_format=torch.contiguous_format) for argument in arguments]
            with _device_of(x):
                self.graphs[key] = (inputs, *capture(lambda: self.velocity(*inputs)))
        inputs, output, replay = self.graphs[key]
        with _device_of(x):
            for target, argument in zip(inputs, arguments, strict=True):
                target.copy_(argument)
            replay()
            return output.clone()


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes x's GPU the current one: streams and graphs are made for that."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


class CompiledVelocity:
    """Calls `velocity` compiled as one graph, once for each combination of shapes.

    Every result is a copy: in the modes with CUDA graphs the next call overwrites what the last one returned. There is
    no limit to the number of shapes: torch's own, 8 for all functions of one code, is lifted for these calls.

    Args:
        velocity: called with x, t and a condition; a graph break in it is an error.
        mode: of torch.compile: "default", "reduce-overhead", "max-autotune" or "max-autotune-no-cudagraphs".
    """

    def __init__(self, velocity: Callable[[Tensor, Tensor, Tensor], Tensor], mode: str) -> None:
        import torch._dynamo  # takes a second, which torch.compile takes anyway

        self.compiled = torch.compile(velocity, mode=mode, fullgraph=True, dynamic=False)

    def __call__(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        with torch._dynamo.config.patch(cache_size_limit=_UNLIMITED, accumulated_cache_size_limit=_UNLIMITED):
            out: Tensor = self.compiled(x, t, condition)
        return out.clone()


def capture(function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """Record the kernels of one call: the tensor that they write, and what runs them again.

    Calls before the capture, on a stream of their own as torch.cuda.graph asks for, let libraries and caches allocate.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()
    return output, graph.replay
