"""Batches: a pure function of (seed, step), the same for any number of processes, every row once per epoch."""

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqe_jax.attention import GQAConfig
from gqe_jax.config import ConfigError, DataConfig, ModelConfig
from gqe_jax.data.preparing.prepare import prepare
from gqe_jax.data.reading.pipeline import EpochOrder, PreparedRows, heldout_batches, train_batches
from gqe_jax.data.reading.prepared import PreparedData, open_data
from gqe_jax.data.sources.corpus import files_corpus
from gqe_jax.data.tokenizer import ByteTokenizer

ATTENTION = GQAConfig(num_query_heads=1, num_kv_heads=1)  # of a model that is never built

SEQ_LEN = 16


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """About 100 training and 12 held-out rows, all different: each begins with another number."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "numbers.txt").write_text("".join(f"{i:04d}\n" for i in range(400)))
    corpus = files_corpus([folder / "numbers.txt"])
    prepare(corpus, folder / "out", tokenizer=ByteTokenizer(), seq_len=SEQ_LEN, heldout_fraction=0.1)
    return folder / "out"


@pytest.fixture(scope="module")
def data(directory) -> PreparedData:
    return open_data(DataConfig(path=str(directory)), ModelConfig(attention=ATTENTION, context=SEQ_LEN))


def take(batches, count: int) -> list[dict[str, np.ndarray]]:
    with batches:
        return [next(batches) for _ in range(count)]


def assert_same(left: list[dict], right: list[dict]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys() == {"tokens", "targets", "segment_ids", "positions", "mask"}
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def joined(parts: list[list[dict]]) -> list[dict]:
    """The global batches from each process's batches, in the order of processes."""
    steps = zip(*parts, strict=True)
    return [{name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in steps]


def share(batch_size: int, process: int, count: int) -> range:
    """The rows of a batch that one of `count` processes reads."""
    return range(batch_size)[process * batch_size // count : (process + 1) * batch_size // count]


def row_counts(batches: list[dict]) -> Counter:
    """How often each row occurs (real rows only), by its bytes."""
    return Counter(row.tobytes() for batch in batches for row in batch["targets"][batch["mask"].any(axis=1)])


@settings(derandomize=True, deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), start=st.integers(0, 10**6), batch_size=st.sampled_from([24, 48, 120]))
def test_any_process_count_gives_the_global_batch(data, seed, start, batch_size):
    """Processes in order hold the global batch's rows in order, so training does not depend on their number."""
    whole = take(train_batches(data, batch_size=batch_size, seed=seed, start_step=start), 3)
    assert whole[0]["tokens"].shape == (batch_size, SEQ_LEN)
    for count in (2, 3, 4, 8):
        parts = [
            train_batches(data, batch_size=batch_size, seed=seed, start_step=start, rows=share(batch_size, i, count))
            for i in range(count)
        ]
        assert_same(joined([take(part, 3) for part in parts]), whole)


@settings(derandomize=True, deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), stop=st.integers(0, 40))
def test_resuming_is_never_having_stopped(data, seed, stop):
    """Batch s does not depend on where reading began, also across the ends of epochs."""
    whole = take(train_batches(data, batch_size=8, seed=seed), stop + 3)
    assert_same(take(train_batches(data, batch_size=8, seed=seed, start_step=stop), 3), whole[stop:])


def test_every_row_once_per_epoch(directory, data):
    """Over k epochs each row occurs k times, though the batch size does not divide the number of rows."""
    rows = PreparedRows(directory, "train")
    assert len(rows) % 8
    batches = take(train_batches(data, batch_size=8, seed=3), len(rows))  # eight epochs
    assert row_counts(batches) == {row.tobytes(): 8 for row in rows.read(range(len(rows)))["targets"]}


@settings(derandomize=True, deadline=None)
@given(num_rows=st.integers(1, 300), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 10**9))
def test_epochs_are_permutations(num_rows, seed, epoch):
    """Any epoch visits each row exactly once."""
    order = EpochOrder(num_rows, seed)
    assert sorted(order[epoch * num_rows + i] for i in range(num_rows)) == list(range(num_rows))


def test_orders_differ_and_mix():
    """Other epochs and other seeds have other orders (seed 1's epoch 0 is not seed 0's epoch 1), spread over all rows.

    The mean distance of successive rows of a random permutation of n is n/3.
    """
    n = 1000
    orders = [EpochOrder(n, seed) for seed in range(3)]
    epochs = [tuple(order[epoch * n + i] for i in range(n)) for order in orders for epoch in range(3)]
    assert len(set(epochs)) == 9
    for order in epochs:
        assert 0.3 * n < np.abs(np.diff(order)).mean() < 0.37 * n


def test_fewer_rows_than_a_batch(directory, data):
    """A batch larger than the corpus goes on into further epochs: each row occurs equally often, give or take one."""
    rows = len(PreparedRows(directory, "train"))
    counts = row_counts(take(train_batches(data, batch_size=rows * 2 + 7, seed=0), 1))
    assert len(counts) == rows and set(counts.values()) == {2, 3}


@pytest.mark.parametrize("batch_size", [1, 4, 12, 64])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_heldout_counts_every_token_once(directory, data, batch_size, count):
    """In order, once, padded at the end with masked rows; every process gets equally many batches."""
    parts = []
    for i in range(count):
        with heldout_batches(data.sets[0], batch_size, share(batch_size, i, count)) as batches:
            parts.append(list(batches))
    whole = joined(parts)
    rows = PreparedRows(directory, "heldout")
    every = rows.read(range(len(rows)))
    assert [len(part) for part in parts] == [-(-len(rows) // batch_size)] * count
    targets = np.concatenate([batch["targets"][batch["mask"]] for batch in whole])
    np.testing.assert_array_equal(targets, every["targets"][every["mask"]])
    assert len(targets) == rows.manifest.heldout.tokens
    assert all(batch["mask"].shape == (batch_size, SEQ_LEN) for batch in whole)


def test_unusable_settings(data):
    """Each message names the value and the rule."""
    with pytest.raises(ConfigError, match=r"data.batch_size=0"):
        train_batches(data, batch_size=0, seed=0)
    with pytest.raises(ConfigError, match=r"data.seed=-1 must lie in \[0, 2\*\*32\)"):
        train_batches(data, batch_size=8, seed=-1)


def test_closing(data):
    """After close no thread reads on, and asking for more is an error rather than a hang."""
    batches = train_batches(data, batch_size=4, seed=0)
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_many_shards_stay_open(tmp_path):
    """Every shard is an open file: the limit grows with their number, and beyond what is allowed the error says so."""
    script = (
        "import pathlib, resource, sys\n"
        "from gqe_jax.data.preparing import units\n"
        "from gqe_jax.data.sources.corpus import files_corpus\n"
        "from gqe_jax.data.reading.pipeline import PreparedRows\n"
        "from gqe_jax.data.preparing.prepare import prepare\n"
        "from gqe_jax.data.tokenizer import ByteTokenizer\n"
        "units._SHARD_TOKENS = 16\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "(folder / 'a.txt').write_text('x' * 16 * 300)\n"
        "prepare(files_corpus([folder / 'a.txt']), folder / 'out', tokenizer=ByteTokenizer(), seq_len=16)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (200, 600))\n"
        "rows = PreparedRows(folder / 'out', 'train')\n"
        "print(len(rows.read(range(285))['tokens']))\n"
        "del rows\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))\n"
        "try: PreparedRows(folder / 'out', 'train')\n"
        "except OSError as error: print(error)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    allowed, refused = done.stdout.splitlines() or [done.stderr, ""]
    assert allowed == "285" and "Too many open files" in refused, done.stderr
