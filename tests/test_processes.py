"""Several real processes of one run on this machine: meeting, agreeing, stopping together, dying, resuming."""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import QUICK_FLAGS, losses, prepare_tiny, write_config

from gqe_jax.cli import train as train_cli
from gqe_jax.config import ConfigError
from gqe_jax.processes import roll_call
from gqe_jax.processes.joined import joined
from gqe_jax.processes.place import Place, StartFailed
from gqe_jax.runs.checkpoint import Checkpoints
from gqe_jax.runs.metrics import read_metrics

REPOSITORY = Path(__file__).parents[1]
BOUND = 30  # seconds in which the others must have ended; measured: 1 on a quiet machine


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def roll(processes, *, directory, timeout=20.0, of=None, versions=None):
    """The outcomes of the roll call among threads of this process: [(process, config, directory), ...]."""
    port = free_port()

    def meet(process, config, directory):
        place = Place(f"127.0.0.1:{port}", of or len(processes), process)
        hello = {"process": process, "of": place.num_processes, "host": f"host{process}", "config": config}
        hello["versions"] = (versions or {}).get(process, {"jax": "1"})
        answer = roll_call._call if process == 0 else roll_call._answer
        try:
            return answer(place, hello, directory, time.monotonic() + timeout)
        except (ConfigError, StartFailed) as error:
            return error

    with ThreadPoolExecutor(len(processes)) as threads:
        settings = [(process, {}, directory) if isinstance(process, int) else process for process in processes]
        return list(threads.map(lambda setting: meet(*setting), settings))


def messages(outcomes, kind):
    assert all(type(outcome) is kind for outcome in outcomes), outcomes
    return [str(outcome) for outcome in outcomes]


def test_all_meet(tmp_path):
    """With equal configurations and a directory that all see, everybody goes on; much may still be refused, so nothing
    is left there."""
    peers = roll([0, 1, 2, 3], directory=tmp_path / "run")
    assert [sorted(one.lines) for one in peers] == [[1, 2, 3], [0], [0], [0]]
    assert not (tmp_path / "run").exists()


def test_missing_processes_are_named(tmp_path):
    """By number, on those that are there; they may be retried, so it is no ConfigError."""
    for message in messages(roll([0, 2], of=4, directory=tmp_path, timeout=1.0), StartFailed):
        assert message.startswith("processes 1, 3 of 4 did not call 127.0.0.1:")
        assert "(process 0, on host0) within the start timeout" in message


def test_missing_coordinator_is_named(tmp_path):
    """With its address, and the port that some networks block."""
    (message,) = messages(roll([1], of=2, directory=tmp_path, timeout=0.5), StartFailed)
    assert message.startswith("process 1 did not reach process 0 at 127.0.0.1:")
    assert "Connection refused" in message and "set JAX_COORDINATOR_PORT=8476" in message


STRANGERS = (
    b"PRI * HTTP/2.0\r\n\r\n",
    b"",
    b"[1]\n",
    b'{"other": 1}\n',
    b'{"process": 1}\n',
    b'{"process": 1, "of": 2, "host": 5, "versions": {}, "config": {}}\n',
    b'{"process": 1, "of": 2, "host": "h", "versions": {"jax": 1}, "config": {}}\n',
    b'{"process": true, "of": 2, "host": "h", "versions": {}, "config": {}}\n',
    b'{"process": 7, "of": 2, "host": "h", "versions": {}, "config": {}}\n',
    b'{"process": 1, "of": 2, "host": "\\u001b[2J", "versions": {}, "config": {}}\n',
    b"[" * 100_000 + b"\n",
    b'{"process": ' + b"9" * 5000 + b"}\n",
    b"x" * (1 << 21),
)


def test_strangers_are_not_counted(tmp_path, capfd):
    """Whoever else finds the port, and says nothing, speaks otherwise or leaves, changes nothing, and is told of."""
    port = free_port()
    place = Place(f"127.0.0.1:{port}", 1 + 1, 0)
    hello = {"process": 0, "of": 2, "host": "host0", "config": {}, "versions": {}}
    with ThreadPoolExecutor(1) as threads, contextlib.ExitStack() as stack:
        first = threads.submit(roll_call._call, place, hello, tmp_path, time.monotonic() + 30)
        for words in STRANGERS:
            while True:
                with contextlib.suppress(OSError):
                    stranger = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                    break
            with contextlib.suppress(OSError):  # it was hung up on before the end
                stranger.sendall(words)
                stranger.shutdown(socket.SHUT_WR)
        second = Place(place.coordinator, 2, 1)
        roll_call._answer(second, hello | {"process": 1}, tmp_path, time.monotonic() + 30)
        assert list(first.result().lines) == [1]
    said = f"gqe: dropped a call from 127.0.0.1 at 127.0.0.1:{port}: it is not from a process of a run\n"
    assert capfd.readouterr().err == said * len(STRANGERS)


def test_it_listens_where_the_others_need_it(tmp_path):
    """At the coordinator's own address, if that is a number of this machine; at all for a name, which other machines
    may know as another address, and for an address that is translated on the way (192.0.2.1 is nobody's)."""
    places = {host: Place(f"{host}:{free_port()}", 2, 0) for host in ("127.0.0.1", "localhost", "name", "192.0.2.1")}
    assert [place.listening_host for place in places.values()] == ["127.0.0.1", "127.0.0.1", None, None]
    for host, everywhere in (("127.0.0.1", False), ("192.0.2.1", True)):
        with roll_call._listen(places[host]) as listener:
            assert (listener.getsockname()[0] in ("::", "0.0.0.0")) == everywhere


def test_the_preemption_service_is_needed(tmp_path):
    """Without it the processes could not agree on the step at which they stop."""
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with pytest.raises(ConfigError, match=r"^JAX_ENABLE_PREEMPTION_SERVICE=false leaves out .*: unset it, or"):
            with joined(Place("127.0.0.1:1", 2, 0), {}, tmp_path, timeout=1, report=lambda error: 1):
                pass
    finally:
        jax.config.update("jax_enable_preemption_service", True)


def test_what_differs_is_named(tmp_path):
    """Field or package, the values, and who has which: the same message everywhere, and no directory made."""
    directory = tmp_path / "run"
    configs = [{"train.steps": "8"}, {"train.steps": "9"}, {"train.steps": "8", "data.seed": "1"}]
    for message in messages(roll([(i, configs[i], directory) for i in range(3)], directory=None), ConfigError):
        assert message == (
            "the processes differ: config.data.seed is absent on processes 0, 1, but 1 on process 2; "
            "config.train.steps is 8 on processes 0, 2, but 9 on process 1: give all the same --config and the same "
            "overrides"
        )
    versions = {i: {"jax": "0.10.2", "libtpu": "absent" if i else "0.0.42"} for i in range(2)}
    for message in messages(roll([0, 1], directory=directory, versions=versions), ConfigError):
        assert message == (
            "the processes differ: libtpu is 0.0.42 on process 0, but absent on process 1: install the same packages "
            "on all machines"
        )
    assert not directory.exists()


def test_versions_are_those_of_the_packages():
    """What is compared: every package that decides the numbers, and the source of this one."""
    versions = roll_call._versions()
    assert versions["jax"] == sys.modules["jax"].__version__ and sys.version.startswith(versions["Python"])
    assert {"jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint"} <= versions.keys()
    assert versions["gqe_jax"].startswith("0.") and "(source " in versions["gqe_jax"]


def test_unshared_directory(tmp_path, monkeypatch):
    """Three processes, of which one sees another directory by the same name; what was made is removed."""
    monkeypatch.setattr(roll_call, "_SHARED_DIRECTORY", 0.5)
    shared, other = tmp_path / "shared", tmp_path / "other"
    for message in messages(roll([(0, {}, shared), (1, {}, shared), (2, {}, other)], directory=None), ConfigError):
        assert message == (
            f"--run={str(shared)!r} is not shared: what process 0 on host0 wrote there is not seen by process 2 on "
            f"host2: name a directory on a file system that all machines share, or gs://BUCKET/DIRECTORY"
        )
    assert not shared.exists()


def test_unwritable_directory_is_refused_to_all(tmp_path):
    (tmp_path / "file").write_text("")
    for message in messages(roll([0, 1], directory=tmp_path / "file" / "run"), StartFailed):
        assert "process 0 cannot write in --run=" in message and "Not a directory" in message


def test_numbers_that_do_not_fit(tmp_path):
    """Two of one number; another total; a second process 0 of a run that is starting."""
    outcomes = messages(roll([0, 1, 1], directory=tmp_path), ConfigError)
    assert outcomes[0].startswith("two processes have --process-id=1, on host1 and host1: number them from 0 to 2")
    outcomes = roll([0, (0, {}, tmp_path)], of=2, directory=tmp_path, timeout=1.0)
    assert any("cannot listen on port" in str(outcome) for outcome in outcomes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--coordinator h:1 --num-processes 2", "--coordinator and --num-processes without --process-id"),
        ("--process-id 0", "--process-id without --coordinator and --num-processes"),
        ("--num-processes 2 --process-id 0", "--num-processes and --process-id without --coordinator"),
        ("--coordinator h:1 --num-processes 2 --process-id 2", "--process-id=2 must lie in .0, --num-processes=2"),
        ("--coordinator host --num-processes 2 --process-id 0", "--coordinator='host' is no HOST:PORT"),
        ("--coordinator h:99999 --num-processes 2 --process-id 0", "is no HOST:PORT"),
        ("--distributed --process-id 0", "--distributed asks the platform for what --process-id say"),
        ("--start-timeout 0", "--start-timeout=0.0 must be above 0"),
        ("--distributed", "--distributed: this is no platform that says which processes a run has"),
    ],
)
def test_arguments(words, message, monkeypatch):
    """Incomplete and contradictory ones are named, with what is missing."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    parser = argparse.ArgumentParser()
    train_cli.add_arguments(parser)
    args = parser.parse_args(["--config", "smoke", "--run", "r", *words.split()])
    with pytest.raises(ConfigError, match=message):
        train_cli.place_from(args)


def test_place_from_slurm(monkeypatch):
    """--distributed takes what the platform knows; without any of these flags there is one process."""
    for name, value in {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "tpu-[3-4]",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
        "JAX_COORDINATOR_PORT": "8476",
    }.items():
        monkeypatch.setenv(name, value)
    args = argparse.Namespace(
        distributed=True, coordinator=None, num_processes=None, process_id=None, start_timeout=1.0
    )
    place = train_cli.place_from(args)
    assert (place.address, place.num_processes, place.process_id) == (("tpu-3", 8476), 2, 1)
    args.distributed = False
    assert train_cli.place_from(args) is None


# ---------------------------------------------------------------------------------------------------- real processes


def start(code, *arguments, devices=1, **environment):
    flags = f"--xla_force_host_platform_device_count={devices} {QUICK_FLAGS}"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1"} | environment,
        cwd=REPOSITORY,
    )


@contextlib.contextmanager
def killed_at_the_end(children):
    try:
        yield children
    finally:
        for child in children:
            child.kill()
            child.communicate()


def ends(child, seconds=BOUND):
    """(exit code, what it printed)."""
    out, err = child.communicate(timeout=seconds)
    return child.returncode, out + err


JOINED = """
import sys, time
from gqe_jax.cli.errors import report
from gqe_jax.config import ConfigError
from gqe_jax.processes.place import Place
from gqe_jax.processes.joined import check_equal, every_text, joined
import functools
port, count, number, directory, what = sys.argv[1:]
number = int(number)
place = Place(f"127.0.0.1:{port}", int(count), number)
with joined(place, {}, directory, timeout=60, report=functools.partial(report, f"process {number}")):
    assert every_text("é" * number) == ["é" * i for i in range(int(count))]
    print("up")
    if what == "fail" and number == 1:
        raise ConfigError("no such thing: do another")
    if what == "differ":
        check_equal("the data", str(number % 2), "do otherwise")
    time.sleep(120 if what != "end" else 0)
"""


@contextlib.contextmanager
def joined_children(count, tmp_path, what):
    port = free_port()
    with killed_at_the_end([start(JOINED, port, count, i, tmp_path, what) for i in range(count)]) as children:
        for child in children:
            line = child.stdout.readline()
            while line and line != "up\n":
                line = child.stdout.readline()
            assert line, child.communicate()
        yield children


def test_they_end_together(tmp_path):
    with joined_children(2, tmp_path, "end") as children:
        assert [ends(child)[0] for child in children] == [0, 0]


@pytest.mark.parametrize("victim", [0, 1])
def test_others_end_when_one_is_killed(tmp_path, victim):
    """kill -9, of the process with JAX's coordinator and of another: the rest say which is gone, and end with 1."""
    with joined_children(3, tmp_path, "wait") as children:
        children[victim].kill()
        for number in {0, 1, 2} - {victim}:
            code, text = ends(children[number])
            expected = f"process {victim} on {socket.gethostname()} is gone (killed, out of memory, stuck, or its"
            if victim == 0:  # JAX's own abort may come first; it says the same at length
                assert (code == 1 and expected in text) or (code == -signal.SIGABRT and "leader" in text), text
            else:
                assert code == 1 and f"{expected} machine lost). Process {number} cannot" in text, text


def test_others_end_when_one_fails(tmp_path):
    """An error of one is said by all, with its host; each ends without waiting for the rest."""
    with joined_children(2, tmp_path, "fail") as children:
        code, text = ends(children[1])
        assert code == 2 and "process 1: no such thing: do another" in text
        code, text = ends(children[0])
        assert code == 1 and f"process 1 on {socket.gethostname()} failed: no such thing: do another. Process 0" in text


def test_what_differs_after_the_start(tmp_path):
    """All raise the same, each prints it once, and nobody speaks of the others' failing."""
    with joined_children(2, tmp_path, "differ") as children:
        for number, child in enumerate(children):
            code, text = ends(child)
            wanted = "the processes differ: the data is 0 on process 0, but 1 on process 1: do otherwise"
            assert code == 2 and f"process {number}: {wanted}\n" in text and "cannot go on" not in text


PLACED = """
import sys
import jax
import numpy as np
from gqe_jax.config import MeshConfig
from gqe_jax.parallel.mesh import AXES, local_rows, make_mesh, shard_batch
from gqe_jax.parallel.zigzag import zigzag

port, number = map(int, sys.argv[1:])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, number)
whole = np.arange(4 * 16).reshape(4, 16)
for sizes in ((1, 1, 1, 4), (1, 1, 4, 1), (1, 2, 1, 2), (2, 1, 2, 1), (1, 4, 1, 1), (2, 2, 1, 1)):
    mesh = make_mesh(MeshConfig(**dict(zip(AXES, sizes))))
    rows = local_rows(mesh, 4)
    array = shard_batch(mesh, {"tokens": whole[rows]})["tokens"]
    assert array.shape == (4, 16), array.shape
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, zigzag(whole, sizes[3])[shard.index])
    print(rows)
"""


def test_devices_hold_the_rows_that_their_place_names():
    """Two processes of two devices: where `expert` or `context` stretches over both, both read the same rows; where it
    does not, each reads its own. A device that held a part of another row would attend to what its neighbours have not.
    """
    port = free_port()
    with killed_at_the_end([start(PLACED, port, i, devices=2) for i in range(2)]) as children:
        read = [ends(child, 120) for child in children]
    assert [code for code, _ in read] == [0, 0], read
    lines = [[line for line in text.splitlines() if line.startswith("[")] for _, text in read]
    everything = "[0, 1, 2, 3]"
    assert lines[0] == [everything, everything, "[0, 1]", "[0, 1]", "[0, 1]", "[0, 1]"]
    assert lines[1] == [everything, everything, "[2, 3]", "[2, 3]", "[2, 3]", "[2, 3]"]


TRAIN = """
import os, sys, time
import jax
import numpy as np
from gqe_jax.cli.main import main
from gqe_jax.train import loop

record, pause = sys.argv[1], float(sys.argv[2])
train_batches = loop.train_batches

def hang():
    time.sleep(3600)

class Recorded:
    def __init__(self, batches, step, process):
        self.batches, self.step, self.process = batches, step, process
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.batches.close()
    def __iter__(self):
        return self
    def __next__(self):
        time.sleep(pause)
        if self.step == 4 and os.environ.get("HANGS") == str(self.process):
            hang()
        batch = next(self.batches)
        self.step += 1
        name = f"{record}/{self.step}.{self.process}"
        np.savez(f"{name}.part.npz", **batch)
        os.replace(f"{name}.part.npz", f"{name}.npz")  # no kill leaves half of one
        return batch

def recorded(data, *, start_step, **options):
    return Recorded(train_batches(data, start_step=start_step, **options), start_step, jax.process_index())

loop.train_batches = recorded
sys.exit(main(sys.argv[3:]))
"""
STEPS = 40


class Runs:
    """Starts `gqe train` on four devices, in one process or several, each recording the batches it is given."""

    def __init__(self, directory):
        self.directory = directory
        prepare_tiny(directory / "data")
        self.config = write_config(directory / "tiny.py", directory / "data")
        self.environment = {
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    @contextlib.contextmanager
    def start(self, name, count, *words, run="run", pause=0.0, hangs=None):
        """The processes; `name` is that of the record of batches. The pause lets a signal arrive before the end; the
        process of number `hangs` waits for ever for the rows of its fifth step."""
        record = self.directory / name
        record.mkdir()
        settings = {"train.steps": STEPS, "data.batch_size": 4, "train.checkpoint_every": 5, "train.keep": 9}
        settings["train.compilation_cache"] = self.directory / "compiled"
        settings["optimizer.learning_rate"] = 1e-3  # rounding, which differs with the number of processes, grows slowly
        words = [record, pause, "train", "--config", self.config, "--run", self.directory / run, *words]
        words += [f"--config.{name}={value}" for name, value in settings.items()]
        if count > 1:
            words += ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", count, "--process-id"]
        environment = self.environment | {"HANGS": str(hangs)}
        with killed_at_the_end(
            [
                start(TRAIN, *words, *([i] if count > 1 else []), devices=4 // count, **environment)
                for i in range(count)
            ]
        ) as children:
            yield children

    def batches(self, name):
        """{step: global batch} that the processes of a start were given together, where all of them were."""
        files = {}
        for path in (self.directory / name).glob("*[0-9].npz"):
            step, process, _ = path.name.split(".")
            files.setdefault(int(step), {})[int(process)] = path
        count = max(map(len, files.values()))
        whole = {step: parts for step, parts in files.items() if len(parts) == count}
        return {
            step: {
                key: np.concatenate([np.load(parts[i])[key] for i in range(count)]) for key in np.load(parts[0]).files
            }
            for step, parts in whole.items()
        }


def train_to_the_end(runs, name, count, *words, run="run"):
    with runs.start(name, count, *words, run=run) as children:
        for child in children:
            code, text = ends(child, 240)
            assert code == 0, text


def read_lines_until(child, text):
    deadline = time.monotonic() + 240
    while text not in (line := child.stdout.readline()):
        assert line and time.monotonic() < deadline, child.communicate()[1]


@pytest.mark.slow
def test_stopped_killed_and_resumed_with_other_numbers_of_processes(tmp_path):
    """Two processes, of which one gets SIGTERM; four, of which one gets kill -9; two to the end: one run.

    A global batch is a function of seed and step, so whoever reads it gets the same rows. The loss is a mean over it in
    float32, in another order of additions for other numbers of processes: within 1e-5 of the run of one process.
    """
    runs = Runs(tmp_path)
    train_to_the_end(runs, "whole_batches", 1, run="whole")
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")

    with runs.start("two", 2, pause=0.15) as children:
        read_lines_until(children[0], f"step  2/{STEPS}")
        children[1].send_signal(signal.SIGTERM)
        texts = [ends(child, 60) for child in children]
    stopped = checkpoints.latest()
    for number, (code, text) in enumerate(texts):
        assert code == 128 + signal.SIGTERM, text
        expected = f"gqe train, process {number} of 2: stopped by SIGTERM after step {stopped}; its checkpoint is saved"
        assert expected in text, text
    assert 2 < stopped < STEPS and max(losses(tmp_path / "run")) == stopped

    with runs.start("four", 4, pause=0.15) as children:
        read_lines_until(children[0], f"resuming {tmp_path / 'run'} from step {stopped}")
        while checkpoints.latest() == stopped:
            time.sleep(0.01)
            assert children[0].poll() is None, children[0].communicate()
        children[2].kill()
        for number in (0, 1, 3):
            code, text = ends(children[number])
            assert code == 1 and f"process 2 on {socket.gethostname()} is gone (killed" in text, text
    killed = checkpoints.latest()
    assert stopped < killed < STEPS

    train_to_the_end(runs, "end", 2)
    assert checkpoints.latest() == STEPS
    assert list((tmp_path / "compiled").iterdir())
    whole = runs.batches("whole_batches")
    resumed = runs.batches("two") | runs.batches("four") | runs.batches("end")
    assert sorted(resumed) == sorted(whole) == list(range(1, STEPS + 1))
    starts = {"two": 1, "four": stopped + 1, "end": killed + 1}
    for name, first in starts.items():
        recorded = runs.batches(name)
        assert min(recorded) == first
        for step, batch in recorded.items():
            for key, rows in batch.items():
                np.testing.assert_array_equal(rows, whole[step][key])
    one, several = losses(tmp_path / "whole"), losses(tmp_path / "run")
    assert sorted(several) == list(range(1, STEPS + 1))
    np.testing.assert_allclose([several[step] for step in one], list(one.values()), atol=1e-5)
    evaluated = [read_metrics(tmp_path / name)[-1]["eval/loss"] for name in ("whole", "run")]
    np.testing.assert_allclose(*evaluated, atol=1e-5)

    # A damaged checkpoint: each process reads a part of the files, and all refuse it alike. Then one goes on alone.
    files = [path for path in (tmp_path / "run" / "checkpoints" / str(STEPS) / "params").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"x")
    with runs.start("damaged", 2) as children:
        for number, child in enumerate(children):
            code, text = ends(child, 120)
            assert code == 2 and f"process {number} of 2: the checkpoint of step {STEPS} in " in text, text
            assert "is damaged: params/" in text and "cannot go on" not in text
    train_to_the_end(runs, "aside", 2, "--previous-checkpoint")
    assert (tmp_path / "run" / "checkpoints" / f"{STEPS}.set_aside").is_dir()
    last = losses(tmp_path / "run")
    np.testing.assert_allclose([last[step] for step in one], list(one.values()), atol=1e-5)
