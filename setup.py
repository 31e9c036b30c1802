"""Builds the compiled CPU core by driving CMake with Ninja; the metadata lives in pyproject.toml.

The core needs no torch to build. When it cannot be built the package still installs: the reason is written
beside the package and told at run time. Environment:
  PIXNERD_SKIP_NATIVE=1     do not build the core
  PIXNERD_REQUIRE_NATIVE=1  fail the installation when the core cannot be built
  PIXNERD_CMAKE_ARGS        extra arguments for CMake's configure step
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MISSING = "_native_missing.txt"


def flag(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no", "off")


def run(command: list[str]) -> None:
    """Run a build step; on failure raise with the end of what it printed."""
    print("+", shlex.join(command), flush=True)
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", cwd=ROOT
    )
    print(result.stdout, flush=True)
    if result.returncode:
        tail = "\n".join(result.stdout.strip().splitlines()[-15:])
        raise RuntimeError(f"`{shlex.join(command[:2])} ...` exited with {result.returncode}:\n{tail}")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        missing_notes = {target.parent / MISSING, ROOT / "pixnerd_kernels" / MISSING}
        for note in missing_notes:
            note.unlink(missing_ok=True)
        try:
            if flag("PIXNERD_SKIP_NATIVE"):
                raise RuntimeError("PIXNERD_SKIP_NATIVE was set when the package was installed")
            self.build_core(target)
        except (RuntimeError, OSError, ImportError) as error:
            if flag("PIXNERD_REQUIRE_NATIVE"):
                raise
            print(f"WARNING: the compiled CPU core was not built: {error}", file=sys.stderr, flush=True)
            # An older core beside newer Python is worse than none.
            home = ROOT / "pixnerd_kernels" if self.inplace or self.editable_mode else target.parent
            for folder in {home, target.parent}:
                (folder / target.name).unlink(missing_ok=True)
            home.mkdir(parents=True, exist_ok=True)
            (home / MISSING).write_text(f"{error}\n")

    def build_core(self, target: Path) -> None:
        import pybind11

        # A build folder per interpreter that survives the call, so that rebuilds are incremental.
        folder = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI') or sys.implementation.cache_tag}"
        cmake = shutil.which("cmake") or "cmake"
        self.forget_stale_cache(folder, cmake)
        configure = [
            cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *shlex.split(os.environ.get("PIXNERD_CMAKE_ARGS", "")),
        ]  # fmt: skip
        if ninja := shutil.which("ninja"):
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        run(configure)
        run([cmake, "--build", str(folder)])
        built = folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
        target.parent.mkdir(parents=True, exist_ok=True)
        # Replace, never overwrite: a running process may have the old file mapped.
        fresh = target.with_suffix(".tmp")
        shutil.copyfile(built, fresh)
        os.replace(fresh, target)

    @staticmethod
    def forget_stale_cache(folder: Path, cmake: str) -> None:
        """Isolated builds bring cmake, ninja and pybind11 in a folder that is gone the next time."""
        cache = folder / "CMakeCache.txt"
        if not cache.exists():
            return
        for line in cache.read_text(errors="replace").splitlines():
            name, _, value = line.partition("=")
            if name.split(":")[0] in ("CMAKE_COMMAND", "CMAKE_MAKE_PROGRAM", "CMAKE_HOME_DIRECTORY"):
                here = ROOT if name.startswith("CMAKE_HOME_DIRECTORY") else None
                if not Path(value).exists() or (here and Path(value).resolve() != here):
                    shutil.rmtree(folder)
                    return


setup(
    ext_modules=[Extension("pixnerd_kernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
