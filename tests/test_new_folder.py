"""A new folder appears whole or not at all, and what a killed process left of it goes with the next attempt."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gqe_jax.config import ConfigError
from gqe_jax.pytorch.folder import new_folder

KILLED = """
import os, signal, sys
from gqe_jax.pytorch.folder import new_folder
with new_folder(sys.argv[1], "--out") as folder:
    (folder / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_in_the_middle(out):
    done = subprocess.run([sys.executable, "-c", KILLED, str(out)], cwd=Path(__file__).parents[1])
    assert done.returncode == -signal.SIGKILL


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_process_left_is_removed(tmp_path):
    """Two kills leave two folders at most one after the other; those of living processes, of other names and of
    preparation, which goes on with what it left, stay."""
    out = tmp_path / "a[b]*"
    kill_in_the_middle(out)
    (left,) = tmp_path.iterdir()
    kill_in_the_middle(out)
    (again,) = tmp_path.iterdir()
    assert left != again and names(again) == ["half"]
    kept = [".a[b]*.partial-host-1234-0a1b2c3d", f".{out.name}x.partial-abcd1234", ".other.partial-abcd1234"]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / ".a[b]*.partial-linked00").symlink_to(tmp_path / kept[0])
    with new_folder(out, "--out") as alive:
        (alive / "mine").write_text("x")
        with pytest.raises(RuntimeError), new_folder(out, "--out") as other:
            assert alive.is_dir() and other != alive
            raise RuntimeError
        assert names(alive) == ["mine"]
    assert names(tmp_path) == sorted([*kept, ".a[b]*.partial-linked00", out.name])
    assert names(out) == ["mine"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """Then nobody can tell whether the process lives: what is there stays."""
    kill_in_the_middle(tmp_path / "out")
    (left,) = tmp_path.iterdir()

    def no_locks(*_):
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr("gqe_jax.pytorch.folder.fcntl.flock", no_locks)
    with new_folder(tmp_path / "out", "--out"):
        pass
    assert names(tmp_path) == sorted([left.name, "out"])


def test_a_folder_that_is_there(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ConfigError, match="exists and is not an empty folder"), new_folder(tmp_path / "out", "--out"):
        pass
    assert names(tmp_path / "out") == ["mine"]
