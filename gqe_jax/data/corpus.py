"""Documents to train on: the text of Python's own standard library, text files, or JSON lines.

A corpus is a list of files and a way to read documents from each; documents are streamed, one in memory at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import json
import os
import platform
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from gqe_jax.config import ConfigError

# Parts of the standard library that are tests, generated tables or this machine's settings rather than text.
_STDLIB_SKIPPED_DIRECTORIES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__phello__"}
)
_STDLIB_SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "sitecustomize", "usercustomize")
_PACKED_SUFFIXES = frozenset({".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".parquet", ".arrow", ".arrayrecord"})
_JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class Document:
    """A text with a name that is unique in its corpus and the same on every machine.

    replaced: how many U+FFFD stand in the text for bytes or JSON escapes that are no Unicode text.
    """

    name: str
    text: str
    replaced: int = 0


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file of a corpus: its relative posix name, and where it is on this machine."""

    name: str
    path: Path

    @functools.cached_property
    def content_digest(self) -> tuple[str, int]:
        """(sha256 hex, number of bytes) of the file."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return digest, file.tell()

    def documents(self, field: str) -> Iterator[Document]:
        """The file's documents: one per line of JSON lines (its `field`), else the file itself."""
        if self.path.suffix in _JSONL_SUFFIXES:
            yield from self._json_lines(field)
        else:
            text, replaced = decode_utf8(self.path.read_bytes())
            yield Document(self.name, text, replaced)

    def _json_lines(self, field: str) -> Iterator[Document]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                text, replaced = decode_utf8(line)
                where = f"{self.path}, line {number}"
                try:
                    record = json.loads(text)
                except json.JSONDecodeError as error:
                    raise ConfigError(
                        f"{where}: not valid JSON ({error.msg} at column {error.colno}): every line of a .jsonl file "
                        "must be one JSON object; repair or remove the line"
                    ) from error
                if not isinstance(record, dict):
                    raise ConfigError(
                        f"{where}: a JSON {type(record).__name__} stands where an object is expected: write "
                        f'{{"{field}": "..."}}, one per line'
                    )
                if not isinstance(record.get(field), str):
                    strings = [key for key, value in record.items() if isinstance(value, str)]
                    kind = type(record.get(field)).__name__
                    found = f"is of type {kind}, not a string" if field in record else "is missing"
                    raise ConfigError(
                        f"{where}: field {field!r} {found} (fields with text: {', '.join(strings) or 'none'}): choose "
                        "the field with --field, or repair the line"
                    )
                value, escapes = _SURROGATES.subn("\ufffd", record[field])
                yield Document(f"{self.name}:{number}", value, replaced + escapes)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Files in a fixed order, and how to read them.

    Attributes:
      description: one line for the manifest.
      files: sorted by name.
      field: of JSON lines, the field that holds the text.
    """

    description: str
    files: tuple[SourceFile, ...]
    field: str = "text"

    def documents(self) -> Iterator[Document]:
        """All documents in order, empty ones included. Raises ConfigError on a line or file that cannot be read."""
        for file in self.files:
            yield from file.documents(self.field)

    @property
    def holds_json_lines(self) -> bool:
        return any(file.path.suffix in _JSONL_SUFFIXES for file in self.files)


def decode_utf8(data: bytes) -> tuple[str, int]:
    """(text, number of U+FFFD that stand for invalid bytes). Newlines, NUL and byte-order marks stay as they are."""
    try:
        return data.decode("utf-8"), 0
    except UnicodeDecodeError:
        text = data.decode("utf-8", errors="replace")
        return text, text.count("\ufffd") - data.count("\ufffd".encode())


def stdlib_corpus(root: str | Path | None = None) -> Corpus:
    """The default corpus: the .py files of the running Python's standard library, sources and docstrings.

    Tests, installed packages, generated tables and per-machine settings are left out. `root` is another library's
    folder. Raises ConfigError where this Python carries no sources (a zipped or frozen library).
    """
    root = Path(root or sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not _skipped_in_stdlib(name)]
        for name in names:
            path = Path(folder, name)
            if path.suffix == ".py" and not _skipped_in_stdlib(name):
                files.append(SourceFile(path.relative_to(root).as_posix(), path))
    if not files:
        raise ConfigError(
            f"the default corpus is the running Python's standard library, and {root} holds no .py files: use a Python "
            "installed with its sources, or your own text with --data 'path/**/*.txt'"
        )
    description = f"standard library of Python {platform.python_version()}"
    return Corpus(description, tuple(sorted(files, key=lambda file: file.name)))


def _skipped_in_stdlib(name: str) -> bool:
    return name in _STDLIB_SKIPPED_DIRECTORIES or name.startswith(_STDLIB_SKIPPED_PREFIXES)


def files_corpus(patterns: Sequence[str | Path], field: str = "text") -> Corpus:
    """The user's own files: paths or glob patterns (`**` goes into folders), plain text or JSON lines (.jsonl).

    Document names are relative to the files' common folder, so that a corpus can be moved. Raises ConfigError for a
    path that does not exist, a folder, a pattern without a match, and compressed or columnar files.
    """
    paths: set[Path] = set()
    for pattern in map(str, patterns):
        paths.update(_matches(pattern))
    for path in sorted(paths):
        if path.suffix in _PACKED_SUFFIXES:
            raise ConfigError(
                f"data={str(path)!r} is packed ({path.suffix}), and only plain text and JSON lines are read: unpack it "
                "first, or narrow the pattern"
            )
    if not paths:
        raise ConfigError("data is empty: give at least one path or pattern, such as --data 'path/**/*.txt'")
    common = Path(os.path.commonpath([path.parent for path in paths]))
    files = (SourceFile(PurePosixPath(path.relative_to(common)).as_posix(), path) for path in paths)
    return Corpus("text files", tuple(sorted(files, key=lambda file: file.name)), field)


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [path.absolute()]
    if path.is_dir():
        raise ConfigError(
            f"data={pattern!r} is a folder: say which files in it, such as --data '{path / '**' / '*.txt'}'"
        )
    if not glob.has_magic(pattern):
        raise ConfigError(f"data={pattern!r} does not exist: check the path, or give a pattern such as 'path/**/*.txt'")
    found = [Path(match).absolute() for match in glob.glob(str(path), recursive=True)]
    files = [match for match in found if match.is_file()]
    if not files:
        raise ConfigError(
            f"data={pattern!r} matches no file: check the path ('**' goes into folders, names that begin with a dot "
            "are not matched), and quote the pattern so that the shell leaves it alone"
        )
    return files
