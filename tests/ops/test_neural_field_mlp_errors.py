"""Bad input: TypeError or ValueError that names the argument, what was expected and what came, all at once."""

import pytest
import torch
from fields import Case, fused_field, pack

from pixnerd_kernels import neural_field_mlp, neural_field_mlp_packed, split_params

CASE = Case(n=2, s=3, d1=4, d2=6, gated=True)


def call(**changes):
    return neural_field_mlp(**{**CASE.inputs(), **changes})


def call_packed(**changes):
    tensors = CASE.inputs()
    arguments = {
        "x": tensors["x"],
        "params": pack(tensors["w1"], tensors["w2"], tensors["w_gate"]),
        "hidden": 6,
        "gated": True,
        "norm_weight": tensors["norm_weight"],
    }
    return neural_field_mlp_packed(**{**arguments, **changes})


def split(**changes):
    return split_params(**{"params": torch.zeros(2, 48), "channels": 4, "hidden": 6, **changes})


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


WRONG = [
    # ranks
    (
        call,
        {"x": zeros(3, 4)},
        ValueError,
        ["x: expected [N, S, D1] (3 dimensions)", "[3, 4] torch.float32 on cpu"],
    ),
    (call, {"w1": zeros(4, 6)}, ValueError, ["w1: expected [N, D1, D2] (3 dimensions)", "got [4, 6]"]),
    (
        call,
        {"w2": zeros(1, 2, 6, 4)},
        ValueError,
        ["w2: expected [N, D2, D1] (3 dimensions)", "got [1, 2, 6, 4]"],
    ),
    (call, {"w_gate": zeros(6)}, ValueError, ["w_gate: expected [N, D1, D2] (3 dimensions)", "got [6]"]),
    (
        call,
        {"norm_weight": zeros(1, 4)},
        ValueError,
        ["norm_weight: expected [D1] (1 dimensions)", "got [1, 4]"],
    ),
    (
        call_packed,
        {"params": zeros(2, 4, 18)},
        ValueError,
        ["params: expected [N, parameters]", "got [2, 4, 18]"],
    ),
    (
        split,
        {"params": zeros(48)},
        ValueError,
        ["params: expected [N, parameters] (2 dimensions)", "got [48]"],
    ),
    # sizes
    (call, {"w1": zeros(3, 4, 6)}, ValueError, ["w1: expected the shape [2, 4, 6]", "got [3, 4, 6]"]),
    (call, {"w2": zeros(2, 4, 6)}, ValueError, ["w2: expected the shape [2, 6, 4]", "got [2, 4, 6]"]),
    (call, {"w_gate": zeros(2, 4, 5)}, ValueError, ["w_gate: expected the shape [2, 4, 6]", "got [2, 4, 5]"]),
    (call, {"norm_weight": zeros(3)}, ValueError, ["norm_weight: expected [4]", "got [3]"]),
    (
        call,
        {
            "x": zeros(2, 3, 0),
            "w1": zeros(2, 0, 6),
            "w2": zeros(2, 6, 0),
            "w_gate": None,
            "norm_weight": None,
        },
        ValueError,
        ["x: expected at least one channel", "got [2, 3, 0]"],
    ),
    (
        call,
        {"w1": zeros(2, 4, 0), "w2": zeros(2, 0, 4), "w_gate": None},
        ValueError,
        ["w1: expected at least one hidden unit", "got [2, 4, 0]"],
    ),
    (
        call_packed,
        {"params": zeros(2, 48)},
        ValueError,
        ["params: expected 3 * 4 * 6 = 72 columns", "got [2, 48]"],
    ),
    (call_packed, {"gated": False}, ValueError, ["params: expected 2 * 4 * 6 = 48 columns", "got [2, 72]"]),
    (call_packed, {"params": zeros(1, 72)}, ValueError, ["params: expected 2 rows", "got [1, 72]"]),
    (call_packed, {"hidden": 0}, ValueError, ["hidden: expected an integer of at least 1, got 0"]),
    (split, {"hidden": 7}, ValueError, ["params: expected 2 * 4 * 7 = 56 columns", "got [2, 48]"]),
    (split, {"gated": True}, ValueError, ["params: expected 3 * 4 * 6 = 72 columns", "got [2, 48]"]),
    (split, {"channels": -4}, ValueError, ["channels: expected an integer of at least 1, got -4"]),
    # devices
    (
        call,
        {"w1": zeros(2, 4, 6, device="meta")},
        ValueError,
        ["w1: expected the device of x (cpu)", "on meta"],
    ),
    (
        call,
        {"norm_weight": zeros(4, device="meta")},
        ValueError,
        ["norm_weight: expected the device of x", "meta"],
    ),
    (
        call_packed,
        {"params": zeros(2, 72, device="meta")},
        ValueError,
        ["params: expected the device of x", "meta"],
    ),
    # dtypes
    (call, {"w2": zeros(2, 6, 4).double()}, TypeError, ["w2: expected the dtype of x", "torch.float64"]),
    (
        call,
        {"x": zeros(2, 3, 4).bfloat16()},
        TypeError,
        ["w1: expected the dtype of x (torch.bfloat16)", "float32"],
    ),
    (
        call,
        {"x": zeros(2, 3, 4).int()},
        TypeError,
        ["x: expected a float32, float64, bfloat16", "torch.int32"],
    ),
    (call, {"norm_weight": zeros(4).long()}, TypeError, ["norm_weight: expected a float32", "torch.int64"]),
    (
        call,
        {"w_gate": zeros(2, 4, 6).to(torch.complex64)},
        TypeError,
        ["w_gate: expected a float32", "complex64"],
    ),
    (
        call_packed,
        {"params": zeros(2, 72).half()},
        TypeError,
        ["params: expected the dtype of x", "torch.float16"],
    ),
    (split, {"params": zeros(2, 48).int()}, TypeError, ["params: expected a float32", "torch.int32"]),
    # not tensors, numbers or names at all
    (call, {"x": [[1.0]]}, TypeError, ["x: expected a tensor [N, S, D1], got [[1.0]] (list)"]),
    (call, {"w1": None}, TypeError, ["w1: expected a tensor [N, D1, D2], got None"]),
    (call, {"norm_weight": 1.0}, TypeError, ["norm_weight: expected a tensor [D1], got 1.0 (float)"]),
    (call, {"norm_eps": "small"}, TypeError, ["norm_eps: expected a number, got 'small' (str)"]),
    (call, {"residual": "no"}, TypeError, ["residual: expected True or False, got 'no' (str)"]),
    (call, {"normalize": "w1"}, TypeError, ["normalize: expected a sequence of names", "'w1' (str)"]),
    (call, {"normalize": None}, TypeError, ["normalize: expected a sequence of names", "None"]),
    (call_packed, {"hidden": 6.0}, TypeError, ["hidden: expected an integer, got 6.0 (float)"]),
    (call_packed, {"gated": 1}, TypeError, ["gated: expected True or False, got 1 (int)"]),
    (call_packed, {"params": None}, TypeError, ["params: expected a tensor [N, parameters], got None"]),
    (split, {"channels": "4"}, TypeError, ["channels: expected an integer, got '4' (str)"]),
    (split, {"gated": None}, TypeError, ["gated: expected True or False, got None"]),
    # names and ranges
    (
        call,
        {"normalize": ("w1", "w3")},
        ValueError,
        ["normalize: expected one of 'w1', 'w2', 'w_gate', got 'w3'"],
    ),
    (
        call,
        {"activation": "tanh"},
        ValueError,
        ["activation: expected one of 'silu', 'gelu', 'relu', got 'tanh'"],
    ),
    (call, {"norm_eps": -1e-6}, ValueError, ["norm_eps: expected a finite number of at least 0, got -1e-06"]),
    (call, {"weight_eps": float("nan")}, ValueError, ["weight_eps: expected a finite number", "nan"]),
    (call_packed, {"weight_eps": float("inf")}, ValueError, ["weight_eps: expected a finite number", "inf"]),
]


@pytest.mark.parametrize(("function", "changes", "kind", "parts"), WRONG)
def test_the_message_names_the_argument_what_was_expected_and_what_came(function, changes, kind, parts):
    with pytest.raises(kind) as caught:
        function(**changes)
    for part in parts:
        assert part in str(caught.value)


def test_every_problem_is_told_at_once():
    with pytest.raises(TypeError) as caught:
        call(
            w1=zeros(2, 4, 6).double(),
            w2=zeros(2, 5, 4),
            norm_weight=zeros(3),
            normalize=("w1", "w4"),
            activation="swish",
            norm_eps=-1,
            weight_eps=None,
        )
    message = str(caught.value)
    assert message.startswith("neural_field_mlp: ")
    told = [line.split(":")[0] for line in message.removeprefix("neural_field_mlp: ").split("; ")]
    assert sorted(told) == sorted(
        ["w1", "w2", "norm_weight", "normalize", "activation", "norm_eps", "weight_eps"]
    )


def test_the_unchanged_calls_are_right(any_isa):
    expected = fused_field(CASE, **CASE.inputs())
    assert torch.equal(call(), expected)
    assert torch.equal(call_packed(), expected)


def test_options_are_given_by_name():
    tensors = CASE.inputs()
    with pytest.raises(TypeError, match="positional"):
        neural_field_mlp(tensors["x"], tensors["w1"], tensors["w2"], tensors["w_gate"])


def test_errors_under_compile():
    """The same message reaches the user of a compiled function."""
    torch.compiler.reset()
    with pytest.raises(Exception, match="w2: expected the shape"):
        torch.compile(call, backend="aot_eager")(w2=zeros(2, 4, 6))
    torch.compiler.reset()


def test_the_op_itself_refuses_what_the_core_would_misread(compiled):
    """Exported programs call it without the public function's checks."""
    field = torch.ops.pixnerd.neural_field_mlp
    options = ([True] * 3, "silu", True, 1e-6, 1e-12, "")
    x, w1, w2 = zeros(2, 3, 4), zeros(2, 4, 8), zeros(2, 8, 4)
    with pytest.raises(ValueError, match=r"w2: expected \[2, 8, 4\] torch.float32 on cpu, got \[2, 8, 3\]"):
        field(x, w1, zeros(2, 8, 3), None, None, *options)
    with pytest.raises(ValueError, match=r"w1: expected .* got .* torch.float16"):
        field(x, w1.half(), w2, None, None, *options)
    with pytest.raises(ValueError, match=r"norm_weight: expected \[4\], got \[5\]"):
        field(x, w1, w2, None, zeros(5), *options)
    with pytest.raises(ValueError, match=r"grad: expected \[2, 3, 4\]"):
        torch.ops.pixnerd.neural_field_mlp_backward(
            zeros(2, 3, 5), x, w1, w2, None, None, True, True, *options
        )
    assert torch.equal(field(x, w1, w2, None, None, *options), x)
