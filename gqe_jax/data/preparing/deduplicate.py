"""Exact duplicate removal: of documents with the same text, the first in the order of the corpus is kept.

The sources are read once more than without it. Each document takes 28 bytes of disk while the work goes on, and memory
holds 1/256 of that at a time: the hashes are looked at in 256 parts, by their first byte.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from gqe_jax.data.sources.files import Document

_RECORD = np.dtype([("hash", "<u8", 2), ("unit", "<u4"), ("number", "<u8")])
_PARTS = 256
_BUFFERED = 2**16  # documents between writes


class KeptDocuments(Iterator[bool]):
    """Tells, document by document, which documents of a unit are kept."""

    def __init__(self, folder: Path, unit: int):
        path = _marks(folder, unit)
        self._duplicates = iter(np.load(path).tolist() if path.exists() else [])
        self._next = next(self._duplicates, None)
        self._number = -1

    def __next__(self) -> bool:
        self._number += 1
        if self._number != self._next:
            return True
        self._next = next(self._duplicates, None)
        return False


def hash_unit(folder: Path, unit: int, documents: Iterable[Document]) -> None:
    """Leaves the unit's hashes in `folder`; the file appears when it is complete."""
    path = _hashes(folder, unit)
    partial = path.with_suffix(".partial")
    texts = (document.text.encode("utf-8", "surrogatepass") for document in documents if document.text)
    digests = (hashlib.blake2b(text, digest_size=16).digest() for text in texts)
    number = 0
    with partial.open("wb") as file:
        while block := b"".join(itertools.islice(digests, _BUFFERED)):
            records = np.empty(len(block) // 16, _RECORD)
            records["hash"] = np.frombuffer(block, "<u8").reshape(-1, 2)
            records["unit"] = unit
            records["number"] = np.arange(number, number + len(records))
            number += len(records)
            file.write(records.tobytes())
    partial.rename(path)


def is_hashed(folder: Path, unit: int) -> bool:
    """Says whether `hash_unit` has finished this unit."""
    return _hashes(folder, unit).is_file()


def mark_duplicates(folder: Path, units: int) -> None:
    """Returns the documents of each unit that are not kept, from the hashes of all units."""
    parts = [folder / f"part-{part:03d}" for part in range(_PARTS)]
    for part in parts:
        part.write_bytes(b"")
    for unit in range(units):
        with _hashes(folder, unit).open("rb") as file:
            while block := file.read(_RECORD.itemsize * 2**20):
                records = np.frombuffer(block, _RECORD)
                first = np.frombuffer(block, np.uint8)[:: _RECORD.itemsize]
                order = np.argsort(first, kind="stable")
                ends = np.searchsorted(first[order], np.arange(_PARTS), side="right")
                for part, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
                    if end > begin:
                        with parts[part].open("ab") as out:
                            out.write(records[order[begin:end]].tobytes())
    duplicates: list[list[np.ndarray]] = [[] for _ in range(units)]
    for part in parts:
        records = np.fromfile(part, _RECORD)  # in the order of the corpus
        part.unlink()
        _, kept = np.unique(records["hash"], axis=0, return_index=True)
        rest = np.delete(records, kept)
        for unit in np.unique(rest["unit"]):
            duplicates[unit].append(rest["number"][rest["unit"] == unit])
    for unit, numbers in enumerate(duplicates):
        np.save(_marks(folder, unit), np.sort(np.concatenate([np.empty(0, np.uint64), *numbers])))


def _hashes(folder: Path, unit: int) -> Path:
    return folder / f"hashes-{unit:05d}"


def _marks(folder: Path, unit: int) -> Path:
    return folder / f"duplicates-{unit:05d}.npy"
