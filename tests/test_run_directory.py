"""The directory of a run: what cannot be one, and that one process at a time trains in it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from etils import epath
from tiny_run import prepare_tiny, tiny_config

from gqe_jax.config import ConfigError
from gqe_jax.runs import directory as runs
from gqe_jax.train.loop import train

HOLD = """
import sys
from etils import epath
from gqe_jax.runs.directory import locked

with locked(epath.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("prepared") / "data"
    prepare_tiny(directory, documents=20)
    return directory


@contextlib.contextmanager
def holder(directory):
    """Another process that holds the lock until it is told to end."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[1],
    ) as child:
        try:
            assert child.stdout.readline() == "held\n"
            yield child
        finally:
            child.kill()


def files(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_one_process_at_a_time(data, tmp_path, monkeypatch):
    """The second says who trains there, and touches nothing; when the first is killed, its lock is gone with it."""
    run = tmp_path / "run"
    with holder(run) as child:
        before = files(run)
        monkeypatch.setattr(runs, "_LOCK_WAIT", 0.2)
        with pytest.raises(ConfigError) as error:
            train(tiny_config(data), run)
        assert str(error.value) == (
            f"another process (pid {child.pid} on {socket.gethostname()}) is training in --run={str(run)!r}: stop it, "
            f"or choose another directory"
        )
        assert files(run) == before
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        with runs.locked(epath.Path(run)):
            assert files(run) == {run / "train.lock": f"pid {os.getpid()} on {socket.gethostname()}\n".encode()}
    assert files(run) == {}


def test_a_process_that_is_ending_is_waited_for(tmp_path, monkeypatch):
    """Whoever kills a run and starts it again at once need not wait for its end."""
    monkeypatch.setattr(runs, "_LOCK_WAIT", 60.0)
    with holder(tmp_path) as child:
        threading.Timer(0.5, child.stdin.close).start()
        with runs.locked(epath.Path(tmp_path)):
            assert child.wait() == 0
            assert (tmp_path / "train.lock").read_text().startswith(f"pid {os.getpid()} on ")


def test_no_lock_no_matter(tmp_path, monkeypatch):
    """A file system or an operating system without locks does not keep anybody from training."""

    def refuse(*args):
        raise OSError(37, os.strerror(37))  # No locks available

    with monkeypatch.context() as patch, runs.locked(epath.Path(tmp_path)):
        patch.setattr(runs.fcntl, "flock", refuse)
        with runs.locked(epath.Path(tmp_path)):
            pass
    monkeypatch.setattr(runs, "fcntl", None)
    with runs.locked(epath.Path(tmp_path)), runs.locked(epath.Path(tmp_path)):
        assert not files(tmp_path)


def test_what_is_no_directory_for_a_run(data, tmp_path):
    """A name that is left out, and a folder of prepared data, are told apart from a run before anything is written."""
    config = tiny_config(data)
    with pytest.raises(ConfigError, match=r"^--run='' names no directory: give one, for instance --run runs/smoke$"):
        train(config, "")
    before = files(data)
    with pytest.raises(ConfigError, match=r"is a folder of prepared data, for it has manifest\.json: choose another"):
        train(config, data)
    assert files(data) == before
    (tmp_path / "mixture.json").write_text("{}")
    with pytest.raises(ConfigError, match=rf"it has mixture\.json: .*; --config.data.path={tmp_path} trains"):
        train(config, tmp_path)
