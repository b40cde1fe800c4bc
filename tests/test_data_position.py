"""A run goes on with other batch sizes, weights, sets and hosts, and repeats or leaves out no row of a set."""

import json
import random

import numpy as np
import pytest
from test_data_mixture import make_set
from tiny_run import quick_compiles

from gqe_jax.attention import GQAConfig
from gqe_jax.config import ConfigError, DataConfig, ModelConfig
from gqe_jax.config_dict import build, defaults
from gqe_jax.data.reading.pipeline import PreparedRows, train_batches
from gqe_jax.data.reading.position import BEGINNING, Position
from gqe_jax.data.reading.prepared import open_data
from gqe_jax.runs import integrity
from gqe_jax.train import loop

SEQ_LEN = 16
MODEL = ModelConfig(attention=GQAConfig(num_query_heads=1, num_kv_heads=1), context=SEQ_LEN)
MIXTURES = ("a:1", "c:1", "a:0.7,b:0.3", "b:0.5,a:0.5", "c:1/3,a:2/3", "a:0.6,b:0.3,c:0.1", "c:0.2,b:0.2,a:0.6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sets a, b and c of 40, 20 and 12 or so rows, each row another one, with a letter that says whose it is."""
    folder = tmp_path_factory.mktemp("sets")
    for letter, lines in (("a", 100), ("b", 50), ("c", 30)):
        make_set(folder / letter, letter, lines)
    return folder


def config_of(folder, mixture):
    return DataConfig(mixture=",".join(str(folder / part) for part in mixture.split(",")))


def names(folder):
    """The text of a row, which is unlike any other → (its set, its number)."""
    found = {}
    for letter in "abc":
        rows = PreparedRows(folder / letter, "train")
        found |= {row.tobytes(): (letter, i) for i, row in enumerate(rows.read(range(len(rows)))["targets"])}
    return found


def assert_epochs(rows, folder):
    """Of each set, every `number of its rows` that come one after the other are all of them, and the rest differ."""
    for letter in "abc":
        numbers = [number for other, number in rows if other == letter]
        size = len(PreparedRows(folder / letter, "train"))
        for first in range(0, len(numbers), size):
            epoch = numbers[first : first + size]
            assert len(set(epoch)) == len(epoch), (letter, first // size)


def read(data, named, steps, *, hosts, **options):
    """The rows of so many steps, as so many hosts read them, in the order of the global batches."""
    parts = []
    for host in range(hosts):
        size = options["batch_size"] // hosts
        with train_batches(data, **options, rows=range(host * size, (host + 1) * size)) as batches:
            parts.append([next(batches)["targets"] for _ in range(steps)])
    return [named[row.tobytes()] for step in range(steps) for part in parts for row in part[step]]


@pytest.mark.parametrize("seed", range(12))
def test_no_sequence_of_changes_repeats_or_skips_a_row(folder, seed):
    """Each piece of a run has a batch size, a mixture and a number of hosts of its own, and the position goes through
    JSON, as through a checkpoint. Shares are those of the weights to within a row, in each piece."""
    rng, named = random.Random(seed), names(folder)
    position, rows = BEGINNING, []
    for step in range(8):
        mixture = rng.choice(MIXTURES)
        data = open_data(config_of(folder, mixture), MODEL)
        hosts = rng.choice([1, 2, 3])
        batch_size, steps = hosts * rng.randint(1, 9), rng.randint(1, 6)
        options = {"batch_size": batch_size, "seed": seed, "start_step": step, "hosts": hosts}
        piece = read(data, named, steps, position=position, **options)
        if not position.turn or position.prepared != data.digest:
            for part, share in zip(data.sets, data.shares, strict=True):
                count = sum(letter == part.directory.name for letter, _ in piece)
                assert abs(count - len(piece) * share) < 1
        rows += piece
        position = Position.read(json.loads(json.dumps(position.after(data, batch_size * steps).to_json())), "here")
        assert sum(position.rows(open_data(config_of(folder, MIXTURES[5]), MODEL))) == len(rows)
    assert_epochs(rows, folder)


@pytest.mark.parametrize("mixture", ["a:1", "a:0.7,b:0.2,c:0.1"])
def test_a_stop_changes_nothing(folder, mixture):
    """With the settings it had, the run that goes on from a position reads what it would have read."""
    data, named = open_data(config_of(folder, mixture), MODEL), names(folder)
    whole = read(data, named, 30, hosts=1, batch_size=6, seed=4)
    for step in (1, 7, 20):
        position = BEGINNING.after(data, 6 * step)
        assert read(data, named, 5, hosts=1, batch_size=6, seed=4, position=position) == whole[6 * step : 6 * step + 30]
        other = read(data, named, 5, hosts=1, batch_size=4, seed=4, position=position)
        assert other == whole[6 * step : 6 * step + 20]


def test_copies_of_a_set_are_refused(folder, tmp_path):
    """Under another name the same rows would be read twice in an epoch."""
    (tmp_path / "link").symlink_to(folder / "a")
    with pytest.raises(ConfigError, match=r"/a and .*/link are copies of the same rows: name one of them"):
        open_data(DataConfig(mixture=f"{folder / 'a'}:1,{tmp_path / 'link'}:1"), MODEL)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "here: None must be an object with prepared, turn, sets"),
        ({"prepared": "", "turn": -1, "sets": []}, "turn=-1, which must be a whole number"),
        ({"prepared": "", "turn": 0, "sets": [{"digest": "x"}]}, "here lacks order, rows"),
        ({"prepared": "", "turn": 0, "sets": [{"digest": "x", "order": 0, "rows": 1e3}]}, "rows=1000.0, which must be"),
    ],
)
def test_what_is_no_position(content, message):
    with pytest.raises(ConfigError, match=message):
        Position.read(content, "here")


def test_more_turns_than_rows(folder):
    data = open_data(config_of(folder, "a:1"), MODEL)
    with pytest.raises(ConfigError, match=r"turn=5, more than the rows that were read"):
        Position(data.digest, 5).on(data)


# ---------------------------------------------------------------- the same in a run


def tiny(folder, mixture, *, steps, batch_size, seed=0):
    config = defaults(kind="gqa", num_query_heads=2, num_kv_heads=1, head_dim=8, implementation="reference")
    config.model.update(d_model=16, num_layers=1, d_ff=16, context=SEQ_LEN, vocab_size=384, dtype="float32")
    config.data.mixture = config_of(folder, mixture).mixture
    config.data.update(batch_size=batch_size, seed=seed)
    config.optimizer.update(warmup_steps=0, decay_steps=0)
    config.train.update(steps=steps, keep=9, checkpoint_every=2)
    return build(config)


@pytest.fixture
def recorded(folder, tmp_path, monkeypatch):
    """A function that trains, and the rows that training was given."""
    named, rows, shard_batch = names(folder), [], loop.shard_batch

    def record(mesh, batch):
        rows.append([named[row.tobytes()] for row in batch["targets"]])
        return shard_batch(mesh, batch)

    monkeypatch.setattr(loop, "shard_batch", record)
    with quick_compiles(tmp_path / "compiled"):
        yield lambda *args, **options: loop.train(tiny(folder, *args, **options), tmp_path / "run"), rows


def into_form_2(checkpoint, digest):
    """Makes the checkpoint of step 2 one of the form that had the step for a position."""
    for item, content in (("format", {"version": 2}), ("data", {"seed": 0, "step": 2, "prepared": digest})):
        (checkpoint / item / "metadata").write_text(json.dumps(content))
    integrity.write_record(checkpoint)


def test_a_run_goes_on_with_another_batch_size_and_other_weights(folder, tmp_path, recorded, capsys):
    """The position comes from an old checkpoint (step times batch size) and from new ones, and the run says it."""
    train, batches = recorded
    data = open_data(config_of(folder, "a:0.7,b:0.3"), MODEL)
    train("a:0.7,b:0.3", steps=2, batch_size=8)
    into_form_2(tmp_path / "run/checkpoints/2", data.digest)
    train("a:0.7,b:0.3", steps=4, batch_size=4)
    out = capsys.readouterr().out
    assert "changed since: data.batch_size was 8 and is now 4" in out
    assert f"rows read so far: 11 of {folder}/a (epoch 1), 5 of {folder}/b (epoch 1)" in out
    letters = [letter for batch in batches for letter, _ in batch]
    train("c:0.5,a:0.5", steps=7, batch_size=4)
    rows = [row for batch in batches for row in batch]
    assert len(rows) == 2 * 8 + 2 * 4 + 3 * 4
    assert_epochs(rows, folder)
    out = capsys.readouterr().out
    assert "changed since: the prepared data or its weights" in out
    assert f"rows read so far: none of {folder}/c, {letters.count('a')} of {folder}/a (epoch 1)" in out
    with pytest.raises(ConfigError, match=r"data.seed was 0 and is now 1: in another order .* set data.seed=0"):
        train("c:0.5,a:0.5", steps=9, batch_size=4, seed=1)


def test_rows_of_a_position_are_numbers(folder):
    """JSON has no numpy integers."""
    data = open_data(config_of(folder, "a:0.7,b:0.3"), MODEL)
    assert all(type(known.rows) is int for known in BEGINNING.after(data, np.int64(7)).sets.values())
