"""Launches past Triton's own dispatch: the same variant, arguments and hooks, told by a driver without a GPU."""

import contextlib
import itertools
import os

import pytest
import torch

from pixnerd_kernels import backends

if missing := backends._triton_missing():
    pytest.skip(missing, allow_module_level=True)
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from pixnerd_kernels.ops.gpu import launch
from pixnerd_kernels.ops.gpu.launch import Options

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)
CPU = torch.device("cpu")
known = pytest.mark.skipif(not launch.KNOWN_TRITON, reason="this Triton launches by itself")


@triton.jit
def scaled(source, target, factor, count, step, SIZE: tl.constexpr, NEGATE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(source + place * step, mask=place < count)
    tl.store(target + place, (-x if NEGATE else x) * factor, mask=place < count)


FACTOR = tl.constexpr(2.0)


@triton.jit
def doubled(source, target, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(target + place, tl.load(source + place) * FACTOR)


class Driver:
    """Stands for CUDA's: kernels are compiled for sm_90, and their launches told."""

    def __init__(self):
        self.launches = []
        self.handles = itertools.count(1)
        self.utils = self
        driver = self

        class Launcher:
            def __init__(self, source, metadata):
                pass

            def __call__(
                self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments
            ):
                if enter is not None:
                    enter(launch_metadata)
                driver.launches.append(((x, y, z), stream, function, arguments))

        self.launcher_cls = Launcher

    def load_binary(self, *_):
        return 0, next(self.handles), 32, 0, 1024

    def unload_module(self, *_):
        pass

    def get_device_properties(self, _):
        return {"max_shared_mem": 232448}

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return None

    def get_current_stream(self, _):
        return 77


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(launch, "_known", {})
    scaled.device_caches.clear()
    yield driver
    scaled.device_caches.clear()


def arguments(**changes):
    room = torch.zeros(64)
    given = {
        "source": room, "target": room, "factor": 0.5, "count": 48, "step": 3, "SIZE": 32, "NEGATE": False,
    }  # fmt: skip
    return given | changes


OFF = torch.zeros(65)[1:]
VARIANTS = {
    "the same": {},
    "another factor": {"factor": 1.0},
    "factor one": {"factor": 1.0, "count": 16},
    "unaligned source": {"source": OFF},
    "unaligned target": {"target": OFF},
    "half": {"source": torch.zeros(64, dtype=torch.bfloat16)},
    "both half": {
        "source": torch.zeros(64, dtype=torch.float16),
        "target": torch.zeros(64, dtype=torch.float16),
    },
    "count of no sixteens": {"count": 47},
    "step one": {"step": 1},
    "step sixteen": {"step": 16},
    "step beyond 32 bits": {"step": 1 << 33},
    "odd step beyond 32 bits": {"step": (1 << 33) + 1},
    "size": {"SIZE": 64},
    "negated": {"NEGATE": True},
    "parameter": {"source": torch.nn.Parameter(torch.zeros(64))},
}
OPTIONS = {
    "8 warps": Options(8),
    "3 stages": Options(4, 3),
    "few registers": Options(4, 1, 64),
    "more cache": Options(4, carveout=50),
}


def triton_takes(driver, given, options):
    """The function that Triton itself launches for these arguments."""
    scaled[(2,)](**given, **options.named())
    return driver.launches[-1][2]


def test_the_variant_that_triton_takes(driver):
    """The first launch of a variant is Triton's, the second is not; both are right, whatever was launched before."""
    functions = set()
    calls = [(changes, Options()) for changes in VARIANTS.values()]
    calls += [({}, options) for options in OPTIONS.values()]
    for _ in range(2):
        for changes, options in calls:
            given = arguments(**changes)
            launch.launch(scaled, (2,), CPU, options, **given)
            launched = driver.launches[-1][2]
            assert launched == triton_takes(driver, given, options), changes
            functions.add(launched)
    assert len(functions) == 15  # 12 kinds of arguments, and the options


@known
def test_what_the_launcher_gets(driver):
    """The second time: addresses in place of tensors, everything in the kernel's order, stream and grid."""
    given = arguments()
    backwards = dict(reversed(given.items()))
    for grid in [(2,), (3, 4), (5, 6, 7)]:
        launch.launch(scaled, grid, CPU, Options(), **given)
        launch.launch(scaled, grid, CPU, Options(), **backwards)
    address = given["source"].data_ptr()
    expected = (address, address, 0.5, 48, 3, 32, False)
    assert driver.launches[-1][:2] == ((5, 6, 7), 77)
    assert driver.launches[-1][3] == driver.launches[2][3] == expected
    assert driver.launches[3][0] == (3, 4, 1)
    assert isinstance(driver.launches[0][3][0], torch.Tensor)
    assert len({function for _, _, function, _ in driver.launches}) == 1


def test_nothing_to_do(driver):
    launch.launch(scaled, (0,), CPU, Options(), **arguments())
    assert not driver.launches


def test_wrong_arguments_are_left_to_triton(driver):
    given = arguments()
    launch.launch(scaled, (1,), CPU, Options(), **given)
    with pytest.raises(TypeError):
        launch.launch(scaled, (1,), CPU, Options(), **{k: v for k, v in given.items() if k != "step"})
    with pytest.raises(KeyError):
        launch.launch(scaled, (1,), CPU, Options(), **given, other=1)


def test_hooks_and_observers(driver, monkeypatch):
    """Whoever asks Triton to show launches sees those of known variants."""
    given, seen = arguments(), []

    def run():
        for _ in range(2):
            launch.launch(scaled, (1,), CPU, Options(), **given)

    def hook(metadata):
        seen.append(metadata.get()["name"])

    run()
    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        run()
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert seen == ["scaled", "scaled"]
    monkeypatch.setattr(scaled, "pre_run_hooks", [lambda *_, **named: seen.append(named["count"])])
    run()
    assert seen[2:] == [48, 48]
    monkeypatch.setattr(scaled, "pre_run_hooks", [])
    original = triton.runtime.jit.JITFunction.run
    monkeypatch.setattr(
        triton.runtime.jit.JITFunction,
        "run",
        lambda *args, **named: seen.append("run") or original(*args, **named),
    )
    run()
    assert seen[4:] == ["run", "run"]
    monkeypatch.undo()


def test_debug_is_a_variant_of_its_own(driver, monkeypatch):
    for debug in (False, True, False):
        monkeypatch.setattr(triton.knobs.runtime, "debug", debug)
        given = arguments()
        launch.launch(scaled, (1,), CPU, Options(), **given)
        assert driver.launches[-1][2] == triton_takes(driver, given, Options())


def test_another_device_is_made_current(driver, monkeypatch):
    entered = []

    @contextlib.contextmanager
    def device(which):
        entered.append(which)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    launch.launch(scaled, (1,), torch.device("cuda:3"), Options(), **arguments())
    launch.launch(scaled, (1,), CPU, Options(), **arguments())
    assert entered == [torch.device("cuda:3")]
    assert len(driver.launches) == 2


@known
def test_cache_is_asked_for_once_for_each_kernel(driver, monkeypatch):
    """Of the compiled kernel itself, by CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT."""
    asked = []

    class Cuda:
        def cuFuncSetAttribute(self, *given):
            asked.append(tuple(number.value for number in given))

    monkeypatch.setattr(launch, "_cuda", Cuda)
    for options in (Options(4, carveout=72), Options(4, carveout=72), Options(4)):
        launch.launch(scaled, (1,), CPU, options, **arguments())
    (compiled,) = {
        variant.function
        for key, variant in launch._known[id(scaled)].variants.items()
        if Options(4, carveout=72) in key
    }
    assert asked == [(compiled, 9, 72)]


def test_no_driver_to_ask_for_cache(driver, monkeypatch):
    monkeypatch.setattr(launch.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    launch._cuda.cache_clear()
    try:
        launch.launch(scaled, (1,), CPU, Options(4, carveout=72), **arguments())
        assert launch._cuda() is None
    finally:
        launch._cuda.cache_clear()
    assert len(driver.launches) == 1


@known
def test_constants_outside_of_a_kernel_do_not_leave_it_to_triton(driver):
    source, target = torch.zeros(32), torch.zeros(32)
    for _ in range(2):
        launch.launch(doubled, (1,), CPU, Options(), source=source, target=target, SIZE=32)
    assert doubled.used_global_vals
    assert driver.launches[-1][3][:2] == (source.data_ptr(), target.data_ptr())


def test_an_unknown_triton_launches_by_itself(driver, monkeypatch):
    monkeypatch.setattr(launch, "KNOWN_TRITON", False)
    for _ in range(3):
        launch.launch(scaled, (1,), CPU, Options(), **arguments())
    assert all(isinstance(given[0], torch.Tensor) for *_, given in driver.launches)


def test_variants_are_forgotten_before_they_fill_the_memory(driver, monkeypatch):
    monkeypatch.setattr(launch, "_MOST_VARIANTS", 4)
    for count in range(2, 30):
        launch.launch(scaled, (1,), CPU, Options(), **arguments(count=count))
    assert len(launch._known[id(scaled)].variants) <= 4


def test_watch_sees_arguments_by_name(driver):
    seen = []
    with launch.watch(lambda told: seen.append(told) or False):
        launch.launch(scaled, (2,), CPU, Options(8), **arguments())
    assert not driver.launches
    assert (seen[0].name, seen[0].grid, seen[0].options) == ("scaled", (2,), Options(8))
    assert seen[0].arguments["count"] == 48


@pytest.mark.parametrize("size", [0, 1, 2, 3, 16, 17, 1023, 1025])
def test_powers_of_two(size):
    power = launch.power_of_two(size)
    assert power == triton.next_power_of_2(max(size, 1))
    assert launch.ceil_div(size, 16) == triton.cdiv(size, 16)
