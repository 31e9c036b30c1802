"""Stand-ins with recorded weights: patched, compared with what was recorded, and brought back bit for bit."""

import copy
import inspect
import json
import pickle

import foreign
import pytest
import recorded
import torch
import torch.nn.functional as F
from blocks import FIELD, block, call, call_double, fields, made, the_field
from tolerance import assert_within
from torch import nn

import pixnerd_kernels as pk


def fingerprint(model):
    """Everything that a patch could leave behind: classes, attributes, parameters and where they are stored."""
    state = model.state_dict()
    return (
        [(type(module), sorted(vars(module))) for module in model.modules()],
        [(key, value.data_ptr(), value.dtype) for key, value in state.items()],
    )


@pytest.mark.parametrize("name", recorded.MODELS)
def test_recorded_models(name, core_calls):
    model = recorded.model(name)
    inputs = {key: tensor.detach() for key, tensor in recorded.inputs(name).items()}
    assert recorded.disagreements(model, name) == {}, "the stand-in itself"
    model.zero_grad()
    before, seen = model(*inputs.values()), fingerprint(model)

    report = pk.patch(model)
    blocks = [n for n, m in model.named_modules() if isinstance(m, foreign.NerfBlock | foreign.NerfGLUBlock)]
    assert [entry.name for entry in fields(report)] == blocks
    assert not report.left, str(report)
    assert fingerprint(model)[1] == seen[1]
    assert all(parameter.grad is None for parameter in model.parameters())
    core_calls.clear()
    assert recorded.disagreements(model, name) == {}
    assert core_calls.total() > 0

    model.zero_grad()
    report.unpatch()
    assert fingerprint(model) == seen
    core_calls.clear()
    assert torch.equal(model(*inputs.values()), before)
    assert core_calls.total() == 0
    report.unpatch()


def test_forms_are_told_apart():
    assert the_field(pk.patch(block())).form == "w1, w2 normalised"
    assert the_field(pk.patch(block(foreign.TextNerfBlock))).form == "w1 normalised"
    assert the_field(pk.patch(block(foreign.NerfGLUBlock))).form == "gated, w_gate, w1, w2 normalised"


class OtherDim(foreign.NerfBlock):
    def forward(self, x, s):
        first, second = self.param_generator1(s).chunk(2, dim=-1)
        first = F.normalize(first.view(len(x), x.shape[2], -1), dim=-1)
        second = F.normalize(second.view(len(x), -1, x.shape[2]), dim=-1)
        return torch.bmm(F.silu(torch.bmm(self.norm(x), first)), second) + x


class NoResidual(foreign.NerfBlock):
    def forward(self, x, s):
        return super().forward(x, s) - x


class OtherActivation(foreign.NerfBlock):
    activation = staticmethod(F.relu)

    def forward(self, x, s):
        first, second = self.param_generator1(s).chunk(2, dim=-1)
        first = F.normalize(first.view(len(x), x.shape[2], -1), dim=-2)
        second = F.normalize(second.view(len(x), -1, x.shape[2]), dim=-2)
        return torch.bmm(self.activation(torch.bmm(self.norm(x), first)), second) + x


class Gelu(OtherActivation):
    activation = staticmethod(F.gelu)


class Tanh(OtherActivation):
    activation = staticmethod(torch.tanh)


class Swapped(foreign.NerfGLUBlock):
    """The value matrix before the gate."""

    def forward(self, x, s):
        n, size = self.norm(x), x.shape[2]
        value, gate, out = self.param_generator(s).chunk(3, dim=-1)
        gate, value = (F.normalize(w.view(len(x), size, -1), dim=-2) for w in (gate, value))
        out = F.normalize(out.view(len(x), -1, size), dim=-2)
        return torch.bmm(F.silu(torch.bmm(n, gate)) * torch.bmm(n, value), out) + x


class Dropped(foreign.NerfBlock):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.drop = nn.Dropout(0.1)


class TwoGenerators(foreign.NerfBlock):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.param_generator2 = copy.deepcopy(self.param_generator1)


class Stopped(foreign.NerfBlock):
    """The same numbers, another gradient."""

    def forward(self, x, s):
        return super().forward(x, s.detach())


class Frozen(foreign.NerfBlock):
    @torch.no_grad()
    def forward(self, x, s):
        return super().forward(x, s)


class Scaled(foreign.NerfBlock):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.gain = nn.Parameter(torch.ones(1))


class Broken(foreign.NerfBlock):
    def forward(self, x, s):
        raise OSError("nothing here\nat all")


class Unlike(foreign.NerfBlock):
    def forward(self, x, s, t):
        return super().forward(x, s)


class OddRatio(foreign.NerfBlock):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.mlp_ratio = 3


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (OtherDim, "weights normalised over dim -1, which is not replaced"),
        (NoResidual, "no residual, which is not replaced"),
        (OtherActivation, "activation relu, which is not replaced"),
        (Gelu, "activation gelu, which is not replaced"),
        (Tanh, "computes no known form"),
        (Swapped, "computes no known form"),
        (Dropped, "more than a generating layer and a norm: drop"),
        (Scaled, "more than a generating layer and a norm: gain"),
        (TwoGenerators, "2 generating layers"),
        (Stopped, "stops the gradient of s"),
        (Frozen, "its result has no gradient"),
        (Broken, "OSError: nothing here"),
        (Unlike, "takes other arguments"),
        (OddRatio, "do not make two or three matrices of 8 x (mlp ratio * 8)"),
    ],
)
def test_different_blocks_are_left_alone_and_named(cls, reason):
    model = nn.ModuleDict({"odd": block(cls), "usual": block()})
    report = pk.patch(model)
    odd, usual = fields(report)
    assert (odd.name, odd.module, odd.status) == ("odd", cls.__name__, "left")
    assert reason in odd.reason, odd.reason
    assert usual.status == "replaced"
    assert type(model["odd"]) is cls


@pytest.mark.parametrize("what", ["generator", "norm", "first"])
def test_degenerate_weights_are_refused(what):
    module = block()
    with torch.no_grad():
        layer = module.param_generator1[0]
        if what == "norm":
            module.norm.weight.zero_()
        else:
            half = None if what == "generator" else len(layer.weight) // 2
            layer.weight[:half].zero_()
            layer.bias[:half].zero_()
    entry = the_field(pk.patch(module))
    assert entry.status == "left"
    assert "cannot tell" in entry.reason
    assert "zero-initialised or degenerate" in entry.reason


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", [foreign.NerfBlock, foreign.TextNerfBlock, foreign.NerfGLUBlock])
def test_dtypes(cls, dtype):
    module = block(cls, dtype=dtype)
    plain = call(module, dtype)
    entry = the_field(pk.patch(module))
    assert entry.status == "replaced", entry.reason
    out = call(module, dtype)
    if dtype == torch.float64:  # the official norm computes in float32
        torch.testing.assert_close(out, plain)
    else:
        exact = call_double(block(cls, dtype=dtype).double(), dtype)
        assert_within({"out": out}, {"out": plain}, {"out": exact})


class LayerNormBlock(foreign.NerfBlock):
    """A fork's: the norm has a weight and a bias."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.norm = nn.LayerNorm(8)
        nn.init.normal_(self.norm.bias)


class OtherEps(foreign.NerfBlock):
    """A norm that is not what its attributes say."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.norm = foreign.ScaleNorm(8)
        self.norm.eps = 1e-3


class TorchNorm(foreign.NerfBlock):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.norm = nn.RMSNorm(8)


@pytest.mark.parametrize("cls", [LayerNormBlock, OtherEps, TorchNorm])
def test_a_norm_that_the_op_does_not_have_is_called(cls):
    module = block(cls)
    expected = call(module)
    ran = []
    handle = module.norm.register_forward_hook(lambda *_: ran.append(1))
    assert the_field(pk.patch(module)).status == "replaced"
    ran.clear()
    torch.testing.assert_close(call(module), expected)
    assert ran == [1]
    handle.remove()
    torch.testing.assert_close(call(module), expected)


def test_the_callers_state_is_not_disturbed():
    module = block().train()
    module.norm.eval()
    module.norm.weight.requires_grad_(False)
    module.param_generator1[0].bias.grad = torch.ones_like(module.param_generator1[0].bias)
    state, modes = torch.get_rng_state(), [m.training for m in module.modules()]
    with torch.no_grad(), torch.autocast("cpu"):
        assert the_field(pk.patch(module)).status == "replaced"
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in module.modules()] == modes
    assert torch.equal(module.param_generator1[0].bias.grad, torch.ones_like(module.param_generator1[0].bias))
    assert module.param_generator1[0].weight.grad is None
    assert not any(m._forward_hooks for m in module.modules())


def test_inference_mode():
    with torch.inference_mode():
        module = block()
        entry = the_field(pk.patch(module))
        assert entry.status == "replaced"
        assert entry.reason == "no gradients to compare"
        call(module)
    module = block()
    with torch.inference_mode():
        assert the_field(pk.patch(module)).reason == ""


def test_dry_run_and_selection():
    module = block()
    report = pk.patch(module, dry_run=True)
    assert the_field(report).status == "would replace"
    assert type(module) is foreign.NerfBlock
    report.unpatch()
    with pytest.raises(ValueError, match=f"'swish'.*{FIELD}|{FIELD}.*'swish'"):
        pk.patch(module, ops=["swish"])
    assert the_field(pk.patch(module, ops=FIELD)).status == "replaced"
    with pytest.raises(TypeError) as error:
        pk.patch("model", ops=3, verify=1, dry_run=None)
    assert all(name in str(error.value) for name in ("model", "ops", "verify", "dry_run"))


def test_without_verification():
    gated, plain = block(foreign.NerfGLUBlock), block()
    assert the_field(pk.patch(gated, verify=False)).reason == "not verified"
    entry = the_field(pk.patch(plain, verify=False))
    assert entry.status == "left"
    assert "w1 normalised" in entry.reason


def test_the_report_as_table_and_data():
    model = nn.ModuleDict({"usual": block(), "odd": block(NoResidual)})
    report = pk.patch(model, ops=FIELD)
    lines = str(report).splitlines()
    assert "usual" in lines[2]
    assert "replaced: w1, w2 normalised" in lines[2]
    assert "no residual" in lines[3]
    assert lines[-1] == f"1 replaced, 1 left, {report.others} other modules"
    data = json.loads(json.dumps(report.data()))
    assert [entry["status"] for entry in data["entries"]] == ["replaced", "left"]
    assert 0 < data["entries"][0]["error"] < 1e-6
    assert "nothing" in str(pk.patch(nn.Linear(2, 2)))


def test_twice():
    module = block()
    first, second = pk.patch(module), pk.patch(module)
    assert the_field(second).status == "left"
    assert "already patched" in the_field(second).reason
    second.unpatch()
    assert type(module) is not foreign.NerfBlock
    first.unpatch()
    assert type(module) is foreign.NerfBlock


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_are_patched_and_their_own(how, core_calls):
    module = block()
    report = pk.patch(module)
    expected, twin = call(module), how(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    core_calls.clear()
    assert torch.equal(call(twin), expected)
    assert core_calls.total() == 1
    report.unpatch()
    assert type(module) is foreign.NerfBlock
    assert type(twin) is not foreign.NerfBlock
    assert "already patched" in the_field(pk.patch(twin)).reason


def test_replicas_use_their_own_parameters():
    """What nn.DataParallel makes of each module."""
    module = block()
    pk.patch(module)
    replica = module._replicate_for_data_parallel()
    replica.norm = copy.deepcopy(module.norm)
    with torch.no_grad():
        replica.norm.weight.mul_(2)
    x, s = torch.randn(4, 9, 8), torch.randn(4, 24)
    assert not torch.allclose(replica(x, s), module(x, s))


def test_calls_by_name_and_signature():
    module = block()
    signature, expected = inspect.signature(module.forward), call(module)
    x, s = made()
    pk.patch(module)
    assert inspect.signature(module.forward) == signature
    torch.testing.assert_close(module(s=s, x=x), expected)
    torch.testing.assert_close(module(x, s=s), expected)
    with pytest.raises(TypeError):
        module(x, s, wrong=1)
