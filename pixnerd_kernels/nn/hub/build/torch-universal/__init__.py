"""What the `kernels` package loads: the layers of the installed pixnerd_kernels."""

from pixnerd_kernels.nn import stateless as layers

__all__ = ["layers"]
