"""coordinate_encoding against the golden tables and against each kind's formula, written out in numpy."""

import math

import numpy as np
import pytest
import torch
from golden import load

from pixnerd_kernels import coordinate_encoding, use_backend

KINDS = ("dct", "dct_integer", "dct_paper", "dct_aligned", "rope", "sincos")
SIZES = [(1, 1), (1, 5), (4, 4), (7, 3), (16, 16), (20, 14)]
kinds = pytest.mark.parametrize("kind", KINDS)
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")


def golden_cases():
    """(name, arguments) of every coordinate table in the golden file."""
    cases = []
    for name in load("encodings")[1]:
        family, *parts = name.split(".")
        numbers = {part[0]: int(part[1:]) for part in parts if not part.startswith("dim")}
        if family.startswith("rope_"):
            continue
        height, width = numbers.get("h", numbers.get("p")), numbers.get("w", numbers.get("p"))
        options = {"kind": "dct"} if family == "c2i_dct" else {"kind": "rope"}
        if family == "t2i_heavydecoder":
            options["scale"] = (16 / width, 16 / height)
        cases.append(pytest.param(name, (height, width, numbers["f"]), options, id=name))
    return cases


def test_the_golden_file_has_every_family():
    assert {case.values[0].split(".")[0] for case in golden_cases()} == {"c2i_dct", "t2i", "t2i_heavydecoder"}


@pytest.mark.parametrize(("name", "sizes", "options"), golden_cases())
def test_golden_tables(any_isa, name, sizes, options):
    expected = load("encodings")[1][name][0]
    out = coordinate_encoding(*sizes, **options)
    assert out.shape == expected.shape
    assert (out.cpu() - expected).abs().max() <= 2e-6


def formula(height, width, count, kind, scale=(1.0, 1.0)):
    """One entry at a time: float64, [height * width, count**2]."""
    table = np.zeros((height * width, count * count))
    for y in range(height):
        for x in range(width):
            u = (x / (width - 1) if width > 1 else 0.0, y / (height - 1) if height > 1 else 0.0)
            table[y * width + x] = [
                entry(c, count, kind, (x, y), u, (width, height), scale) for c in range(count**2)
            ]
    return table


def entry(column, count, kind, pixel, u, shape, scale):
    a, b = divmod(column, count)
    if kind == "dct_paper":
        return math.cos(math.pi * (a + 1) * u[0]) * math.cos(math.pi * (b + 1) * u[1])
    if kind == "dct_aligned":
        u = (pixel[0] / shape[0], pixel[1] / shape[1])
    if kind in ("dct", "dct_integer", "dct_aligned"):
        step = 1.0 if kind == "dct_integer" else (count / (count - 1) if count > 1 else 0.0)
        f_x, f_y = a * step, b * step
        return math.cos(math.pi * u[0] * f_x) * math.cos(math.pi * u[1] * f_y) / (1 + f_x * f_y)
    if kind == "rope":
        m, axis = divmod(column, 2)
        return math.cos(u[axis] * shape[axis] * scale[axis] * 10000.0 ** (-2 * m / count**2))
    block, m = divmod(column, count * count // 4)
    angle = pixel[block // 2] * 10000.0 ** (-4 * m / count**2)
    return math.cos(angle) if block % 2 else math.sin(angle)


@kinds
@sizes
@pytest.mark.parametrize("count", [2, 4, 8])
def test_formulas(any_isa, kind, size, count):
    out = coordinate_encoding(*size, count, kind, dtype=torch.float64)
    np.testing.assert_allclose(out.cpu().numpy(), formula(*size, count, kind), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["dct", "dct_integer", "dct_paper", "dct_aligned"])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_odd_numbers_of_frequencies(any_isa, kind, count):
    out = coordinate_encoding(5, 4, count, kind, dtype=torch.float64)
    np.testing.assert_allclose(out.cpu().numpy(), formula(5, 4, count, kind), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [2, 0.5, 0, (3.0, 0.25), [1, 2]], ids=str)
def test_scale_of_rope(any_isa, scale):
    pair = tuple(scale) if isinstance(scale, (tuple, list)) else (scale, scale)
    out = coordinate_encoding(6, 9, 4, "rope", scale=scale, dtype=torch.float64)
    np.testing.assert_allclose(out.cpu().numpy(), formula(6, 9, 4, "rope", pair), rtol=0, atol=1e-12)


def rounded(table, dtype):
    """float64 values rounded once, to the nearest and ties to even, without torch's conversions."""
    if dtype == torch.bfloat16:
        mantissa, exponent = np.frexp(table)
        return np.ldexp(np.rint(mantissa * 256), exponent - 8)
    kind = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}[dtype]
    return table.astype(kind).astype(np.float64)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_entries_are_the_rounded_float64_values(any_isa, kind, dtype):
    exact = coordinate_encoding(32, 24, 8, kind, dtype=torch.float64)
    out = coordinate_encoding(32, 24, 8, kind, dtype=dtype)
    assert out.dtype == dtype
    wrong = np.flatnonzero(out.double().cpu().numpy() != rounded(exact.cpu().numpy(), dtype))
    assert not wrong.size, f"{wrong.size} of {out.numel()} entries are not the nearest {dtype}"


@kinds
@sizes
def test_the_table_is_fresh_and_dense(any_isa, kind, size):
    first, second = coordinate_encoding(*size, 4, kind), coordinate_encoding(*size, 4, kind)
    assert first.is_contiguous()
    assert not first.requires_grad
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


@kinds
def test_every_element_is_written(any_isa, kind, monkeypatch):
    expected = coordinate_encoding(7, 5, 4, kind)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: empty(*sizes, **options).fill_(torch.nan))
    assert torch.equal(coordinate_encoding(7, 5, 4, kind), expected)


@kinds
def test_backends_agree(compiled, kind):
    out = coordinate_encoding(20, 14, 8, kind, dtype=torch.float64)
    with use_backend("reference"):
        expected = coordinate_encoding(20, 14, 8, kind, dtype=torch.float64)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


@kinds
def test_compile_and_opcheck(any_isa, kind):
    def table_plus(x):
        return coordinate_encoding(4, 6, 4, kind) + x

    torch.compiler.reset()
    ones = torch.ones(16)
    for backend in ("aot_eager", "inductor") if kind == "dct" else ("aot_eager",):
        compiled = torch.compile(table_plus, fullgraph=True, backend=backend)
        assert torch.equal(compiled(ones), table_plus(ones))
    torch.compiler.reset()
    arguments = (4, 6, 4, kind, 1.0, 1.0, torch.device("cpu"), torch.float32, any_isa.name)
    torch.library.opcheck(torch.ops.pixnerd.coordinate_encoding.default, arguments)


def test_default_device():
    """torch's default device holds, by either way of setting it, compiled too."""
    torch.compiler.reset()
    with use_backend("reference"), torch.device("meta"):
        assert coordinate_encoding(2, 2).device.type == "meta"
        assert coordinate_encoding(2, 2, device="cpu").device.type == "cpu"
        assert torch.compile(coordinate_encoding, backend="aot_eager")(2, 3).device.type == "meta"
    assert coordinate_encoding(2, 2).device.type == "cpu"
    torch.compiler.reset()


WRONG = [
    ({"height": 0}, ValueError, "height: expected an integer of at least 1, got 0 (int)"),
    ({"width": 2.0}, TypeError, "width: expected an integer, got 2.0 (float)"),
    ({"height": True}, TypeError, "height: expected an integer, got True (bool)"),
    ({"max_freqs": -1}, ValueError, "max_freqs: expected an integer of at least 1, got -1 (int)"),
    ({"max_freqs": 3, "kind": "rope"}, ValueError, "max_freqs: expected an even number for kind 'rope', got 3"),
    ({"max_freqs": 5, "kind": "sincos"}, ValueError, "max_freqs: expected an even number for kind 'sincos'"),
    ({"kind": "fourier"}, ValueError, f"kind: expected one of {', '.join(map(repr, KINDS))}"),
    ({"scale": 2.0}, ValueError, "scale: expected None for kind 'dct' (only 'rope' takes one), got 2.0"),
    ({"scale": (1, 2, 3), "kind": "rope"}, ValueError, "scale: expected one number or a pair (x, y), got (1, 2, 3)"),
    ({"scale": -1, "kind": "rope"}, ValueError, "scale: expected a finite number of at least 0, got -1"),
    ({"scale": "wide", "kind": "rope"}, TypeError, "scale: expected a number, got 'wide' (str)"),
    ({"dtype": torch.int32}, TypeError, "dtype: expected torch.float32, float64, bfloat16 or float16, got torch.int32"),
    ({"device": "nowhere"}, ValueError, "device: expected a torch device"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "message"), WRONG)
def test_errors(changes, kind, message):
    with pytest.raises(kind) as caught:
        coordinate_encoding(**{"height": 4, "width": 4, **changes})
    assert message in str(caught.value)


def test_every_problem_is_told_at_once():
    with pytest.raises(TypeError) as caught:
        coordinate_encoding(0, "4", 1.5, "none", scale=1, dtype=torch.int8)
    for argument in ("height", "width", "max_freqs", "kind", "scale", "dtype"):
        assert f"{argument}: expected" in str(caught.value)
