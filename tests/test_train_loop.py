"""The training loop: what it computes, what it leaves behind, and how it stops."""

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_run import CONTEXT, QUICK_FLAGS, leaf_hashes, losses, prepare_tiny, quick_compiles, read_arrays, tiny_config

from gqe_jax.config import ConfigError
from gqe_jax.data.reading.pipeline import PreparedRows
from gqe_jax.data.reading.prepared import open_data
from gqe_jax.evaluate.heldout import evaluate_model
from gqe_jax.parallel.mesh import make_mesh
from gqe_jax.runs.checkpoint import CheckpointDamaged, CheckpointFailed, Checkpoints
from gqe_jax.runs.load import load_model
from gqe_jax.runs.metrics import read_metrics
from gqe_jax.train import loop
from gqe_jax.train.log import NonFiniteLoss
from gqe_jax.train.loop import train
from gqe_jax.train.step import Step

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    with quick_compiles(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("prepared") / "data"
    prepare_tiny(directory)
    return directory


@dataclasses.dataclass
class Finished:
    config: object
    directory: Path
    result: object
    batches: list  # that were trained on, in order


def train_recorded(config, directory, monkeypatch, **options):
    """Trains, and keeps the batches that the steps were given."""
    batches, shard_batch = [], loop.shard_batch
    with monkeypatch.context() as patch:
        patch.setattr(loop, "shard_batch", lambda mesh, batch: batches.append(batch) or shard_batch(mesh, batch))
        result = train(config, directory, **options)
    return Finished(config, directory, result, batches)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """An uninterrupted run of 8 steps, with checkpoints of steps 4, 6 and 8."""
    with pytest.MonkeyPatch.context() as patch:
        return train_recorded(tiny_config(data), tmp_path_factory.mktemp("whole") / "run", patch)


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished.directory, tmp_path / "run")
    return dataclasses.replace(finished, directory=tmp_path / "run")


def damage(directory: Path, step: int) -> None:
    """Flips a bit in the largest file of the parameters."""
    files = [path for path in (directory / "checkpoints" / str(step) / "params").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def assert_same_run(one: Path, other: Path, step: int = 8) -> None:
    """Bitwise: losses as logged, and every array of the last checkpoint."""
    assert losses(one) == losses(other)
    assert leaf_hashes(one, step) == leaf_hashes(other, step)


def test_what_a_run_leaves(finished):
    """Checkpoints at the interval, as many as are kept; a line of metrics per step; the configuration as JSON."""
    assert Checkpoints(finished.directory / "checkpoints").steps() == [4, 6, 8]
    assert list(losses(finished.directory)) == list(range(1, 9))
    assert json.loads((finished.directory / "config.json").read_text()) == dataclasses.asdict(finished.config)
    evaluations = [line for line in read_metrics(finished.directory) if "eval/loss" in line]
    assert [(line["step"], line["eval/loss"]) for line in evaluations] == [(8, finished.result.loss)]


def test_where_the_time_goes(data, tmp_path, capsys):
    """Steps, waits, checkpoints, evaluations and compilation are told apart; together they are no more than the run's
    time. The window of steps leaves its trace, and the memory of the state is what it is by its arrays."""
    changes = ("train.profile_steps=3:4", "train.eval_every=4", "train.eval_batches=1")
    began = time.monotonic()
    train(tiny_config(data, *changes), tmp_path / "run")
    elapsed = time.monotonic() - began
    lines = read_metrics(tmp_path / "run")
    seconds = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith("seconds/"):
                seconds[name] = seconds.get(name, 0.0) + value
    purposes = ("step", "data_wait", "checkpoint", "evaluation", "compile")
    assert set(seconds) == {f"seconds/{purpose}" for purpose in purposes} and min(seconds.values()) > 0
    assert sum(seconds.values()) < elapsed
    assert [line["step"] for line in lines if "seconds/evaluation" in line] == [4, 8]
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    out = capsys.readouterr().out
    parameters = sum(x.nbytes for name, x in read_arrays(tmp_path / "run", 8).items() if name.startswith("params"))
    assert f": parameters {parameters / 1e9:.3g} GB, optimizer {2 * parameters / 1e9:.3g} GB, temporaries" in out


@pytest.mark.parametrize("window", ["3", "0:2", "4:3", "a:b", "3:"])
def test_no_window(data, window):
    with pytest.raises(ConfigError, match=rf"train.profile_steps='{window}' is no window of steps: write FIRST:LAST"):
        tiny_config(data, f"train.profile_steps={window}")


def test_resumed_with_other_data(copied, tmp_path, monkeypatch, capsys):
    """Other rows are the user's right, but must be seen to be; another tokenizer makes nonsense of the weights."""
    prepare_tiny(tmp_path / "other", seed=1)
    config = tiny_config(tmp_path / "other")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=9))
    train(config, copied.directory)
    out = capsys.readouterr().out
    assert "changed since: train.steps was 8 and is now 9" in out
    assert "changed since: the prepared data" in out

    other = types.SimpleNamespace(name="other", vocab_size=300, digest="0" * 64)
    monkeypatch.setattr(loop, "tokenizer_from_files", lambda files: other)
    with pytest.raises(ConfigError, match=r"the data was prepared with the tokenizer bytes.*, not with other"):
        train(config, copied.directory)


def test_damaged_newest_checkpoint(copied, finished, monkeypatch, capsys):
    """It is refused by name, with the flag that helps; with the flag the run goes on from the one before.

    Step s is a function of the state and of the batch of step s, and both come back bit for bit: so does the run.
    """
    damage(copied.directory, 8)
    before = losses(copied.directory)
    with pytest.raises(CheckpointDamaged, match=r"(?s)checkpoint of step 8 in .*checkpoints.*--previous-checkpoint"):
        train(copied.config, copied.directory)
    assert losses(copied.directory) == before
    again = train_recorded(copied.config, copied.directory, monkeypatch, previous_checkpoint=True)
    out = capsys.readouterr().out
    assert "kept aside: " in out and f"resuming {copied.directory} from step 6" in out
    assert (copied.directory / "checkpoints" / "8.set_aside").is_dir()
    assert_same_run(copied.directory, finished.directory)
    assert again.result.loss == finished.result.loss
    for old, new in zip(finished.batches[6:8], again.batches[:2], strict=True):
        for name in old:
            np.testing.assert_array_equal(old[name], new[name])


def test_finished_run_is_evaluated_again(copied, capsys):
    """The same command on a run that is done trains nothing and changes no checkpoint."""
    hashes = leaf_hashes(copied.directory, 8)
    assert train(copied.config, copied.directory).loss == copied.result.loss
    assert "nothing to train (raise train.steps to continue)" in capsys.readouterr().out
    assert leaf_hashes(copied.directory, 8) == hashes and list(losses(copied.directory)) == list(range(1, 9))


class PoisonedStep(Step):
    """Its fifth step meets parameters that are no numbers."""

    def _train(self, state, batch):
        poison = jnp.where(state.step == 4, jnp.nan, 1.0)
        params = jax.tree.map(lambda p: p * poison, state.params)
        return super()._train(dataclasses.replace(state, params=params), batch)


def test_nan_stops_the_run_before_its_checkpoint(data, finished, tmp_path, monkeypatch):
    """The message names the step; what is saved is from before it, finite, and leads to the run without the poison."""
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Step", PoisonedStep)
        with pytest.raises(NonFiniteLoss, match=r"step 5: loss=nan, .*Lower optimizer.learning_rate \(now 0.01\)"):
            train(tiny_config(data), tmp_path / "run")
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest() == 4
    assert all(np.isfinite(x).all() for x in read_arrays(tmp_path / "run", 4).values())
    train(tiny_config(data), tmp_path / "run")
    assert_same_run(tmp_path / "run", finished.directory)


@pytest.fixture
def limit_file_size():
    """Files of this process cannot grow beyond a number of bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's threads
def test_full_disk_spares_the_last_checkpoint(copied, finished, limit_file_size):
    """Metrics or checkpoint, whatever fails first: the message says what is left, and once there is room the same
    command leads to the uninterrupted run."""
    checkpoints = Checkpoints(copied.directory / "checkpoints")
    shutil.rmtree(copied.directory / "checkpoints" / "8")
    limit_file_size(1000)
    with pytest.raises(OSError, match=r"could not write .*run.*File too large; the checkpoint of step 6 is complete"):
        train(copied.config, copied.directory)
    limit_file_size(20_000)
    with pytest.raises(CheckpointFailed, match=r"not save the checkpoint of step 8 .*File too large; the .* step 6"):
        train(copied.config, copied.directory)
    assert checkpoints.latest() == 6
    checkpoints.verify(6)
    limit_file_size(resource.RLIM_INFINITY)
    train(copied.config, copied.directory)
    assert_same_run(copied.directory, finished.directory)


def test_unwritable_directory(data, copied, tmp_path):
    """A file where a directory must be, and a directory where a file must be: said before anything is compiled."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"could not write .*file/run.*: Not a directory; there is no complete"):
        train(tiny_config(data), tmp_path / "file" / "run")
    (copied.directory / "metrics.jsonl").unlink()
    (copied.directory / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match=r"metrics.jsonl of the run .*Is a directory; the checkpoint of step 8"):
        train(copied.config, copied.directory)


def test_heldout_loss_is_the_mean_over_all_tokens(finished, data):
    """Against a float64 log-softmax over the logits of all held-out rows at once.

    The tokens to predict are the bytes of the documents and one end for each, whatever the batch size: 43 rows in
    batches of 2 (the run's) and 5 leave batches to be filled up with padding, which must not count.
    """
    trained = load_model(finished.directory)
    rows = PreparedRows(data, "heldout")
    batch = rows.read(range(len(rows)))
    graphdef, state = nnx.split(trained.model)

    def logits_of(state, tokens, segment_ids, positions):
        model = nnx.merge(graphdef, state)
        return model.logits(model(tokens, segment_ids=segment_ids, positions=positions)[0])

    logits = jax.jit(logits_of)(state, batch["tokens"], batch["segment_ids"], batch["positions"])
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    log_probs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0][batch["mask"]]

    documents = [json.loads(line)["text"].encode() for line in (data / "heldout.jsonl").read_text().splitlines()]
    num_bytes = sum(map(len, documents))
    assert len(nats) == num_bytes + len(documents) and len(rows) % 5 and len(rows) % 2
    opened = open_data(finished.config.data, finished.config.model)
    other = evaluate_model(trained.model, opened, make_mesh(), batch_size=5)
    for result in (finished.result, other):
        assert result.tokens == len(nats)
        np.testing.assert_allclose(result.loss, nats.mean(), rtol=1e-6)
        np.testing.assert_allclose(result.perplexity, np.exp(nats.mean()), rtol=1e-5)
        np.testing.assert_allclose(result.bits_per_byte, nats.sum() / np.log(2) / num_bytes, rtol=1e-6)
        np.testing.assert_allclose(result.load.sum(-1), 1.0, atol=1e-6)  # k = 1


def test_accumulation_of_a_dense_model(data, tmp_path):
    """Two microbatches of 2 rows are one batch of 4: the loss is a mean over the tokens of both.

    Only for dense attention: GQE's balance loss is a product of means over its batch, and so is taken per microbatch.
    """
    for parts in (1, 2):
        overrides = ("data.batch_size=4", f"train.accumulate={parts}", "train.steps=4")
        train(tiny_config(data, *overrides, argument="gqa"), tmp_path / str(parts))
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    np.testing.assert_allclose(list(one.values()), list(two.values()), atol=1e-5)
    assert one[4] < one[1] - 0.1
    lines = read_metrics(tmp_path / "1")
    assert all("load" not in line for line in lines) and lines[-1]["eval/load"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "attention",
    [
        "router.kind=fixed",
        "router.kind=random",
        "variant=hard_concat",
        "variant=weighted_concat",
        "router.bias_update_rate=0.01",
    ],
)
def test_every_attention_learns(data, tmp_path, attention):
    """A text of one line over and over has almost no entropy, so 30 steps take most of the loss away: from ln 259 =
    5.56 to less than that of the text's own bytes drawn independently (about 2.9 nats)."""
    changes = ("train.steps=30", "data.batch_size=4", "train.checkpoint_every=30", "train.log_every=29")
    train(tiny_config(data, *changes, f"model.attention.{attention}"), tmp_path / "run")
    curve = losses(tmp_path / "run")
    assert abs(curve[1] - np.log(259)) < 0.1 and curve[30] < 2.7
    biases = [x for name, x in read_arrays(tmp_path / "run", 30).items() if "buffers" in name]
    assert [np.abs(x).max() > 0.005 for x in biases] == [True] * ("bias" in attention)


def test_balancing_biases_are_saved_and_restored(data, tmp_path):
    """Without them the selection after a restore would be another one, and so the losses."""
    changes = ("train.steps=6", "train.checkpoint_every=3", "model.attention.router.bias_update_rate=0.05")
    config = tiny_config(data, *changes)
    train(config, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "6")
    (bias,) = (x for name, x in read_arrays(tmp_path / "again", 3).items() if "buffers" in name)
    assert np.abs(bias).min() > 0.04  # three steps up or down
    train(config, tmp_path / "again")
    assert_same_run(tmp_path / "run", tmp_path / "again", 6)


def test_dead_experts_are_reported(data, tmp_path, capsys):
    """A zero router ties all experts, so that all tokens select expert 0: the log says so, with layer and group."""
    train(tiny_config(data, "model.attention.router.init_std=0.0", "train.steps=4"), tmp_path / "run")
    out = capsys.readouterr().out
    line = "warning: router of layer 0, group 0: dead: expert 1 (0.0%); overloaded: expert 0 (100.0%); uniform: 50.0%"
    assert out.splitlines().index(line) < [text.startswith("step 2") for text in out.splitlines()].index(True)


EIGHT_DEVICES = """
import sys
import jax
from gqe_jax.config_files import load_config
from gqe_jax.train.loop import train
assert jax.device_count() == 8
train(load_config(sys.argv[1], sys.argv[3:]), sys.argv[2])
"""


@pytest.mark.slow
def test_eight_devices_train_as_one(data, tmp_path):
    """The batch is spread over the devices, and every mean, the router's too, is over the global batch."""
    changes = ("data.batch_size=8", "train.steps=5")
    config = tiny_config(data, *changes)
    code = [sys.executable, "-c", EIGHT_DEVICES, data.parent / "data.py", tmp_path / "eight", *changes]
    flags = f"--xla_force_host_platform_device_count=8 {QUICK_FLAGS}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    subprocess.run(list(map(str, code)), env=environment, cwd=REPOSITORY, check=True, capture_output=True, timeout=300)
    train(config, tmp_path / "one")
    one, eight = losses(tmp_path / "one"), losses(tmp_path / "eight")
    np.testing.assert_allclose(list(one.values()), list(eight.values()), atol=1e-5)
    assert CONTEXT == config.model.context and len(one) == 5
