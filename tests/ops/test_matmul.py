"""The core's matrix product: every layout, dtype, instruction set and edge of its blocks."""

import itertools

import pytest
import torch

from pixnerd_kernels.ops.linear.cpu import matmul

#: Rows, columns, depth: one element; empty; few rows; parts of a vector, a strip, a unit and a panel; several passes.
SIZES = [
    (1, 1, 1),
    (0, 3, 4),
    (3, 0, 4),
    (3, 4, 0),
    (1, 40, 300),
    (2, 90, 5),
    (3, 17, 64),
    (4, 133, 1537),
    (90, 2, 5),
    (17, 33, 70),
    (64, 96, 64),
    (45, 131, 1537),
    (131, 45, 3100),
]
LAYOUTS = ["rows", "columns"]


def inside(height, width, layout, dtype):
    """A matrix of which either rows or columns are dense, in memory that is NaN all around it."""
    shape = (height, width) if layout == "rows" else (width, height)
    whole = torch.full((shape[0] + 2, shape[1] + 3), torch.nan, dtype=dtype)
    part = whole[1:-1, 1:-2]
    part.copy_(torch.randn(shape, dtype=torch.float64))
    return part if layout == "rows" else part.T


def check(a, b, bias=None, add=False, dtype=None):
    rows, columns = a.shape[0], b.shape[1]
    dtype = dtype or a.dtype
    whole = torch.full((rows + 2, columns + 5), 7.0, dtype=dtype)
    out = whole[1:-1, 2:-3]
    matmul(a, b, out, bias, add=add)
    wide = [t.double() for t in (a, b)]
    expected = wide[0] @ wide[1] + (0 if bias is None else bias.double()) + (7 if add else 0)
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    # Every product and sum is rounded once, in any order, and the result once more.
    size = wide[0].abs() @ wide[1].abs() + (0 if bias is None else bias.double().abs()) + (7 if add else 0)
    bound = (a.shape[1] + 3) * torch.finfo(computed).eps * size + torch.finfo(dtype).eps * expected.abs()
    assert bool(((out.double() - expected).abs() <= bound).all())
    out.fill_(7)
    assert bool((whole == 7).all()), "something outside of the result was written"


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, LAYOUTS)), ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_products(compiled, size, layouts, dtype):
    rows, columns, depth = size
    a, b = inside(rows, depth, layouts[0], dtype), inside(depth, columns, layouts[1], dtype)
    check(a, b)
    check(a, b, bias=torch.randn(columns).to(dtype))
    check(a, b, add=True, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, LAYOUTS)), ids="-".join)
def test_dtypes_may_differ(compiled, layouts):
    a, b = inside(40, 50, layouts[0], torch.float32), inside(50, 70, layouts[1], torch.bfloat16)
    check(a, b, bias=torch.randn(70).bfloat16())
    check(b.T, a.T, dtype=torch.float16)


def test_expanded_and_strided_operands(compiled):
    a = torch.randn(1, 40).expand(50, 40)
    check(a, torch.randn(40, 60))
    check(a.T, torch.randn(50, 60))
    check(torch.randn(1).expand(50, 40), torch.randn(40, 60))
    check(torch.randn(50, 80)[:, ::2], torch.randn(80, 60)[::2], bias=torch.randn(120)[::2])


def test_threads_do_not_change_the_result(compiled, threads):
    a, b = torch.randn(100, 1600), torch.randn(200, 1600)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(torch.empty(100, 200))
        matmul(a, b.T, results[-1])
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_rows_may_have_the_same_bits_whatever_their_number(compiled):
    a, b = torch.randn(300, 3200), torch.randn(90, 3200)
    whole = torch.empty(300, 90)
    matmul(a, b.T, whole, row_invariant=True)
    for count in (1, 3, 33, 90):
        part = torch.empty(count, 90)
        matmul(a[:count], b.T, part, row_invariant=True)
        assert torch.equal(part, whole[:count]), count
