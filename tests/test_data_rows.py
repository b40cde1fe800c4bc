"""Rows: every token is a target exactly once, and segments and positions follow the documents."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqe_jax.data.preparing.packing import RowCutter
from gqe_jax.data.rows import Row, decode_rows, encode_row, token_dtype

EOS = 1

# Documents may be empty and may hold the eos id themselves: boundaries must not be guessed from ids.
documents_strategy = st.lists(st.lists(st.integers(0, 258), max_size=40), min_size=1, max_size=8)


def cut(documents: list[list[int]], seq_len: int) -> list[Row]:
    cutter = RowCutter(seq_len, EOS)
    rows = [row for document in documents for row in cutter.add(np.array(document, np.int32))]
    return rows + list(cutter.finish())


def batch_of(documents: list[list[int]], seq_len: int) -> dict[str, np.ndarray]:
    return decode_rows([encode_row(row, seq_len, token_dtype(259)) for row in cut(documents, seq_len)], seq_len, EOS)


def stream_of(documents: list[list[int]]) -> tuple[list[int], list[tuple[int, int]]]:
    """The stream as plain lists, and of each of its tokens (document it opens or belongs to, place after its eos)."""
    tokens, owners = [], []
    for number, document in enumerate(documents):
        tokens += [EOS, *document]
        owners += [(number, place) for place in range(len(document) + 1)]
    return [*tokens, EOS], owners


@settings(derandomize=True, deadline=None)
@given(documents_strategy, st.integers(1, 24))
def test_every_token_is_a_target_exactly_once(documents, seq_len):
    """Real targets, row after row, are the stream without its first eos: nothing is lost, doubled or moved.

    Inputs are the stream without its last eos, so each target stands one place after its input.
    """
    batch = batch_of(documents, seq_len)
    stream, _ = stream_of(documents)
    assert batch["targets"][batch["mask"]].tolist() == stream[1:]
    assert batch["tokens"][batch["mask"]].tolist() == stream[:-1]


@settings(derandomize=True, deadline=None)
@given(documents_strategy, st.integers(1, 24))
def test_segments_are_documents(documents, seq_len):
    """Two positions of a row share a segment exactly if their inputs belong to one document; positions count from 0."""
    batch = batch_of(documents, seq_len)
    _, owners = stream_of(documents)
    for r in range(len(batch["tokens"])):
        inside = owners[r * seq_len : (r + 1) * seq_len]
        numbers = [number for number, _ in inside]
        distinct = list(dict.fromkeys(numbers))
        assert batch["segment_ids"][r, : len(inside)].tolist() == [distinct.index(number) + 1 for number in numbers]
        expected = [place - min(p for n, p in inside if n == number) for number, place in inside]
        assert batch["positions"][r, : len(inside)].tolist() == expected


@settings(derandomize=True, deadline=None)
@given(documents_strategy, st.integers(1, 24))
def test_only_the_end_is_padded(documents, seq_len):
    """ceil((stream - 1) / S) rows; what is padded is the last row's end: segment 0, position 0, mask False."""
    batch = batch_of(documents, seq_len)
    real = sum(len(document) + 1 for document in documents)
    assert len(batch["mask"]) == -(-real // seq_len)
    assert batch["mask"].ravel().tolist() == [i < real for i in range(batch["mask"].size)]
    for name in ("tokens", "targets", "segment_ids", "positions"):
        assert not batch[name][~batch["mask"]].any(), name
        assert batch[name].dtype == np.int32


@settings(derandomize=True, deadline=None)
@given(documents_strategy, st.integers(1, 24))
def test_cutting_does_not_depend_on_grouping(documents, seq_len):
    """A document of any length streams through: rows hold S + 1 tokens (the last may be short) and start a segment."""
    rows = cut(documents, seq_len)
    assert all(len(row.tokens) == seq_len + 1 for row in rows[:-1])
    assert 2 <= len(rows[-1].tokens) <= seq_len + 1
    for row in rows:
        starts = row.segment_starts.tolist()
        assert starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < len(row.tokens) - 1


def test_no_documents_no_rows():
    """An empty stream has no target, so it has no row."""
    assert list(RowCutter(8, EOS).finish()) == []


def test_packed_rows_have_the_same_form():
    """Rows packed by another rule (several whole documents, early end) come back as they were put in."""
    row = Row(np.array([EOS, 5, 6, EOS, 7, EOS]), np.array([0, 3]))
    batch = decode_rows([encode_row(row, 8, token_dtype(100))], 8, EOS)
    assert batch["targets"][0].tolist() == [5, 6, EOS, 7, EOS, 0, 0, 0]
    assert batch["segment_ids"][0].tolist() == [1, 1, 1, 2, 2, 0, 0, 0]
    assert batch["positions"][0].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("vocab_size, bytes_per_token", [(259, 2), (65536, 2), (65537, 4), (250_000, 4)])
def test_largest_id_survives(vocab_size, bytes_per_token):
    """uint16 as long as it holds the last id, uint32 beyond: the largest id is not cut off."""
    assert token_dtype(vocab_size).itemsize == bytes_per_token
    row = Row(np.array([0, vocab_size - 1]), np.array([0]))
    batch = decode_rows([encode_row(row, 1, token_dtype(vocab_size)), b""], 1, EOS)
    assert batch["targets"].tolist() == [[vocab_size - 1], [0]]
    assert batch["mask"].tolist() == [[True], [False]]


def test_foreign_records_are_refused():
    """A record of other data must not be read as tokens."""
    record = encode_row(Row(np.array([1, 2, 3]), np.array([0])), 4, token_dtype(259))
    with pytest.raises(ValueError, match=r"says seq_len=4, tokens=3, .* no row of seq_len=8: the shard belongs"):
        decode_rows([record], 8, EOS)
    with pytest.raises(ValueError, match="no row of seq_len=4"):
        decode_rows([record[:-1]], 4, EOS)
    with pytest.raises(ValueError, match="has no header"):
        decode_rows([b"abc"], 4, EOS)
