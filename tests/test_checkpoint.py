"""Checkpoints give back what was saved, and say what does not fit, what is damaged and what could not be written."""

import asyncio
import collections
import gc
import json
import os
import random
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqe_jax.config import ConfigError, OptimizerConfig
from gqe_jax.runs.checkpoint import CheckpointDamaged, CheckpointFailed, Checkpoints, cause_of
from gqe_jax.runs.integrity import RECORD
from gqe_jax.train.optimizer import make_optimizer

CONFIG = {"name": "test", "model": {"d_model": 8, "attention": {"window": None}}}
TOKENIZER = {"model.spm": bytes(range(256)), "tokenizer.json": b"{}"}


def make_items(step: int) -> dict:
    """All that is saved, as a function of `step`: numbers that cannot be compressed, and odd corners of a tree."""
    rng = np.random.default_rng(step)
    params = {
        "embed": {"embedding": jnp.asarray(rng.standard_normal((50, 8)), jnp.float32)},
        "blocks": {
            "q": jnp.asarray(rng.standard_normal((2, 8, 4, 64)), jnp.float32),
            "scale": jnp.asarray(rng.standard_normal((2, 8)), jnp.bfloat16),
        },
    }
    train = {"step": jnp.asarray(step), "key": jax.random.key_data(jax.random.key(step)), "router_bias": {}}
    return {
        "params": params,
        "opt_state": make_optimizer(OptimizerConfig(), 1000).init(params),
        "train": train,
        "data": {"seed": 7, "step": step},
        "config": CONFIG,
        "tokenizer": TOKENIZER,
    }


def abstract(tree):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def arrays(items: dict) -> dict:
    return {name: items[name] for name in ("params", "opt_state", "train")}


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True), got, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A directory with checkpoints of steps 1 and 2; tests that change it take a copy."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(directory) as checkpoints:
        for step in (1, 2):
            assert checkpoints.save(step, **make_items(step))
    return directory


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


# ---------------------------------------------------------------- what goes in comes out


def test_round_trip(saved):
    """Every leaf comes back bit for bit in its dtype and tree, by each step's own number; JSON items as they were."""
    checkpoints = Checkpoints(saved)
    assert (checkpoints.steps(), checkpoints.latest()) == ([1, 2], 2)
    for step in (1, 2):
        items = make_items(step)
        assert_same(checkpoints.restore(step, **abstract(arrays(items))), arrays(items))
        assert checkpoints.read_data(step) == items["data"]
        assert checkpoints.read_config(step) == CONFIG
        assert checkpoints.read_tokenizer(step) == TOKENIZER


def test_params_alone_need_nothing_else(copy):
    """Evaluation and export must not read (three times as large) optimizer state: they work with it gone."""
    for item in ("opt_state", "train", "data"):
        shutil.rmtree(copy / "2" / item)
    params = make_items(2)["params"]
    restored = Checkpoints(copy).restore(2, params=abstract(params))
    assert_same(restored, {"params": params})


def test_saving_keeps_the_newest_and_does_not_repeat(tmp_path):
    """`keep` bounds the disk a run needs; the save at the end of a run may coincide with one of the interval."""
    with Checkpoints(tmp_path, keep=2, every=3) as checkpoints:
        assert [step for step in range(1, 8) if checkpoints.should_save(step)] == [3, 6]
        for step in (3, 6, 9):
            assert checkpoints.save(step, **make_items(step), wait=True)
        assert not checkpoints.save(9, **make_items(9))
    assert Checkpoints(tmp_path).steps() == [6, 9]


def test_arrays_may_be_donated_right_after_save(tmp_path):
    """A save goes on while training does: it must hold the values of its call, whatever becomes of the buffers."""
    items = make_items(1)
    params = {f"w{i}": jax.random.normal(jax.random.key(i), (512, 1024)) for i in range(4)}
    expected = jax.tree.map(lambda x: np.array(x, copy=True), params)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, **items | {"params": params})
        for _ in range(5):
            params = overwrite(params)
        jax.block_until_ready(params)
    assert_same(Checkpoints(tmp_path).restore(1, params=abstract(params)), {"params": expected})


def test_looking_changes_nothing(tmp_path, saved):
    """`gqe eval` may look into a run that is being trained: it must neither make directories nor clear a save away."""
    checkpoints = Checkpoints(tmp_path / "absent")
    assert (checkpoints.steps(), checkpoints.latest()) == ([], None)
    assert not (tmp_path / "absent").exists()

    directory = Path(shutil.copytree(saved, tmp_path / "run"))
    half = directory / "3.orbax-checkpoint-tmp"
    shutil.copytree(directory / "2", half)
    reader = Checkpoints(directory)
    assert reader.steps() == [1, 2]
    reader.read_config(2)
    assert half.exists()
    with Checkpoints(directory) as writer:
        writer.save(4, **make_items(4), wait=True)
    assert not half.exists()


# ---------------------------------------------------------------- what does not fit is named


def test_every_mismatch_is_listed_at_once(saved):
    """One missing, one surplus, one dtype, one depth, one vocabulary: five lines, each with what to check."""
    params = make_items(2)["params"]
    params["embed"]["embedding"] = jnp.zeros((60, 8))
    params["blocks"] = {
        "q": jnp.zeros((3, 8, 4, 64)),
        "router": jnp.zeros((2, 8)),
        "scale": jnp.zeros((2, 8), jnp.float32),
    }
    with pytest.raises(ConfigError) as error:
        Checkpoints(saved).restore(2, params=abstract(params), train=abstract({"step": jnp.asarray(0)}))
    heading, *lines = str(error.value).split("\n  ")
    assert f"checkpoint of step 2 in {saved}" in heading and "(5 differences)" in heading
    for line, parts in zip(
        lines,
        [
            ("params/blocks/q: ", "expected float32[3, 8, 4, 64], found float32[2, 8, 4, 64]", "model.num_layers"),
            ("params/blocks/router: ", "expected float32[2, 8], found nothing", "model.attention"),
            ("params/blocks/scale: ", "expected float32[2, 8], found bfloat16[2, 8]", "model.param_dtype"),
            ("params/embed/embedding: ", "expected float32[60, 8], found float32[50, 8]", "model.vocab_size"),
            ("train/key: ", "expected nothing, found uint32[2]", "check"),
        ],
        strict=True,
    ):
        assert all(part in line for part in parts), line


def test_unknown_step_is_refused(saved):
    with pytest.raises(ConfigError, match=r"no checkpoint of step 5 in .*choose one that is there \(1, 2\)"):
        Checkpoints(saved).read_config(5)


# ---------------------------------------------------------------- damage is found


def recorded_files(directory: Path, step: int) -> list[str]:
    return sorted(json.loads((directory / str(step) / RECORD).read_text()))


def flip_bit(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 16
    path.write_bytes(content)


def test_any_damage_to_any_file_is_found(copy):
    """Orbax itself restores flipped bits of array data without a word. Every file is recorded, so each damage shows."""
    rng = random.Random(0)
    files = recorded_files(copy, 2)
    on_disk = {p.relative_to(copy / "2").as_posix() for p in (copy / "2").rglob("*") if p.is_file()}
    assert on_disk - set(files) - {RECORD} == {"_CHECKPOINT_METADATA", "commit_success.txt"}
    checkpoints = Checkpoints(copy)
    for name in files:
        path = copy / "2" / name
        content = path.read_bytes()
        flip_bit(path, rng.random())
        with pytest.raises(CheckpointDamaged, match=f"{re.escape(name)} has other contents than were written"):
            checkpoints.verify(2)
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointDamaged, match=f"{re.escape(name)} has {len(content) // 2} bytes instead of"):
            checkpoints.verify(2)
        path.unlink()
        with pytest.raises(CheckpointDamaged, match=f"{re.escape(name)} is missing"):
            checkpoints.verify(2)
        path.write_bytes(content)
    checkpoints.verify(2)


@pytest.mark.parametrize("item", ["params", "opt_state", "config"])
def test_restore_names_the_damaged_checkpoint_and_the_way_out(copy, item):
    """The message must do: which checkpoint, which file, what to type. The one before is not used unasked."""
    files = [copy / "2" / name for name in recorded_files(copy, 2) if name.startswith(f"{item}/")]
    flip_bit(max(files, key=lambda path: path.stat().st_size), 0.5)
    checkpoints = Checkpoints(copy)
    with pytest.raises(CheckpointDamaged) as error:
        checkpoints.read_config(2)
        checkpoints.restore(2, **abstract(arrays(make_items(2))))
    message = str(error.value)
    assert message.startswith(f"the checkpoint of step 2 in {copy} is damaged: {item}/")
    assert "--previous-checkpoint" in message and "--step 1" in message
    assert isinstance(error.value, ConfigError)
    assert checkpoints.latest() == 2


def test_damage_of_the_only_checkpoint_offers_no_earlier_one(copy):
    shutil.rmtree(copy / "2")
    (copy / "1" / RECORD).write_text("{")
    with pytest.raises(CheckpointDamaged, match=rf"{RECORD} cannot be read .*there is none before it") as error:
        Checkpoints(copy).verify(1)
    assert "--previous-checkpoint" not in str(error.value)


def test_many_damaged_files_make_a_short_message(copy):
    """A lost item has a dozen files; five names are enough."""
    shutil.rmtree(copy / "2" / "opt_state")
    count = sum(name.startswith("opt_state/") for name in recorded_files(copy, 2))
    with pytest.raises(CheckpointDamaged, match=f"and {count - 5} more files"):
        Checkpoints(copy).verify(2)


def test_set_aside_makes_way_for_the_step_before(copy):
    """After the user's word the damaged one no longer counts, is not lost, and its step can be saved again."""
    with Checkpoints(copy, keep=2) as checkpoints:
        checkpoints.should_save(3)  # opens the writer, which must notice as well
        (aside,) = checkpoints.set_aside_damaged(2)
        assert checkpoints.latest() == 1 and (aside / "params").is_dir()
        assert checkpoints.save(2, **make_items(2), wait=True)
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.set_aside_damaged(2) != [aside]
        assert checkpoints.save(3, **make_items(3), wait=True)
        assert checkpoints.steps() == [1, 3]


def test_set_aside_goes_back_to_a_whole_checkpoint_or_touches_nothing(copy):
    """Else one word too few of the user's would start a long run from its beginning, and its metrics with it."""
    with Checkpoints(copy, keep=3) as checkpoints:
        checkpoints.save(3, **make_items(3), wait=True)
        for step in (3, 2):
            (copy / str(step) / RECORD).write_text("{")
        assert [path.name for path in checkpoints.set_aside_damaged(3)] == ["3.set_aside", "2.set_aside"]
        assert checkpoints.steps() == [1]
        (copy / "1" / RECORD).write_text("{")
        with pytest.raises(CheckpointDamaged, match=r"no checkpoint in .* is whole \(those of steps 1 are damaged\)"):
            checkpoints.set_aside_damaged(1)
        assert checkpoints.steps() == [1]


# ---------------------------------------------------------------- what cannot be written is said


def test_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    """With less room than it takes, the save is refused at once; nothing half-written stays behind.

    What it takes is what the one before took, byte for byte: arrays are compressed, so their sizes are more.
    """
    usage = collections.namedtuple("usage", ["total", "used", "free"])

    def with_room(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, free))

    with Checkpoints(tmp_path) as checkpoints:
        with_room(1000)
        with pytest.raises(CheckpointFailed, match=r"step 1 .*GB and the disk has 1e-06 GB left; there is no complete"):
            checkpoints.save(1, **make_items(1))
        assert not [path for path in tmp_path.iterdir() if path.name.startswith("1")]
        zeros = {name: jax.tree.map(jnp.zeros_like, make_items(1)[name]) for name in ("params", "opt_state")}
        with_room(sum(leaf.nbytes for leaf in jax.tree.leaves(zeros["params"])))  # and none for the optimizer's zeros
        checkpoints.save(1, **make_items(1) | zeros, wait=True)
        record = json.loads((tmp_path / "1" / RECORD).read_text())
        written = sum(size for size, _ in record.values())
        assert written == sum((tmp_path / "1" / name).stat().st_size for name in record)
        with_room(written)
        checkpoints.save(2, **make_items(2) | zeros, wait=True)
        with_room(written // 2)
        with pytest.raises(CheckpointFailed, match=r"step 3 .*GB left; the checkpoint of step 2 is complete"):
            checkpoints.save(3, **make_items(3) | zeros)


def test_one_line_for_writes_that_fail_together(caplog):
    """Orbax raises a page for one of them, and its event loop logs the others: a cause is left, and no traceback."""
    page = "RESOURCE_EXHAUSTED: Error writing local file \"a\":\n ... [os_error_code='28']"
    assert cause_of(ValueError(page)) == os.strerror(28)
    Checkpoints("nowhere")
    loop = asyncio.new_event_loop()
    for error in (OSError(28, "No space left on device"), KeyError("mine")):
        loop.create_future().set_exception(error)
        gc.collect()
    loop.close()
    assert [record.exc_info[0] for record in caplog.records] == [KeyError]


def test_directory_that_cannot_be_made(tmp_path):
    """A path through a regular file cannot be created, not even by root."""
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints")
    assert checkpoints.steps() == []
    with pytest.raises(CheckpointFailed, match=r"step 1 in .*file/checkpoints: .*Not a directory"):
        checkpoints.save(1, **make_items(1))
    checkpoints.close()
