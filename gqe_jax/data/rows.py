"""Fixed-length rows of tokens: cutting documents into them, and their binary form.

All documents form one stream, `eos doc eos doc ... doc eos`. Row r holds the S + 1 tokens from position r·S on, so rows
overlap by one token: its first S tokens are inputs, its last S are targets, and every token of every document, and the
eos that ends it, is the target of exactly one position. A document's segment begins with the eos before it.

A row's record, little-endian: uint32 seq_len, uint32 number of tokens, uint32 number of segments, uint32 bytes per
token (2 or 4); uint32 start of every segment; the tokens. Padding is not stored. Segment starts are explicit, so rows
packed in any other way have the same form.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

_HEADER = np.dtype("<u4")
_HEADER_FIELDS = 4


@dataclasses.dataclass(frozen=True)
class Row:
    """tokens: integers [n], 2 <= n <= seq_len + 1. segment_starts: input positions, ascending, the first of them 0."""

    tokens: np.ndarray
    segment_starts: np.ndarray


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

    def add(self, document: np.ndarray) -> Iterator[Row]:
        """The rows that are full once this document (integers [n]) has been appended."""
        starts = np.append(self._starts, len(self._stream))
        stream = np.concatenate([self._stream, self._eos, document], dtype=np.int32)
        end = (len(stream) - 1) // self._seq_len * self._seq_len
        self._stream, self._starts = stream[end:], starts[starts >= end] - end
        return (_row(stream, starts, begin, self._seq_len) for begin in range(0, end, self._seq_len))

    def finish(self) -> Iterator[Row]:
        """The row that is left, ended by eos; none if there was no document. Nothing can be added after it."""
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


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def encode_row(row: Row, seq_len: int, dtype: np.dtype) -> bytes:
    """The record of a row; dtype is `token_dtype` of the vocabulary."""
    header = np.array([seq_len, len(row.tokens), len(row.segment_starts), dtype.itemsize], _HEADER)
    return header.tobytes() + row.segment_starts.astype(_HEADER).tobytes() + row.tokens.astype(dtype).tobytes()


def decode_rows(records: Sequence[bytes], seq_len: int) -> dict[str, np.ndarray]:
    """A batch from the records of rows; an empty record gives a row of padding.

    Returns, each [B, S]: `tokens` and `targets` int32 (0 where padded), `segment_ids` int32 (1, 2, ... from the left; 0
    is padding), `positions` int32 (from 0 within each segment), `mask` bool (the target is real).

    Raises ValueError if a record is not of a row of this length.
    """
    shape = (len(records), seq_len)
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    opens, mask = np.zeros(shape, np.int32), np.zeros(shape, np.bool_)
    for b, record in enumerate(records):
        if not record:
            continue
        row = _decode_row(record, seq_len)
        real = len(row.tokens) - 1
        tokens[b, :real] = row.tokens[:-1]
        targets[b, :real] = row.tokens[1:]
        opens[b, row.segment_starts] = 1
        mask[b, :real] = True
    column = np.arange(seq_len, dtype=np.int32)
    positions = column - np.maximum.accumulate(np.where(opens, column, 0), axis=1)
    segment_ids = np.cumsum(opens, axis=1, dtype=np.int32)
    return {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": np.where(mask, segment_ids, 0),
        "positions": np.where(mask, positions, 0),
        "mask": mask,
    }


def _decode_row(record: bytes, seq_len: int) -> Row:
    if len(record) < _HEADER_FIELDS * _HEADER.itemsize:
        raise ValueError(f"a row's record of {len(record)} bytes has no header: gqe prepare did not write this shard")
    row_len, num_tokens, num_segments, itemsize = np.frombuffer(record, _HEADER, _HEADER_FIELDS).tolist()
    starts_offset = _HEADER_FIELDS * _HEADER.itemsize
    tokens_offset = starts_offset + num_segments * _HEADER.itemsize
    if (
        row_len != seq_len
        or itemsize not in (2, 4)
        or not 2 <= num_tokens <= seq_len + 1
        or len(record) != tokens_offset + num_tokens * itemsize
    ):
        raise ValueError(
            f"a row's record of {len(record)} bytes says seq_len={row_len}, tokens={num_tokens}, "
            f"segments={num_segments}, bytes per token={itemsize}, which is no row of seq_len={seq_len}: the shard "
            "belongs to other data"
        )
    starts = np.frombuffer(record, _HEADER, num_segments, starts_offset)
    return Row(np.frombuffer(record, f"<u{itemsize}", num_tokens, tokens_offset), starts)
