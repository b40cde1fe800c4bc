"""A new folder that appears under its name only when everything in it is written."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gqe_jax.config import ConfigError


@contextlib.contextmanager
def new_folder(out: str | Path, option: str, size: int = 0) -> Iterator[Path]:
    """Yields a temporary folder beside `out` that is renamed to it at the end, or removed if anything is raised.

    Args:
      out: the folder to make; it must not exist, or be empty.
      option: name of the command-line option that gave it, for messages.
      size: bytes that will be written, to refuse a full disk at once.

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
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.partial-"))
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
