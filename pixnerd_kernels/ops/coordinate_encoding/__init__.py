"""Coordinate encodings of the pixels of a patch, one table for all patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pixnerd_kernels import backends
from pixnerd_kernels.checks import FLOATS, Problems
from pixnerd_kernels.ops.library import Passed, module, register, watched

_passed = Passed()

KINDS = ("dct", "dct_integer", "dct_paper", "dct_aligned", "rope", "sincos")
#: Those whose max_freqs is even.
EVEN_KINDS = ("rope", "sincos")


def coordinate_encoding(
    height: int,
    width: int,
    max_freqs: int = 8,
    kind: str = "dct",
    *,
    scale: float | Sequence[float] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The encoding of every pixel position of a patch: [height * width, max_freqs**2], row y * width + x.

    Args:
        height, width: pixels of the patch.
        max_freqs: K, frequencies per axis; even for "rope" and "sincos".
        kind: with coordinates u in linspace(0, 1, n) along each axis,

            - "dct" (official class-to-image): cos(pi u_x f_a) cos(pi u_y f_b) / (1 + f_a f_b) with
              f = linspace(0, K, K), column a * K + b;
            - "dct_integer" (Chroma1-Radiance): the same with f = 0 ... K-1;
            - "dct_paper" (arXiv 2507.23268): cos(pi a u_x) cos(pi b u_y), a, b = 1 ... K, unweighted;
            - "dct_aligned": as "dct" with u = i / n, so that pixel i of n lies where it does at every n; for models
              that are decoded at several resolutions (the ends of linspace move with n);
            - "rope" (official text-to-image): the cosines of the 2-D rotary table of 2 K^2 dimensions, x and y
              interleaved, theta 10000, positions linspace(0, n * scale, n);
            - "sincos": sin and cos of x and of y in pixels at K^2/4 frequencies each, theta 10000.
        scale: "rope" only: one factor, or (x, y). None is 1, the official text-to-image model; its heavy decoder
            uses (16 / width, 16 / height), so that positions span 0 to 16 at any size.
        device: where the table is made; None is torch's default device.
        dtype: float32, float64, bfloat16 or float16; computed in float64 and rounded once.

    A frequency above the Nyquist limit of the patch (K > height) aliases when a field is decoded at another
    resolution than it was trained at; keep K below the patch size for models meant to be upscaled.

    Raises:
        TypeError, ValueError: every problem with the arguments at once.
        NotImplementedError: a forced backend (`use_backend`) cannot run; lists every reason.
    """
    call = (height, width, max_freqs, kind, scale, device, dtype)
    direct = None if watched() else (*call, *map(type, call))
    # Asked of a tensor: below the op torch has left the default device's scope, and torch.compile does not trace
    # torch.get_default_device.
    if direct is None or direct not in _passed:
        where, factors = _check(height, width, max_freqs, kind, scale, device, dtype)
        if direct is not None:
            _passed.add(direct)
    else:
        where = torch.empty(0).device if device is None else torch.device(device)
        factors = _factors(Problems(""), scale, kind)
    forced = backends.forced_backend()
    arguments = (height, width, max_freqs, kind, *factors, where, dtype, forced)
    out: Tensor = (torch.ops.pixnerd.coordinate_encoding if direct is None else _forward)(*arguments)
    return out


def _check(
    height: object, width: object, max_freqs: Any, kind: Any, scale: object, device: Any, dtype: object
) -> tuple[torch.device, tuple[float, float]]:
    """The device of the table, and the factors of x and y."""
    problems = Problems("coordinate_encoding")
    problems.count("height", height)
    problems.count("width", width)
    counted = problems.count("max_freqs", max_freqs, maximum=4096)
    problems.choice("kind", kind, KINDS)
    if counted and kind in EVEN_KINDS and max_freqs % 2:
        problems.add("max_freqs", f"an even number for kind {kind!r}", max_freqs)
    if dtype not in FLOATS:
        problems.add_type("dtype", "torch.float32, float64, bfloat16 or float16", dtype)
    factors = _factors(problems, scale, kind)
    try:
        where = torch.empty(0).device if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        problems.add("device", f"a torch device ({str(error).splitlines()[0]})", device)
    problems.raise_if_any()
    return where, factors


def _factors(problems: Problems, scale: object, kind: str) -> tuple[float, float]:
    """The factors of x and y."""
    if scale is None:
        return 1.0, 1.0
    if kind != "rope":
        problems.add("scale", f"None for kind {kind!r} (only 'rope' takes one)", scale)
        return 1.0, 1.0
    pair = tuple(scale) if isinstance(scale, Sequence) and not isinstance(scale, str) else (scale, scale)
    if len(pair) != 2:
        problems.add("scale", "one number or a pair (x, y)", scale)
        return 1.0, 1.0
    before = len(problems.lines)
    for value in pair:
        problems.number("scale", value)
    if len(problems.lines) > before:
        return 1.0, 1.0
    return float(pair[0]), float(pair[1])


def _forward(height, width, max_freqs, kind, scale_x, scale_y, device, dtype, forced):  # type: ignore[no-untyped-def]
    backend = module("coordinate_encoding", backends.select("coordinate_encoding", device, dtype, forced))
    return backend.forward(height, width, max_freqs, kind, scale_x, scale_y, device, dtype)


def _fake(height, width, max_freqs, kind, scale_x, scale_y, device, dtype, forced):  # type: ignore[no-untyped-def]
    return torch.empty(height * width, max_freqs * max_freqs, device=device, dtype=dtype)


register(
    "coordinate_encoding(int height, int width, int max_freqs, str kind, float scale_x, float scale_y, "
    "Device device, ScalarType dtype, str forced) -> Tensor",
    _forward,
    _fake,
)
