"""Patched modules among what else people do to modules: hooks, wrappers, checkpointing, compilation, offloading."""

import warnings

import foreign
import pytest
import recorded
import torch
import torch.distributed as dist
from blocks import FIELD, block, call, made, the_field
from torch import nn
from torch.utils.checkpoint import checkpoint

import pixnerd_kernels as pk
from pixnerd_kernels.models import PixNerd, PixNerdConfig


def test_hooks_run():
    """On the block, on the generating layer, and on the norm that the op would have swallowed."""
    module = block()
    pk.patch(module)
    ran = []
    for name, child in (("block", module), ("generator", module.param_generator1), ("norm", module.norm)):
        child.register_forward_pre_hook(lambda *_, name=name: ran.append(f"before {name}"))
        child.register_forward_hook(lambda *_, name=name: ran.append(f"after {name}"))
        child.register_full_backward_hook(lambda *_, name=name: ran.append(f"back {name}"))
    module(*(tensor.requires_grad_() for tensor in made())).sum().backward()
    expected = {
        f"{when} {name}" for when in ("before", "after", "back") for name in ("block", "generator", "norm")
    }
    assert set(ran) == expected


def test_a_hook_that_changes_the_norm_keeps_its_effect():
    module, twin = block(), block()
    pk.patch(module)
    for each in (module, twin):
        each.norm.register_forward_hook(lambda *args: args[2] * 1.5)
    torch.testing.assert_close(call(module), call(twin))


def test_old_backward_hooks_are_refused():
    module = block()
    module.register_backward_hook(lambda *_: None)
    assert "register_full_backward_hook" in the_field(pk.patch(module)).reason


class OwnCall(foreign.NerfBlock):
    def __call__(self, *args):
        return super().__call__(*args)


def test_replaced_methods_are_refused():
    module = block()
    module.forward = module.forward
    assert "replaced on the instance" in the_field(pk.patch(module)).reason
    assert "overrides __call__" in the_field(pk.patch(block(OwnCall))).reason
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(block(), made())
    assert "TorchScript" in the_field(pk.patch(traced)).reason


class Recomputing(foreign.NerfBlock):
    """A subclass with its own forward, around the same thing."""

    def forward(self, x, s):
        return checkpoint(super().forward, x, s, use_reentrant=False)


def test_a_subclass_is_judged_by_what_it_computes():
    module = block(Recomputing)
    expected = call(module)
    assert the_field(pk.patch(module)).status == "replaced"
    torch.testing.assert_close(call(module), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, core_calls):
    gradients = []
    for patched in (False, True):
        module = block()
        if patched:
            pk.patch(module)
        x, s = (tensor.requires_grad_() for tensor in made())
        core_calls.clear()
        checkpoint(module, x, s, use_reentrant=reentrant).square().sum().backward()
        gradients.append([x.grad, s.grad, *(p.grad for p in module.parameters())])
    assert core_calls["neural_field_mlp_forward"] == 2
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_shared_modules_are_patched_once():
    shared = block()
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    report = pk.patch(model)
    assert the_field(report).also == ("b.0",)
    assert "a (= b.0)" in str(report)
    report.unpatch()
    assert type(shared) is foreign.NerfBlock


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_before_the_patch(inplace, core_calls):
    """The compiled code guards the module's type: it is compiled anew with the op in it, and again without."""
    module = block()
    if inplace:
        module.compile(backend="eager")
    model = module if inplace else torch.compile(module, backend="eager")
    expected = call(model)
    report = pk.patch(model)
    assert the_field(report).status == "replaced"
    core_calls.clear()
    torch.testing.assert_close(call(model), expected)
    assert core_calls.total() == 1
    report.unpatch()
    assert torch.equal(call(model), expected)
    assert core_calls.total() == 1


def test_compiled_after_the_patch(core_calls):
    """Without a graph break, and with one graph for blocks that are alike."""
    model = nn.ModuleList([block(), block()])
    expected = call(model[0])
    pk.patch(model)
    core_calls.clear()
    counter = torch._dynamo.testing.CompileCounter()
    for module in model:
        torch.testing.assert_close(call(torch.compile(module, backend=counter, fullgraph=True)), expected)
    assert core_calls.total() == 2
    assert type(model[0]) is type(model[1])


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed(process_group, core_calls):
    module, twin = block(), block()
    wrapped = nn.parallel.DistributedDataParallel(module)
    assert the_field(pk.patch(wrapped)).name == "module"
    core_calls.clear()
    for model in (wrapped, twin):
        model(*made()).square().sum().backward()
    assert core_calls.total() == 2
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_fully_sharded(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    after = block()
    fully_shard(after, mesh=mesh)
    assert "patch before fully_shard" in the_field(pk.patch(after)).reason

    before, expected = block(), call(block())
    report = pk.patch(before)
    fully_shard(before, mesh=mesh)
    torch.testing.assert_close(call(before), expected)
    with pytest.raises(RuntimeError, match=r"\(the model\).*fully_shard"):
        report.unpatch()


def test_inside_the_first_fsdp():
    """Its wrapper keeps parameters flat; a class of its name is enough to be careful."""
    wrapper = type("FullyShardedDataParallel", (nn.Module,), {})()
    wrapper.module = block()
    assert "patch before wrapping" in the_field(pk.patch(wrapper)).reason


def test_data_parallel():
    model = nn.DataParallel(block())
    expected = call(model)
    assert the_field(pk.patch(model)).name == "module"
    torch.testing.assert_close(call(model), expected)


def test_offloaded_and_scattered_parameters():
    assert "offloaded" in the_field(pk.patch(block().to("meta"))).reason
    module = block()
    module.norm.to("meta")
    assert "offloaded" in the_field(pk.patch(module)).reason
    module = block()
    module.param_generator1[0].weight.data = torch.empty(0)
    assert "weight is empty" in the_field(pk.patch(module)).reason


def test_inputs_of_a_class_of_their_own(core_calls):
    """Distributed tensors, say: the module's own code knows what to do with them."""

    class Marked(torch.Tensor):
        pass

    module, twin = block(), block()
    assert the_field(pk.patch(module)).status == "replaced"
    core_calls.clear()
    x, s = made()
    out = module(x.as_subclass(Marked), s)
    assert type(out) is Marked
    assert torch.equal(out, twin(x.as_subclass(Marked), s))
    assert core_calls.total() == 0


def test_hidden_states_of_another_rank(core_calls):
    """[N, 1, D] in place of [N, D]: the formula allows it, the op does not."""
    module, twin = block(), block()
    assert the_field(pk.patch(module, ops=FIELD)).status == "replaced"
    core_calls.clear()
    x, s = made()
    assert torch.equal(module(x, s[:, None]), twin(x, s[:, None]))
    assert core_calls["neural_field_mlp_forward"] == 0


def test_autocast():
    """The residual keeps the dtype of what comes in."""
    module, twin = block(), block()
    pk.patch(module)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu"):
            x, s = made()
            out, expected = module(x.to(dtype), s), twin(x.to(dtype), s)
        assert out.dtype == expected.dtype
        assert torch.linalg.vector_norm((out - expected).float()) < 0.02 * torch.linalg.vector_norm(
            expected.float()
        )


def test_training_goes_on():
    """Ten steps of a patched and of an untouched model, and the checkpoint of one in the other."""
    torch.manual_seed(1)
    models = [recorded.model("c2i_tiny"), recorded.model("c2i_tiny")]
    report = pk.patch(models[0])
    x, t, y = (v.detach() for v in recorded.inputs("c2i_tiny").values())
    losses = []
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(5):
            loss = (model(x, t, y) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    report.unpatch()
    models[1].load_state_dict(models[0].state_dict())
    assert torch.equal(models[0](x, t, y), models[1](x, t, y))


@pytest.mark.parametrize("early", [False, True], ids=["after the patch", "before"])
def test_a_forward_of_the_instance_is_called(early):
    """Kohya's adapters: a generating layer's `forward` becomes an attribute of the layer."""
    models = [recorded.model("c2i_tiny") for _ in range(2)]
    gains = [nn.Parameter(torch.zeros(())) for _ in models]
    if not early:
        assert pk.patch(models[0]).replaced
    for each, gain in zip(models, gains, strict=True):
        layer = each.blocks[-1].param_generator1[0]
        original = layer.forward
        # A factor would be normalised away.
        layer.forward = lambda s, original=original, gain=gain: (
            original(s) + gain * torch.sin(3 * original(s))
        )
    if early:
        pk.patch(models[0])
    for gain in gains:
        gain.data.fill_(0.7)
    outs = [each(*recorded.inputs("c2i_tiny").values()) for each in models]
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    for out in outs:
        out.square().sum().backward()
    assert gains[1].grad.abs() > 0
    torch.testing.assert_close(gains[0].grad, gains[1].grad, rtol=1e-3, atol=1e-5)


def offload(module):
    """As accelerate does it: weights are there while their module runs only."""
    for child in module.modules():
        if not child._parameters:
            continue
        kept = {name: p for name, p in child._parameters.items() if p is not None}
        original = child.forward

        def forward(*args, child=child, kept=kept, original=original):
            child._parameters.update(kept)
            try:
                return original(*args)
            finally:
                child._parameters.update({name: nn.Parameter(p.to("meta")) for name, p in kept.items()})

        child._parameters.update({name: nn.Parameter(p.to("meta")) for name, p in kept.items()})
        child.forward = forward


def test_weights_that_are_elsewhere_until_their_module_runs():
    model, twin = (recorded.model("c2i_tiny") for _ in range(2))
    assert pk.patch(model).replaced
    offload(model)
    given = recorded.inputs("c2i_tiny").values()
    with torch.no_grad():
        torch.testing.assert_close(model(*given), twin(*given), rtol=1e-4, atol=1e-5)


class Dropping(foreign.NerfBlock):
    """In training a part of the patches keeps what it had (stochastic depth)."""

    def forward(self, x, s):
        out = super().forward(x, s)
        return torch.where(torch.rand(len(x), 1, 1) < 0.5, x, out) if self.training else out


@pytest.mark.parametrize("training", [False, True])
def test_what_is_dropped_in_training_is_not_patched_away(training):
    module = block(Dropping).train(training)
    entry = the_field(pk.patch(module))
    assert entry.status == "left"
    assert training or "in training mode" in entry.reason
    assert module.training is training
    assert module.norm.training is training


def test_the_default_device_is_not_the_probe_s():
    module = block()
    with torch.device("meta"):
        assert the_field(pk.patch(module)).status == "replaced"


def test_the_library_s_own_model_computes_the_same_when_patched():
    """There is little to gain; but a subclass of its norms is still one of them."""
    torch.manual_seed(0)
    model = PixNerd(PixNerdConfig(32, 2, 1, 1, 8, 2, patch_size=4, in_channels=1, num_classes=3, max_freqs=3))
    nn.init.normal_(model.decoder.linear.weight)
    given = (torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([0, 1]))
    expected = model(*given)
    assert pk.patch(model).replaced
    torch.testing.assert_close(model(*given), expected, rtol=1e-4, atol=1e-5)
