"""Documents into rows: cut from one stream ("concat"), or packed whole ("best-fit").

Both have `add(tokens, continued)` and `finish()`, which give the rows that are complete, and hold a bounded number of
tokens. A long document is added in parts: the first as a document, the others as its continuation.
In both, a document of n tokens fills n + 1 positions: eos and its tokens are inputs, its tokens and eos are targets.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gqe_jax.data.rows import Row

_WINDOW_TOKENS = 2**22  # what best-fit chooses from


def row_packer(packing: str, seq_len: int, eos_id: int) -> RowCutter | BestFitPacker:
    """Returns the packer named "concat" or "best-fit"."""
    return {"concat": RowCutter, "best-fit": BestFitPacker}[packing](seq_len, eos_id)


class RowCutter:
    """Concatenates tokenised documents and cuts the stream into rows; only the last of all may be short.

    A document that goes on in the next row is a segment of its own there. Holds less than a row between calls.
    """

    def __init__(self, seq_len: int, eos_id: int):
        self._seq_len = seq_len
        self._eos = np.array([eos_id], np.int32)
        # What is not cut yet; its first token was the last target of the row before.
        self._stream = np.empty(0, np.int32)
        self._starts = np.empty(0, np.int64)

    def add(self, tokens: np.ndarray, continued: bool = False) -> Iterator[Row]:
        """Returns the rows that are full once this document, or the next part of the one before, has been appended."""
        starts = self._starts if continued else np.append(self._starts, len(self._stream))
        stream = np.concatenate([self._stream, self._eos[:0] if continued else self._eos, tokens], dtype=np.int32)
        end = (len(stream) - 1) // self._seq_len * self._seq_len
        self._stream, self._starts = stream[end:], starts[starts >= end] - end
        return (_row(stream, starts, begin, self._seq_len) for begin in range(0, end, self._seq_len))

    def finish(self) -> Iterator[Row]:
        """Returns the row that is left, ended by eos; none if there was no document. Nothing can be added after it."""
        stream, starts = self._stream, self._starts
        if len(stream):
            stream = np.concatenate([stream, self._eos])
        return (_row(stream, starts, begin, self._seq_len) for begin in range(0, len(stream) - 1, self._seq_len))


def _row(stream: np.ndarray, starts: np.ndarray, begin: int, seq_len: int) -> Row:
    first, last = np.searchsorted(starts, [begin, begin + seq_len])
    inside = starts[first:last] - begin
    if not len(inside) or inside[0] != 0:
        inside = np.concatenate([[0], inside])
    return Row(stream[begin : begin + seq_len + 1], inside)


class BestFitPacker:
    """Packs whole documents, each into the row whose free space it fills best, the longest first.

    A document that is longer than a row fills rows of its own, and what is left of it is packed. Chooses among about
    four million tokens at a time (best-fit decreasing: Johnson 1973; for language models, Ding et al. 2024, arXiv
    2404.10830).
    """

    def __init__(self, seq_len: int, eos_id: int):
        self._seq_len = seq_len
        self._eos = np.array([eos_id], np.int32)
        self._open = self._eos[:0]  # inputs of the document that is being added, those in no row yet
        self._waiting: list[np.ndarray] = []  # inputs of documents or of their ends, each at most a row long
        self._tokens = 0  # of these

    def add(self, tokens: np.ndarray, continued: bool = False) -> Iterator[Row]:
        """Yields the rows that are complete once this document, or the next part of the one before, has been added."""
        if not continued:
            self._end_document()
            if self._tokens >= _WINDOW_TOKENS:
                yield from self._pack()
        stream = np.concatenate([self._open if continued else self._eos, tokens], dtype=np.int32)
        whole = (len(stream) - 1) // self._seq_len * self._seq_len
        for begin in range(0, whole, self._seq_len):
            yield Row(stream[begin : begin + self._seq_len + 1], np.zeros(1, np.int64))
        self._open = stream[whole:]

    def finish(self) -> Iterator[Row]:
        """Yields the rows of all that is left."""
        self._end_document()
        yield from self._pack()

    def _end_document(self) -> None:
        if len(self._open):
            self._waiting.append(self._open)
            self._tokens += len(self._open)
            self._open = self._eos[:0]

    def _pack(self) -> Iterator[Row]:
        waiting, self._waiting, self._tokens = self._waiting, [], 0
        for row in best_fit([len(rest) for rest in waiting], self._seq_len):
            parts = [waiting[i] for i in row]
            starts = np.cumsum([0, *map(len, parts[:-1])])
            yield Row(np.concatenate([*parts, self._eos]), starts)


def best_fit(lengths: list[int], size: int) -> list[list[int]]:
    """Numbers of the items in each bin of `size`, by best-fit decreasing; every length is in [1, size]."""
    bins: list[list[int]] = []
    by_space: dict[int, list[int]] = {}  # free space: bins that have it
    spaces = 0  # its keys as a set of bits
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[item]
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            number = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
            bins[number].append(item)
        else:
            space, number = size, len(bins)
            bins.append([item])
        space -= length
        if space:
            if not by_space.setdefault(space, []):
                spaces |= 1 << space
            by_space[space].append(number)
    return bins
