"""Evaluation on held-out text: exact token weighting, over a mixture, per word, and by position in the context."""

import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import jit

from gqe_jax.attention import GQEConfig
from gqe_jax.config import DataConfig, ModelConfig
from gqe_jax.data.preparing.prepare import prepare
from gqe_jax.data.reading.pipeline import PreparedRows
from gqe_jax.data.reading.prepared import open_data
from gqe_jax.data.sources.corpus import files_corpus
from gqe_jax.data.tokenizer import ByteTokenizer
from gqe_jax.evaluate.heldout import (
    _exponential,
    batch_loss,
    compare_with_compressors,
    evaluate,
    format_perplexity,
    report,
)
from gqe_jax.models.transformer import Transformer
from gqe_jax.parallel.mesh import make_mesh

SEQ_LEN = 32
ATTENTION = GQEConfig(num_query_experts=4, num_kv_heads=2, head_dim=8, implementation="reference")
MODEL = ModelConfig(d_model=16, num_layers=1, d_ff=16, context=SEQ_LEN, dtype="float32", attention=ATTENTION)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sets of different text, one concatenated, one packed; their held-out rows fill no whole number of batches."""
    folder = tmp_path_factory.mktemp("sets")
    for name, packing in (("digits", "concat"), ("words", "best-fit")):
        lines = (folder / name).with_suffix(".jsonl")
        texts = [("12345 " if name == "digits" else "the é fox\n") * (i % 7 + 1) for i in range(80)]
        lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        settings = {"seq_len": SEQ_LEN, "heldout_fraction": 0.4, "packing": packing}
        prepare(files_corpus([lines]), folder / name, tokenizer=ByteTokenizer(), **settings)
    return folder


@pytest.fixture(scope="module")
def evaluated():
    """(evaluate_batch, losses): losses(batch) float64 [B, S], by a log-softmax over the logits."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(MODEL, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda p: np.float32(rng.normal(0.1, 0.3, p.shape)), nnx.to_pure_dict(state))
    compiled = jit(lambda state, batch: batch_loss(nnx.merge(graphdef, state), batch))

    @jit
    def logits(state, batch):
        model = nnx.merge(graphdef, state)
        return model.logits(model(batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"])[0])

    def losses(batch):
        x = np.asarray(logits(state, batch), np.float64)
        log_probs = x - np.log(np.exp(x).sum(-1, keepdims=True))
        return -np.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]

    return functools.partial(compiled, state), losses


def opened(folder, names: str):
    return open_data(DataConfig(mixture=",".join(f"{folder / name}:1" for name in names.split(","))), MODEL)


def reference(folder, name, losses):
    """(rows, losses of the real tokens, positions of these, texts) of a set's held-out rows, all at once."""
    rows = PreparedRows(folder / name, "heldout")
    batch = rows.read(range(len(rows)))
    texts = [json.loads(line)["text"] for line in (folder / name / "heldout.jsonl").read_text().splitlines()]
    return rows, losses(batch)[batch["mask"]], batch["positions"][batch["mask"]], texts


@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_token_counts_once(folder, evaluated, batch_size):
    """Loss, bits per byte, perplexity per token and per word, against all rows at once and the texts themselves.

    Targets are the bytes of the texts and one end for each; batches are filled up with padding, which must not count.
    """
    evaluate_batch, losses = evaluated
    for name in ("digits", "words"):
        rows, nats, _, texts = reference(folder, name, losses)
        assert len(rows) % 4
        result = evaluate(evaluate_batch, opened(folder, name), make_mesh(), batch_size=batch_size)
        num_bytes, words = sum(len(text.encode()) for text in texts), sum(len(text.split()) for text in texts)
        assert result.tokens == len(nats) == num_bytes + len(texts)
        np.testing.assert_allclose(result.loss, nats.mean(), rtol=1e-5)
        np.testing.assert_allclose(result.perplexity, np.exp(nats.mean()), rtol=1e-4)
        np.testing.assert_allclose(result.bits_per_byte, nats.sum() / np.log(2) / num_bytes, rtol=1e-5)
        np.testing.assert_allclose(np.log(result.word_perplexity), nats.sum() / words, rtol=1e-5)
        np.testing.assert_allclose(result.load.sum(-1), 1.0, atol=1e-6)
        assert result.by_set == {}


@pytest.mark.parametrize(
    "nats, shown",
    [(0.0, "1.00"), (13.8, "984,609.11"), (28.028, "1.49e+12"), (709.7, "1.65e+308"), (710.0, "inf")],
)
def test_perplexity_can_be_read(nats, shown):
    """An untrained byte model has e to the 28 per word and more: beyond a million a power of ten, never an error."""
    assert format_perplexity(_exponential(nats)) == shown


def test_by_position(folder, evaluated):
    """Ranges 0, 1, 2-3, 4-7, ... of a token's position in its segment; together they are all tokens."""
    evaluate_batch, losses = evaluated
    _, nats, positions, _ = reference(folder, "words", losses)
    result = evaluate(evaluate_batch, opened(folder, "words"), make_mesh(), batch_size=4)
    ranges = [(part.first, part.last) for part in result.by_position]
    assert ranges == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31)]
    for part in result.by_position:
        inside = (positions >= part.first) & (positions <= part.last)
        assert part.tokens == inside.sum()
        np.testing.assert_allclose(part.loss, nats[inside].mean(), rtol=1e-5)
    assert sum(part.tokens for part in result.by_position) == result.tokens
    assert all(f"{part.first}-{part.last}" in report(result) for part in result.by_position[2:])


def test_a_mixture_by_domain(folder, evaluated):
    """Each set as alone; the whole as one long text, with every token of every set once, whatever the weights."""
    evaluate_batch, losses = evaluated
    both = opened(folder, "digits,words")
    result = evaluate(evaluate_batch, both, make_mesh(), batch_size=4)
    nats = [reference(folder, name, losses)[1] for name in ("digits", "words")]
    assert [*result.by_set] == [str(folder / "digits"), str(folder / "words")]
    for name, part, expected in zip(("digits", "words"), result.by_set.values(), nats, strict=True):
        np.testing.assert_allclose(part.loss, expected.mean(), rtol=1e-5)
        alone = evaluate(evaluate_batch, opened(folder, name), make_mesh(), batch_size=4)
        assert part.bits_per_byte == alone.bits_per_byte and part.by_position == alone.by_position
    every = np.concatenate(nats)
    assert result.tokens == len(every)
    np.testing.assert_allclose(result.loss, every.mean(), rtol=1e-5)
    num_bytes = sum(part.manifest.heldout.bytes for part in both.sets)
    np.testing.assert_allclose(result.bits_per_byte, every.sum() / np.log(2) / num_bytes, rtol=1e-5)
    assert f"  {folder / 'words'}: loss" in report(result)
    assert f"{num_bytes:,} bytes; each compressed on its own" in compare_with_compressors(result, both)


def test_the_first_batches_only(folder, evaluated):
    """`limit` reads the first batches, and estimates figures per byte with the whole split's tokens per byte."""
    evaluate_batch, losses = evaluated
    data = opened(folder, "digits")
    rows = PreparedRows(folder / "digits", "heldout")
    batch = rows.read(range(8))
    nats = losses(batch)[batch["mask"]]
    result = evaluate(evaluate_batch, data, make_mesh(), batch_size=4, limit=2)
    assert result.tokens == len(nats) < rows.manifest.heldout.tokens
    np.testing.assert_allclose(result.loss, nats.mean(), rtol=1e-5)
    per_byte = rows.manifest.heldout.tokens / rows.manifest.heldout.bytes
    np.testing.assert_allclose(result.bits_per_byte, nats.mean() / np.log(2) * per_byte, rtol=1e-5)
