"""What a prepared data set is: a folder of row shards and `manifest.json`, which says what they hold.

    manifest.json   this page's dataclass
    train-00000-of-00002.arrayrecord, ..., heldout-00000-of-00001.arrayrecord
    heldout.jsonl   the held-out documents' names and texts, for comparison with compressors
    sources.jsonl   every source file's name, size and sha256
    tokenizer/      the tokenizer's own files
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from gqe_jax.config import ConfigError
from gqe_jax.data.corpus import Document
from gqe_jax.data.tokenizer import Tokenizer, tokenizer_from_files

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
HELDOUT_FILE = "heldout.jsonl"
SOURCES_FILE = "sources.jsonl"
TOKENIZER_DIRECTORY = "tokenizer"
SPLITS = ("train", "heldout")

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


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """One split. tokens: targets, that is all documents' tokens and one eos for each. bytes: of the text, as UTF-8."""

    documents: int
    bytes: int
    tokens: int
    rows: int
    shards: tuple[FileRecord, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
      source: one line on where the text came from.
      source_files, source_bytes: how many files were read, and their size.
      split_rule: how documents were divided, "document" (whole, by a hash of the name) or "tail" (the end of each).
      replaced: U+FFFD put in place of invalid UTF-8. empty_documents: documents without text, left out.
      tokenizer, tokenizer_digest, vocab_size, eos_id, pad_id: as in `Tokenizer`.
      files: all files but the shards.
    """

    format_version: int
    source: str
    source_files: int
    source_bytes: int
    heldout_fraction: float
    split_rule: str
    replaced: int
    empty_documents: int
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
        except ValueError as error:
            raise ConfigError(f"{path} is cut off or damaged ({error}): {_AGAIN}") from error
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"{path} has format_version={version}, and this version of gqe_jax reads {FORMAT_VERSION}: {_AGAIN}, "
                "or use the version of gqe_jax that wrote it"
            )
        try:
            for split in SPLITS:
                shards = tuple(FileRecord(**shard) for shard in content[split].pop("shards"))
                content[split] = SplitInfo(**content[split], shards=shards)
            return cls(**content | {"files": tuple(FileRecord(**file) for file in content["files"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is incomplete or altered ({error}): {_AGAIN}") from error

    def split(self, name: str) -> SplitInfo:
        """The split "train" or "heldout"."""
        return {"train": self.train, "heldout": self.heldout}[name]

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


def check_sizes(directory: str | Path, files: tuple[FileRecord, ...]) -> None:
    """Compares file sizes with the manifest's. Raises ConfigError that names every file that differs."""
    directory = Path(directory)
    problems = []
    for file in files:
        path = directory / file.name
        if not path.is_file():
            problems.append(f"{file.name} is missing")
        elif (size := path.stat().st_size) != file.bytes:
            what = "truncated" if size < file.bytes else "altered"
            problems.append(f"{file.name} is {what} ({size} bytes, {file.bytes} expected)")
    if problems:
        raise ConfigError(f"prepared data {str(directory)!r} is damaged: {'; '.join(problems)}. To repair: {_AGAIN}")


def verify(directory: str | Path) -> Manifest:
    """Reads every file of the data set and compares it with the manifest, which is returned.

    Raises ConfigError that names every file that is missing, truncated or altered.
    """
    directory = Path(directory)
    manifest = Manifest.load(directory)
    files = manifest.files + manifest.train.shards + manifest.heldout.shards
    check_sizes(directory, files)
    altered = [file.name for file in files if FileRecord.of(directory, file.name).sha256 != file.sha256]
    if altered:
        raise ConfigError(
            f"prepared data {str(directory)!r} is damaged: sha256 differs from the manifest's in {', '.join(altered)}. "
            f"To repair: {_AGAIN}"
        )
    return manifest
