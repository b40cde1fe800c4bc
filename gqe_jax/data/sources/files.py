"""Files that hold documents: text, JSON lines, Parquet and Arrow, plain or compressed, on disk or in a bucket.

Documents are streamed, one in memory at a time, whatever the size of the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import importlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import numpy as np

from gqe_jax.config import ConfigError, nearest

# A text file that is larger is read as several documents, so that memory has a bound; bytes.
TEXT_PART = 2**26
LONGEST_LINE = 2**30  # bytes of JSON: a line is held whole, and a small compressed file could claim any length

_KINDS = {".jsonl": "json lines", ".ndjson": "json lines", ".json": "json lines", ".parquet": "parquet"}
_KINDS |= {".arrow": "arrow"}
_COMPRESSIONS = frozenset({".gz", ".zst"})
_UNREAD_SUFFIXES = frozenset({".bz2", ".xz", ".zip", ".tar", ".tgz", ".arrayrecord", ".tfrecord"})
_SURROGATES = re.compile("[\ud800-\udfff]")
_BYTE_ORDER_MARK = "\ufeff"
_RECORDS_AT_ONCE = 64  # rows of a column that are decoded together
_TEXT_TYPES = frozenset({"string", "large_string", "string_view"})  # of Arrow, by name, for old versions lack some
_BYTES_TYPES = frozenset({"binary", "large_binary", "binary_view"})

Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Document:
    """A text with a name that is unique in its corpus and the same on every machine.

    replaced: how many U+FFFD stand in the text for bytes or JSON escapes that are no Unicode text.
    tokens: int32 [n], its tokens where the source gives them; None: the tokenizer makes them.
    """

    name: str
    text: str
    replaced: int = 0
    tokens: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file of a corpus: its relative posix name, and where it is (a local path, or `etils.epath` of a bucket)."""

    name: str
    path: Path
    split: str | None = None  # "train" or "heldout", where its documents go; None: divided by a hash of their names

    @functools.cached_property
    def content_digest(self) -> tuple[str, int]:
        """(sha256 hex, number of bytes) of the file."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return digest, file.tell()

    def stamp(self) -> tuple[int, int]:
        """(bytes, time of the last change): another stamp means that the file has changed."""
        stat = self.path.stat()
        if hasattr(stat, "st_mtime_ns"):
            return stat.st_size, stat.st_mtime_ns
        return stat.length, int(stat.mtime)  # of epath

    @property
    def compression(self) -> str | None:
        """".gz", ".zst" or None."""
        return self.path.suffix if self.path.suffix in _COMPRESSIONS else None

    @property
    def kind(self) -> str:
        """ "text", "json lines", "parquet" or "arrow", by the suffix. Raises ConfigError for packed files of others."""
        suffix = self.path.suffixes[-2:-1] if self.compression else self.path.suffixes[-1:]
        if suffix and suffix[0] in _UNREAD_SUFFIXES:
            raise ConfigError(
                f"data={str(self.path)!r} is packed ({suffix[0]}), and what is read is text, JSON lines (both also .gz "
                "and .zst), Parquet and a Hugging Face dataset folder: unpack it first, or narrow the pattern"
            )
        return _KINDS.get(suffix[0], "text") if suffix else "text"

    @property
    def holds_records(self) -> bool:
        """Whether a document is a line or a row of the file, rather than the file."""
        return self.kind != "text"

    def documents(self, column: str, progress: Progress = lambda position: None) -> Iterator[Document]:
        """Yields the file's documents: its `column` in each record, or else the file itself.

        A text file of more than `TEXT_PART` bytes is several documents, each ended at the end of a line. `progress`
        is told how far the file has been read, in its own bytes. Raises ConfigError for what cannot be read.
        """
        with self.path.open("rb") as raw, self._errors_named():
            if self.kind in ("parquet", "arrow"):
                documents = self._columnar(raw, column)
            else:
                file = self._decompressed(raw)
                documents = self._json_lines(file, column) if self.kind == "json lines" else self._text(file)
            for document in documents:
                progress(raw.tell())
                yield document

    @contextlib.contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise self._damaged(error) from error
        except OSError as error:
            if error.errno is not None:  # of the operating system, not of a decompressor
                raise
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> ConfigError:
        reason = " ".join(str(error).split())
        return ConfigError(f"data={str(self.path)!r} is cut off or damaged ({reason}): fetch it again, or leave it out")

    def _decompressed(self, raw: BinaryIO) -> io.BufferedReader | gzip.GzipFile:
        if self.compression == ".gz":
            return gzip.GzipFile(fileobj=raw)
        if self.compression == ".zst":
            stream = require_pyarrow("", str(self.path)).CompressedInputStream(raw, "zstd")
            return io.BufferedReader(stream, 2**20)
        return raw

    def _text(self, file: io.BufferedReader | gzip.GzipFile) -> Iterator[Document]:
        number, part = 1, _text_part(file)
        while True:
            following = _text_part(file)
            text, replaced = decode_utf8(part)
            yield Document(f"{self.name}#{number}" if following or number > 1 else self.name, text, replaced)
            if not following:
                break
            number, part = number + 1, following

    def _json_lines(self, file: io.BufferedReader | gzip.GzipFile, column: str) -> Iterator[Document]:
        lines = iter(functools.partial(file.readline, LONGEST_LINE + 1), b"")
        for number, line in enumerate(lines, start=1):
            where = f"{self.path}, line {number}"
            if len(line) > LONGEST_LINE:
                raise ConfigError(f"{where} has more than {LONGEST_LINE:,} bytes: divide it, or leave the file out")
            if line.strip():
                yield Document(f"{self.name}:{number}", *self._json_text(line, where, column))

    def _json_text(self, line: bytes, where: str, column: str) -> tuple[str, int]:
        """(text of the column, number of U+FFFD put into it)."""
        text, replaced = decode_utf8(line)
        try:
            record = json.loads(text.removeprefix(_BYTE_ORDER_MARK))
        except (ValueError, RecursionError) as error:  # too many digits or brackets, too
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise ConfigError(
                f"{where}: not valid JSON ({reason}): every line of a {self.path.suffix} file must be one JSON object; "
                f"repair or remove the line"
            ) from error
        if not isinstance(record, dict):
            raise ConfigError(
                f"{where}: a JSON {type(record).__name__} stands where an object is expected: write "
                f'{{"{column}": "..."}}, one per line'
            )
        value = record.get(column)
        if not isinstance(value, str):
            strings = [key for key, value in record.items() if isinstance(value, str)]
            found = f"is of type {type(value).__name__}, not a string" if column in record else "is missing"
            raise ConfigError(
                f"{where}: field {column!r} {found} (fields with text: {_some(strings)}): choose "
                "the field with --column, or repair the line"
            )
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can escape halves of surrogate pairs, which are no characters
            value, escapes = _SURROGATES.subn("\ufffd", value)
            replaced += escapes
        return value, replaced

    def _columnar(self, raw: BinaryIO, column: str) -> Iterator[Document]:
        arrow = require_pyarrow("", str(self.path))
        try:
            if self.kind == "parquet":
                file = require_pyarrow("parquet", str(self.path)).ParquetFile(raw, buffer_size=2**20)
                schema = file.schema_arrow
                self._require_text_column(schema, column)
                batches = file.iter_batches(batch_size=_RECORDS_AT_ONCE, columns=[column])
            else:
                batches = require_pyarrow("ipc", str(self.path)).open_stream(raw)
                self._require_text_column(batches.schema, column)
            number = 0
            for batch in batches:
                values = batch.column(column)
                values.validate(full=True)  # offsets that lead out of a damaged file's buffers would end the process
                for begin in range(0, len(values), _RECORDS_AT_ONCE):
                    for value in values.slice(begin, _RECORDS_AT_ONCE).cast(arrow.large_binary()).to_pylist():
                        number += 1
                        yield Document(f"{self.name}:{number}", *decode_utf8(value or b""))
        except (arrow.ArrowException, UnicodeDecodeError, MemoryError) as error:  # the last where a size is not true
            raise self._damaged(error) from error

    def _require_text_column(self, schema, column: str) -> None:
        names, kinds = list(schema.names), [_value_type(field.type) for field in schema]
        known = f"columns with text: {_some([name for name, k in zip(names, kinds, strict=True) if k in _TEXT_TYPES])}"
        if names.count(column) > 1:
            problem = f"stands there {names.count(column)} times ({known})"
        elif column not in names:
            problem = f"does not exist ({nearest(column, names)}; {known})"
        elif (kind := kinds[names.index(column)]) not in _TEXT_TYPES | _BYTES_TYPES:
            problem = f"is of type {kind}, not text ({known})"
        else:
            return
        raise ConfigError(f"{self.path}: column {column!r} {problem}: choose the column with --column")


def _value_type(kind) -> str:
    """Returns the name of an Arrow type; of a dictionary that of its values."""
    return str(getattr(kind, "value_type", kind)) if str(kind).startswith("dictionary<") else str(kind)


def _some(names: list[str]) -> str:
    """Returns the first names of a list, for a message."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "none"


def _text_part(file: io.BufferedReader | gzip.GzipFile) -> bytes:
    """About TEXT_PART bytes, to the end of a line, or at least of a character."""
    part = file.read(TEXT_PART)
    if len(part) == TEXT_PART and not part.endswith(b"\n"):
        part += file.readline(TEXT_PART)
        while not part.endswith(b"\n") and (byte := file.peek(1)[:1]) and byte[0] & 0xC0 == 0x80:
            part += file.read(1)
    return part


def decode_utf8(data: bytes) -> tuple[str, int]:
    """(text, number of U+FFFD that stand for invalid bytes). Newlines, NUL and byte-order marks stay as they are."""
    try:
        return data.decode("utf-8"), 0
    except UnicodeDecodeError:
        text = data.decode("utf-8", errors="replace")
        return text, text.count("\ufffd") - data.count("\ufffd".encode())


def require_pyarrow(module: str, origin: str) -> ModuleType:
    """pyarrow, or one of its modules. Raises ConfigError that names the extra where it is not installed."""
    try:
        return importlib.import_module(f"pyarrow.{module}".rstrip("."))
    except ImportError as error:
        raise ConfigError(
            f"{origin} needs the package pyarrow, which is not installed: pip install 'gqe_jax[columnar]', or turn the "
            "file into text, JSON lines or .gz"
        ) from error
