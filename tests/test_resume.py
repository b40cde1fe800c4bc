"""A run that is killed or stopped and started again is the uninterrupted run, bit for bit. With real processes."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import leaf_hashes, losses, prepare_tiny, start_gqe, write_config

from gqe_jax.runs.checkpoint import Checkpoints

STEPS = 80
CHANGES = (f"--config.train.steps={STEPS}", "--config.model.attention.implementation=None")  # what users train with


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("resume")
    prepare_tiny(directory / "data")
    return write_config(directory / "tiny.py", directory / "data")


def start(config, run):
    return start_gqe("train", "--config", config, "--run", run, *CHANGES)


def finish(child) -> str:
    out, err = child.communicate(timeout=240)
    assert child.returncode == 0, err
    return out


def read_until_training(child) -> list[str]:
    """The lines up to the first progress line."""
    lines = []
    while not (lines and lines[-1].startswith("step ")):
        line = child.stdout.readline()
        assert line, child.communicate()[1]
        lines.append(line)
    return lines


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    finish(start(config, run))
    return run


def assert_same_run(run, whole):
    assert losses(run) == losses(whole) and len(losses(whole)) == STEPS
    assert leaf_hashes(run, STEPS) == leaf_hashes(whole, STEPS)


def wait_until(condition: Callable[[], object], child) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.001)


def checkpoints(run: Path) -> Checkpoints:
    return Checkpoints(run / "checkpoints")


@pytest.mark.slow
def test_killed_three_times(config, whole, tmp_path):
    """kill -9 in the middle of a save and at two random moments; the same command each time.

    The state after step s is a function of the state before it and of the batch of step s, so whatever was lost since
    the newest complete checkpoint is computed again, to the same numbers.
    """
    run = tmp_path / "run"
    rng = random.Random(0)
    for moment in ("save", "random", "random"):
        began = checkpoints(run).latest() or 0
        child = start(config, run)
        try:
            assert (f"resuming {run} from step {began}\n" in read_until_training(child)) == (began > 0)
            wait_until(lambda began=began: (checkpoints(run).latest() or 0) > began, child)
            if moment == "save":
                wait_until(lambda: list((run / "checkpoints").glob("*.orbax-checkpoint-tmp/params*")), child)
            else:
                time.sleep(rng.uniform(0, 0.3))
        finally:
            child.kill()
            child.communicate()
        assert child.returncode == -signal.SIGKILL
        assert began < checkpoints(run).latest() < STEPS
    assert f"resuming {run} from step {checkpoints(run).latest()}" in finish(start(config, run))
    assert_same_run(run, whole)


@pytest.mark.slow
def test_stopped_by_signals(config, whole, tmp_path):
    """SIGTERM, then SIGINT: each finishes its step, saves it, says so and leaves with 128 + the signal's number."""
    run = tmp_path / "run"
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        child = start(config, run)
        read_until_training(child)
        child.send_signal(number)
        child.send_signal(number)  # as terminals and supervisors do: it is the same request
        _, err = child.communicate(timeout=240)
        assert child.returncode == code, err
        step = checkpoints(run).latest()
        at_once, at_the_end = err.splitlines()
        assert at_once.startswith(f"gqe: {number.name}: stopping after this step and saving; another signal")
        expected = f"gqe train: stopped by {number.name} after step {step}; its checkpoint is saved; "
        assert at_the_end == expected + "the same command continues it"
        assert max(losses(run)) == step < STEPS
    assert f"resuming {run} from step {step}" in finish(start(config, run))
    assert_same_run(run, whole)
