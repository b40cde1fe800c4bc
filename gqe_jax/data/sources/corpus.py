"""Documents to train on: the text of Python's own standard library, or files of the user's own.

A corpus is a list of files and the column to read from those that hold records; documents are streamed.
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import os
import platform
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NoReturn

from etils import epath

from gqe_jax.checked_json import OBJECTS, TEXTS, check_fields, read_object
from gqe_jax.config import ConfigError
from gqe_jax.data.sources.files import Document, SourceFile
from gqe_jax.safe_names import checked_name

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
        """Yields all documents in order, empty ones included. Raises ConfigError on a line or file that cannot be
        read."""
        for file in self.files:
            yield from file.documents(self.column)

    @property
    def holds_records(self) -> bool:
        return any(file.holds_records for file in self.files)


def stdlib_corpus(root: str | Path | None = None) -> Corpus:
    """Returns the default corpus: the .py files of the running Python's standard library, sources and docstrings.

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
    """Returns the user's own files: paths or glob patterns (`**` goes into folders), local or in a bucket (gs://).

    Text and JSON lines (.jsonl), each also .gz or .zst, Parquet, and the folder of a Hugging Face dataset
    (`save_to_disk`). Each file is read once, however many names or links lead to it. Document names are relative to the
    files' common folder, so that a corpus can be moved. Raises ConfigError for a path that does not exist, another
    folder, a pattern without a match, files packed otherwise, and what is no file: a pipe, a device, a socket.
    """
    paths = _each_once([path for pattern in map(str, patterns) for path in _matches(pattern)])
    if not paths:
        raise ConfigError("data is empty: give at least one path or pattern, such as --data 'path/**/*.txt'")
    parents = [path.parent.parts for path in paths]
    shared = (len(set(parts)) == 1 for parts in zip(*parents, strict=False))
    common = sum(itertools.takewhile(bool, shared))
    files = [SourceFile(PurePosixPath(*path.parts[common:]).as_posix(), path) for path in paths]
    for file in files:
        file.kind  # noqa: B018 (refuses packed files)
    return Corpus("text files", tuple(sorted(files, key=lambda file: file.name)), column)


def _each_once(paths: Sequence[Path]) -> list[Path]:
    """Returns one path for each file there is: of several that lead to it the shortest, then the first by name."""
    files: dict[object, Path] = {}
    for path in sorted(paths, key=lambda path: (len(path.parts), str(path))):
        if "://" in str(path):  # a bucket has no links
            files.setdefault(str(path), path)
        else:
            status = path.stat()
            files.setdefault((status.st_dev, status.st_ino), path)
    return list(files.values())


def _matches(pattern: str) -> list[Path]:
    if "://" in pattern:
        return _remote_matches(pattern)
    path = os.path.expanduser(pattern)
    if os.path.isdir(path):
        return _dataset_files(Path(path))
    if not glob.has_magic(pattern):
        return [_plain_file(Path(path), pattern)]
    parts = Path(path).absolute().parts
    found = {match for match in _found(parts[0], parts[1:]) if not os.path.isdir(match)}
    return [_plain_file(Path(match), pattern) for match in sorted(found)] or _refuse_no_match(pattern)


def _remote_matches(pattern: str) -> list[Path]:
    path = epath.Path(pattern)
    if path.is_dir():
        return _dataset_files(path)
    if not glob.has_magic(pattern):
        return [_plain_file(path, pattern)]
    if "**" in pattern:
        raise ConfigError(f"data={pattern!r}: '**' is not searched in a bucket: name the folders, '*' for files")
    first = next(i for i, part in enumerate(path.parts) if glob.has_magic(part))
    found = path.parents[len(path.parts) - first - 1].glob("/".join(path.parts[first:]))
    return [match for match in found if match.is_file()] or _refuse_no_match(pattern)


def _refuse_no_match(pattern: str) -> NoReturn:
    raise ConfigError(
        f"data={pattern!r} matches no file: check the path ('**' goes into folders, names that begin with a dot are "
        "not matched), and quote the pattern so that the shell leaves it alone"
    )


def _found(folder: str, parts: Sequence[str]) -> Iterator[str]:
    """Yields what a pattern's `parts` match below a folder, as `glob.glob` has it; but no link is followed in a
    circle."""
    if "**" not in parts:
        yield from glob.glob(os.path.join(glob.escape(folder), *parts))
        return
    first = parts.index("**")
    rest = list(itertools.dropwhile("**".__eq__, parts[first:])) or ["*"]
    for root in glob.glob(os.path.join(glob.escape(folder), *parts[:first], "")):
        for below in _folders(root):
            yield from _found(below, rest)


def _folders(root: str) -> Iterator[str]:
    """Yields a folder and all those below it that are not hidden, each once, whatever links lead back to it."""
    seen: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        following = []
        for folder in waiting:
            try:
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(folder) as entries:
                    below = sorted(entry.path for entry in entries if entry.is_dir() and not entry.name.startswith("."))
            except OSError:  # not to be read, as for `glob`
                continue
            following += below
            yield folder
        waiting = following


def _plain_file(path: Path, pattern: str) -> Path:
    """Returns the absolute path, if it is a file's. Raises ConfigError for what is not there, could block, or never
    ends."""
    remote = "://" in str(path)
    if not (path.exists() if remote else os.path.lexists(path)):
        raise ConfigError(
            f"data={str(path)!r} does not exist: check the path, or give a pattern such as 'path/**/*.txt'"
        )
    if remote:
        return path
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(
            f"data={pattern!r}: {path} cannot be read ({error.strerror}): repair it, or leave it out"
        ) from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        raise ConfigError(
            f"data={pattern!r}: {path} is {kinds.get(stat.S_IFMT(mode), 'a device')}, and what is read must be a file: "
            f"write the text to one first, or leave it out"
        )
    path = path.absolute()
    return Path(os.path.realpath(path.parent), path.name) if ".." in path.parts else path


def _dataset_files(folder: Path) -> list[Path]:
    """Returns the Arrow files of a Hugging Face dataset that was saved to `folder`, in its own order of rows."""
    again = "save the dataset again with save_to_disk"
    splits, state = folder / "dataset_dict.json", folder / "state.json"
    if splits.is_file():
        content = read_object(splits, again)
        check_fields(content, {"splits": TEXTS}, splits, again)
        names = [checked_name(name, splits) for name in content.get("splits") or []]
        if not names:
            raise ConfigError(f"data={str(folder)!r} is a Hugging Face dataset without splits: {again}")
        raise ConfigError(
            f"data={str(folder)!r} is a Hugging Face dataset with the splits {', '.join(names)}: name one, such as "
            f"--data {folder / names[0]}"
        )
    if not state.is_file():
        raise ConfigError(
            f"data={str(folder)!r} is a folder, and no Hugging Face dataset: say which files in it, such as --data "
            f"'{folder / '**' / '*.txt'}'"
        )
    content = read_object(state, again)
    check_fields(content, {"_data_files": OBJECTS}, state, again)
    shards = [checked_name(file.get("filename"), state, suffix=".arrow") for file in content.get("_data_files") or []]
    if not shards:
        raise ConfigError(f"{state} names no files of the dataset: {again}")
    if missing := [shard for shard in shards if not (folder / shard).exists()]:
        raise ConfigError(f"{state} names {missing[0]}, which is missing: restore the file, or {again}")
    return [_plain_file(folder / shard, str(folder)) for shard in shards]
