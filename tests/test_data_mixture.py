"""Mixtures: exact rates in every prefix, each set shuffled on its own, and sets that do not fit refused."""

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gqe_jax.attention import GQAConfig
from gqe_jax.config import ConfigError, DataConfig, ModelConfig
from gqe_jax.data.manifest import Manifest
from gqe_jax.data.preparing.prepare import prepare
from gqe_jax.data.reading.mixture import (
    MixturePart,
    MixtureSchedule,
    parse_mixture,
    quotas,
    read_mixture,
    rounded_shares,
    write_mixture,
)
from gqe_jax.data.reading.pipeline import train_batches
from gqe_jax.data.reading.prepared import open_data
from gqe_jax.data.sources.corpus import files_corpus
from gqe_jax.data.tokenizer import ByteTokenizer

ATTENTION = GQAConfig(num_query_heads=1, num_kv_heads=1)  # of a model that is never built

SEQ_LEN = 16
MODEL = ModelConfig(attention=ATTENTION, context=SEQ_LEN)


class UpperTokenizer(ByteTokenizer):
    """Another vocabulary, as its files say."""

    def files(self):
        return {"bytes.json": b"other"}


def make_set(folder, letter: str, lines: int, *, seq_len: int = SEQ_LEN, tokenizer=None, heldout: float = 0.1):
    folder.parent.mkdir(parents=True, exist_ok=True)
    text = folder.with_suffix(".txt")
    text.write_text("".join(f"{letter}{i:05d}\n" for i in range(lines)))
    tokenizer = tokenizer or ByteTokenizer()
    prepare(files_corpus([text]), folder, tokenizer=tokenizer, seq_len=seq_len, heldout_fraction=heldout)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sets a, b and c of letters of their own, of 395, 99 and 32 training rows."""
    folder = tmp_path_factory.mktemp("sets")
    for letter, lines in (("a", 1000), ("b", 250), ("c", 80)):
        make_set(folder / letter, letter, lines)
    return folder


def opened(folder, weights: str, **options):
    """weights: "a:3,b:1"."""
    parts = ",".join(str(folder / part) for part in weights.split(","))
    return open_data(DataConfig(mixture=parts, **options), MODEL)


def take(batches, count):
    with batches:
        return [next(batches) for _ in range(count)]


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(0, 10**12))
@example([1, 1, 1, 1, 96], 0)
@example([7, 3], 10**15)
def test_counts_are_within_one_row_of_exact(weights, far):
    """In every prefix of n rows, set i has given more than n·w_i − 1 and fewer than n·w_i + 1 (w_i its share).

    Two whole periods are walked, and the same from a position far away: the counts before it are read from the
    schedule itself, which says how many rows a set has given before.
    """
    schedule, period = MixtureSchedule(weights), sum(weights)
    counts = [0] * len(weights)
    for n in range(2 * period):
        chosen, before = schedule[n]
        assert before == counts[chosen]
        counts[chosen] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - Fraction((n + 1) * weight, period)) < 1
    for n in range(far, far + period):
        chosen, before = schedule[n]
        assert abs(before - Fraction(n * weights[chosen], period)) < 1


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 10**9))
def test_a_far_position_is_what_walking_there_gives(weights, start):
    """The rows that a set gives are numbered without gap or repetition, from any position on."""
    schedule = MixtureSchedule(weights)
    given_before = {}
    for n in range(start, start + 3 * sum(weights)):
        chosen, before = schedule[n]
        assert given_before.get(chosen, before - 1) == before - 1
        given_before[chosen] = before
    assert len(given_before) == len(weights)


def test_rates_of_rows(folder):
    """Of 1000 rows of a 7:2:1 mixture 700, 200 and 100 come from the sets: a letter in each row says which."""
    data = opened(folder, "a:0.7,b:0.2,c:0.1")
    batches = take(train_batches(data, batch_size=20, seed=5), 50)
    letters = np.concatenate([batch["targets"] for batch in batches])
    found = [int(((letters == ord(letter) + 3).any(1)).sum()) for letter in "abc"]
    assert found == [700, 200, 100]


@settings(derandomize=True, deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), start=st.integers(0, 10**6), batch_size=st.sampled_from([24, 48]))
def test_any_process_count_and_start(folder, seed, start, batch_size):
    """Batch s of a mixture is a function of (seed, s): the same for 1, 2, 3, 4, 8 processes, wherever reading began."""
    data = opened(folder, "a:0.6,b:0.3,c:0.1")
    whole = take(train_batches(data, batch_size=batch_size, seed=seed, start_step=start), 3)
    later = take(train_batches(data, batch_size=batch_size, seed=seed, start_step=start + 2), 1)
    for name in whole[0]:
        np.testing.assert_array_equal(later[0][name], whole[2][name])
    for count in (2, 3, 4, 8):
        sizes = {"batch_size": batch_size, "seed": seed, "start_step": start}
        shares = np.split(np.arange(batch_size), count)
        parts = [take(train_batches(data, **sizes, rows=share), 2) for share in shares]
        for step in range(2):
            for name in whole[step]:
                joined = np.concatenate([part[step][name] for part in parts])
                np.testing.assert_array_equal(joined, whole[step][name])


def test_every_row_of_every_set_once_per_epoch(folder):
    """While a set's rows have been drawn k times its number, each was drawn k times, though epochs of sets differ."""
    data = opened(folder, "a:1,b:1,c:1")
    sizes = [part.manifest.train.rows for part in data.sets]
    least = min(sizes)
    rows = 3 * least * 12  # each set has given 12 · least rows
    targets = np.concatenate([b["targets"] for b in take(train_batches(data, batch_size=36, seed=1), rows // 36)])
    smallest = targets[(targets == ord("c") + 3).any(1)]
    _, counts = np.unique(smallest, axis=0, return_counts=True)
    assert len(counts) == sizes[2] == least and set(counts) == {12}
    largest = targets[(targets == ord("a") + 3).any(1)]
    _, counts = np.unique(largest, axis=0, return_counts=True)
    assert len(largest) == 12 * least and max(counts) - min(counts) <= 1 and len(counts) == min(sizes[0], len(largest))


@pytest.mark.slow
def test_worker_processes_give_the_same_batches(folder):
    """Processes that read change nothing but who reads; the arrays are the caller's own, not shared memory."""
    data = opened(folder, "a:0.6,b:0.4")
    expected = take(train_batches(data, batch_size=8, seed=3, start_step=5), 6)
    found = take(train_batches(data, batch_size=8, seed=3, start_step=5, workers=2), 6)
    for one, two in zip(expected, found, strict=True):
        assert all(np.array_equal(one[name], two[name]) and two[name].flags.owndata for name in one)


def test_weights_become_whole_numbers():
    """The smallest whole numbers in the same proportion, from decimals and fractions alike."""
    assert quotas(parse_mixture("a:0.7,b:0.3")) == [7, 3]
    assert quotas(parse_mixture("a:2, gs://bucket/b:6")) == [1, 3]
    assert quotas(parse_mixture("a:1/3,b:1/6,c:1/2")) == [2, 1, 3]
    with pytest.raises(ConfigError, match=r"exact only over 1,111,110 rows, and at most 1,000,000 .*round them"):
        quotas(parse_mixture("a:123457,b:987653"))


@settings(derandomize=True, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9))
def test_rounded_shares(shares):
    """They add up to 1, each within 1e-5 per share of the given one; none is lost; the period can be held."""
    found = rounded_shares(shares)
    assert sum(found) == 1 and min(found) > 0
    for fraction, share in zip(found, shares, strict=True):
        assert abs(float(fraction) - share / sum(shares)) < 1e-5 * len(shares) + 1e-5
    assert sum(quotas([MixturePart(str(i), fraction) for i, fraction in enumerate(found)])) <= 10**5 + len(shares)


@pytest.mark.parametrize(
    "text", ["a", "a:", ":1", "a:x", "a:0", "a:-1", "a:1,", "a:1/0", "a:1e5000", "a:1e999999999", "a:nan"]
)
def test_unreadable_mixtures(text):
    """What cannot be read is shown, with an example."""
    with pytest.raises(ConfigError, match=r"cannot be read at .*: write prepared folders, each with a"):
        parse_mixture(text)


def test_repeated_sets():
    """The same set twice would be shuffled alike twice: its weights have to be added up."""
    with pytest.raises(ConfigError, match=r"names 'a' more than once: add up its weights"):
        parse_mixture("a:1,b:1,a:2")


def test_sets_that_do_not_fit(folder, tmp_path):
    """One length of rows and one tokenizer: the message names both sets, both values and the remedy."""
    make_set(tmp_path / "long", "d", 300, seq_len=32)
    with pytest.raises(ConfigError, match=r"/a have 16 tokens, those of .*long 32: prepare .* the same --seq-len"):
        open_data(DataConfig(mixture=f"{folder / 'a'}:1,{tmp_path / 'long'}:1"), MODEL)
    make_set(tmp_path / "other", "e", 300, tokenizer=UpperTokenizer())
    with pytest.raises(ConfigError, match=r"must share one tokenizer, and .*/a was made with bytes .*with the same"):
        open_data(DataConfig(mixture=f"{folder / 'a'}:1,{tmp_path / 'other'}:1"), MODEL)
    with pytest.raises(ConfigError, match=r"data.path='x' and data.mixture='a:1' exclude each other"):
        DataConfig(path="x", mixture="a:1")
    with pytest.raises(ConfigError, match=r"model.context=8 is shorter than the rows"):
        open_data(DataConfig(path=str(folder / "a")), ModelConfig(attention=ATTENTION, context=8))
    with pytest.raises(ConfigError, match=r"model.vocab_size=100 is smaller than the data's vocab_size=259"):
        open_data(DataConfig(path=str(folder / "a")), ModelConfig(attention=ATTENTION, context=SEQ_LEN, vocab_size=100))


def test_a_trained_models_tokenizer_comes_first(folder):
    """The vocabulary of a trained model cannot be raised: what helps is other data."""
    small = ModelConfig(attention=ATTENTION, context=SEQ_LEN, vocab_size=100)
    with pytest.raises(ConfigError, match=r"was prepared with the tokenizer bytes .*choose data made with it"):
        open_data(DataConfig(path=str(folder / "a")), small, UpperTokenizer())
    assert open_data(DataConfig(path=str(folder / "a")), MODEL, ByteTokenizer()).seq_len == SEQ_LEN


def test_a_folder_can_be_a_mixture(folder, tmp_path):
    """`mixture.json` in a folder names sets inside it with their weights; nested mixtures and damage are refused."""
    for letter in "ab":
        make_set(tmp_path / "both" / letter, letter, 300)
    parts = [MixturePart("a", Fraction(3, 4)), MixturePart("b", Fraction(1, 4))]
    write_mixture(tmp_path / "both", "both", parts)
    data = open_data(DataConfig(path=str(tmp_path / "both")), MODEL)
    assert data.quotas == (3, 1) and [part.directory.name for part in data.sets] == ["a", "b"]
    assert "75.0000% of the rows" in data.describe()
    with pytest.raises(ConfigError, match=r"names '.*both', which is a mixture itself"):
        open_data(DataConfig(mixture=f"{tmp_path / 'both'}:1,{folder / 'a'}:1"), MODEL)
    (tmp_path / "both" / "mixture.json").write_text(json.dumps({"sets": [{"path": "a"}]}))
    with pytest.raises(ConfigError, match=r"mixture.json lacks name: delete the folder"):
        open_data(DataConfig(path=str(tmp_path / "both")), MODEL)


@pytest.mark.parametrize(
    "sets, message",
    [
        ([], "names no sets"),
        ([{"path": "a"}], "lacks weight"),
        ([{"path": "a", "weight": "0"}], "weight='0', which must be a positive decimal number or fraction"),
        ([{"path": "a", "weight": "1/0"}], "weight='1/0', which must be a positive"),
        ([{"path": "a", "weight": "1e5000"}], "weight='1e5000', which must be a positive"),
        ([{"path": "a", "weight": [1]}], r"weight=\[1\], which must be a positive"),
        ([{"path": "../a", "weight": "1"}], r"names the file '../a', but must name one in its own folder"),
        ([{"path": "a", "weight": "1"}] * 2, "more than once: add up its weights"),
        ("a:1", "has sets='a:1', which must be a list of objects"),
    ],
)
def test_unreadable_mixture_files(tmp_path, sets, message):
    """A mixture.json names sets below its folder, each once, with weights that are numbers: else a sentence with it."""
    (tmp_path / "mixture.json").write_text(json.dumps({"name": "m", "sets": sets}))
    with pytest.raises(ConfigError, match=rf"mixture.json.* {message}"):
        read_mixture(tmp_path)


def test_a_mixture_file_may_have_numbers(tmp_path):
    """0.7 is seven tenths, as it is written, and not the binary number next to it."""
    (tmp_path / "mixture.json").write_text(
        json.dumps({"name": "m", "sets": [{"path": "a", "weight": 0.7}, {"path": "b", "weight": 1}]})
    )
    assert [part.weight for part in read_mixture(tmp_path)] == [Fraction(7, 10), 1]


def flip(path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 255]) + data[len(data) // 2 + 1 :])


def test_damaged_shards_stop_the_run_or_are_counted(tmp_path, monkeypatch):
    """A flipped byte is found before the first step, and named; only if told so is the shard left out, and counted.

    What is left is a stream of the other shards' rows, each once per epoch.
    """
    from gqe_jax.data.preparing import units

    monkeypatch.setattr(units, "_SHARD_TOKENS", SEQ_LEN * 50)
    directory = make_set(tmp_path / "a", "a", 600)
    shards = Manifest.load(directory).train.shards
    assert len(shards) > 3
    whole = open_data(DataConfig(path=str(directory)), MODEL)
    flip(directory / shards[1].name)
    with pytest.raises(ConfigError, match=rf"sha256 differs .* in {shards[1].name}\. .*data.skip_damaged=true"):
        open_data(DataConfig(path=str(directory)), MODEL)
    open_data(DataConfig(path=str(directory), verify=False), MODEL)  # sizes only
    (directory / shards[2].name).unlink()
    with pytest.raises(ConfigError, match=rf"damaged: {shards[2].name} is missing"):
        open_data(DataConfig(path=str(directory), verify=False), MODEL)
    data = open_data(DataConfig(path=str(directory), skip_damaged=True), MODEL)
    left = shards[1].rows + shards[2].rows
    assert f"warning: 2 damaged shard(s) of {directory} left out, with {left:,} of the" in data.describe()
    assert data.digest != whole.digest
    rows = sum(shard.rows for shard in shards) - left
    batches = take(train_batches(data, batch_size=rows, seed=0), 1)
    assert len(np.unique(batches[0]["targets"], axis=0)) == rows
    for shard in Manifest.load(directory).heldout.shards:
        flip(directory / shard.name)
    with pytest.raises(ConfigError, match=r"no whole shard left of a split: .* To repair: restore these"):
        open_data(DataConfig(path=str(directory), skip_damaged=True), MODEL)
