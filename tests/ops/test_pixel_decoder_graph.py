"""pixel_decoder under autograd, autocast, opcheck, torch.compile and torch.export."""

import functools

import pytest
import torch
from decoders import Case, decode, expected, op_arguments, plain_decoder, results
from derivatives import BY_KERNELS, KINDS, assert_derivatives
from tolerance import assert_same, assert_within

from pixnerd_kernels import nn, use_backend

CASES = [
    Case(patch=2, d=5, d1=4, d2=6),
    Case(patch=2, d=5, d1=4, d2=6, gated=True, outputs=None, bias=False, encoding="dct_integer"),
    Case(patch=2, d=5, d1=4, d2=6, blocks=1, final_norm=False, normalize=("w1",), encoding="rope"),
]
cases = pytest.mark.parametrize("case", CASES, ids=["c2i", "radiance", "t2i"])


@pytest.mark.parametrize("save_weights", [False, True], ids=["recompute", "save"])
@cases
def test_opcheck(any_isa, case, save_weights):
    torch.library.opcheck(
        torch.ops.pixnerd.pixel_decoder.default, op_arguments(case, any_isa.name, save_weights)
    )


@pytest.mark.parametrize("every", [False, True], ids=["image alone", "every gradient"])
@cases
def test_opcheck_backward(any_isa, case, every):
    arguments = op_arguments(case, any_isa.name, leaves=False)
    flat = [t for a in arguments[:10] for t in (a if isinstance(a, list) else [a])]
    needs = [index == 0 or (every and t is not None) for index, t in enumerate(flat)]
    call = (case.upstream(), torch.empty(0), needs, *arguments)
    torch.library.opcheck(torch.ops.pixnerd.pixel_decoder_backward.default, call)


@cases
def test_saved_weights_may_have_any_strides(any_isa, case):
    """Kernels read rows whose neighbours are neighbours in memory."""
    arguments = op_arguments(case, any_isa.name, save_weights=True, leaves=False)
    _, saved = torch.ops.pixnerd.pixel_decoder(*arguments)
    needs = [t is not None for a in arguments[:10] for t in (a if isinstance(a, list) else [a])]
    backward = torch.ops.pixnerd.pixel_decoder_backward
    dense, apart = (
        backward(case.upstream(), weights, needs, *arguments) for weights in (saved, saved.mT.contiguous().mT)
    )
    assert all(torch.equal(one, other) for one, other in zip(dense, apart, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("save_weights", [False, True], ids=["recompute", "save"])
@cases
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives(any_isa, case, kind, save_weights, dtype):
    any_isa.may_idle = kind not in BY_KERNELS
    assert_derivatives(
        kind,
        lambda **tensors: (decode(case, tensors, save_weights=save_weights, workspace=1),),
        lambda **tensors: (plain_decoder(case, tensors),),
        case.inputs(dtype),
    )


def test_a_tensor_that_is_two_arguments_has_both_gradients(any_isa):
    """Of several incoming gradients at once: the weight of a block's norm and of the last one."""
    case, upstream = CASES[0], torch.stack([CASES[0].upstream(), -2 * CASES[0].upstream()])
    shared = case.inputs()["norm_weight"].requires_grad_()
    tensors = {name: shared if name in ("norm_weight", "norm.0") else t for name, t in case.inputs().items()}
    found = [
        torch.autograd.grad(function(case, tensors), shared, upstream, is_grads_batched=True)[0]
        for function in (decode, plain_decoder)
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_backward_takes_the_backend_of_its_forward(any_isa):
    case = CASES[0]
    tensors = {name: tensor.requires_grad_() for name, tensor in case.inputs().items()}
    y = decode(case, tensors)
    with use_backend("cpu" if any_isa.name == "reference" else "reference"):
        y.backward(case.upstream())
    assert tensors["hidden"].grad is not None
    assert bool(any_isa.calls["pixel_decoder_backward"]) == any_isa.compiled


@pytest.mark.parametrize("wide", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_autocast(any_isa, wide):
    """Image, hidden and generators are cast first; gradients come back in the inputs' own dtypes."""
    case = CASES[0]
    tensors, upstream = case.inputs(wide), case.upstream(torch.bfloat16)
    cast = ("image", "hidden", "generator", "bias")
    half = {name: t.bfloat16() if name.startswith(cast) else t for name, t in tensors.items()}
    function = functools.partial(decode, case)
    by_hand = results(function, half, upstream)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        out = results(function, tensors, upstream)
    assert out["y"].dtype == torch.bfloat16
    for name, tensor in out.items():
        assert name == "y" or tensor.dtype == wide
        assert torch.equal(tensor, by_hand[name].to(tensor.dtype)), name


@pytest.mark.float64
def test_autocast_leaves_float64_alone(any_isa):
    case, dtype = Case(), torch.float64
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        out = results(functools.partial(decode, case), case.inputs(dtype), case.upstream(dtype))
    assert_within(out, *expected(case, dtype))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_compiled_equals_eager(bits, compiler, case, **options):
    def twice(tensors):
        return decode(case, tensors, workspace=case.workspace(2), **options) * 2

    tensors, upstream = case.inputs(), case.upstream()
    out = results(torch.compile(twice, fullgraph=True, **compiler), tensors, upstream)
    by_hand = results(twice, tensors, upstream)

    def references():
        return tuple({name: 2 * tensor for name, tensor in each.items()} for each in expected(case))

    assert_same(out, by_hand, bits, references)


@pytest.mark.parametrize("save_weights", [False, True], ids=["recompute", "save"])
@cases
def test_compile_with_aot_eager(any_isa, case, save_weights):
    assert_compiled_equals_eager(
        any_isa.one_kernel, {"backend": "aot_eager"}, case, save_weights=save_weights
    )


def test_compile_with_inductor(any_isa):
    assert_compiled_equals_eager(any_isa.one_kernel, {}, CASES[0])


def test_compile_for_any_batch(any_isa):
    """One graph with a symbolic number of images."""
    case = CASES[0]
    tensors = case.inputs()

    def run(image, hidden):
        return decode(case, {**tensors, "image": image, "hidden": hidden})

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3, 5):
        sample = Case(**{**vars(case), "batch": batch}).inputs()
        assert torch.equal(
            compiled(sample["image"], sample["hidden"]), run(sample["image"], sample["hidden"])
        )


def test_export(any_isa):
    """The exported program holds one decoder, and runs on another number of images."""
    decoder = nn.PixelDecoder(3, 5, 4, 2, 2, 2, max_freqs=4)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        decoder, (torch.randn(2, 3, 4, 6), torch.randn(2, 6, 5)), dynamic_shapes=({0: batch}, {0: batch})
    )
    targets = [str(node.target) for node in program.graph.nodes if "pixnerd" in str(node.target)]
    assert targets == ["pixnerd.pixel_decoder.default"]
    image, hidden = torch.randn(5, 3, 4, 6), torch.randn(5, 6, 5)
    assert torch.equal(program.module()(image, hidden), decoder(image, hidden))


def test_meta_tensors_run_no_kernel():
    case = CASES[1]
    tensors = {name: tensor.to("meta") for name, tensor in case.inputs(torch.bfloat16).items()}
    y = decode(case, tensors)
    assert (y.device.type, y.dtype, y.shape) == ("meta", torch.bfloat16, case.upstream().shape)
