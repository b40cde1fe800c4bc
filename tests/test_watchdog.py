"""A process that lives but no longer trains ends by itself, and says where it stood."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_processes import Runs, ends, read_lines_until

from gqe_jax.train import watchdog
from gqe_jax.train.watchdog import EXIT_CODE, Watchdog

WATCHED = """
import sys, time
from gqe_jax.train.watchdog import Watchdog

def stuck_here():
    time.sleep(60)

with Watchdog(float(sys.argv[1])) as dog:
    for _ in range(4):  # longer in all than the bound, but never without a sign of life
        dog.alive()
        time.sleep(float(sys.argv[1]) / 2)
    with dog.patient():  # a save
        time.sleep(float(sys.argv[1]) * 2)
    print("trained", flush=True)
    stuck_here()
"""


def test_it_ends_what_is_stuck_and_nothing_else():
    """Steps within the bound, and a save that takes twice as long, are left alone; what follows ends with the stack."""
    child = subprocess.run(
        [sys.executable, "-c", WATCHED, "1.0"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[1],
    )
    assert (child.returncode, child.stdout) == (EXIT_CODE, "trained\n"), child.stderr
    assert "gqe: process 0 is stuck: nothing has ended for 1 s (train.stall_seconds)" in child.stderr
    assert "in stuck_here" in child.stderr
    assert f"ends with exit code {EXIT_CODE}: the same command, on all machines, continues the run" in child.stderr


def test_the_bound_follows_the_steps(monkeypatch):
    """Twenty times the longest step, at least 300 s; ten times that in a save; a save is no step."""
    bounds = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, bound: bounds.append(bound))
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    dog = Watchdog(None)
    monkeypatch.setattr(dog._left, "wait", lambda tick: bool(bounds))

    def bound():
        bounds.clear()
        dog._silent = 1e9
        dog._watch()
        return bounds[0]

    assert bound() == 300.0
    for moment in (0.0, 2.0, 42.0, 44.0):
        now[0] = moment
        dog.alive()
    assert bound() == 20 * 40.0
    with dog.patient():
        now[0] = 10_000.0
        dog.alive()
        assert bound() == 10 * 20 * 40.0
    now[0] = 20_000.0
    dog.alive()
    assert bound() == 20 * 40.0


@pytest.mark.slow
def test_two_processes_of_which_one_hangs(tmp_path):
    """Process 1 waits for ever for its rows, process 0 in a collective operation for process 1: both end within the
    bound and a few seconds, process 1 with the place where it stood."""
    runs = Runs(tmp_path)
    with runs.start("stuck", 2, "--config.train.stall_seconds=8.0", hangs=1) as children:
        read_lines_until(children[0], "step  2/")
        began = time.monotonic()
        outcomes = [ends(child, 120) for child in children]
        assert time.monotonic() - began < 60
    assert EXIT_CODE in (code for code, _ in outcomes) and {code for code, _ in outcomes} <= {1, EXIT_CODE, -6}
    assert "process 1 is stuck: nothing has ended for 8 s" in outcomes[1][1] and "in hang" in outcomes[1][1]
