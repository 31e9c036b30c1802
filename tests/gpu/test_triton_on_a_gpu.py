"""What only a GPU can show of the Triton kernels: streams, devices, graphs, compilation and large tensors."""

import pytest
import torch
from tolerance import assert_within

from pixnerd_kernels import neural_field_mlp, neural_field_mlp_packed, use_backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def triton():
    with use_backend("triton"):
        yield


def inputs(patches=64, dtype=torch.bfloat16, device="cuda"):
    draw = torch.Generator(device).manual_seed(0)
    shapes = {"x": (patches, 256, 64), "params": (patches, 2 * 64 * 128), "norm_weight": (64,)}
    return {
        name: torch.randn(shape, generator=draw, device=device).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def step(tensors):
    """Output and gradients."""
    y = neural_field_mlp_packed(hidden=128, **tensors)
    return [y.detach(), *torch.autograd.grad(y, list(tensors.values()), torch.ones_like(y))]


def assert_equal(out, expected):
    for a, b in zip(out, expected, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


def assert_right(out, tensors):
    """The results of a step lie within the tolerance; returns those in float64."""
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    with use_backend("reference"):
        plain, exact = step(tensors), step(wide)
    assert_within(*(dict(zip(["y", *tensors], r, strict=True)) for r in (out, plain, exact)))
    return exact


def test_another_stream():
    """Inputs are written on the stream late: a kernel on another stream would read zeros."""
    tensors = inputs()
    expected = step(tensors)
    late = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for name, tensor in late.items():
            tensor.copy_(tensors[name].detach())
        out = step({name: tensor.requires_grad_() for name, tensor in late.items()})
    stream.synchronize()
    assert_equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_another_device():
    expected = step(inputs())
    moved = {name: tensor.detach().to("cuda:1").requires_grad_() for name, tensor in inputs().items()}
    assert_equal(step(moved), expected)


def test_cuda_graph():
    """Captured once, replayed on new values."""
    tensors = inputs()
    step(tensors)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(tensors)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = step(tensors)
    with torch.no_grad():
        tensors["x"].mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert_equal(captured, step(tensors))


def test_inductor():
    tensors = inputs()
    compiled = torch.compile(lambda **t: neural_field_mlp_packed(hidden=128, **t) * 2, fullgraph=True)
    y = compiled(**tensors)
    out = [y.detach(), *torch.autograd.grad(y, list(tensors.values()), torch.ones_like(y))]
    assert_right([result / 2 for result in out], tensors)


def test_the_same_bits_every_time():
    tensors = inputs(patches=2048)
    expected = step(tensors)
    for _ in range(3):
        assert_equal(step(tensors), expected)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="its kernel is for sm_90",
)
@pytest.mark.parametrize(
    "options", [{}, {"normalize": ("w1",), "residual": False}, {"normalize": ()}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("patches", "pixels"), [(7, 256), (3, 65), (300, 128), (5, 300), (140, 1024)])
def test_the_backward_on_hopper(patches, pixels, dtype, options):
    """Whole and begun tiles, programs with one patch and with several, strided gradients."""
    from pixnerd_kernels.ops.gpu.launch import watch

    draw = torch.Generator("cuda").manual_seed(pixels)

    def drawn(*shape):
        return torch.randn(shape, generator=draw, device="cuda").to(dtype)

    tensors = {"x": drawn(patches, pixels, 64), "w1": drawn(patches, 64, 128), "w2": drawn(patches, 128, 64)}
    tensors["norm_weight"] = 1 + drawn(64) / 4
    upstream = drawn(patches, pixels, 80)[:, :, 8:72]

    def gradients(backend, wide=False):
        leaves = {k: (t.double() if wide else t).detach().requires_grad_() for k, t in tensors.items()}
        with use_backend(backend):
            y = neural_field_mlp(**leaves, **options)
            found = torch.autograd.grad(y, list(leaves.values()), upstream.to(y.dtype))
        return dict(zip(leaves, found, strict=True))

    names = []
    with watch(lambda launch: names.append(launch.name) or True):
        out = gradients("triton")
    assert "neural_field_mlp_backward_hopper" in names
    assert_within(out, gradients("reference"), gradients("reference", wide=True))
    assert_equal(gradients("triton").values(), out.values())


def test_more_elements_than_32_bits_count():
    """The last patch begins beyond 2^31 elements."""
    patches = (1 << 31) // (256 * 64) + 64
    needed = 3 * patches * 256 * 64 * 2
    if torch.cuda.mem_get_info()[0] < 2 * needed:
        pytest.skip("too little memory")
    x = torch.zeros(patches, 256, 64, dtype=torch.bfloat16, device="cuda")
    params = inputs(1)["params"].detach().expand(patches, -1)
    x[-1].normal_()
    last = {"x": x[-1:].clone(), "params": params[-1:].clone()}
    with torch.no_grad():
        y = neural_field_mlp_packed(x, params, hidden=128)
        with use_backend("reference"):
            plain = neural_field_mlp_packed(**last, hidden=128)
            exact = neural_field_mlp_packed(**{name: t.double() for name, t in last.items()}, hidden=128)
    assert_within({"y": y[-1:]}, {"y": plain}, {"y": exact})
    assert not y[:1].any()


def test_tf32_only_where_it_is_allowed():
    """At "highest" float32 keeps the rule; at "high" it is faster and less exact."""
    tensors = inputs(8, torch.float32)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        out = step(tensors)
        torch.set_float32_matmul_precision("high")
        loose = step(tensors)
    finally:
        torch.set_float32_matmul_precision(before)
    exact = assert_right(out, tensors)
    assert (loose[0] - exact[0]).norm() > 4 * (out[0] - exact[0]).norm()


def test_the_hardware_tanh():
    """What `pieces.activate` relies on: an error below 2^-11 of the value, and exactly 1 where it has saturated."""
    import triton_kernels

    below = torch.linspace(-8, 8, 1 << 20, device="cuda")
    assert (
        (triton_kernels.tanh(below).double() / below.double().tanh() - 1).nan_to_num().abs() < 2**-11
    ).all()
    beyond = torch.logspace(3, 126, 1 << 16, base=2, device="cuda")
    assert (triton_kernels.tanh(beyond) == 1).all()
    assert (triton_kernels.tanh(-beyond) == -1).all()
