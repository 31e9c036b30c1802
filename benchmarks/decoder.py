"""Time and memory of the whole pixel decoder, at the sizes of L/16, XL/16 and Chroma1-Radiance."""

from __future__ import annotations

import argparse

from benchmarks import ops

add_arguments = ops.add_arguments


def run(arguments: argparse.Namespace) -> int:
    """As `ops`, on the pixel decoder's cases unless others are named."""
    arguments.case = arguments.case or ["pixel_decoder"]
    return ops.run(arguments)
