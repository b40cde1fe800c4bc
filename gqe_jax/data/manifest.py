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

from gqe_jax.config import ConfigError
from gqe_jax.data.choices import SPLITS
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
    def read(cls, content: dict[str, Any], source: Path) -> FileRecord:
        """Makes one of its `dataclasses.asdict`, as the file `source` has it.

        Raises:
          ConfigError: a name that leads out of the data set's folder, or a count that is none.
          TypeError: it is no such dictionary.
        """
        record = cls(**content)
        checked_name(record.name, source)
        for field in ("bytes", "rows"):
            value = getattr(record, field)
            if type(value) is not int or value < 0:
                raise ConfigError(f"{source}: {field}={value!r} of {record.name} is no number of {field}: {_AGAIN}")
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
    def read(cls, content: dict[str, Any], source: Path) -> SplitInfo:
        """Makes one of its `dataclasses.asdict`, as the file `source` has it.

        Raises:
          ConfigError: a shard's name or a count that cannot be.
          KeyError, TypeError: it is no such dictionary.
        """
        split = cls(**content | {"shards": tuple(FileRecord.read(shard, source) for shard in content["shards"])})
        for field in ("documents", "bytes", "words", "tokens", "rows"):
            value = getattr(split, field)
            if type(value) is not int or value < 0:
                raise ConfigError(f"{source}: {field}={value!r} is no number of {field}: {_AGAIN}")
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

        Raises ConfigError if it is missing, cut off, of another format version or incomplete.
        """
        path = Path(directory) / MANIFEST_FILE
        if not path.is_file():
            raise ConfigError(
                f"data.path={str(directory)!r} holds no {MANIFEST_FILE}, so it is no prepared data set: make one with "
                f"`gqe prepare --data 'path/**/*.txt' --out {directory}`"
            )
        try:
            content = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is cut off or damaged ({error}): {_AGAIN}") from error
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"{path} has format_version={version}, and this version of gqe_jax reads {FORMAT_VERSION}: {_AGAIN}, "
                "or use the version of gqe_jax that wrote it"
            )
        try:
            splits = {split: SplitInfo.read(content[split], path) for split in SPLITS}
            return cls(**content | splits | {"files": tuple(FileRecord.read(file, path) for file in content["files"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is incomplete or altered ({error}): {_AGAIN}") from error

    def split(self, name: str) -> SplitInfo:
        """The split "train" or "heldout"."""
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


def prepared_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer that the data set was made with. Raises ConfigError if its files are missing or altered."""
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
    """The held-out documents, in the order of the held-out rows."""
    path = Path(directory) / HELDOUT_FILE
    if not path.is_file():
        raise ConfigError(f"{path} with the held-out documents is missing: {_AGAIN}")
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield Document(**json.loads(line))


def changed_sources(directory: Path, corpus: Corpus) -> list[str]:
    """Names of the corpus's files that differ from those the data set was made of: changed, new or gone."""
    with (directory / SOURCES_FILE).open() as file:
        before = {record["name"]: (record["sha256"], record["bytes"]) for record in map(json.loads, file)}
    now = {file.name: file.content_digest for file in corpus.files}
    return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))


def damaged_files(directory: Path, files: Sequence[FileRecord], *, hashes: bool) -> dict[str, str]:
    """What is wrong with each file that is not as the manifest says, by name: its size, and if asked its sha256."""

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
