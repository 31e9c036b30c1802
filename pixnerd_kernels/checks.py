"""Input checks that report every problem at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_FINITE = 1e300
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def describe(value: object) -> str:
    """What came, in words: a tensor by shape, dtype and device, anything else by its repr."""
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {value.dtype} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def check_tangents(
    names: Sequence[str], values: Sequence[torch.Tensor | None], tangents: Sequence[torch.Tensor | None]
) -> None:
    """Check that every tangent (None: there is none) has the shape, dtype and device of its value.

    Of ops that only the dispatcher and the package itself call.
    """

    def kind(tensor: torch.Tensor | None) -> tuple[object, ...]:
        return () if tensor is None else (tensor.shape, tensor.dtype, tensor.device)

    for name, value, tangent in zip(names, values, tangents, strict=True):
        if tangent is not None and kind(tangent) != kind(value):
            expected = "None" if value is None else describe(value)
            raise ValueError(f"tangent of {name}: expected {expected}, got {describe(tangent)}")


class Problems:
    """Collects what is wrong with a call, and raises it all at once.

    Wrong types and dtypes make it a TypeError, everything else a ValueError.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.lines: list[str] = []
        self.is_type_error = False

    def add(self, argument: str, expected: str, got: object) -> None:
        self.lines.append(f"{argument}: expected {expected}, got {describe(got)}")

    def add_type(self, argument: str, expected: str, got: object) -> None:
        self.is_type_error = True
        self.add(argument, expected, got)

    def tensor(self, argument: str, value: object, rank: int, layout: str) -> bool:
        """Check that value is a floating tensor of this rank; True when its shape may be read."""
        if not isinstance(value, torch.Tensor):
            self.add_type(argument, f"a tensor {layout}", value)
            return False
        if value.dtype not in FLOATS:
            self.add_type(argument, "a float32, float64, bfloat16 or float16 tensor", value)
        if value.layout != torch.strided:
            self.add_type(argument, "a dense (strided) tensor", value.layout)
            return False
        if value.dim() != rank:
            self.add(argument, f"{layout} ({rank} dimensions)", value)
            return False
        return True

    def same_device(self, first: str, reference: object, others: Sequence[tuple[str, object]]) -> None:
        if isinstance(reference, torch.Tensor):
            for name, value in others:
                if isinstance(value, torch.Tensor) and value.device != reference.device:
                    self.add(name, f"the device of {first} ({reference.device})", value)

    def same_dtype(self, first: str, reference: object, others: Sequence[tuple[str, object]]) -> None:
        if isinstance(reference, torch.Tensor):
            for name, value in others:
                if isinstance(value, torch.Tensor) and value.dtype != reference.dtype:
                    self.add_type(name, f"the dtype of {first} ({reference.dtype})", value)

    def choice(self, argument: str, value: object, allowed: Sequence[str]) -> None:
        if value not in allowed:
            self.add(argument, "one of " + ", ".join(repr(name) for name in allowed), value)

    def number(self, argument: str, value: object, minimum: float = 0.0, maximum: float = _FINITE) -> bool:
        """Check for a number from `minimum` to `maximum`, a finite one by default; True when it is one."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.add_type(argument, "a number", value)
            return False
        if not minimum <= value <= maximum:
            least = f"a finite number of at least {minimum:g}"
            self.add(
                argument, least if maximum == _FINITE else f"a number from {minimum:g} to {maximum:g}", value
            )
            return False
        return True

    def count(self, argument: str, value: object, minimum: int = 1, maximum: int = 2**31 - 1) -> bool:
        """Check for an integer from `minimum` to `maximum`; True when it is one."""
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            self.add_type(argument, "an integer", value)
            return False
        if value < minimum:
            self.add(argument, f"an integer of at least {minimum}", value)
            return False
        if value > maximum:
            self.add(argument, f"an integer of at most {maximum}", value)
            return False
        return True

    def raise_if_any(self) -> None:
        if self.lines:
            text = f"{self.where}: " + "; ".join(self.lines)
            raise TypeError(text) if self.is_type_error else ValueError(text)
