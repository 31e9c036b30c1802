"""Fresh interpreters, for what is decided at import: environment variables, missing cores, loaded libraries."""

import os
import subprocess
import sys
from pathlib import Path

import pixnerd_kernels

PACKAGE = Path(pixnerd_kernels.__file__).parent


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without the package's own variables, and with `changes`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIXNERD_")}
    return {**kept, **changes}


def python(
    code: str, *options: str, where: Path = PACKAGE.parent, **changes: str
) -> subprocess.CompletedProcess:
    """Run `code` in a fresh interpreter that finds pixnerd_kernels in the folder `where`."""
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        env=environment(PYTHONPATH=str(where), **changes),
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
    )


def output(code: str, *options: str, where: Path = PACKAGE.parent, **changes: str) -> str:
    """What a run of `code` that must succeed prints."""
    done = python(code, *options, where=where, **changes)
    assert done.returncode == 0, done.stderr
    return done.stdout
