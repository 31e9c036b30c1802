"""Muon's update is the orthogonalised momentum, and agrees with torch's own where there is one."""

import pytest
import torch

from pixnerd_kernels.training.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(3, 48, 96), (1, 200, 24), (2, 1, 7)])
def test_orthogonalised_matrices_keep_their_directions_and_lose_their_scales(shape):
    generator = torch.Generator().manual_seed(0)
    # Singular values from 0.05 to 1 of the largest: those the iteration is made for.
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    values = torch.linspace(1, 0.05, min(shape[1:]))
    got = orthogonalise(1e3 * (u * values) @ vh)
    diagonal = u.mT @ got @ vh.mT
    on = diagonal.diagonal(dim1=1, dim2=2)
    assert on.min() > 0.6
    assert on.max() < 1.3
    assert (diagonal - torch.diag_embed(on)).abs().max() < 1e-3


def test_it_takes_torchs_steps():
    theirs = getattr(torch.optim, "Muon", None)
    if theirs is None:
        pytest.skip("torch has an optimiser of its own from 2.9 on")
    torch.manual_seed(0)
    start, grads = torch.randn(64, 128), torch.randn(4, 64, 128)
    one, other = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    ours = Muon([one], lr=1e-2, weight_decay=0.1)
    theirs = theirs([other], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for grad in grads:
        one.grad, other.grad = grad.clone(), grad.clone()
        ours.step()
        theirs.step()
    # Torch iterates in bfloat16, whose epsilon is 2^-7; five quintic steps grow an error by about 3.4445 each,
    # but the singular values that it moves are those near zero.
    assert (one - other).norm() < 4 * 2**-7 * (other - start).norm()


def test_it_takes_matrices_only():
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))])
