"""Offline preparation: documents to tokens to ArrayRecord shards of fixed-length rows, with a manifest.

The same corpus, tokenizer and settings give the same bytes. Everything is written to a folder beside the target and
renamed at the end, so the target exists only when it is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from gqe_jax.config import ConfigError
from gqe_jax.data.corpus import Corpus, Document, stdlib_corpus
from gqe_jax.data.manifest import (
    FORMAT_VERSION,
    HELDOUT_FILE,
    MANIFEST_FILE,
    SOURCES_FILE,
    SPLITS,
    TOKENIZER_DIRECTORY,
    FileRecord,
    Manifest,
    SplitInfo,
)
from gqe_jax.data.rows import Row, RowCutter, encode_row, token_dtype
from gqe_jax.data.tokenizer import Tokenizer

DEFAULT_HELDOUT_FRACTION = 0.05

_SHARD_TOKENS = 2**26
# With fewer expected held-out files than this, a hash of names could well hold out none of them, or far too much.
_FEWEST_HELDOUT_FILES = 8


def split_document(document: Document, rule: str, heldout_fraction: float) -> dict[str, Document]:
    """The document's part in each split ("train", "heldout"); a split it has no text for is left out.

    Rule "document": the whole document goes to one split, by a hash of its name, whatever else the corpus holds.
    Rule "tail": its last lines are held out.
    """
    if rule == "document":
        fingerprint = int.from_bytes(hashlib.sha256(document.name.encode("utf-8", "surrogateescape")).digest()[:8])
        parts = {"heldout" if fingerprint < heldout_fraction * 2**64 else "train": document}
    else:
        cut = _tail_start(document.text, heldout_fraction)
        parts = {
            "train": dataclasses.replace(document, text=document.text[:cut]),
            "heldout": dataclasses.replace(document, text=document.text[cut:]),
        }
    return {split: part for split, part in parts.items() if part.text}


def split_rule(corpus: Corpus, heldout_fraction: float) -> str:
    """The rule for `split_document`: "document", or "tail" where a corpus has few text files."""
    few = len(corpus.files) * heldout_fraction < _FEWEST_HELDOUT_FILES
    return "tail" if few and heldout_fraction > 0 and not corpus.holds_json_lines else "document"


def _tail_start(text: str, fraction: float) -> int:
    """Where the last `fraction` of the text begins, moved back to the beginning of its line if it has lines."""
    cut = len(text) - math.ceil(len(text) * fraction)
    line = text.rfind("\n", 0, cut) + 1
    return line or cut


def prepare(
    corpus: Corpus,
    out: str | Path,
    *,
    tokenizer: Tokenizer,
    seq_len: int,
    heldout_fraction: float = DEFAULT_HELDOUT_FRACTION,
) -> Manifest:
    """Writes the corpus to the folder `out` as rows of `seq_len` inputs (see `rows` and `manifest`).

    Raises ConfigError if `out` is not empty, a setting is out of range, a document cannot be read, or a split comes out
    empty; OSError if the disk is full or `out` cannot be written. In each case `out` is not made.
    """
    if seq_len < 1:
        raise ConfigError(f"seq_len={seq_len} must be positive: choose the input tokens of a row, such as 512")
    if not 0 <= heldout_fraction < 1:
        raise ConfigError(f"heldout={heldout_fraction} must lie in [0, 1): choose a fraction such as 0.05")
    out = Path(out).absolute()
    _refuse_used(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with _partial_directory(out) as partial:
        manifest = _write(corpus, partial, tokenizer, seq_len, heldout_fraction)
        try:
            partial.rename(out)
        except OSError:
            _refuse_used(out)  # another process was quicker
            raise
    return manifest


def _refuse_used(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"out={str(out)!r} exists and is not empty: choose another folder, or delete it first")


@contextlib.contextmanager
def _partial_directory(out: Path) -> Iterator[Path]:
    """A folder beside `out`, gone at the end; what killed processes of this machine left there goes too."""
    prefix = f".{out.name}.partial-{socket.gethostname()}-"
    for stale in out.parent.glob(f"{prefix}*"):
        pid = stale.name.removeprefix(prefix).split("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(stale, ignore_errors=True)
    partial = out.parent / f"{prefix}{os.getpid()}-{secrets.token_hex(4)}"
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _write(corpus: Corpus, folder: Path, tokenizer: Tokenizer, seq_len: int, heldout_fraction: float) -> Manifest:
    (folder / TOKENIZER_DIRECTORY).mkdir()
    names = [SOURCES_FILE, HELDOUT_FILE]
    for name, content in sorted(tokenizer.files().items()):
        names.append(f"{TOKENIZER_DIRECTORY}/{name}")
        (folder / names[-1]).write_bytes(content)
    source_bytes = 0
    with (folder / SOURCES_FILE).open("w", encoding="utf-8", newline="\n") as sources:
        for file in corpus.files:
            digest, size = file.content_digest
            sources.write(json.dumps({"name": file.name, "bytes": size, "sha256": digest}) + "\n")
            source_bytes += size
    writers = {split: _SplitWriter(folder, split, tokenizer, seq_len) for split in SPLITS}
    rule = split_rule(corpus, heldout_fraction)
    replaced = empty = 0
    with (folder / HELDOUT_FILE).open("w", encoding="utf-8", newline="\n") as heldout:
        for document in corpus.documents():
            parts = split_document(document, rule, heldout_fraction)
            replaced += document.replaced
            empty += not parts
            for split, part in parts.items():
                writers[split].add(tokenizer.encode(part.text), len(part.text.encode("utf-8")))
            if "heldout" in parts:
                heldout.write(json.dumps({"name": document.name, "text": parts["heldout"].text}) + "\n")
    splits = {split: writer.close() for split, writer in writers.items()}
    _require_text(corpus, splits, heldout_fraction)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source=corpus.description,
        source_files=len(corpus.files),
        source_bytes=source_bytes,
        heldout_fraction=heldout_fraction,
        split_rule=rule,
        replaced=replaced,
        empty_documents=empty,
        tokenizer=tokenizer.name,
        tokenizer_digest=tokenizer.digest,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        seq_len=seq_len,
        train=splits["train"],
        heldout=splits["heldout"],
        files=tuple(FileRecord.of(folder, name) for name in names),
    )
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), "utf-8", newline="\n")
    return manifest


def _require_text(corpus: Corpus, splits: dict[str, SplitInfo], heldout_fraction: float) -> None:
    train, heldout = splits["train"], splits["heldout"]
    if not train.rows and not heldout.rows:
        raise ConfigError(
            f"the corpus ({corpus.description}, the first {corpus.files[0].path}) holds no text, only empty documents: "
            "check the path and, for JSON lines, --field"
        )
    if not train.rows or (heldout_fraction > 0 and not heldout.rows):
        empty, full = ("train", heldout) if not train.rows else ("held-out", train)
        raise ConfigError(
            f"heldout={heldout_fraction} leaves the {empty} split empty (the corpus has {full.documents} documents "
            "with text): change --heldout, or give more documents"
        )


class _SplitWriter:
    """Writes the rows of one split to shards, and counts."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, seq_len: int):
        self._folder, self._split, self._seq_len = folder, split, seq_len
        self._cutter = RowCutter(seq_len, tokenizer.eos_id)
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._rows_per_shard = max(1, _SHARD_TOKENS // seq_len)
        self._rows: list[int] = []  # of each shard
        self._writer: ArrayRecordWriter | None = None
        self._documents = self._bytes = self._tokens = 0

    def add(self, tokens: np.ndarray, num_bytes: int) -> None:
        self._documents += 1
        self._bytes += num_bytes
        self._tokens += len(tokens) + 1
        self._write(self._cutter.add(tokens))

    def _write(self, rows: Iterator[Row]) -> None:
        for row in rows:
            if self._writer is None:
                path = self._folder / self._shard_name(len(self._rows))
                self._writer = ArrayRecordWriter(str(path), "group_size:1")
                self._rows.append(0)
            self._writer.write(encode_row(row, self._seq_len, self._dtype))
            self._rows[-1] += 1
            if self._rows[-1] == self._rows_per_shard:
                self._close_shard()

    def _close_shard(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            try:
                writer.close()
            except RuntimeError as error:  # the library's form of a full disk, told only here
                raise OSError(f"cannot write {self._split} rows to {self._folder}: {error}") from error

    def _shard_name(self, index: int, count: int | None = None) -> str:
        of = "" if count is None else f"-of-{count:05d}"
        return f"{self._split}-{index:05d}{of}.arrayrecord"

    def close(self) -> SplitInfo:
        self._write(self._cutter.finish())
        self._close_shard()
        shards = []
        for index, rows in enumerate(self._rows):
            name = self._shard_name(index, len(self._rows))
            (self._folder / self._shard_name(index)).rename(self._folder / name)
            shards.append(FileRecord.of(self._folder, name, rows))
        return SplitInfo(self._documents, self._bytes, self._tokens, sum(self._rows), tuple(shards))


def default_corpus_dir(tokenizer: Tokenizer, seq_len: int) -> Path:
    """The prepared default corpus, made on first use in `$XDG_CACHE_HOME/gqe_jax` (else `~/.cache/gqe_jax`).

    The folder's name is a digest of the sources, the tokenizer and the settings. Safe for processes that start at once.
    """
    corpus = stdlib_corpus()
    digest = hashlib.sha256(
        json.dumps([FORMAT_VERSION, DEFAULT_HELDOUT_FRACTION, tokenizer.digest, seq_len]).encode()
    )
    for file in corpus.files:
        digest.update(json.dumps([file.name, *file.content_digest]).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gqe_jax"
    out = cache / f"stdlib-{digest.hexdigest()[:16]}"
    if not (out / MANIFEST_FILE).is_file():
        try:
            prepare(corpus, out, tokenizer=tokenizer, seq_len=seq_len)
        except ConfigError:
            if not (out / MANIFEST_FILE).is_file():  # else another process made it meanwhile
                raise
    return out
