"""A run's directory: `config.json`, `metrics.jsonl`, `checkpoints/`, and the lock of the process that trains there."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import jax
from etils import epath

from gqe_jax.config import ConfigError, RunConfig
from gqe_jax.config_dict import to_dict
from gqe_jax.data.manifest import MANIFEST_FILE
from gqe_jax.data.reading.mixture import MIXTURE_FILE
from gqe_jax.processes.joined import first_says
from gqe_jax.runs.checkpoint import CheckpointFailed, Checkpoints

try:
    import fcntl
except ImportError:  # an operating system without it
    fcntl = None

CONFIG_FILE = "config.json"
LOCK_FILE = "train.lock"
CHECKPOINTS = "checkpoints"
PROFILE = "profile"
FREE_TO_CHANGE = {  # how the model is computed, not what it is
    "model.remat",
    "model.attention.implementation",
    "model.attention.context_parallel",
}

_LOCK_WAIT = 5.0  # seconds for the process that had the run before to end: it may have been told to a moment ago


def check_directory(directory: str | Path) -> epath.Path:
    """Returns the directory as a path. Raises ConfigError if it can be no run's: it has no name, or holds prepared
    data."""
    if not str(directory).strip():
        raise ConfigError(f"--run={str(directory)!r} names no directory: give one, for instance --run runs/smoke")
    path = epath.Path(directory)
    for name in (MANIFEST_FILE, MIXTURE_FILE):
        if (path / name).exists():
            raise ConfigError(
                f"--run={str(directory)!r} is a folder of prepared data, for it has {name}: choose another directory "
                f"for the run; --config.data.path={directory} trains on the data"
            )
    return path


@contextlib.contextmanager
def locked(directory: epath.Path) -> Iterator[None]:
    """Keeps other processes from training in the directory; process 0 holds the lock, which ends with it.

    There is none in a bucket, on a file system without locks or on an operating system without `fcntl`.

    Raises:
      ConfigError: another process trains there; every process raises the same.
      OSError: the directory cannot be written.
    """
    with contextlib.ExitStack() as stack:
        holder = ""
        if jax.process_index() == 0 and "://" not in str(directory) and fcntl is not None:
            directory.mkdir(parents=True, exist_ok=True)
            holder = stack.enter_context(_lock(Path(directory / LOCK_FILE)))
        if holder := first_says(holder):
            raise ConfigError(
                f"another process ({holder}) is training in --run={str(directory)!r}: stop it, or choose another "
                f"directory"
            )
        yield


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[str]:
    """Gives "", and inside this process holds the lock; or the one that holds it, and goes on holding it.

    Who holds it removes the file at the end, so it has to be opened anew at every try; after a kill it stays, unlocked.
    """
    deadline = time.monotonic() + _LOCK_WAIT
    while True:
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.1)
                    continue
                file.seek(0)
                yield file.read().strip() or "which has not said yet who it is"
                return
            except OSError:  # a file system without locks
                pass
            if not _names(path, file) and time.monotonic() < deadline:
                continue
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            try:
                yield ""
            finally:
                path.unlink(missing_ok=True)
            return


def _names(path: Path, file: IO[str]) -> bool:
    """Says whether the open file is still the one of that name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def write_failures_named(directory: epath.Path) -> Iterator[None]:
    """Explains a failed write in the run's directory and what helps; failed checkpoints explain themselves."""
    try:
        yield
    except (CheckpointFailed, BrokenPipeError, ChildProcessError):  # which name what failed
        raise
    except OSError as error:
        raise OSError(
            f"could not write {error.filename or 'the metrics'} of the run {directory}: {error.strerror or error}; "
            f"{Checkpoints(directory / CHECKPOINTS).newest_in_words()}. Free disk space or make the directory writable "
            f"first"
        ) from error


def write_config(directory: epath.Path, config: RunConfig) -> None:
    """Leaves the configuration where `gqe inspect` and people look for it; the first process does."""
    if jax.process_index() != 0:
        return
    directory.mkdir(parents=True, exist_ok=True)
    written = directory / (CONFIG_FILE + ".partial")
    written.write_text(json.dumps(to_dict(config), indent=1) + "\n")
    written.replace(directory / CONFIG_FILE)


def check_same_model(directory: epath.Path, saved: RunConfig, wanted: RunConfig) -> None:
    """Raises ConfigError, listing every difference, unless the run in `directory` has the model that is asked for."""
    different = [line for line in differences(saved, wanted) if line.startswith("model.")]
    if different:
        raise ConfigError(
            f"--run={str(directory)!r} was made with another model config ({'; '.join(different)}): continue it with "
            f"the config it was made with, or choose another directory"
        )


def differences(saved: RunConfig, wanted: RunConfig) -> list[str]:
    """Returns one line for each field that differs, those apart that change how a model is computed and not what it
    is."""
    old, new = _flatten(to_dict(saved)), _flatten(to_dict(wanted))
    return [
        f"{key} was {old.get(key)!r} and is now {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in FREE_TO_CHANGE
    ]


def _flatten(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flatten(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return leaves
