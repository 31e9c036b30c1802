"""Patched modules around layers that are not plain: cast at every call, changed by functions, adapted."""

import copy

import foreign
import pytest
import recorded
import torch
from blocks import block, call, the_field
from tolerance import relative
from torch import nn

import pixnerd_kernels as pk


def radiance(dtype, operations=foreign.cast_operations):
    torch.manual_seed(5)
    return foreign.NerfGLUBlock(24, 8, 2, operations).to(dtype)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_weights_cast_by_hand(storage, core_calls):
    """Stored in one dtype, called in another."""
    module = radiance(storage)
    entry = the_field(pk.patch(module))
    assert entry.status == "replaced", entry.reason
    twin = radiance(storage)
    core_calls.clear()
    for dtype in (torch.float32, torch.bfloat16):
        out, expected = call(module, dtype), call(twin, dtype)
        assert out.dtype == dtype
        assert torch.linalg.vector_norm(out - expected) < 0.02 * torch.linalg.vector_norm(expected)
    assert core_calls["neural_field_mlp_forward"] == 2


def test_float8_without_casting_is_left():
    entry = the_field(pk.patch(radiance(torch.float8_e4m3fn, foreign.plain_operations)))
    assert entry.status == "left"
    assert "it raised on the probe" in entry.reason


def test_functions_on_weights_keep_their_effect():
    """ComfyUI applies LoRAs at the call, where memory is short."""
    module, twin = radiance(torch.float32), radiance(torch.float32)
    pk.patch(module)
    for each in (module, twin):
        each.param_generator.weight_function = [lambda w: w.flip(0)]
    torch.testing.assert_close(call(module), call(twin))


def test_lora_around_the_generating_layer():
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.down, self.up = base, nn.Linear(24, 2), nn.Linear(2, base.out_features)

        def forward(self, s):
            return self.base(s) + self.up(self.down(s))

    torch.manual_seed(0)
    module, twin = block(), block()
    pk.patch(module)
    module.param_generator1[0] = Adapted(module.param_generator1[0])
    twin.param_generator1[0] = copy.deepcopy(module.param_generator1[0])
    torch.testing.assert_close(call(module), call(twin))


class Adapter(nn.Module):
    """As peft and its like: around a layer, and with its sizes. In training it drops some of its input."""

    def __init__(self, base, dropout=0.0):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base, self.dropout = base, nn.Dropout(dropout)
        self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(self.dropout(x)))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("training", [False, True])
def test_adapters_that_were_there_before(dropout, training, core_calls):
    """The modules around them are patched, and call them; the whole head, which reads weights, says what it met."""
    models = []
    for _ in range(2):
        model = recorded.model("c2i_tiny").train(training)
        torch.manual_seed(3)
        for name, layer in list(model.named_modules()):
            if name.startswith("blocks.") and isinstance(layer, nn.Linear):
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, Adapter(layer, dropout).train(training))
        models.append(model)
    model, twin = models
    report = pk.patch(model)
    kinds = {"neural_field_mlp_packed", "swiglu", "qk_norm_rope", "gated_residual_rms_norm"}
    assert {entry.op for entry in report.replaced} >= kinds, str(report)
    assert [entry.op for entry in report.left] == ["pixel_decoder"], str(report)
    assert "are or hold Adapter" in report.left[0].reason
    core_calls.clear()
    outs = []
    for each in (model, twin):
        torch.manual_seed(4)
        outs.append(each(*recorded.inputs("c2i_tiny").values()))
        outs[-1].square().sum().backward()
    assert core_calls["neural_field_mlp_forward"] > 0
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None:
            assert relative(ours.grad, theirs.grad) < 1e-4


class Stored(nn.Module):
    """A linear layer whose weight is a buffer, as some quantised ones have it, of any dtype."""

    def __init__(self, layer, dtype):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("weight", (8 * layer.weight.detach()).to(dtype))

    def forward(self, x):
        return x @ self.weight.to(x.dtype).mT / 8


@pytest.mark.parametrize("storage", [torch.float32, torch.int8])
def test_generating_layers_without_parameters(storage, core_calls):
    """The block's norm tells the dtype."""
    module = block()
    module.param_generator1[0] = Stored(module.param_generator1[0], storage)
    expected = call(module)
    entry = the_field(pk.patch(module))
    assert entry.status == "replaced", entry.reason
    core_calls.clear()
    torch.testing.assert_close(call(module), expected)
    assert core_calls["neural_field_mlp_forward"] == 1


def test_no_parameter_at_all_is_a_reason():
    module = foreign.FeedForward(16, 32)
    for name in ("w1", "w2", "w3"):
        setattr(module, name, Stored(getattr(module, name), torch.int8))
    (entry,) = pk.patch(module).left
    assert "no parameter tells the dtype" in entry.reason
