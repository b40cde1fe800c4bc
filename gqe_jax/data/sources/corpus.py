"""Documents to train on: the text of Python's own standard library, or files of the user's own.

A corpus is a list of files and the column to read from those that hold records; documents are streamed.
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import json
import os
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from etils import epath

from gqe_jax.config import ConfigError
from gqe_jax.data.sources.files import Document, SourceFile

# Parts of the standard library that are tests, generated tables or this machine's settings rather than text.
_STDLIB_SKIPPED_DIRECTORIES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__phello__"}
)
_STDLIB_SKIPPED_PREFIXES = ("config-", "_sysconfigdata", "sitecustomize", "usercustomize")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Files in a fixed order, and how to read them.

    Attributes:
      description: one line for the manifest.
      files: sorted by name.
      column: of JSON lines, Parquet and Arrow, the field that holds the text.
    """

    description: str
    files: tuple[SourceFile, ...]
    column: str = "text"

    def documents(self) -> Iterator[Document]:
        """All documents in order, empty ones included. Raises ConfigError on a line or file that cannot be read."""
        for file in self.files:
            yield from file.documents(self.column)

    @property
    def holds_records(self) -> bool:
        return any(file.holds_records for file in self.files)


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


def files_corpus(patterns: Sequence[str | Path], column: str = "text") -> Corpus:
    """The user's own files: paths or glob patterns (`**` goes into folders), local or in a bucket (gs://).

    Text and JSON lines (.jsonl), each also .gz or .zst, Parquet, and the folder of a Hugging Face dataset
    (`save_to_disk`). Document names are relative to the files' common folder, so that a corpus can be moved. Raises
    ConfigError for a path that does not exist, another folder, a pattern without a match, and files packed otherwise.
    """
    paths: dict[str, Path] = {}
    for pattern in map(str, patterns):
        paths |= {str(path): path for path in _matches(pattern)}
    if not paths:
        raise ConfigError("data is empty: give at least one path or pattern, such as --data 'path/**/*.txt'")
    parents = [path.parent.parts for path in paths.values()]
    shared = (len(set(parts)) == 1 for parts in zip(*parents, strict=False))
    common = sum(itertools.takewhile(bool, shared))
    files = [SourceFile(PurePosixPath(*path.parts[common:]).as_posix(), path) for path in paths.values()]
    for file in files:
        file.kind  # noqa: B018 (refuses packed files)
    return Corpus("text files", tuple(sorted(files, key=lambda file: file.name)), column)


def _matches(pattern: str) -> list[Path]:
    remote = "://" in pattern
    path = epath.Path(pattern) if remote else Path(pattern).expanduser()
    if path.is_dir():
        return _dataset_files(path)
    if not glob.has_magic(pattern):
        if not path.exists():
            raise ConfigError(
                f"data={pattern!r} does not exist: check the path, or give a pattern such as 'path/**/*.txt'"
            )
        return [path if remote else path.absolute()]
    if remote:
        if "**" in pattern:
            raise ConfigError(f"data={pattern!r}: '**' is not searched in a bucket: name the folders, '*' for files")
        first = next(i for i, part in enumerate(path.parts) if glob.has_magic(part))
        found = path.parents[len(path.parts) - first - 1].glob("/".join(path.parts[first:]))
    else:
        found = [Path(match).absolute() for match in glob.glob(str(path), recursive=True)]
    files = [match for match in found if match.is_file()]
    if not files:
        raise ConfigError(
            f"data={pattern!r} matches no file: check the path ('**' goes into folders, names that begin with a dot "
            "are not matched), and quote the pattern so that the shell leaves it alone"
        )
    return files


def _dataset_files(folder: Path) -> list[Path]:
    """The Arrow files of a Hugging Face dataset that was saved to `folder`, in its own order of rows."""
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = json.loads(splits.read_text())["splits"]
        raise ConfigError(
            f"data={str(folder)!r} is a Hugging Face dataset with the splits {', '.join(names)}: name one, such as "
            f"--data {folder / names[0]}"
        )
    state = folder / "state.json"
    if not state.is_file():
        raise ConfigError(
            f"data={str(folder)!r} is a folder, and no Hugging Face dataset: say which files in it, such as --data "
            f"'{folder / '**' / '*.txt'}'"
        )
    return [folder.absolute() / file["filename"] for file in json.loads(state.read_text())["_data_files"]]
