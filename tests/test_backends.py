"""Which backend runs: by default, forced, from the environment, and without a working core."""

import json
import re
import shutil
import sysconfig
import threading

import pytest
import torch
from processes import PACKAGE, output, python

import pixnerd_kernels as pk
from pixnerd_kernels import backends

ISAS = ("portable", "avx2", "avx512", "avx512_bf16")


def some_field(device="cpu", dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, 5, 4), (2, 4, 6), (2, 6, 4)]
    return [torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes]


def test_cpu_tensors_take_the_core_by_default(core_calls, monkeypatch):
    monkeypatch.setattr(backends, "_forced", "")
    pk.neural_field_mlp(*some_field())
    pk.normalize_weights(torch.ones(2, 3))
    pk.coordinate_encoding(2, 2)
    assert core_calls == {"neural_field_mlp_forward": 1, "normalize_weights": 1, "coordinate_encoding": 1}


def test_forcing_nests_and_is_undone(core_calls):
    before = backends.forced_backend()
    with pk.use_backend("reference"):
        with pk.use_backend("cpu"):
            pk.neural_field_mlp(*some_field())
        assert core_calls.total() == 1
        assert backends.forced_backend() == "reference"
        pk.neural_field_mlp(*some_field())
    with pytest.raises(KeyError), pk.use_backend("reference"):
        raise KeyError
    assert backends.forced_backend() == before
    assert core_calls.total() == 1


def test_forcing_holds_for_every_thread(core_calls):
    with pk.use_backend("reference"):
        thread = threading.Thread(target=pk.neural_field_mlp, args=some_field())
        thread.start()
        thread.join()
    assert not core_calls


@pytest.mark.parametrize("name", ["gpu", "", "CPU", None])
def test_unknown_names(name):
    message = f"unknown backend {name!r}, expected one of reference, cpu, triton"
    with pytest.raises(ValueError, match=message), pk.use_backend(name):
        pass


CALLS = {
    "neural_field_mlp": lambda: pk.neural_field_mlp(*some_field()),
    "neural_field_mlp_packed": lambda: pk.neural_field_mlp_packed(
        torch.ones(1, 2, 3), torch.ones(1, 24), hidden=4
    ),
    "normalize_weights": lambda: pk.normalize_weights(torch.ones(2, 3)),
    "coordinate_encoding": lambda: pk.coordinate_encoding(2, 2),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_forced_backend_that_cannot_run_tells_every_reason(name):
    op = name.removesuffix("_packed")
    reasons = backends.not_supported_reasons(op, "triton", torch.device("cpu"))
    assert any("CUDA tensors, the inputs are on cpu" in reason for reason in reasons)
    with pk.use_backend("triton"), pytest.raises(NotImplementedError) as caught:
        CALLS[name]()
    assert str(caught.value).splitlines() == [
        f"{op} cannot run on the forced backend 'triton':",
        *(f"  - {reason}" for reason in reasons),
    ]


def test_the_core_refuses_other_devices_and_does_not_choose_them(core):
    meta = torch.device("meta")
    assert backends.select("normalize_weights", meta, torch.float32, "") == "reference"
    with pytest.raises(NotImplementedError, match="it needs CPU tensors, the inputs are on meta"):
        backends.select("normalize_weights", meta, torch.float32, "cpu")


def test_reasons_are_complete():
    reasons = backends.not_supported_reasons("nothing", "cpu", torch.device("cuda:1"), torch.int32)
    for part in ("torch.int32 is not one of", "no CPU kernel is written for nothing", "are on cuda:1"):
        assert sum(part in reason for reason in reasons) == 1, part
    assert backends.not_supported_reasons("neural_field_mlp", "reference", torch.device("cpu")) == []


RUN = """
import json, warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import pixnerd_kernels as pk
    from pixnerd_kernels import backends
    draw = torch.Generator().manual_seed(0)
    x, w1, w2 = (torch.randn(s, generator=draw) for s in [(2, 5, 4), (2, 4, 6), (2, 6, 4)])
    leaf = x.clone().requires_grad_()
    y = pk.neural_field_mlp(leaf, w1, w2)
    y.sum().backward()
    pk.neural_field_mlp(x, w1, w2)
    pk.normalize_weights(w1)
    pk.coordinate_encoding(2, 2)
unit = [w / w.norm(dim=1, keepdim=True) for w in (w1, w2)]
exact = x + torch.nn.functional.silu(x @ unit[0]) @ unit[1]
try:
    with pk.use_backend("cpu"):
        pk.neural_field_mlp(x, w1, w2)
    refusal = ""
except NotImplementedError as error:
    refusal = str(error)
print(json.dumps({
    "warnings": [[w.category.__name__, str(w.message), w.filename] for w in caught],
    "right": torch.allclose(y, exact, atol=1e-6) and leaf.grad.isfinite().all().item(),
    "refusal": refusal,
    "forced": backends.forced_backend(),
    "core": backends._load_native()[0] is not None,
}))
"""


def report(**options):
    return json.loads(output(RUN, **options).splitlines()[-1])


def assert_falls_back(told, reason):
    """Results are right, and one warning and the refusal of a forced core say why."""
    assert told["right"]
    assert not told["core"]
    assert len(told["warnings"]) == 1
    category, message, _ = told["warnings"][0]
    assert category == "RuntimeWarning"
    assert "runs on the slow PyTorch reference because the compiled CPU core is not available" in message
    for text in (message, told["refusal"]):
        assert re.search(reason, text), text


def test_a_working_core_warns_of_nothing(core):
    told = report()
    assert told == {"warnings": [], "right": True, "refusal": "", "forced": "", "core": True}


@pytest.mark.parametrize("value", ["1", "true", "YES"])
def test_skipping_the_core(value):
    assert_falls_back(report(PIXNERD_SKIP_NATIVE=value), "PIXNERD_SKIP_NATIVE is set")


@pytest.mark.parametrize("value", ["", "0", "false", "off"])
def test_not_skipping_the_core(core, value):
    assert report(PIXNERD_SKIP_NATIVE=value)["core"]


def without_core(folder):
    """A copy of the package that holds no compiled core."""
    ignored = shutil.ignore_patterns("_native*", "__pycache__")
    return shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=ignored)


def test_a_core_that_was_never_built(tmp_path):
    without_core(tmp_path)
    assert_falls_back(
        report(where=tmp_path), r"ModuleNotFoundError: No module named 'pixnerd_kernels\._native'"
    )


def test_a_core_that_could_not_be_built(tmp_path):
    note = without_core(tmp_path) / "_native_missing.txt"
    note.write_text("no C++ compiler was found\n")
    assert_falls_back(report(where=tmp_path), "it was not built: no C\\+\\+ compiler was found")


def test_a_file_that_is_no_library(tmp_path):
    library = without_core(tmp_path) / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    library.write_bytes(b"this is no shared library" * 100)
    assert_falls_back(
        report(where=tmp_path), r"importing pixnerd_kernels\._native failed: ImportError: .*_native"
    )


def test_a_core_that_raises_at_import(tmp_path):
    (without_core(tmp_path) / "_native.py").write_text("raise RuntimeError('built for another machine')")
    assert_falls_back(report(where=tmp_path), "failed: RuntimeError: built for another machine")


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_backend_from_the_environment(core, name):
    told = report(PIXNERD_BACKEND=name)
    assert (told["forced"], told["right"], told["warnings"]) == (name, True, [])


def test_the_environment_forces_the_reference_without_a_warning():
    told = report(PIXNERD_BACKEND="reference", PIXNERD_SKIP_NATIVE="1")
    assert told["right"]
    assert told["warnings"] == []


def test_a_forced_core_that_is_missing_raises():
    done = python(RUN, PIXNERD_BACKEND="cpu", PIXNERD_SKIP_NATIVE="1")
    assert done.returncode != 0
    assert "NotImplementedError: neural_field_mlp cannot run on the forced backend 'cpu'" in done.stderr
    assert "- the compiled CPU core is not available: PIXNERD_SKIP_NATIVE is set" in done.stderr


def test_an_unknown_backend_in_the_environment():
    problem = "PIXNERD_BACKEND: unknown backend 'fast', expected one of reference, cpu, triton"
    done = python("import pixnerd_kernels", PIXNERD_BACKEND="fast")
    assert done.returncode == 0, done.stderr
    done = python(RUN, PIXNERD_BACKEND="fast")
    assert done.returncode != 0
    assert f"ValueError: {problem}" in done.stderr
    done = python(
        "from pixnerd_kernels.cli import main; raise SystemExit(main(['info']))", PIXNERD_BACKEND="fast"
    )
    assert (done.returncode, done.stderr) == (2, f"pixnerd info: error: {problem}\n")


ISA = "from pixnerd_kernels import backends; print(backends.native().isa())"


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_set_from_the_environment(core, isa):
    done = python(ISA, PIXNERD_ISA=isa)
    if isa in core.isas():
        assert done.stdout.split() == [isa]
    else:
        assert f"PIXNERD_ISA: instruction set '{isa}' is not supported here" in done.stderr


def test_instruction_sets(core):
    assert core.isas() == [isa for isa in ISAS if isa in core.isas()]
    assert core.isas()[0] == "portable"
    assert output(ISA).split() == core.isas()[-1:]
    before = core.isa()
    with pytest.raises(ValueError, match="'sse9' is not supported here, expected one of auto, portable"):
        core.set_isa("sse9")
    assert core.isa() == before
    done = python(ISA, PIXNERD_ISA="sse9")
    assert "PIXNERD_ISA: instruction set 'sse9' is not supported here" in done.stderr


# scikit-learn brings an OpenMP runtime of its own, loaded first where imports are sorted.
TORCHS_RUNTIME = """
import sklearn.cluster
import torch
from pixnerd_kernels import backends
import os
print(os.path.samefile(os.path.dirname(backends.native().openmp_runtime()), os.path.dirname(torch.__file__) + "/lib"))
"""


def test_the_openmp_runtime_is_torchs(core):
    assert output(TORCHS_RUNTIME).split() == ["True"]


LIBRARIES = """
import os
import torch
import pixnerd_kernels as pk
from pixnerd_kernels import backends
torch.set_num_threads(2)
torch.ones(600, 600) @ torch.ones(600, 600)
before = len(os.listdir("/proc/self/task"))
with pk.use_backend("cpu"):
    x = torch.ones(8, 64, 16, requires_grad=True)
    pk.neural_field_mlp(x, torch.ones(8, 16, 32), torch.ones(8, 32, 16)).sum().backward()
after = len(os.listdir("/proc/self/task"))
maps = {line.split()[-1] for line in open("/proc/self/maps")}
loaded = {os.path.realpath(p) for p in maps if os.path.basename(p).startswith(("libgomp", "libiomp5", "libomp"))}
print(len(loaded), os.path.realpath(backends.native().openmp_runtime()) in loaded, after - before)
"""


def test_one_openmp_runtime_and_one_thread_pool(core):
    """The core runs on the threads of torch's own OpenMP runtime: it loads no other, and starts no more threads."""
    runtimes, is_torchs, more_threads = output(LIBRARIES).split()
    assert (runtimes, is_torchs) == ("1", "True")
    assert int(more_threads) <= 1  # autograd's own worker
