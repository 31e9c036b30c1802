"""Checkpoint files survive kills and full disks, and foreign or damaged ones are refused."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from pixnerd_kernels.training import checkpoint


def write(path, value, size=300_000):
    checkpoint.save(path, {"a.x": torch.full((size,), value), "b.y": torch.tensor(value)}, {"value": value})


def assert_holds(path, *values):
    tensors, content = checkpoint.load(path)
    assert content["value"] in values
    assert all((tensor == content["value"]).all() for tensor in tensors.values())


def start(code, *arguments):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)])


def test_tensors_and_content_return(tmp_path):
    path = tmp_path / "new" / "x.safetensors"
    tensors = {"a.x": torch.randn(3, 2).t(), "a.n": torch.tensor(4), "b": torch.arange(5, dtype=torch.uint8)}
    checkpoint.save(path, tensors, {"name": "é", "list": [1, None]})
    loaded, content = checkpoint.load(path)
    assert content == {"name": "é", "list": [1, None]}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)
    only, _ = checkpoint.load(path, "a.")
    assert set(only) == {"x", "n"}
    assert checkpoint.is_checkpoint(path)
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def bytes_in(folder):
    """What lies in a folder that another process fills and removes."""
    with contextlib.suppress(FileNotFoundError):
        return sum(file.stat().st_size for file in folder.iterdir())
    return 0


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    code = """
import itertools, sys
sys.path.insert(0, sys.argv[1])
from test_checkpoint import write
for value in itertools.count(2):
    write(sys.argv[2], value, 20_000_000)
"""
    path = tmp_path / "x.safetensors"
    write(path, 1)
    first = path.stat().st_mtime_ns
    writer = start(code, os.path.dirname(__file__), path)
    while path.stat().st_mtime_ns == first:  # until it is in the midst of its work
        assert writer.poll() is None
        time.sleep(0.01)
    # A save writes 80 MB into the hidden folder before it renames: wait until some of it is there.
    hidden = tmp_path / f".{path.name}.new"
    while not bytes_in(hidden):
        assert writer.poll() is None
    writer.kill()
    assert writer.wait() == -signal.SIGKILL
    assert_holds(path, *range(2, 1000))
    write(path, 0)
    assert_holds(path, 0)
    assert os.listdir(tmp_path) == [path.name]


def test_a_kill_before_the_rename_leaves_the_old_one(tmp_path):
    code = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_checkpoint import write
os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
write(sys.argv[2], 2)
"""
    path = tmp_path / "x.safetensors"
    write(path, 1)
    assert start(code, os.path.dirname(__file__), path).wait() == -signal.SIGKILL
    assert_holds(path, 1)


def test_a_full_disk_leaves_the_old_one(tmp_path):
    """A limit on the size of files stands for the disk: the write fails on the way."""
    path = tmp_path / "x.safetensors"
    write(path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not save the checkpoint .*the one before is untouched"):
            write(path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_holds(path, 1)
    assert os.listdir(tmp_path) == [path.name]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        write(tmp_path / "file" / "x.safetensors", 1)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoint.load(path)
    assert not checkpoint.is_checkpoint(path)
    write(path, 1)
    content = path.read_bytes()
    for damaged in (b"", b"hello", content[: len(content) // 2], b"\xff" * 64):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x\.safetensors: not a readable checkpoint"):
            checkpoint.load(path)
        assert not checkpoint.is_checkpoint(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="not a checkpoint that `pixnerd train` wrote"):
        checkpoint.load(path)
    assert not checkpoint.is_checkpoint(path)
