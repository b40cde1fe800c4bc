"""The record of a checkpoint's files: size and CRC-32 of each, made when they were written.

Orbax checksums its index but not the arrays, and a flipped bit there restores without a word.
Its limits: it is taken when the files have been written, so it cannot see what was already wrong in memory; a CRC finds
accidents, not forgery; a power failure (not a kill) can lose what the operating system had not yet written, which then
shows as damage. On object stores (`gs://`), which check what they store themselves, there is no record.
"""

import contextlib
import json
import stat
import zlib
from collections.abc import Sequence
from pathlib import Path

from gqe_jax.checked_json import parse_json, read_object, shown
from gqe_jax.config import ConfigError
from gqe_jax.safe_names import checked_name

RECORD = "integrity.json"
JSON_FILES = frozenset({".zarray", "_METADATA", "_sharding"})  # of arrays: a deep one would end the process in C++
# Orbax touches these once more between the record and the rename; nothing is read from them.
UNRECORDED = frozenset({RECORD, "_CHECKPOINT_METADATA", "commit_success.txt"})


def write_record(root: Path) -> None:
    """Writes the record of all files below `root` beside them."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    names = {path: path.relative_to(root).as_posix() for path in files}
    record = {name: _fingerprint(path) for path, name in names.items() if name not in UNRECORDED}
    (root / RECORD).write_text(json.dumps(record, indent=0))


def read_record(root: Path) -> dict[str, tuple[int, int]]:
    """Name → (bytes, CRC-32) of the files in `root`, as they were written.

    Raises ConfigError if there is no such record, or one that names no files in `root`.
    """
    record = read_object(root / RECORD)
    for name, value in record.items():
        if not (type(value) is list and len(value) == 2 and all(type(n) is int and 0 <= n < 2**63 for n in value)):
            raise ConfigError(f"{root / RECORD}: {shown(value)} must be the bytes and the CRC-32 of {shown(name)}")
    return {checked_name(name, root / RECORD): tuple(value) for name, value in record.items()}


def recorded_items(root: Path) -> set[str]:
    """Names of the items (folders in `root`) that were written, whether or not they are still there."""
    return {name.split("/")[0] for name in read_record(root) if "/" in name}


def recorded_bytes(root: Path) -> int:
    """Size of all files of the record; 0 where there is none to read."""
    with contextlib.suppress(ConfigError):
        return sum(size for size, _ in read_record(root).values())
    return 0


def problems(root: Path, items: Sequence[str] | None, *, part: int, parts: int) -> list[str]:
    """Describes what is wrong with the recorded files of `items` (None: all); reads `part` of `parts` of them."""
    try:
        record = read_record(root)
    except ConfigError as error:
        return [f"{RECORD} cannot be read ({error})"]
    chosen = sorted(name for name in record if items is None or name.split("/")[0] in items)[part::parts]
    return [f"{name} {problem}" for name in chosen if (problem := _problem(root / name, *record[name]))]


def _fingerprint(path: Path) -> tuple[int, int]:
    """(bytes, CRC-32) of a file, read in pieces."""
    checksum = size = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
            size += len(block)
    return size, checksum


def _problem(path: Path, size: int, checksum: int) -> str | None:
    try:
        found = path.stat()  # before the checksum: a truncated file need not be read
        if not stat.S_ISREG(found.st_mode):
            return "is no plain file"
        if found.st_size != size:
            return f"has {found.st_size} bytes instead of {size}"
        if _fingerprint(path) != (size, checksum):
            return "has other contents than were written"
        if path.name in JSON_FILES:
            parse_json(path.read_bytes(), path)
        return None
    except ConfigError:
        return "is no JSON"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
