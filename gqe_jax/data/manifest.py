"""What a prepared data set is: a folder of row shards and `manifest.json`, which says what they hold.

    manifest.json   this page's dataclass
    train-00000-of-00002.arrayrecord, ..., heldout-00000-of-00001.arrayrecord
    heldout.jsonl   the held-out documents' names and texts, for comparison with compressors
    sources.jsonl   every source file's name, size and sha256
    tokenizer/      the tokenizer's own files
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gqe_jax.checked_json import (
    COUNT,
    FLAG,
    OBJECT,
    OBJECTS,
    TEXT,
    check_record,
    is_one_of,
    is_whole,
    read_object,
    read_records,
    shown,
)
from gqe_jax.config import ConfigError
from gqe_jax.data.choices import LONGEST_ROW, PACKINGS, SPLITS
from gqe_jax.data.sources.corpus import Corpus
from gqe_jax.data.sources.files import Document
from gqe_jax.data.tokenizer import Tokenizer, tokenizer_from_files
from gqe_jax.safe_names import checked_name

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
HELDOUT_FILE = "heldout.jsonl"
SOURCES_FILE = "sources.jsonl"
TOKENIZER_DIRECTORY = "tokenizer"

_AGAIN = "delete the folder and prepare it again with `gqe prepare`"


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """A file of the data set. rows: how many records, in a shard; 0 in other files."""

    name: str
    bytes: int
    sha256: str
    rows: int = 0

    @classmethod
    def of(cls, directory: Path, name: str, rows: int = 0) -> FileRecord:
        """Measures the file `name` of `directory`."""
        with (directory / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(name, file.tell(), digest, rows)

    @classmethod
    def read(cls, content: Any, source: Path) -> FileRecord:
        """Makes one of its `dataclasses.asdict`, as the file `source` has it.

        Raises:
          ConfigError: it is no such dictionary, or has a name that leads out of the data set's folder.
        """
        record = cls(**check_record(content, _FILE_RULES, source, _AGAIN))
        checked_name(record.name, source)
        return record


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """One split.

    Attributes:
      documents: how many have text here.
      bytes: of the text, as UTF-8.
      words: of the text, separated by ASCII white space.
      tokens: targets, that is all documents' tokens and one eos for each.
      rows: of all shards.
    """

    documents: int
    bytes: int
    words: int
    tokens: int
    rows: int
    shards: tuple[FileRecord, ...]

    @classmethod
    def read(cls, content: Any, source: Path) -> SplitInfo:
        """Makes one of its `dataclasses.asdict`, as the file `source` has it.

        Raises:
          ConfigError: it is no such dictionary, or its counts contradict each other.
        """
        check_record(content, _SPLIT_RULES, source, _AGAIN)
        split = cls(**content | {"shards": tuple(FileRecord.read(shard, source) for shard in content["shards"])})
        rows = sum(shard.rows for shard in split.shards)
        if split.rows != rows or len({split.rows > 0, split.tokens > 0, split.bytes > 0}) > 1:
            raise ConfigError(
                f"{source}: rows={split.rows}, tokens={split.tokens} and bytes={split.bytes} do not fit each other, or "
                f"not the {rows} rows of the shards: {_AGAIN}"
            )
        return split


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
      source: one line on where the text came from.
      source_files, source_bytes: how many files were read, and their size.
      split_rule: how documents were divided, "document" (whole, by a hash of the name) or "tail" (the end of each).
      packing: of documents into rows, "concat" or "best-fit".
      replaced: U+FFFD put in place of invalid UTF-8. empty_documents: documents without text, left out.
      deduplicated, duplicates: whether repeated documents were left out, and how many.
      tokenizer, tokenizer_digest, vocab_size, eos_id, pad_id: as in `Tokenizer`.
      files: all files but the shards.
    """

    format_version: int
    source: str
    source_files: int
    source_bytes: int
    heldout_fraction: float
    split_rule: str
    packing: str
    replaced: int
    empty_documents: int
    deduplicated: bool
    duplicates: int
    tokenizer: str
    tokenizer_digest: str
    vocab_size: int
    eos_id: int
    pad_id: int
    seq_len: int
    train: SplitInfo
    heldout: SplitInfo
    files: tuple[FileRecord, ...]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def load(cls, directory: str | Path) -> Manifest:
        """Reads `directory/manifest.json`.

        Raises ConfigError if it is missing, cut off, of another format version, incomplete or contradicts itself.
        """
        path = Path(directory) / MANIFEST_FILE
        if not path.is_file():
            raise ConfigError(
                f"data.path={str(directory)!r} holds no {MANIFEST_FILE}, so it is no prepared data set: make one with "
                f"`gqe prepare --data 'path/**/*.txt' --out {directory}`"
            )
        content = read_object(path, _AGAIN)
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"{path} has format_version={shown(version)}, and this version of gqe_jax reads {FORMAT_VERSION}: "
                f"{_AGAIN}, or use the version of gqe_jax that wrote it"
            )
        check_record(content, _MANIFEST_RULES, path, _AGAIN)
        splits = {split: SplitInfo.read(content[split], path) for split in SPLITS}
        manifest = cls(**content | splits | {"files": tuple(FileRecord.read(file, path) for file in content["files"])})
        if max(manifest.eos_id, manifest.pad_id) >= manifest.vocab_size:
            raise ConfigError(
                f"{path}: eos_id={manifest.eos_id} and pad_id={manifest.pad_id} must be below vocab_size="
                f"{manifest.vocab_size}: {_AGAIN}"
            )
        return manifest

    def split(self, name: str) -> SplitInfo:
        """Returns the split "train" or "heldout"."""
        return {"train": self.train, "heldout": self.heldout}[name]

    def padding(self, name: str) -> float:
        """Share of the split's positions that hold no token."""
        split = self.split(name)
        return 1 - split.tokens / (split.rows * self.seq_len) if split.rows else 0.0

    def check_vocab_size(self, vocab_size: int) -> None:
        """Raises ConfigError if the data has token ids that a model with this vocabulary does not know."""
        if self.vocab_size > vocab_size:
            raise ConfigError(
                f"model.vocab_size={vocab_size} is smaller than the data's vocab_size={self.vocab_size} (tokenizer "
                f"{self.tokenizer}): set model.vocab_size to at least {self.vocab_size}, or prepare the data with a "
                "smaller tokenizer"
            )

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises ConfigError if the data was made with another tokenizer."""
        if self.tokenizer_digest != tokenizer.digest:
            raise ConfigError(
                f"the data was prepared with the tokenizer {self.tokenizer} (vocab_size={self.vocab_size}, sha256 "
                f"{self.tokenizer_digest[:12]}), not with {tokenizer.name} (vocab_size={tokenizer.vocab_size}, sha256 "
                f"{tokenizer.digest[:12]}): prepare the data again with this tokenizer, or choose data made with it"
            )


_FILE_RULES = {"name": TEXT, "bytes": COUNT, "sha256": TEXT, "rows": COUNT}
_SPLIT_RULES = dict.fromkeys(("documents", "bytes", "words", "tokens", "rows"), COUNT) | {"shards": OBJECTS}
_FRACTION = (lambda v: type(v) in (int, float) and 0 <= v < 1, "a number of at least 0 and below 1")
_MANIFEST_RULES = {
    "format_version": is_whole(1),
    **dict.fromkeys(("source", "tokenizer", "tokenizer_digest"), TEXT),
    **dict.fromkeys(("source_files", "source_bytes", "replaced", "empty_documents", "duplicates"), COUNT),
    "heldout_fraction": _FRACTION,
    "split_rule": is_one_of("source", "document", "tail"),
    "packing": is_one_of(*PACKINGS),
    "deduplicated": FLAG,
    "vocab_size": is_whole(1),
    **dict.fromkeys(("eos_id", "pad_id"), is_whole(0)),
    "seq_len": is_whole(1, LONGEST_ROW),
    **dict.fromkeys(SPLITS, OBJECT),
    "files": OBJECTS,
}
_DIGEST = (lambda v: v is None or type(v) is str, "a text, or null")  # null: seqio reads no file of that name
_SOURCE_RULES = {"name": TEXT, "bytes": COUNT, "sha256": _DIGEST}


def prepared_tokenizer(directory: str | Path) -> Tokenizer:
    """Returns the tokenizer that the data set was made with. Raises ConfigError if its files are missing or altered."""
    directory = Path(directory)
    manifest = Manifest.load(directory)
    folder = directory / TOKENIZER_DIRECTORY
    files = {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}
    if not files:
        raise ConfigError(f"{folder} with the data's tokenizer is missing: {_AGAIN}")
    tokenizer = tokenizer_from_files(files)
    if tokenizer.digest != manifest.tokenizer_digest:
        raise ConfigError(
            f"{folder} is not the tokenizer of {directory / MANIFEST_FILE} (sha256 {tokenizer.digest[:12]}, not "
            f"{manifest.tokenizer_digest[:12]}): {_AGAIN}"
        )
    return tokenizer


def heldout_documents(directory: str | Path) -> Iterator[Document]:
    """Yields the held-out documents, in the order of the held-out rows."""
    path = Path(directory) / HELDOUT_FILE
    for record in read_records(path, {"name": TEXT, "text": TEXT}, _AGAIN):
        yield Document(**record)


def copied_sources(directory: str | Path) -> int:
    """Says how many source files have the bytes of another one that was read before them."""
    records = read_records(Path(directory) / SOURCES_FILE, _SOURCE_RULES, _AGAIN)
    digests = [record["sha256"] for record in records if record["sha256"] is not None]
    return len(digests) - len(set(digests))


def changed_sources(directory: Path, corpus: Corpus) -> list[str]:
    """Names of the corpus's files that differ from those the data set was made of: changed, new or gone."""
    records = read_records(directory / SOURCES_FILE, _SOURCE_RULES, _AGAIN)
    before = {record["name"]: (record["sha256"], record["bytes"]) for record in records}
    now = {file.name: file.content_digest for file in corpus.files}
    return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))


def damaged_files(directory: Path, files: Sequence[FileRecord], *, hashes: bool) -> dict[str, str]:
    """Returns file name → what is wrong with it, for files whose size (or, if asked, sha256) is not the manifest's."""

    def problem(file: FileRecord) -> str | None:
        path = directory / file.name
        if not path.is_file():
            return f"{file.name} is missing"
        if (size := path.stat().st_size) != file.bytes:
            what = "truncated" if size < file.bytes else "altered"
            return f"{file.name} is {what} ({size} bytes, {file.bytes} expected)"
        if hashes and FileRecord.of(directory, file.name).sha256 != file.sha256:
            return f"sha256 differs from the manifest's in {file.name}"
        return None

    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing lets other threads run
        problems = zip(files, pool.map(problem, files), strict=True)
        return {file.name: problem for file, problem in problems if problem}


def check_sizes(directory: str | Path, files: Sequence[FileRecord]) -> None:
    """Compares file sizes with the manifest's. Raises ConfigError that names every file that differs."""
    _refuse_damaged(Path(directory), files, hashes=False)


def verify(directory: str | Path) -> Manifest:
    """Reads every file of the data set and compares it with the manifest, which is returned.

    Raises ConfigError that names every file that is missing, truncated or altered.
    """
    manifest = Manifest.load(directory)
    _refuse_damaged(Path(directory), manifest.files + manifest.train.shards + manifest.heldout.shards, hashes=True)
    return manifest


def _refuse_damaged(directory: Path, files: Sequence[FileRecord], *, hashes: bool) -> None:
    if problems := damaged_files(directory, files, hashes=hashes):
        raise ConfigError(
            f"prepared data {str(directory)!r} is damaged: {'; '.join(problems.values())}. To repair: {_AGAIN}"
        )
