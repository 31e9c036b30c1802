"""Rectified flow: the path and its loss (`flow`), and solvers that draw samples (`sample`)."""

from pixnerd_kernels.diffusion import flow
from pixnerd_kernels.diffusion.solvers import SOLVERS, sample

__all__ = ["SOLVERS", "flow", "sample"]
