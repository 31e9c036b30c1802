"""A kernel written in Gluon as plain Python on tensors, since Triton's interpreter knows no Gluon.

Shows formulas, places and the order of copies, products, waits, fences and barriers, but neither layouts nor what one
thread does before another. All numbers are float64. What is asynchronous takes effect at the wait for it or, where
`late` is False, at once: a kernel has to be right both ways.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

WIDE = torch.float64


class Pointer:
    """An address, or a tensor of them, in a flat tensor."""

    def __init__(self, base: Tensor, place: Any = 0) -> None:
        self.base, self.place = base, place
        self.dtype = SimpleNamespace(element_ty=WIDE)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.base, self.place + offset)

    def inside(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Places, and where they may be used."""
        place = torch.as_tensor(self.place)
        return place, torch.ones_like(place, dtype=torch.bool) if mask is None else mask.expand(place.shape)


class Pending:
    """A product on its way."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self.compute, self.value = compute, None

    def done(self) -> None:
        if self.value is None:
            self.value = self.compute()


class Shared:
    """A view of shared memory."""

    dtype = WIDE

    def __init__(self, program: Program, tensor: Tensor) -> None:
        self.program, self.tensor = program, tensor

    def _view(self, tensor: Tensor) -> Shared:
        return Shared(self.program, tensor)

    def index(self, i: Any) -> Shared:
        return self._view(self.tensor[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return self._view(self.tensor.narrow(dim, start, length))

    def permute(self, order: Any) -> Shared:
        return self._view(self.tensor.permute(order))

    def _reinterpret(self, dtype: Any, shape: Any, layout: Any) -> Shared:
        # Of as many bytes, but not the same: what is read has to be written first.
        return self.program.allocate(dtype, shape, layout)

    def load(self, layout: Any) -> Tensor:
        return self.tensor.clone()

    def store(self, value: Tensor) -> None:
        assert value.shape == self.tensor.shape
        self.tensor.copy_(value)
        self.program.written.add(self.tensor.untyped_storage().data_ptr())


class Program:
    """What one program of a grid has under way."""

    def __init__(self, late: bool) -> None:
        self.late = late
        self.copies: list[list[tuple[Callable[[], None], Tensor]]] = [[]]  # the last group is open
        self.products: list[Pending] = []
        # Memory that products must not read: written, and fenced but before a barrier.
        self.written: set[int] = set()
        self.fenced: set[int] = set()

    def allocate(self, dtype: Any, shape: Any, layout: Any) -> Shared:
        return Shared(self, torch.full(list(map(int, shape)), float("nan"), dtype=WIDE))

    def copy(self, target: Shared, source: Pointer, mask: Tensor | None = None) -> None:
        place, inside = source.inside(mask)
        tensor = target.tensor

        def arrive() -> None:
            tensor.copy_(torch.where(inside, source.base[torch.where(inside, place, 0)], 0.0))

        tensor.fill_(float("nan")) if self.late else arrive()
        self.copies[-1].append((arrive, tensor))

    def wait_for_copies(self, pending: int) -> None:
        while len(self.copies) - 1 > pending:
            for arrive, tensor in self.copies.pop(0):
                if self.late:
                    arrive()
                self.written.add(tensor.untyped_storage().data_ptr())

    def multiply(self, a: Any, b: Any, total: Any, use_acc: bool = True, is_async: bool = False) -> Pending:
        assert is_async
        for operand in (a, b):
            if isinstance(operand, Shared):
                memory = operand.tensor.untyped_storage().data_ptr()
                assert memory not in self.written | self.fenced, "not behind a fence and a barrier"

        def compute() -> Tensor:
            left, right = (operand.tensor if isinstance(operand, Shared) else operand for operand in (a, b))
            before = total.value if isinstance(total, Pending) else total
            return left @ right + before if use_acc else left @ right

        product = Pending(compute)
        self.products.append(product)
        if not self.late:
            product.done()
        return product

    def wait_for_products(self, pending: int, deps: list[Any]) -> Any:
        while len(self.products) > pending:
            self.products.pop(0).done()
        assert not any(product is dep for product in self.products for dep in deps), "not waited for"
        found = tuple(dep.value if isinstance(dep, Pending) else dep for dep in deps)
        return found if len(found) > 1 else found[0]

    def fence(self) -> None:
        self.fenced |= self.written
        self.written.clear()

    def barrier(self) -> None:
        self.fenced.clear()

    def end(self) -> None:
        self.wait_for_copies(0)
        assert not self.products
        assert not self.copies[0]


def _where(condition: Any, a: Any, b: Any) -> Tensor:
    whole = all(isinstance(v, int) or (isinstance(v, Tensor) and not v.is_floating_point()) for v in (a, b))
    dtype = torch.int64 if whole else WIDE
    return torch.where(
        torch.as_tensor(condition), torch.as_tensor(a, dtype=dtype), torch.as_tensor(b, dtype=dtype)
    )


def _store(to: Pointer, value: Tensor, mask: Tensor | None = None) -> None:
    place, inside = to.inside(mask)
    assert place.shape == value.shape
    to.base[place[inside]] = value[inside]


class Kernels:
    """The functions of a file, for grids of programs one after the other."""

    def __init__(self, path: Path, late: bool) -> None:
        self._late = late
        self._program = Program(late)
        self._index, self._programs = 0, 1
        self._names: dict[str, Any] = {
            "__name__": path.stem,
            "__builtins__": {**vars(builtins), "__import__": self._import, "range": self._range},
        }
        exec(compile(path.read_text(), str(path), "exec"), self._names)

    def run(self, name: str, programs: int, **arguments: Any) -> None:
        """Run a kernel; tensors among the arguments are flat ones, and pointers to their beginning for the kernel."""
        self._programs = programs
        for self._index in range(programs):
            self._program = Program(self._late)
            self._names[name](
                **{k: Pointer(v) if isinstance(v, Tensor) and v.dim() else v for k, v in arguments.items()}
            )
            self._program.end()

    def _range(self, *bounds: Any) -> Iterator[Tensor]:
        return (torch.tensor(i) for i in range(*map(int, bounds)))

    def _import(self, name: str, *rest: Any) -> Any:
        found = {
            "triton.experimental": SimpleNamespace(gluon=SimpleNamespace(jit=_as_it_is)),
            "triton.experimental.gluon": SimpleNamespace(language=self._language()),
            "triton.experimental.gluon.language.nvidia.ampere": SimpleNamespace(async_copy=self._copying()),
            "triton.experimental.gluon.language.nvidia.hopper": self._hopper(),
        }
        return found[name] if name in found else __import__(name, *rest)

    # The kernel's imports hold functions that ask for the program at hand when they are called.

    def _copying(self) -> Any:
        return SimpleNamespace(
            async_copy_global_to_shared=lambda *a, **k: self._program.copy(*a, **k),
            commit_group=lambda: self._program.copies.append([]),
            wait_group=lambda pending: self._program.wait_for_copies(pending),
        )

    def _hopper(self) -> Any:
        return SimpleNamespace(
            fence_async_shared=lambda: self._program.fence(),
            warpgroup_mma=lambda *a, **k: self._program.multiply(*a, **k),
            warpgroup_mma_wait=lambda pending, deps: self._program.wait_for_products(pending, deps),
        )

    def _language(self) -> Any:
        layouts = (
            "NVMMADistributedLayout", "DotOperandLayout", "DistributedLinearLayout", "BlockedLayout", "SliceLayout",
            "NVMMASharedLayout", "SwizzledSharedLayout",
        )  # fmt: skip
        return SimpleNamespace(
            **dict.fromkeys(layouts, lambda *a, **k: None),
            float32=WIDE,
            int64=torch.int64,
            constexpr=lambda value: value if isinstance(value, int) else SimpleNamespace(value=value),
            barrier=lambda: self._program.barrier(),
            allocate_shared_memory=lambda *a: self._program.allocate(*a),
            program_id=lambda axis: torch.tensor(self._index),
            num_programs=lambda axis: self._programs,
            arange=lambda first, end, layout=None: torch.arange(first, end),
            zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=WIDE),
            full_like=torch.full_like,
            sum=lambda x, axis: x.sum(axis),
            reshape=torch.reshape,
            permute=torch.permute,
            join=lambda a, b: torch.stack((a, b), -1),
            convert_layout=lambda x, layout: x,
            rsqrt=torch.rsqrt,
            where=_where,
            load=lambda source: source.base[source.place],
            store=_store,
            static_range=range,
            to_tensor=torch.tensor,
            cdiv=lambda a, b: -(-a // b),
            # The one that is there.
            inline_asm_elementwise=lambda assembly, constraints, args, **k: torch.tanh(*args),
        )


def _as_it_is(function: Any = None, **options: Any) -> Any:
    return function if function is not None else lambda wrapped: wrapped
