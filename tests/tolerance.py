"""The derived tolerance: twice the error of plain PyTorch at the same dtype, plus four units of rounding.

Norm-wise for every tensor:  ||out - exact|| <= 2 ||plain - exact|| + 4 eps(dtype) ||exact||,  where plain is the
formula in plain PyTorch at the dtype of `out`, and exact the same formula in float64 on the same rounded inputs.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def error_and_limit(out: Tensor, plain: Tensor, exact: Tensor) -> tuple[float, float]:
    """||out - exact|| and its bound."""
    out, plain, exact = out.cpu(), plain.cpu(), exact.cpu().double()
    limit = 2 * torch.linalg.vector_norm(plain.double() - exact)
    limit += 4 * torch.finfo(out.dtype).eps * torch.linalg.vector_norm(exact)
    return torch.linalg.vector_norm(out.double() - exact).item(), limit.item()


def assert_within(
    out: Mapping[str, Tensor], plain: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> None:
    """Every tensor of `out` has the dtype and shape of its plain counterpart and lies within the tolerance."""
    assert out.keys() == plain.keys() == exact.keys()
    wrong = []
    for name, tensor in out.items():
        kind, expected = (tensor.dtype, tensor.shape), (plain[name].dtype, plain[name].shape)
        if kind != expected:
            wrong.append(f"{name}: {kind}, expected {expected}")
            continue
        error, limit = error_and_limit(tensor, plain[name], exact[name])
        if not error <= limit:  # so that NaN is wrong
            wrong.append(f"{name}: error {error:.3e} > limit {limit:.3e}")
    assert not wrong, "; ".join(wrong)


def assert_same(
    out: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    bits: bool,
    references: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Tensor]]],
) -> None:
    """Two results have the same bits; unless `bits`, each lies within the tolerance of `references()`: plain, exact."""
    assert out.keys() == other.keys()
    if bits:
        for name, tensor in out.items():
            assert torch.equal(tensor, other[name]), name
        return
    chosen = [{name: reference[name] for name in out} for reference in references()]
    for each in (out, other):
        assert_within(each, *chosen)


def relative(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected||."""
    out, expected = out.cpu(), expected.cpu()
    difference = torch.linalg.vector_norm(out.double() - expected.double())
    return (difference / torch.linalg.vector_norm(expected.double())).item()
