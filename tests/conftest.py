"""The backends that every op is tested on, and the proof that compiled kernels ran where they should have.

`triton` runs on a GPU where there is one, with every tensor of the test made there, and under TRITON_INTERPRET=1 on the
CPU, which tests/test_triton.py does in a process of its own.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from pixnerd_kernels import backends, use_backend

ISAS = ("portable", "avx2", "avx512", "avx512_bf16")
KERNELS = (
    "coordinate_encoding",
    "gated_residual_backward",
    "gated_residual_forward",
    "gated_residual_jvp",
    "matmul",
    "modulated_rms_norm_backward",
    "modulated_rms_norm_forward",
    "modulated_rms_norm_jvp",
    "neural_field_mlp_backward",
    "neural_field_mlp_forward",
    "neural_field_mlp_jvp",
    "normalize_weights",
    "pixel_decoder_backward",
    "pixel_decoder_forward",
    "qk_norm_rope_backward",
    "qk_norm_rope_forward",
    "qk_norm_rope_jvp",
    "swiglu_backward",
    "swiglu_forward",
    "swiglu_jvp",
)
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
SKIP_NATIVE = os.environ.get("PIXNERD_SKIP_NATIVE", "").lower() not in ("", "0", "false", "no", "off")


@dataclass
class Backend:
    """A forced backend, and how often each kernel of the core was called since the test began."""

    name: str
    calls: Counter = field(default_factory=Counter)
    may_idle: bool = False  # set by tests whose work never reaches a kernel, such as empty batches

    @property
    def compiled(self) -> bool:
        return self.name != "reference"

    @property
    def one_kernel(self) -> bool:
        """Whether calls that differ in strides, alignment or wanted gradients alone run the same machine code.

        On a GPU Triton compiles a kernel for each kind of argument, which may sum in another order.
        """
        return self.name != "triton" or INTERPRETING


def compiled_core():
    """The compiled core. A missing one fails the test, unless PIXNERD_SKIP_NATIVE asks for a run without it."""
    if SKIP_NATIVE:
        pytest.skip("PIXNERD_SKIP_NATIVE is set: a run without the compiled core")
    try:
        return backends.native()
    except NotImplementedError as error:
        pytest.fail(str(error))


def spied(core, patch: pytest.MonkeyPatch) -> Counter:
    calls: Counter = Counter()

    def counting(name):
        kernel = getattr(core, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return kernel(*args, **kwargs)

        return call

    for name in KERNELS:
        patch.setattr(core, name, counting(name))
    return calls


def forced_triton() -> Iterator[Backend]:
    """The Triton kernels on the first GPU, or in the interpreter."""
    if not INTERPRETING and not torch.cuda.is_available():
        pytest.skip("no CUDA device; tests/test_triton.py runs the Triton kernels in the interpreter")
    from pixnerd_kernels.ops.gpu.launch import watch

    backend = Backend("triton")

    def count(launch):
        # The decoder's backward begins with the forward's kernel, which then keeps what enters each block.
        backend.calls["pixel_decoder_backward" if launch.arguments.get("KEEP") else launch.name] += 1
        return True

    with torch.device("cpu" if INTERPRETING else "cuda"), watch(count), use_backend("triton"):
        yield backend
    assert backend.calls or backend.may_idle, "the Triton kernels were forced, but did not run"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "float64: the test computes in float64 only")
    if INTERPRETING:
        _hasten_the_interpreter()


def _hasten_the_interpreter() -> None:
    """At every call of one kernel's function by another Triton looks through its whole language for what to replace.

    That is most of its time, and finds nothing where the caller has replaced it.
    """
    from triton.language import core
    from triton.runtime.interpreter import InterpretedFunction

    whole = InterpretedFunction.__call__

    def call(self, *args, **kwargs):
        language = self.fn.__globals__.get("tl", core)
        if core.is_builtin(language.load):
            return whole(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what Triton does not offer: ops that are in CPU_OPS alone, and float64 but for some."""
    left_out = set()
    for item in items:
        values = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
        if "triton" not in [value for value in values if isinstance(value, str)]:
            continue
        stem = item.path.stem.removeprefix("test_")
        op = max((name for name in backends.CPU_OPS if stem.startswith(name)), key=len, default="")
        wide = item.get_closest_marker("float64") or torch.float64 in [
            value for value in values if isinstance(value, torch.dtype)
        ]
        if (op and op not in backends.TRITON_OPS) or (wide and op not in backends.TRITON_FLOAT64_OPS):
            left_out.add(item)
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def forced(parameter: str, patch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """`reference`, `triton`, `cpu` (the best instruction set) or `cpu-<instruction set>`, until the test is over."""
    if parameter == "triton":
        yield from forced_triton()
        return
    name, _, isa = parameter.partition("-")
    if name == "reference":
        core, calls = backends._load_native()[0], Counter()
    else:
        core = compiled_core()
        if isa and isa not in core.isas():
            pytest.skip(f"this processor does not run {isa}")
        calls = Counter()
    if core is not None:
        calls = spied(core, patch)
        before = core.isa()
        core.set_isa(isa or "auto")
    backend = Backend(name, calls)
    with use_backend(name):
        yield backend
    if core is not None:
        core.set_isa(before)
    if name == "reference":
        assert not calls, f"the reference was forced, but the core ran: {dict(calls)}"
    else:
        assert calls or backend.may_idle, "the compiled core was forced, but did not run"


@pytest.fixture(params=["reference", *(f"cpu-{isa}" for isa in ISAS), "triton"])
def backend(request, monkeypatch):
    """Every backend, the compiled core once for each of its instruction sets."""
    yield from forced(request.param, monkeypatch)


@pytest.fixture(params=[f"cpu-{isa}" for isa in ISAS])
def compiled(request, monkeypatch):
    """The compiled core, once for each of its instruction sets."""
    yield from forced(request.param, monkeypatch)


@pytest.fixture(params=["reference", "cpu", "triton"])
def any_isa(request, monkeypatch):
    """Every backend, for tests of what happens around a kernel."""
    yield from forced(request.param, monkeypatch)


@pytest.fixture
def core():
    return compiled_core()


@pytest.fixture
def core_calls(core, monkeypatch):
    """How often each kernel of the core was called, for tests that force several backends."""
    return spied(core, monkeypatch)


@pytest.fixture
def threads():
    """Restores torch's thread count; call it to set one."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_generate_tests(metafunc):
    """`call`, `first` and `calls`: each, the first and all of a module's CALLS (see tests/ops/calls.py)."""
    if "call" in metafunc.fixturenames and hasattr(metafunc.module, "CALLS"):
        metafunc.parametrize("call", metafunc.module.CALLS, ids=str)


@pytest.fixture
def calls(request):
    return request.module.CALLS


@pytest.fixture
def first(calls):
    return calls[0]
