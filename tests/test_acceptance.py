"""The acceptance list for new pods: what each item lets pass, and a rehearsal on this machine's CPU."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath
from tiny_run import QUICK_FLAGS, prepare_tiny, write_config

SCRIPTS = Path(__file__).parents[1] / "tpu_scripts"
sys.path.insert(0, str(SCRIPTS))

from acceptance import Acceptance, Ended, Hosts, main  # noqa: E402

STEPS = 30
LOSSES = {step: 5.0 - 0.1 * step for step in range(1, STEPS + 1)}


class FakePod(Hosts):
    """Hosts on which every run does what it should, apart from what a test changes.

    `losses` by run, and `codes`: exit codes in the order of the starts of a run.
    """

    def __init__(self, processes=2, platform="tpu"):
        self.rehearse = None
        self.processes = processes
        self.platform = platform
        self.losses = {"whole": dict(LOSSES), "preempted": dict(LOSSES), "moved": dict(LOSSES), "speed": dict(LOSSES)}
        self.codes = {"whole": [0], "preempted": [143, 0], "moved": [143, 143, 0], "speed": [0]}
        self.started = []

    def run(self, command, *, alone=False, stop_at=None):
        if command[0].endswith("acceptance_probe.py"):
            out = next(argument for argument in command if argument.startswith("--out="))
            record = {
                "process_index": 0, "process_count": self.processes, "device_count": 8, "device_kind": "TPU v5 lite",
                "platform": self.platform, "batch_size": 8,
                "items": [{"name": "kernel", "why": "", "passed": True, "measured": {}}],
            }  # fmt: skip
            Path(out.removeprefix("--out="), "0.json").write_text(json.dumps(record))
            return Ended((0,), "")
        directory = Path(command[command.index("--run") + 1])
        run = directory.name
        self.started.append((run, alone, stop_at))
        directory.mkdir(parents=True, exist_ok=True)
        lines = [
            {"step": step, "loss": loss, "tokens_per_second": 1e5, "mfu": 0.4}
            for step, loss in self.losses[run].items()
        ]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return Ended((self.codes[run].pop(0),), "resuming from step 11\nlast words\n")


def run_on(pod, tmp_path) -> dict:
    acceptance = Acceptance(
        pod, epath.Path(tmp_path), config="c", speed_config="s", overrides=["mesh.fsdp=2"], steps=STEPS, speed_steps=30
    )
    return acceptance.run()


def item(record, name) -> dict:
    return next(item for item in record["items"] if item["name"] == name)


def test_all_items_pass_on_a_good_pod(tmp_path):
    """One host alone is stopped too, so that the checkpoint goes from many to one and from one to many."""
    pod = FakePod()
    record = run_on(pod, tmp_path)
    assert record["passed"] and all(entry["passed"] for entry in record["items"])
    assert all(entry["why"] for entry in record["items"][1:])
    assert item(record, "preempted_run")["measured"] == {"steps": 30, "resumed_from": 11, "largest_difference": 0.0}
    assert item(record, "mfu")["measured"] == {"mfu": 0.4, "tokens_per_second": 1e5}
    assert pod.started == [
        ("whole", False, None), ("preempted", False, 10), ("preempted", False, None),
        ("moved", False, 10), ("moved", True, 20), ("moved", False, None), ("speed", False, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        lambda losses: losses.pop(12),  # a step that was not taken
        lambda losses: losses.update({12: losses[11]}),  # the batch of another step
        lambda losses: losses.update({30: losses[30] + 1e-6}),  # state that was not restored exactly
    ],
)
def test_a_preempted_run_must_be_the_uninterrupted_one(tmp_path, change):
    pod = FakePod()
    change(pod.losses["preempted"])
    record = run_on(pod, tmp_path)
    assert not record["passed"] and item(record, "preempted_run")["passed"] is False


@pytest.mark.parametrize(
    ("platform", "error", "passed"), [("tpu", 5e-4, True), ("tpu", 2e-3, False), ("cpu", 5e-4, False)]
)
def test_another_host_count_may_only_sum_in_another_order(tmp_path, platform, error, passed):
    pod = FakePod(platform=platform)
    pod.losses["moved"] = {step: loss * (1 + error) for step, loss in LOSSES.items()}
    assert item(run_on(pod, tmp_path), "other_host_count")["passed"] is passed


def test_a_run_that_ends_otherwise_fails_its_item_and_shows_its_last_words(tmp_path):
    """A signal that does not end the run with 128 + 15 lost the state; the rest of the list still runs."""
    pod = FakePod()
    pod.codes["preempted"] = [0, 0]
    record = run_on(pod, tmp_path)
    failed = item(record, "preempted_run")
    assert failed["passed"] is False
    assert failed["measured"] == {
        "expected_exit_code": 128 + signal.SIGTERM, "exit_codes": [0], "output": "resuming from step 11\nlast words\n",
    }  # fmt: skip
    assert item(record, "mfu")["passed"] and not record["passed"]


def test_what_one_process_cannot_show_is_not_claimed(tmp_path):
    record = run_on(FakePod(processes=1), tmp_path)
    assert item(record, "other_host_count")["passed"] is None and record["passed"]


def test_a_probe_that_fails_fails_the_list(tmp_path):
    class Broken(FakePod):
        def run(self, command, **options):
            return Ended((1,), "no devices")

    record = run_on(Broken(), tmp_path)
    assert not record["passed"] and item(record, "probe")["measured"]["output"] == "no devices"


def test_a_used_directory_is_refused(tmp_path, capsys):
    (tmp_path / "whole").mkdir()
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--rehearse", "1"])
    assert "is not empty: choose another directory, for its runs would be continued" in capsys.readouterr().err


# ---------------------------------------------------------------- with real processes


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("acceptance")
    prepare_tiny(directory / "data")
    return write_config(directory / "tiny.py", directory / "data")


def rehearse(config, out, processes, *arguments) -> dict:
    command = [sys.executable, SCRIPTS / "acceptance.py", "--out", out, "--rehearse", str(processes)]
    command += ["--config", config, "--steps", "60", "--speed-steps", "6", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_FLAGS}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return json.loads((out / "record.json").read_text())


@pytest.mark.slow
def test_rehearsal_with_two_processes(config, tmp_path):
    """Everything but the speed of a chip: two real processes, their rows and losses, a preemption, one process more."""
    record = rehearse(config, tmp_path / "out", 2)
    verdicts = {entry["name"]: entry["passed"] for entry in record["items"]}
    assert verdicts == {
        "devices": True, "host_batches": True, "equal_losses": True, "kernel": True, "preempted_run": True,
        "other_host_count": True, "mfu": None,
    }  # fmt: skip
    assert item(record, "host_batches")["measured"]["rows_per_host"] == 1
    assert item(record, "equal_losses")["measured"]["hosts"] == 2
    assert 20 <= item(record, "preempted_run")["measured"]["resumed_from"] < 60
    assert item(record, "mfu")["measured"]["not shown"] == "the peak of cpu is not known"
