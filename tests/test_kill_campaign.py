"""kill -9 at moments drawn anew each time: nothing is lost, doubled or half-written, and the same command ends well."""

import json
import random
import shutil
import time

import pytest
from test_run_faults import record
from tiny_run import leaf_hashes, prepare_tiny, start_gqe, write_config

STEPS = 12
CHANGES = (f"--config.train.steps={STEPS}", "--config.train.eval_every=2", "--config.train.eval_batches=1")
KILLS = 2  # of each command, one after the other


def finished(*command):
    """Seconds that the command takes."""
    began = time.monotonic()
    child = start_gqe(*command)
    _, err = child.communicate(timeout=240)
    assert child.returncode == 0, err
    return time.monotonic() - began


def killed(seconds, *command):
    child = start_gqe(*command)
    time.sleep(seconds)
    child.kill()
    child.communicate()


def contents(folder):
    """Every file below a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Prepared data and a configuration."""
    place = tmp_path_factory.mktemp("campaign")
    prepare_tiny(place / "data", documents=30)
    write_config(place / "tiny.py", place / "data")
    return place


@pytest.fixture
def rng(capsys):
    seed = random.randrange(2**32)
    with capsys.disabled():
        print(f"(seed {seed})", end="")
    return random.Random(seed)


@pytest.mark.slow
def test_training(place, tmp_path, rng):
    """The record, with its evaluations, and the last parameters are those of the uninterrupted run."""
    command = ["train", "--config", f"{place / 'tiny.py'}:gqa", "--run"]
    cache = f"--config.train.compilation_cache={tmp_path / 'compiled'}"
    seconds = finished(*command, tmp_path / "whole", *CHANGES, cache)
    for _ in range(KILLS):
        killed(rng.uniform(0.4, 1.0) * seconds, *command, tmp_path / "run", *CHANGES, cache)
        metrics = tmp_path / "run" / "metrics.jsonl"
        assert not metrics.exists() or all(json.loads(line) for line in metrics.read_text().split("\n")[:-1])
    finished(*command, tmp_path / "run", *CHANGES, cache)
    assert record(tmp_path / "run") == record(tmp_path / "whole")
    assert leaf_hashes(tmp_path / "run", STEPS) == leaf_hashes(tmp_path / "whole", STEPS)


def whole_or_absent(command, out, look, rng):
    """Kills the command, which makes the folder `out`; it is whole or absent. The next start makes it, and clears away
    what the killed ones left beside it."""
    before = {path.name for path in out.parent.iterdir()}
    seconds = finished(*command)
    expected = look(out)
    for _ in range(KILLS):
        shutil.rmtree(out, ignore_errors=True)
        killed(rng.uniform(0.3, 1.0) * seconds, *command)
        assert not out.exists() or look(out) == expected
    shutil.rmtree(out, ignore_errors=True)
    finished(*command)
    assert look(out) == expected
    assert {path.name for path in out.parent.iterdir()} == {*before, out.name}



def weights(run):
    """The run's parameters, its configuration and its tokenizer."""
    files = contents(run)
    return leaf_hashes(run, 0), {name: files[name] for name in files if name.parts[0] != "checkpoints"}


@pytest.mark.slow
def test_prepare(place, tmp_path, rng):
    """A killed preparation goes on with the next start; the rows are the same bytes."""
    texts = str(place / "data_texts" / "*.txt")
    command = ["prepare", "--data", texts, "--out", tmp_path / "out", "--seq-len", 64, "--heldout", 0.1]
    whole_or_absent([*command, "--workers", 2], tmp_path / "out", contents, rng)


@pytest.fixture(scope="module")
def trained(place):
    finished("train", "--config", f"{place / 'tiny.py'}:gqa", "--run", place / "trained", "--config.train.steps=4")
    finished("export", "--run", place / "trained", "--out", place / "hf")
    return place


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["export", "import", "convert"])
def test_a_folder_is_whole_or_absent(trained, tmp_path, rng, verb):
    out = tmp_path / "out"
    command = {
        "export": ["export", "--run", trained / "trained", "--out", out],
        "import": ["import", "--from", trained / "hf", "--run", out],
        "convert": ["convert", "--run", trained / "trained", "--to", "gqa", "--num-kv-heads", 1, "--out", out,
                    "--calibration-rows", 4, "--heldout-rows", 4],
    }[verb]  # fmt: skip
    whole_or_absent(command, out, contents if verb == "export" else weights, rng)
