"""Splits a corpus into units, consecutive files that are tokenised and packed on their own.

What a unit writes depends on its files and the settings alone, so units can be made in any order, by any number of
processes, and those that are finished stay finished.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from gqe_jax.config import ConfigError
from gqe_jax.data.choices import SPLITS
from gqe_jax.data.manifest import HELDOUT_FILE, SOURCES_FILE, FileRecord, SplitInfo
from gqe_jax.data.preparing.deduplicate import KeptDocuments, hash_unit
from gqe_jax.data.preparing.packing import row_packer
from gqe_jax.data.preparing.splitting import split_document
from gqe_jax.data.rows import Row, encode_row, token_dtype
from gqe_jax.data.sources.corpus import Corpus
from gqe_jax.data.sources.files import Document, Progress, SourceFile
from gqe_jax.data.tokenizer import Tokenizer

RESULT_FILE = "unit.json"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_UNIT_BYTES = 2**25  # least size of a unit's files together; of a larger corpus, 1/256
_MOST_UNITS = 256
_SHARD_TOKENS = 2**28
_BATCH_CHARACTERS = 2**21  # tokenised in one call
_PART_CHARACTERS = 2**22  # of a document, tokenised on its own: a tokenizer takes up to 100 bytes per character

_IS_SPACE = np.zeros(256, np.bool_)
_IS_SPACE[[*b" \t\n\r\v\f"]] = True


@dataclasses.dataclass(frozen=True)
class Settings:
    """Holds all settings, beside corpus and tokenizer, that decide which bytes are written."""

    seq_len: int
    heldout_fraction: float
    rule: str
    packing: str
    deduplicate: bool


@dataclasses.dataclass(frozen=True)
class UnitResult:
    """Holds the counts of a prepared unit, and the names of its shards in the unit's folder."""

    replaced: int
    empty_documents: int
    duplicates: int
    splits: dict[str, SplitInfo]

    @classmethod
    def load(cls, folder: Path) -> UnitResult:
        file = folder / RESULT_FILE
        content = json.loads(file.read_text())
        splits = {name: SplitInfo.read(split, file) for name, split in content["splits"].items()}
        return cls(**content | {"splits": splits})


def plan_units(corpus: Corpus) -> list[tuple[SourceFile, ...]]:
    """Returns the corpus's files in runs of about equal size, at least one file each; a function of names and sizes
    alone."""
    sizes = [file.stamp()[0] for file in corpus.files]
    least = max(_UNIT_BYTES, sum(sizes) // _MOST_UNITS)
    units: list[tuple[SourceFile, ...]] = []
    run: list[SourceFile] = []
    collected = 0
    for file, size in zip(corpus.files, sizes, strict=True):
        run.append(file)
        collected += size
        if collected >= least:
            units.append(tuple(run))
            run, collected = [], 0
    return [*units, tuple(run)] if run else units


@dataclasses.dataclass(frozen=True)
class Job:
    """Holds all that a process needs to prepare a unit; it can be pickled.

    Attributes:
      units: files of each unit.
      stamps: of each file, by name, when the work was planned.
      folder: where unit n leaves the folder `unit-n`.
    """

    units: tuple[tuple[SourceFile, ...], ...]
    column: str
    stamps: dict[str, tuple[int, int]]
    folder: Path
    tokenizer: Tokenizer
    settings: Settings

    def unit_folder(self, number: int) -> Path:
        return self.folder / f"unit-{number:05d}"

    def finished(self, number: int) -> bool:
        """Says whether the unit's folder is there, with all its shards."""
        folder = self.unit_folder(number)
        if not folder.is_dir():
            return False
        shards = [shard for split in UnitResult.load(folder).splits.values() for shard in split.shards]
        return all((folder / shard.name).is_file() for shard in shards)

    def documents(self, number: int, progress: Progress) -> Iterator[tuple[SourceFile, Document]]:
        """Yields the unit's documents with their files; `progress` is told of bytes read.

        Raises ConfigError if a file has changed.
        """
        behind = 0
        for file in self.units[number]:
            self._require_unchanged(file)
            for document in file.documents(self.column, lambda position, behind=behind: progress(behind + position)):
                yield file, document
            self._require_unchanged(file)
            behind += self.stamps[file.name][0]
            progress(behind)

    def _require_unchanged(self, file: SourceFile) -> None:
        if file.stamp() != self.stamps[file.name]:
            raise ConfigError(
                f"data={str(file.path)!r} has changed while it was being prepared: start again when nothing writes to "
                "it"
            )

    def hash_unit(self, number: int, progress: Progress, threads: int = 1) -> None:
        """Leaves the hashes of one unit's documents in the folder (see `deduplicate`)."""
        hash_unit(self.folder, number, (document for _, document in self.documents(number, progress)))

    def write_unit(self, number: int, progress: Progress, threads: int = 1) -> None:
        """Prepares one unit; its folder appears when it is complete.

        Raises ConfigError for a document that cannot be read, OSError where writing fails.
        """
        folder = self.unit_folder(number).with_suffix(".partial")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with (folder / SOURCES_FILE).open("w", encoding="utf-8", newline="\n") as sources:
            for file in self.units[number]:
                digest, size = file.content_digest
                sources.write(json.dumps({"name": file.name, "bytes": size, "sha256": digest}) + "\n")
        settings = self.settings
        writers = {split: _SplitWriter(folder, split, self.tokenizer, settings) for split in SPLITS}
        kept = KeptDocuments(self.folder, number) if settings.deduplicate else None
        replaced = empty = duplicates = 0
        with (folder / HELDOUT_FILE).open("w", encoding="utf-8", newline="\n") as heldout:
            batch: list[tuple[str, Document]] = []
            characters = 0
            for file, document in self.documents(number, progress):
                replaced += document.replaced
                if not document.text:
                    empty += 1
                    continue
                if kept is not None and not next(kept):
                    duplicates += 1
                    continue
                parts = split_document(document, settings.rule, settings.heldout_fraction, file.split)
                if "heldout" in parts:
                    heldout.write(json.dumps({"name": document.name, "text": parts["heldout"].text}) + "\n")
                batch += parts.items()
                characters += len(document.text)
                if characters >= _BATCH_CHARACTERS:
                    del document, parts
                    self._write_batch(batch, writers, threads)
                    batch, characters = [], 0
            self._write_batch(batch, writers, threads)
        result = UnitResult(replaced, empty, duplicates, {split: writer.close() for split, writer in writers.items()})
        (folder / RESULT_FILE).write_text(json.dumps(dataclasses.asdict(result)))
        folder.rename(self.unit_folder(number))

    def _write_batch(self, batch: list[tuple[str, Document]], writers: dict[str, _SplitWriter], threads: int) -> None:
        long = [document.tokens is None and len(document.text) > _PART_CHARACTERS for _, document in batch]
        short = [i for i, (_, document) in enumerate(batch) if document.tokens is None and not long[i]]
        ids = iter(self.tokenizer.encode_batch([batch[i][1].text for i in short], threads)) if short else iter(())
        for (split, document), in_parts in zip(batch, long, strict=True):
            if in_parts:
                for number, part in enumerate(_text_parts(document.text)):
                    writers[split].add(*self.tokenizer.encode_batch([part]), part, continued=number > 0)
            else:
                tokens = document.tokens if document.tokens is not None else next(ids)
                writers[split].add(tokens, document.text)


def _text_parts(text: str) -> Iterator[str]:
    """Yields the text in parts of at most `_PART_CHARACTERS`, cut after newlines where there are any."""
    begin = 0
    while len(text) - begin > _PART_CHARACTERS:
        cut = text.rfind("\n", begin, begin + _PART_CHARACTERS) + 1 or begin + _PART_CHARACTERS
        yield text[begin:cut]
        begin = cut
    yield text[begin:]


def _count_words(data: np.ndarray) -> int:
    """Runs of bytes, uint8 [n], other than ASCII white space."""
    inside = ~_IS_SPACE[data]
    return int(np.count_nonzero(inside[1:] & ~inside[:-1])) + bool(inside[:1].any())


class _SplitWriter:
    """Writes the rows of one split of a unit to shards, and counts."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, settings: Settings):
        self._folder, self._split, self._seq_len = folder, split, settings.seq_len
        self._packer = row_packer(settings.packing, settings.seq_len, tokenizer.eos_id)
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._rows_per_shard = max(1, _SHARD_TOKENS // settings.seq_len)
        self._rows: list[int] = []  # of each shard
        self._writer: ArrayRecordWriter | None = None
        self._documents = self._bytes = self._words = self._tokens = 0

    def add(self, tokens: np.ndarray, text: str, continued: bool = False) -> None:
        """Adds a document's rows; `continued` means what it means for the packers' `add`."""
        self._documents += not continued
        data = np.frombuffer(text.encode(), np.uint8)
        self._bytes += len(data)
        self._words += _count_words(data)
        self._tokens += len(tokens) + (not continued)
        self._write(self._packer.add(tokens, continued))

    def _write(self, rows: Iterator[Row]) -> None:
        for row in rows:
            if self._writer is None:
                path = self._folder / self._shard_name(len(self._rows))
                self._writer = ArrayRecordWriter(str(path), "group_size:1,zstd:1")
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
                full = (number for number in FULL_DISK if os.strerror(number) in str(error))
                message = f"cannot write {self._split} rows to {self._folder}: {error}"
                raise OSError(next(full, errno.EIO), message) from error

    def _shard_name(self, index: int) -> str:
        return f"{self._split}-{index:05d}.arrayrecord"

    def close(self) -> SplitInfo:
        self._write(self._packer.finish())
        self._close_shard()
        shards = tuple(FileRecord.of(self._folder, self._shard_name(i), rows) for i, rows in enumerate(self._rows))
        return SplitInfo(self._documents, self._bytes, self._words, self._tokens, sum(self._rows), shards)
