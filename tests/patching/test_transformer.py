"""The transformer's side: norms, SwiGLU, attention and DiT blocks of foreign models."""

import copy

import foreign
import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_within
from torch import nn

import pixnerd_kernels as pk

NORM, MLP, ATTENTION, BLOCK = "modulated_rms_norm", "swiglu", "qk_norm_rope", "gated_residual_rms_norm"


def made(cls, *arguments, **options):
    torch.manual_seed(11)
    module = cls(*arguments, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def values(*names, dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)
    shapes = {"x": (2, 6, 32), "y": (2, 3, 32), "c": (2, 1, 32)}
    given = {n: torch.randn(shape, generator=generator).to(dtype) for n, shape in shapes.items()}
    return [{**given, "pos": foreign.rotary(8, 2, 3), "mask": None}[name] for name in names]


MODULES = {
    "norm": (NORM, foreign.RMSNorm, (32,), ("x",)),
    "scale norm": (NORM, foreign.ScaleNorm, (32,), ("x",)),
    "torch's norm": (NORM, nn.RMSNorm, (32, 1e-6), ("x",)),
    "torch's norm with its own eps": (NORM, nn.RMSNorm, (32,), ("x",)),
    "mlp": (MLP, foreign.FeedForward, (32, 96), ("x",)),
    "packed mlp": (MLP, foreign.PackedFeedForward, (32, 64), ("x",)),
    "attention": (ATTENTION, foreign.RAttention, (32, 4), ("x", "pos", "mask")),
    "text attention": (ATTENTION, foreign.TextAttention, (32, 4), ("x", "y", "pos")),
    "refining attention": (ATTENTION, foreign.TextRefineAttention, (32, 4), ("x",)),
    "block": (BLOCK, foreign.FlattenDiTBlock, (32, 4), ("x", "c", "pos", "mask")),
    "text block": (BLOCK, foreign.TextDiTBlock, (32, 4), ("x", "y", "c", "pos")),
    "refining block": (BLOCK, foreign.TextRefineBlock, (32, 4), ("x", "c")),
}


def entry_of(report, op, name=""):
    (entry,) = (entry for entry in report.entries if entry.op == op and entry.name == name)
    return entry


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("what", MODULES)
def test_replaced_and_within_the_tolerance(what, dtype, core_calls):
    op, cls, arguments, names = MODULES[what]
    module = made(cls, *arguments).to(dtype)
    given = values(*names, dtype=dtype)
    plain = module(*given).detach()
    wide = [v.double() if isinstance(v, torch.Tensor) and not v.is_complex() else v for v in given]
    exact = copy.deepcopy(module).double()(*wide).detach()
    report = pk.patch(module, ops=[op])
    assert entry_of(report, op).status == "replaced", str(report)
    core_calls.clear()
    out = module(*given).detach()
    assert core_calls.total() > 0
    assert_within({"out": out}, {"out": plain}, {"out": exact})
    report.unpatch()
    assert torch.equal(module(*given), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_norm_that_leaves_its_eps_to_torch(dtype):
    """Rows as small as that eps, and a model that changes its dtype after the patch."""
    module = made(nn.RMSNorm, 32).to(dtype)
    assert entry_of(pk.patch(module), NORM).status == "replaced"
    for when in (dtype, torch.float32):
        module.to(when)
        x = values("x")[0] * torch.logspace(-6, 0, 6)[:, None]
        x = x.to(when)
        plain = nn.RMSNorm.forward(module, x)
        eps = torch.finfo(when).eps if plain.dtype.itemsize > 2 else 2.0**-23
        exact = F.rms_norm(x.double(), (32,), module.weight.double(), eps)
        assert_within({"out": module(x)}, {"out": plain}, {"out": exact})
        torch.testing.assert_close(module(x)[:, :2], plain[:, :2])  # the smallest, by themselves


class PlusOneNorm(foreign.RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, 1 + self.weight, 1e-6)


class Gelu(foreign.FeedForward):
    def forward(self, x):
        return self.w2(F.gelu(self.w1(x)) * self.w3(x))


class SecondGate(foreign.FeedForward):
    def forward(self, x):
        return self.w2(self.w1(x) * F.silu(self.w3(x)))


class Halves(foreign.RAttention):
    def forward(self, x, pos, mask):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = (self.turned(z) for z in ((self.q_norm(q), pos), (self.k_norm(k), pos)))
        out = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)))
        return self.proj(out.transpose(1, 2).flatten(2))

    @staticmethod
    def turned(given):
        x, pos = given
        cos, sin = pos.real[:, None], pos.imag[:, None]
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).type_as(x)


class ScaledAttention(foreign.RAttention):
    def forward(self, x, pos, mask):
        return super().forward(x, pos, mask) * 1.1


class ScaleFirst(foreign.FlattenDiTBlock):
    def forward(self, x, c, pos, mask=None):
        scale1, shift1, gate1, scale2, shift2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, pos, mask)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Parallel(foreign.FlattenDiTBlock):
    """Attention and MLP both read the block's input."""

    def forward(self, x, c, pos, mask=None):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        attended = gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, pos, mask)
        return x + attended + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class OtherArguments(foreign.FlattenDiTBlock):
    def forward(self, x, c, pos, mask, extra):
        return super().forward(x, c, pos, mask)


@pytest.mark.parametrize(
    ("op", "module", "reason"),
    [
        (NORM, made(PlusOneNorm, 32), "a weight to which one is added, which is not replaced"),
        (MLP, made(Gelu, 32, 96), "activation gelu, which is not replaced"),
        (ATTENTION, made(Halves, 32, 4), "halves rotated in place of pairs, which is not replaced"),
        (ATTENTION, made(ScaledAttention, 32, 4), "computes no known form"),
        (BLOCK, made(ScaleFirst, 32, 4), "the scale before the shift, which is not replaced"),
        (BLOCK, made(Parallel, 32, 4), "computes no known form"),
        (BLOCK, made(OtherArguments, 32, 4), "takes other arguments"),
    ],
)
def test_others_are_left_and_named(op, module, reason):
    entry = entry_of(pk.patch(module, dry_run=True), op)
    assert entry.status == "left"
    assert reason in entry.reason


def test_gradients_tell_apart_what_outputs_cannot():
    """A block whose modulation starts at zero gives its input back, whatever it does with the modulation."""

    def zeroed():
        block = made(foreign.FlattenDiTBlock, 32, 4)
        nn.init.zeros_(block.adaLN_modulation[0].weight)
        nn.init.zeros_(block.adaLN_modulation[0].bias)
        return block

    assert entry_of(pk.patch(zeroed()), BLOCK).status == "replaced"
    with torch.inference_mode():
        entry = entry_of(pk.patch(zeroed()), BLOCK)
    assert entry.status == "left"
    assert "cannot tell" in entry.reason


def test_the_second_half_may_be_the_gate():
    module = made(SecondGate, 32, 96)
    expected = module(*values("x"))
    entry = entry_of(pk.patch(module), MLP)
    assert (entry.status, entry.form) == ("replaced", "SiLU of the second")
    torch.testing.assert_close(module(*values("x")), expected)


def both(what):
    """A patched module and its untouched twin."""
    op, cls, arguments, names = MODULES[what]
    module, twin = made(cls, *arguments), made(cls, *arguments)
    assert entry_of(pk.patch(module, ops=[op]), op).status == "replaced"
    return module, twin, values(*names)


def test_calls_that_the_ops_do_not_take_go_to_the_module(core_calls):
    """A mask, a condition for every token, a table that is not complex, a norm with a hook."""
    module, twin, (x, pos, _) = both("attention")
    mask = torch.randn(6, 6)
    core_calls.clear()
    assert torch.equal(module(x, pos, mask), twin(x, pos, mask))
    module.q_norm.register_forward_hook(lambda *args: args[2] * 2)
    assert not torch.equal(module(x, pos, None), twin(x, pos, None))
    assert core_calls.total() == 0

    module, twin, (x, _, pos, _) = both("block")
    per_token = torch.randn(2, 6, 32)
    core_calls.clear()
    assert torch.equal(module(x, per_token, pos), twin(x, per_token, pos))
    assert core_calls.total() == 0

    module, twin, (x,) = both("norm")
    core_calls.clear()
    assert module(x.bfloat16()).dtype == twin(x.bfloat16()).dtype == torch.float32
    assert core_calls.total() == 0


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("what", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_same_dtype(what, dtype):
    module, twin, given = both(what)
    given[0] = given[0].to(dtype)
    with torch.autocast("cpu"):
        out, expected = module(*given), twin(*given)
    assert out.dtype == expected.dtype
    assert torch.linalg.vector_norm((out - expected).float()) < 0.03 * torch.linalg.vector_norm(
        expected.float()
    )


def test_compiled_without_a_graph_break(core_calls):
    module, twin, given = both("block")
    pk.patch(module)
    core_calls.clear()
    out = torch.compile(module, backend="aot_eager", fullgraph=True)(*given)
    torch.testing.assert_close(out, twin(*given))
    assert core_calls.total() > 0
