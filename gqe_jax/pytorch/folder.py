"""A new folder that appears under its name only when everything in it is written."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gqe_jax.config import ConfigError

try:
    import fcntl
except ImportError:  # an operating system without it
    fcntl = None


@contextlib.contextmanager
def new_folder(out: str | Path, option: str, size: int = 0) -> Iterator[Path]:
    """Yields a temporary folder beside `out` that is renamed to it at the end, or removed if anything is raised.

    What a killed process left of an earlier attempt at the same folder is removed first.

    Args:
      out: the folder to make; it must not exist, or be empty.
      option: name of the command-line option that gave it, for messages.
      size: bytes that will be written at least, to refuse a full disk at once.

    Raises:
      ConfigError: `out` exists and is not an empty folder.
      OSError: it cannot be written.
    """
    given, out = out, Path(os.path.realpath(out))  # a link keeps leading where it leads
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{option}={str(given)!r} exists and is not an empty folder: name another one, or remove it")
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.partial-"))
        with _held(temporary):
            free = shutil.disk_usage(temporary).free
            if free < size:
                raise OSError(f"it takes {size / 1e9:.3g} GB and the disk has {free / 1e9:.3g} GB left")
            yield temporary
            temporary.chmod(0o777 & ~_umask())  # mkdtemp makes it private
            if out.exists():
                out.rmdir()
            temporary.rename(out)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise OSError(
                f"could not write {given}: {error.strerror or error}; nothing is left behind. Free disk space or make "
                f"{out.parent} writable, and start the same command again"
            ) from error
        raise


def _remove_abandoned(out: Path) -> None:
    """Removes the temporary folders for `out` that no process holds."""
    ours = re.compile(re.escape(f".{out.name}.partial-") + r"\w{8}")  # as mkdtemp makes it; gqe prepare's have more
    for folder in out.parent.iterdir():
        if ours.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
            with contextlib.suppress(OSError), _held(folder) as free:  # another process may remove it meanwhile
                if free:
                    shutil.rmtree(folder)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Holds a lock on the folder, which ends with the process at the latest; gives whether it was free.

    It gives False too where there are no locks: then nobody knows whether another process uses the folder.
    """
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError:
            held = False
        yield held
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
