"""Whatever kills, signals and repeats a run goes through, it leaves the record of the uninterrupted run."""

import contextlib
import json
import random
import signal
from unittest import mock

import pytest
from tiny_run import leaf_hashes, prepare_tiny, quick_compiles, tiny_config

from gqe_jax.runs.checkpoint import Checkpoints
from gqe_jax.runs.metrics import MetricWriter
from gqe_jax.train import log, loop
from gqe_jax.train.loop import Interrupted, train

STEPS = 6
CHANGES = (f"train.steps={STEPS}", "train.eval_every=2", "train.log_every=2", "train.eval_batches=2")
BY_THE_CLOCK = ("seconds/", "tokens_per_second", "mfu")


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    with quick_compiles(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("prepared") / "data"
    prepare_tiny(directory, documents=60)
    return tiny_config(directory, *CHANGES)


def record(run):
    """The lines of metrics.jsonl, without what a clock decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(BY_THE_CLOCK)} for line in lines]


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The record and the last state of a run that nothing interrupts."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(config, run)
    assert [(line["step"], "eval/loss" in line) for line in record(run)] == [
        (1, False), (2, False), (2, True), (4, False), (4, True), (6, False), (6, True)
    ]  # fmt: skip
    return record(run), leaf_hashes(run, STEPS)


class Killed(BaseException):
    """Nothing in a run catches it, as nothing catches kill -9."""


# Where a run can be cut: a function that it calls, before or after which the fault comes; None: that of one batch.
PLACES = {
    "a step": (log.Log, "dispatched"),
    "a save": (Checkpoints, "save"),
    "an evaluation's batch": None,
    "an evaluation": (log.Log, "evaluated"),
    "a line of metrics": (MetricWriter, "write"),
}


@contextlib.contextmanager
def fault(place, call, what, after):
    """Inside, the `call`-th call of the function at `place` is killed, or gets a signal, before or after it."""
    calls = 0

    def strike():
        if what == "kill":
            raise Killed
        signal.raise_signal(what)

    def faulty(function):
        def call_it(*args, **options):
            nonlocal calls
            calls += 1
            if calls == call and not after:
                strike()
            result = function(*args, **options)
            if calls == call and after:
                strike()
            return result

        return call_it

    with wrapped_batches(faulty) if PLACES[place] is None else wrapped(*PLACES[place], faulty):
        yield


def wrapped(owner, name, wrapper):
    return mock.patch.object(owner, name, wrapper(getattr(owner, name)))


def wrapped_batches(wrapper):
    """The function that evaluates one batch, wrapped."""
    evaluate = loop.evaluate
    return mock.patch.object(loop, "evaluate", lambda function, *args, **kw: evaluate(wrapper(function), *args, **kw))


def go_through(config, run, faults):
    """Starts the run again and again, each time with the next fault, and once more to its end."""
    for each in faults:
        with fault(*each), contextlib.suppress(Killed, Interrupted):
            train(config, run)
        assert all(line.endswith(b"}\n") for line in (run / "metrics.jsonl").read_bytes().splitlines(keepends=True))
    train(config, run)


KILLS = [
    ("an evaluation", 1, "kill", False),  # the checkpoint of its step is complete
    ("an evaluation's batch", 2, "kill", True),
    ("a step", 2, signal.SIGTERM, True),  # a step whose evaluation is due
    ("an evaluation's batch", 1, signal.SIGINT, False),
    ("a save", 1, "kill", True),
]


def test_no_evaluation_is_lost_or_doubled(config, whole, tmp_path):
    """A kill between a checkpoint and its evaluation, signals in a step that is to be evaluated and in the evaluation
    itself, and three starts of a run that is done: the same lines, each once, and the same parameters."""
    run = tmp_path / "run"
    go_through(config, run, KILLS)
    assert (record(run), leaf_hashes(run, STEPS)) == whole
    before = (run / "metrics.jsonl").read_bytes()
    train(config, run)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_torn_lines(config, whole, tmp_path):
    """Half a line at the end of the record, as a kill in the middle of a write leaves it, is written again."""
    run = tmp_path / "run"
    train(config, run)
    metrics = run / "metrics.jsonl"
    for cut in (1, 40):
        metrics.write_bytes(metrics.read_bytes()[:-cut])
        train(config, run)
        assert record(run) == whole[0]


def test_signal_in_an_evaluation_is_obeyed_between_batches(config, tmp_path, capfd):
    """The last evaluation too: no further batch is evaluated, the message says which signal, and the next start makes
    the whole evaluation."""
    run = tmp_path / "run"
    train(config, run)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    evaluated = []

    def counted(function):
        def call(*args):
            evaluated.append(1)
            if len(evaluated) == 2:
                signal.raise_signal(signal.SIGINT)
            return function(*args)

        return call

    said = f"^stopped by SIGINT after step {STEPS}; its checkpoint is saved$"
    with wrapped_batches(counted), pytest.raises(Interrupted, match=said):
        train(config, run)
    assert len(evaluated) == 2
    assert "gqe: SIGINT: stopping after this step and saving; another signal, from 1 s on" in capfd.readouterr().err
    train(config, run)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len(lines)


@pytest.mark.slow
def test_drawn_sequences(config, whole, tmp_path):
    """Faults at drawn places, three to five one after the other, in three runs."""
    rng = random.Random(18)
    for number in range(3):
        faults = [
            (
                rng.choice(list(PLACES)),
                rng.randint(1, 4),
                rng.choice(["kill", "kill", signal.SIGTERM, signal.SIGINT]),
                rng.random() < 0.5,
            )
            for _ in range(rng.randint(3, 5))
        ]
        run = tmp_path / str(number)
        go_through(config, run, faults)
        assert (record(run), leaf_hashes(run, STEPS)) == whole, faults
