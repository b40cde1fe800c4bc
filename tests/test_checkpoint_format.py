"""Forms of checkpoints: the one before is still read, a newer one is refused, parameters alone are enough to train."""

import json
import shutil
from pathlib import Path

import jax
import pytest
from tiny_run import leaf_hashes, prepare_tiny, quick_compiles, read_arrays, tiny_config

from gqe_jax.config import ConfigError
from gqe_jax.data.reading.position import BEGINNING
from gqe_jax.data.reading.prepared import open_data
from gqe_jax.runs import integrity
from gqe_jax.runs.checkpoint import CheckpointDamaged, Checkpoints
from gqe_jax.runs.load import load_model
from gqe_jax.runs.state import FORMAT, items_of
from gqe_jax.train import loop
from gqe_jax.train.loop import train

CHANGES = ("train.steps=4", "train.checkpoint_every=2", "model.attention.router.bias_update_rate=0.05")


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    with quick_compiles(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("prepared") / "data"
    prepare_tiny(directory)
    return tiny_config(directory, *CHANGES)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A run of four steps, and the same as form 1 had it: other names, and the step for a position in the data."""
    directory = tmp_path_factory.mktemp("whole")
    train(config, directory / "now")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "items_of", lambda state: items_of(state, 1))
        train(config, directory / "before")
    for step in (2, 4):
        checkpoint = directory / "before/checkpoints" / str(step)
        shutil.rmtree(checkpoint / "format")
        data = {"seed": 0, "step": step, "prepared": open_data(config.data, config.model).digest}
        (checkpoint / "data/metadata").write_text(json.dumps(data))
        integrity.write_record(checkpoint)
    return directory


def without_last(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints/4")
    return target


def test_a_run_of_the_form_before_goes_on_bit_for_bit(finished, config, tmp_path):
    """Its selection bias was called `router_bias`: the run goes on from it, to the arrays of the run of today."""
    assert any("router_bias" in name for name in read_arrays(finished / "before", 2))
    run = without_last(finished / "before", tmp_path / "run")
    train(config, run)
    assert leaf_hashes(run, 4) == leaf_hashes(finished / "now", 4)


def test_a_model_of_the_form_before_is_read(finished):
    models = [load_model(finished / name, 4).model for name in ("before", "now")]
    for old, new in zip(*map(jax.tree.leaves, models), strict=True):
        assert (old == new).all()


def test_a_newer_form_is_refused_by_its_number(finished, config, tmp_path):
    run = without_last(finished / "now", tmp_path / "run")
    (written,) = (run / "checkpoints/2/format").glob("metadata")
    written.write_text(json.dumps({"version": FORMAT + 1}))
    integrity.write_record(run / "checkpoints/2")
    message = rf"step 2 in .* has format {FORMAT + 1}, but this gqe_jax reads formats 1 to {FORMAT}: use the newer"
    for read in (lambda: train(config, run), lambda: load_model(run)):
        with pytest.raises(ConfigError, match=message):
            read()


def test_parameters_alone_start_with_a_fresh_optimizer(finished, config, tmp_path):
    """A checkpoint of step 0 with the parameters of initialisation alone gives the run that starts without one."""
    state = loop.Step(config).initial_state()
    items = items_of(state) | {"opt_state": None}
    with Checkpoints(tmp_path / "run/checkpoints") as checkpoints, Checkpoints(finished / "now/checkpoints") as other:
        data = {"seed": config.data.seed, "step": 0, "position": BEGINNING.to_json()}
        texts = {"config": other.read_config(2), "tokenizer": other.read_tokenizer(2)}
        checkpoints.save(0, **items, data=data, **texts, wait=True)
        assert not checkpoints.has_optimizer(0) and other.has_optimizer(2)
    train(config, tmp_path / "run")
    assert leaf_hashes(tmp_path / "run", 4) == leaf_hashes(finished / "now", 4)


@pytest.mark.parametrize("item", ["opt_state", "format"])
def test_a_lost_item_is_damage_and_no_fresh_start(finished, config, tmp_path, item):
    """The record tells an optimizer state that was never written from one that is gone."""
    run = without_last(finished / "now", tmp_path / "run")
    shutil.rmtree(run / "checkpoints/2" / item)
    with pytest.raises(CheckpointDamaged, match=f"{item}/"):
        train(config, run)
