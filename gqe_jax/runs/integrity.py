"""The record of a checkpoint's files: size and CRC-32 of each, made when they were written.

Orbax checksums its index but not the arrays, and a flipped bit there restores without a word.
Its limits: it is taken when the files have been written, so it cannot see what was already wrong in memory; a CRC finds
accidents, not forgery; a power failure (not a kill) can lose what the operating system had not yet written, which then
shows as damage. On object stores (`gs://`), which check what they store themselves, there is no record.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

RECORD = "integrity.json"
# Orbax touches these once more between the record and the rename; nothing is read from them.
UNRECORDED = frozenset({RECORD, "_CHECKPOINT_METADATA", "commit_success.txt"})


def write_record(root: Path) -> None:
    """Writes the record of all files below `root` beside them."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    names = {path: path.relative_to(root).as_posix() for path in files}
    record = {name: _fingerprint(path) for path, name in names.items() if name not in UNRECORDED}
    (root / RECORD).write_text(json.dumps(record, indent=0))


def recorded_items(root: Path) -> set[str]:
    """Names of the items (folders in `root`) that were written, whether or not they are still there."""
    return {name.split("/")[0] for name in json.loads((root / RECORD).read_bytes()) if "/" in name}


def recorded_bytes(root: Path) -> int:
    """Size of all files of the record; 0 where there is none to read."""
    try:
        return sum(size for size, _ in json.loads((root / RECORD).read_bytes()).values())
    except (OSError, ValueError, TypeError, AttributeError):
        return 0


def problems(root: Path, items: Sequence[str] | None, *, part: int, parts: int) -> list[str]:
    """Describes what is wrong with the recorded files of `items` (None: all); reads `part` of `parts` of them."""
    try:
        record = json.loads((root / RECORD).read_bytes())
    except (OSError, ValueError) as error:
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
        found = path.stat().st_size  # before the checksum: a truncated file need not be read
        if found != size:
            return f"has {found} bytes instead of {size}"
        return None if _fingerprint(path) == (size, checksum) else "has other contents than were written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
