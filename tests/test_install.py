"""Installing without a compiler, or with the core refused: the package works, and says why it is slow."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment, output

CHECKOUT = Path(__file__).parents[1]
SOURCES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md", "csrc", "pixnerd_kernels")

USE = """
import warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import pixnerd_kernels as pk
    w = torch.arange(1.0, 7.0).view(2, 3)
    assert torch.equal(pk.normalize_weights(w), torch.nn.functional.normalize(w, dim=0))
print(pk.__file__)
print(*(warning.message for warning in caught), sep="\\n")
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources without anything that was built."""
    if not (CHECKOUT / "setup.py").exists():
        pytest.fail("the tests run from a checkout; setup.py is not beside them")
    ignored = shutil.ignore_patterns("_native*", "__pycache__", "*.egg-info")
    for name in SOURCES:
        source = CHECKOUT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / "checkout" / name, ignore=ignored)
        elif source.exists():
            (tmp_path / "checkout").mkdir(exist_ok=True)
            shutil.copy(source, tmp_path / "checkout")
    return tmp_path / "checkout"


def install(checkout, **changes):
    target = checkout.parent / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
    ]
    bin_folder = str(Path(sys.executable).parent)
    path = os.pathsep.join([bin_folder, os.environ.get("PATH", "")])
    done = subprocess.run(
        [*pip, "--disable-pip-version-check", "--target", str(target), str(checkout)],
        env=environment(PATH=path, **changes),
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done, target


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"CXX": "/nonexistent/c++"}, "/nonexistent/c++"),
        ({"PIXNERD_SKIP_NATIVE": "1"}, "PIXNERD_SKIP_NATIVE was set when the package was installed"),
    ],
    ids=["missing compiler", "core refused"],
)
def test_installing_without_the_core(checkout, changes, reason):
    done, target = install(checkout, **changes)
    assert done.returncode == 0, done.stderr
    assert not list((target / "pixnerd_kernels").glob("_native*.so"))
    file, *warnings = output(USE, where=target).splitlines()
    assert Path(file).parent == target / "pixnerd_kernels"
    told = "\n".join(warnings)
    assert told.count("runs on the slow PyTorch reference") == 1
    assert "it was not built: " in told
    assert reason in told


def test_installing_with_the_core(checkout, core):
    """From clean sources, unoptimised to be quick: the installed package runs the core that was built for it."""
    done, target = install(
        checkout, PIXNERD_REQUIRE_NATIVE="1", PIXNERD_CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Debug"
    )
    assert done.returncode == 0, done.stderr
    use = f"{USE}\nfrom pixnerd_kernels import backends\nprint(backends.native().__file__)"
    package, *warnings, library = output(use, where=target).splitlines()
    assert Path(package).parent == Path(library).parent == target / "pixnerd_kernels"
    assert warnings == [""]
    assert not (target / "pixnerd_kernels" / "_native_missing.txt").exists()


def test_requiring_the_core_fails_with_the_reason(checkout):
    done, target = install(checkout, CXX="/nonexistent/c++", PIXNERD_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "/nonexistent/c++" in done.stdout + done.stderr
    assert not (target / "pixnerd_kernels").exists()
