"""Fixed-length rows of tokens in their binary form, and batches made of them.

A row has S input positions and S targets, in segments: documents or parts of them. Every token of every document, and
the eos that ends it, is the target of exactly one position; a document's segment begins with an eos as input. A part of
a document that does not begin it starts with the last target of the part before.

A row's record, little-endian: uint32 seq_len, uint32 number of tokens, uint32 number of segments, uint32 bytes per
token (2 or 4); uint32 start of every segment; the tokens: all inputs, and the last target. The target of an input is
the token after it, or eos where a segment ends before the row's last. Padding is not stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from gqe_jax.config import ConfigError

_HEADER = np.dtype("<u4")
_HEADER_FIELDS = 4


@dataclasses.dataclass(frozen=True)
class Row:
    """A row has tokens, integers [n], 2 <= n <= seq_len + 1, and segment_starts, ascending positions from 0."""

    tokens: np.ndarray
    segment_starts: np.ndarray


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def encode_row(row: Row, seq_len: int, dtype: np.dtype) -> bytes:
    """Returns the record of a row; dtype is `token_dtype` of the vocabulary."""
    header = np.array([seq_len, len(row.tokens), len(row.segment_starts), dtype.itemsize], _HEADER)
    return header.tobytes() + row.segment_starts.astype(_HEADER).tobytes() + row.tokens.astype(dtype).tobytes()


def decode_rows(records: Sequence[bytes], seq_len: int, eos_id: int) -> dict[str, np.ndarray]:
    """Returns a batch from the records of rows; an empty record gives a row of padding.

    Returns, each [B, S]: `tokens` and `targets` int32 (0 where padded), `segment_ids` int32 (1, 2, ... from the left; 0
    is padding), `positions` int32 (from 0 within each segment), `mask` bool (the target is real).

    Raises ConfigError if a record is not of a row of this length.
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
        targets[b, row.segment_starts[1:] - 1] = eos_id
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
        raise ConfigError(f"a row's record of {len(record)} bytes has no header: gqe prepare did not write this shard")
    row_len, num_tokens, num_segments, itemsize = np.frombuffer(record, _HEADER, _HEADER_FIELDS).tolist()
    starts_offset = _HEADER_FIELDS * _HEADER.itemsize
    tokens_offset = starts_offset + num_segments * _HEADER.itemsize
    if (
        row_len != seq_len
        or itemsize not in (2, 4)
        or not 2 <= num_tokens <= seq_len + 1
        or len(record) != tokens_offset + num_tokens * itemsize
    ):
        raise ConfigError(
            f"a row's record of {len(record)} bytes says seq_len={row_len}, tokens={num_tokens}, "
            f"segments={num_segments}, bytes per token={itemsize}, which is no row of seq_len={seq_len}: the shard "
            "belongs to other data"
        )
    starts = np.frombuffer(record, _HEADER, num_segments, starts_offset).astype(np.int64)
    if num_segments == 0 or starts[0] != 0 or (np.diff(starts) < 1).any() or starts[-1] > num_tokens - 2:
        raise ConfigError(
            f"a row of {num_tokens} tokens has segments from {starts[:5].tolist()} on, which do not ascend from 0 in "
            "it: prepare the data again"
        )
    return Row(np.frombuffer(record, f"<u{itemsize}", num_tokens, tokens_offset), starts)
