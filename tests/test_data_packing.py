"""Packing: whole documents where they fit, every token a target once, little padding, no leak between documents."""

import jax
import numpy as np
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import jit

from gqe_jax.attention import GQEConfig
from gqe_jax.config import ModelConfig
from gqe_jax.data.choices import PACKINGS
from gqe_jax.data.preparing import packing
from gqe_jax.data.preparing.packing import BestFitPacker, best_fit, row_packer
from gqe_jax.data.rows import decode_rows, encode_row, token_dtype
from gqe_jax.evaluate.heldout import batch_loss
from gqe_jax.models.transformer import Transformer

EOS = 1

# Ids may be eos itself: boundaries must not be guessed from ids.
documents_strategy = st.lists(st.lists(st.integers(0, 258), max_size=40), min_size=1, max_size=12)


def pack(documents: list[list[int]], seq_len: int) -> dict[str, np.ndarray]:
    packer = BestFitPacker(seq_len, EOS)
    rows = [row for document in documents for row in packer.add(np.array(document, np.int32))]
    rows += packer.finish()
    return decode_rows([encode_row(row, seq_len, token_dtype(259)) for row in rows], seq_len, EOS)


def segments(batch: dict[str, np.ndarray]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(inputs, targets) of every segment, sorted."""
    found = []
    for r, ids in enumerate(batch["segment_ids"]):
        for number in range(1, ids.max() + 1):
            inside = ids == number
            found.append((tuple(batch["tokens"][r, inside].tolist()), tuple(batch["targets"][r, inside].tolist())))
    return sorted(found)


@settings(derandomize=True, deadline=None)
@given(documents_strategy, st.integers(1, 24))
def test_no_document_is_cut_that_fits_a_row(documents, seq_len):
    """The segments are the documents, each in one piece; a longer one is cut every `seq_len` positions.

    A document stands as inputs `eos doc` and targets `doc eos`, so every token, and the eos after it, is a target once.
    """
    expected = []
    for document in documents:
        inputs, targets = [EOS, *document], [*document, EOS]
        for begin in range(0, len(inputs), seq_len):
            expected.append((tuple(inputs[begin : begin + seq_len]), tuple(targets[begin : begin + seq_len])))
    batch = pack(documents, seq_len)
    assert segments(batch) == sorted(expected)
    assert batch["mask"].sum() == sum(len(document) + 1 for document in documents)


@settings(derandomize=True, deadline=None)
@given(documents_strategy, st.integers(1, 24))
def test_positions_count_within_segments(documents, seq_len):
    """Positions count from 0 in each segment; padding is at the end of a row, with segment 0 and mask False."""
    batch = pack(documents, seq_len)
    for ids, positions, mask in zip(batch["segment_ids"], batch["positions"], batch["mask"], strict=True):
        real = mask.sum()
        assert mask[:real].all() and not ids[real:].any() and not positions[real:].any()
        assert (np.diff(ids[:real]) >= 0).all() and ids[0] == 1
        for number in range(1, ids.max() + 1):
            assert positions[ids == number].tolist() == list(range((ids == number).sum()))


@settings(derandomize=True, deadline=None)
@given(documents_strategy, st.integers(1, 24), st.integers(1, 9), st.sampled_from(PACKINGS))
def test_a_document_in_parts_is_the_document(documents, seq_len, part, packing):
    """Rows do not depend on the parts in which a long document arrives."""

    def rows(step: int) -> list[bytes]:
        packer = row_packer(packing, seq_len, EOS)
        found = []
        for document in documents:
            for begin in range(0, len(document) or 1, step):
                found += packer.add(np.array(document[begin : begin + step], np.int32), continued=begin > 0)
        return [encode_row(row, seq_len, token_dtype(259)) for row in [*found, *packer.finish()]]

    assert rows(part) == rows(10**9)


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=200), st.integers(50, 64))
def test_best_fit_fills_bins(lengths, size):
    """Every item in one bin, none too full, and at most one filled no more than by half: two would have been one."""
    bins = best_fit(lengths, size)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in items) <= size for items in bins)
    fill = [sum(lengths[item] for item in items) for items in bins]
    assert sum(used <= size / 2 for used in fill) <= 1


def test_best_fit_takes_the_fullest_bin():
    """7 and 6 open bins of 10; 3 fits both and goes where it leaves nothing; 4 then fills the other."""
    assert best_fit([7, 6, 3, 4], 10) == [[0, 2], [1, 3]]


def test_windows_bound_the_memory(monkeypatch):
    """What waits to be packed never exceeds the window by more than a row, however long the corpus is."""
    monkeypatch.setattr(packing, "_WINDOW_TOKENS", 64)
    packer = BestFitPacker(16, EOS)
    rng = np.random.default_rng(0)
    waiting, tokens, rows = [], 0, []
    for _ in range(300):
        document = rng.integers(3, 259, rng.integers(0, 30))
        tokens += len(document) + 1
        rows += packer.add(document)
        waiting.append(sum(map(len, packer._waiting)))
    rows += packer.finish()
    assert max(waiting) < 64 + 16
    assert sum(len(row.tokens) - 1 for row in rows) == tokens


def test_a_document_has_the_loss_it_has_alone():
    """Nothing leaks across segments: the summed loss of each packed document is that of it alone in a row, to 1e-5.

    Alone, a document has no other document to see, so equality means that attention, rotary positions and targets of
    the packed row depend on its own segment only.
    """
    attention = GQEConfig(num_query_experts=4, num_kv_heads=2, head_dim=8, implementation="reference")
    config = ModelConfig(d_model=32, num_layers=2, d_ff=48, context=32, dtype="float32", attention=attention)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda p: np.float32(rng.normal(0.1, 0.3, p.shape)), nnx.to_pure_dict(state))
    loss = jit(lambda state, batch: batch_loss(nnx.merge(graphdef, state), batch))
    documents = [rng.integers(3, 259, n).tolist() for n in (5, 9, 20, 1, 30, 14, 47, 3)]
    together = pack(documents, 32)
    assert len(together["tokens"]) < len(documents) and together["segment_ids"].max() > 1
    for r in range(len(together["tokens"])):
        row = {name: rows[r : r + 1] for name, rows in together.items()}
        for number in range(1, row["segment_ids"].max() + 1):
            inside = row["segment_ids"] == number
            alone = {name: np.zeros_like(rows) for name, rows in row.items()}
            for name, rows in row.items():
                alone[name][0, : inside.sum()] = rows[inside]
            alone["segment_ids"] = np.minimum(alone["segment_ids"], 1)
            packed, single = (float(loss(state, batch)["nats"]) for batch in (row | {"mask": inside}, alone))
            np.testing.assert_allclose(packed, single, rtol=1e-5)
