"""The backward in Gluon for sm_90, without a GPU: its formulas and the order of what it does, run as plain Python."""

from pathlib import Path

import pytest
import torch
from gluon_on_a_cpu import Kernels

import pixnerd_kernels
from pixnerd_kernels.ops.neural_field_mlp import reference

HOPPER = Path(pixnerd_kernels.__file__).parent / "ops" / "neural_field_mlp" / "triton" / "hopper.py"
PATCHES = 5
NAMES = ("dx", "d1", "d2", "d_norm")


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Tensors are so small that more of them wait for each other."""
    threads(1)


@pytest.fixture(scope="module", params=[True, False], ids=["late", "at_once"])
def kernels(request):
    return Kernels(HOPPER, request.param)


def inputs(pixels):
    draw = torch.Generator().manual_seed(pixels)
    shapes = {"grad": (pixels, 64), "x": (pixels, 64), "w1": (64, 128), "w2": (128, 64)}
    made = {
        name: torch.randn(PATCHES, *size, generator=draw, dtype=torch.float64)
        for name, size in shapes.items()
    }
    # Columns that are shorter than eps.
    made["w1"][1, :, 70] = 1e-14
    made["w2"][2, :, 9] = 1e-14
    return {**made, "norm_weight": torch.randn(64, generator=draw, dtype=torch.float64)}


def run(kernels, made, programs, in_place=False, unit=(True, True), residual=True):
    """dx, d1, d2 and d_norm, each patch's."""
    pixels = made["x"].shape[1]
    flat = {name: tensor.clone().flatten() for name, tensor in made.items()}
    alike = {"dx": "x", "d1": "w1", "d2": "w2"}
    out = {name: torch.full_like(flat[like], float("nan")) for name, like in alike.items()}
    if in_place:
        out = {"dx": flat["grad"], "d1": flat["w1"], "d2": flat["w2"]}
    out["d_norm"] = torch.full((PATCHES * 64,), float("nan"), dtype=torch.float64)
    strides = {f"{name}_patch": made[name].stride(0) for name in ("grad", "x", "w1", "w2")}
    strides |= {f"{name}_row": made[name].stride(1) for name in ("grad", "x", "w1", "w2")}
    strides |= {f"d{i}_{kind}": strides[f"w{i}_{kind}"] for i in (1, 2) for kind in ("patch", "row")}
    kernels.run(
        "neural_field_mlp_backward_hopper", programs, **flat, **out, **strides, patches=PATCHES,
        pixels=torch.tensor(pixels), norm_step=1, norm_eps=1e-6, weight_eps=1e-12,
        UNIT1=unit[0], UNIT2=unit[1], RESIDUAL=residual, FULL=pixels % 128 == 0,
    )  # fmt: skip
    shapes = (made["x"].shape, made["w1"].shape, made["w2"].shape, (PATCHES, 64))
    return [out[name].view(shape) for name, shape in zip(NAMES, shapes, strict=True)]


def expected(made, unit=(True, True), residual=True):
    """By autograd through the reference."""
    x, w1, w2 = (made[name].clone().requires_grad_() for name in ("x", "w1", "w2"))
    norm = made["norm_weight"].expand(PATCHES, 64).clone().requires_grad_()
    parts = [
        reference.forward(
            x[i : i + 1],
            w1[i : i + 1],
            w2[i : i + 1],
            None,
            norm[i],
            (*unit, True),
            "silu",
            residual,
            1e-6,
            1e-12,
        )
        for i in range(PATCHES)
    ]
    torch.cat(parts).backward(made["grad"])
    return x.grad, w1.grad, w2.grad, norm.grad


def assert_close(found, wanted):
    for name, a, b in zip(NAMES, found, wanted, strict=True):
        error = (a - b).norm() / b.norm()
        assert error < 1e-12, f"{name}: {error:.1e}"


@pytest.mark.parametrize("programs", [1, 2, PATCHES])
@pytest.mark.parametrize("pixels", [256, 65, 128, 300, 400])
def test_every_gradient(kernels, pixels, programs):
    """Whole and begun tiles, an odd and an even number, patches that a program has alone and in a row."""
    made = inputs(pixels)
    assert_close(run(kernels, made, programs), expected(made))


def test_gradients_in_place_of_what_they_are_of(kernels):
    made = inputs(256)
    assert_close(run(kernels, made, 2, in_place=True), expected(made))


@pytest.mark.parametrize(
    ("unit", "residual"), [((True, False), True), ((False, True), True), ((False, False), False)]
)
def test_weights_as_they_are_and_no_residual(kernels, unit, residual):
    made = inputs(128)
    assert_close(run(kernels, made, 2, unit=unit, residual=residual), expected(made, unit, residual))


@pytest.mark.parametrize(
    "missing", ["    fence_async_shared()\n", "    barrier()\n", "async_copy.wait_group(0)\n"]
)
def test_a_missing_fence_barrier_or_wait_is_seen(tmp_path, missing):
    """All of a kind, left out of the loop over tiles. Triton itself adds barriers between stores and loads."""
    source = HOPPER.read_text()
    begin = source.index("def backward_tile(")
    end = source.index("\n\n\n", begin)
    tile = source[begin:end]
    assert missing in tile
    without = tile.replace(missing, missing.replace(missing.strip(), "pass"))
    broken = tmp_path / "broken.py"
    broken.write_text(source[:begin] + without + source[end:])
    made = inputs(256)
    with pytest.raises(AssertionError):
        assert_close(run(Kernels(broken, True), made, 2), expected(made))


PLAIN = {
    "dtype": torch.bfloat16,
    "pixels": 256,
    "hidden": 128,
    "gap": 0,
    "activation": "silu",
    "arch": 90,
    "need": True,
}


@pytest.mark.parametrize(
    ("change", "kernel"),
    [
        ({}, "neural_field_mlp_backward_hopper"),
        ({"dtype": torch.float16, "pixels": 1024}, "neural_field_mlp_backward_hopper"),
        ({"gap": 16}, "neural_field_mlp_backward_hopper"),
        ({"dtype": torch.float32}, "neural_field_mlp_backward"),
        ({"pixels": 64}, "neural_field_mlp_backward"),
        ({"pixels": 1025}, "neural_field_mlp_backward"),  # its sums would lose digits
        ({"hidden": 96}, "neural_field_mlp_backward"),
        ({"gap": 8}, "neural_field_mlp_backward"),  # Triton could not know that rows begin on 16 bytes
        ({"gap": 1}, "neural_field_mlp_backward"),
        ({"activation": "relu"}, "neural_field_mlp_backward"),
        ({"need": False}, "neural_field_mlp_backward"),
        ({"arch": 80}, "neural_field_mlp_backward"),
        ({"arch": 100}, "neural_field_mlp_backward"),
    ],
)
def test_what_it_takes(change, kernel):
    pytest.importorskip("triton")
    from pixnerd_kernels.ops.gpu.launch import KNOWN_TRITON, Target, capture

    if not KNOWN_TRITON:
        pytest.skip("this Triton takes the other kernel")
    from pixnerd_kernels.ops.neural_field_mlp.triton import backward

    case = PLAIN | change

    def empty(*shape):
        return torch.empty(shape, dtype=case["dtype"], device="meta")

    hidden = case["hidden"]
    params = empty(7, 2 * 64 * hidden + case["gap"])[:, : 2 * 64 * hidden]
    w1, w2 = params[:, : 64 * hidden].view(7, 64, hidden), params[:, 64 * hidden :].view(7, hidden, 64)
    x, targets = empty(7, case["pixels"], 64), [w1, w2, None] if case["need"] else [None] * 3
    options = ((True, True, True), case["activation"], True, 1e-6, 1e-12)
    with capture(Target("cuda", case["arch"], 132, "a GPU")) as launches:
        backward(x, x, w1, w2, None, empty(64), True, targets, *options)
    assert [launch.name for launch in launches] == [kernel]
