"""tpu_scripts/supervise.sh: a run that is kept going through preemptions, lost machines and failures."""

import os
import signal
import subprocess

import pytest
from fake_cloud import TRAIN, Cloud, states, wait_until


class Supervisor:
    def __init__(self, cloud: Cloud, *arguments: str):
        self.cloud = cloud
        self.output = cloud.root / "supervisor"
        self.child = subprocess.Popen(
            cloud.arguments("supervise.sh", *arguments), env=cloud.environment(), stdout=self.output.open("w"),
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def launched(self) -> bool:
        homes = self.cloud.workers() if (self.cloud.root / "workers").exists() else []
        return len(homes) > 0 and all((home / "gqe_run/pid").exists() for home in homes)

    def finish(self, codes: str = "0") -> None:
        for home in self.cloud.workers():
            (home / "finish").write_text(codes)

    def wait(self, code: int = 0) -> str:
        try:
            self.child.wait(timeout=60)
        finally:
            self.kill()
        assert self.child.returncode == code, self.output.read_text()
        return self.output.read_text()

    def kill(self) -> None:
        if self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()


@pytest.fixture
def supervise(cloud):
    started = []

    def start(*arguments):
        started.append(Supervisor(cloud, *arguments))
        return started[-1]

    yield start
    for supervisor in started:
        supervisor.kill()


@pytest.mark.slow
def test_supervise_from_nothing_through_a_preemption_to_the_end(cloud, supervise):
    """Created, set up, launched; preempted; deleted, created, set up and launched again; done; deleted."""
    cloud.put("after_create", "WAITING_FOR_RESOURCES\nACTIVE")
    supervisor = supervise("--delete-when-done", "--", *TRAIN)
    wait_until(supervisor.launched, "first launch")
    cloud.preempt()
    wait_until(lambda: cloud.changes().count("create") == 2, "second pod")
    wait_until(supervisor.launched, "second launch")
    supervisor.finish()
    out = supervisor.wait()
    assert "preempted (SUSPENDED): deleting the pod and asking for another" in out and "the run is done" in out
    order = [verb for verb in cloud.changes() if verb != "ssh"]
    assert order == ["create", "scp", "delete", "create", "scp", "delete"]


@pytest.mark.slow
def test_supervise_a_vm_that_vanished(ready, supervise):
    """The queued resource can say ACTIVE for a while after its VMs are gone; a bad connection alone deletes nothing."""
    supervisor = supervise("--", *TRAIN)
    wait_until(supervisor.launched, "launch")
    ready.put("unreachable", "")
    wait_until(lambda: "the workers do not answer: looking again" in supervisor.output.read_text(), "notice")
    assert "delete" not in ready.changes()
    ready.put("vm_state", "PREEMPTED")
    wait_until(lambda: "delete" in ready.changes(), "deletion")
    (ready.root / "unreachable").unlink()
    wait_until(lambda: ready.changes().count("create") == 2 and supervisor.launched(), "second launch")
    supervisor.finish()
    assert "the pod is still there, and paid for: tpu_scripts/teardown.sh" in supervisor.wait()


@pytest.mark.slow
def test_supervise_saved_run_and_failed_run_are_launched_again(ready, supervise):
    supervisor = supervise("--max-restarts=3", "--", *TRAIN)
    wait_until(supervisor.launched, "launch")
    ready("stop.sh")
    wait_until(lambda: "asked to stop and has saved: launching again" in supervisor.output.read_text(), "notice")
    wait_until(lambda: all(state.startswith("running") for state in states(ready)), "second launch")
    supervisor.finish("1")
    wait_until(lambda: "exit codes 1; failure 1 of at most 3 in a row" in supervisor.output.read_text(), "the end")
    supervisor.finish("0")
    assert "the run is done" in supervisor.wait()
    assert ready.changes().count("create") == 1


@pytest.mark.slow
def test_supervise_gives_up(ready, supervise):
    """Failures in a row are counted and waited for; input that cannot be used is not tried again."""
    out = supervise("--max-restarts=1", "--", "gqe", "fail", "1", "--distributed").wait(code=2)
    assert "failure 1 of at most 1 in a row; next try in 1 s" in out
    assert "the run ended with exit codes 1; that was failure 2 in a row: gave up" in out
    out = supervise("--", "gqe", "fail", "2", "--distributed").wait(code=2)
    assert "cannot use its input (exit code 2), which another try would not change" in out


def test_supervise_takes_up_a_run_that_is_alive(ready, supervise):
    ready("launch.sh", "--", *TRAIN)
    before = states(ready)
    supervisor = supervise("--", *TRAIN)
    wait_until(lambda: "2 running, 0 ended" in supervisor.output.read_text(), "look")
    assert states(ready) == before
    supervisor.finish()
    supervisor.wait()
