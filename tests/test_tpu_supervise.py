"""tpu_scripts/supervise.sh: a run that is kept going through preemptions, lost machines and failures."""

import itertools
import signal
import subprocess

import pytest
from fake_cloud import ON_COMPUTE, TRAIN, Cloud, states, wait_until

BOUND = 300  # seconds in which a supervisor that is to end has ended; measured: 2 to 20


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

    def text(self) -> str:
        return self.output.read_text()

    def finish(self, codes: str = "0") -> None:
        for home in self.cloud.workers():
            (home / "finish").write_text(codes)

    def wait(self, code: int = 0) -> str:
        try:
            self.child.wait(timeout=BOUND)
        finally:
            self.kill()
        assert self.child.returncode == code, self.text()
        return self.text()

    def kill(self) -> None:
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
            self.child.wait(timeout=120)


@pytest.fixture
def supervise(cloud):
    started = []

    def start(*arguments):
        started.append(Supervisor(cloud, *arguments))
        return started[-1]

    yield start
    for supervisor in started:
        supervisor.kill()



NOTHING_LEFT = "there is no pod pod: nothing is paid for but the bucket"
PAID_FOR = "the pod pod is still there, and paid for: tpu_scripts/teardown.sh --name=pod"


def knows_what_is_paid_for(cloud: Cloud, out: str) -> bool:
    """The last line says whether there is a pod, or that nobody can know."""
    last = out.splitlines()[-1]
    return "is not known" in last or (("still there" in last) if cloud.exists() else (NOTHING_LEFT in last))


def workers_end_at_once(cloud: Cloud) -> None:
    """Each run on a worker ends well as soon as it has started."""
    cloud.put("gqe", "#!/usr/bin/env bash\necho trained\n")


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
    assert NOTHING_LEFT in out
    order = [verb for verb in cloud.changes() if verb != "ssh"]
    assert order == ["create", "scp", "delete", "create", "scp", "delete"]


@pytest.mark.slow
def test_supervise_a_vm_that_vanished(ready, supervise):
    """The queued resource can say ACTIVE for a while after its VMs are gone; a bad connection alone deletes nothing."""
    supervisor = supervise("--", *TRAIN)
    wait_until(supervisor.launched, "launch")
    ready.put("unreachable", "")
    wait_until(lambda: "the workers do not answer: looking again" in supervisor.text(), "notice")
    assert "delete" not in ready.changes()
    ready.put("vm_state", "PREEMPTED")
    wait_until(lambda: "delete" in ready.changes(), "deletion")
    (ready.root / "unreachable").unlink()
    wait_until(lambda: ready.changes().count("create") == 2 and supervisor.launched(), "second launch")
    supervisor.finish()
    assert PAID_FOR in supervisor.wait()


@pytest.mark.slow
def test_supervise_workers_that_never_answer(ready, supervise):
    """Their VMs are there: they are installed and started again, then replaced, and that is not done for ever."""
    ready("launch.sh", "--", *TRAIN)
    supervisor = supervise("--max-restarts=2", "--", *TRAIN)
    wait_until(lambda: "2 running" in supervisor.text(), "a look")
    ready.put("unreachable", "")
    out = supervisor.wait(code=1)
    assert "a worker does not answer, though its VM is there: installing and starting it again; failure 1" in out
    assert "gave up" in out and knows_what_is_paid_for(ready, out)


@pytest.mark.slow
def test_supervise_a_worker_that_was_made_anew(ready, supervise):
    """Its disk is empty, its VM READY: the others are stopped, it is installed, all start again."""
    ready("launch.sh", "--", *TRAIN)
    supervisor = supervise("--", *TRAIN)
    wait_until(lambda: "2 running" in supervisor.text(), "a look")
    ready.lose_disk(1)
    wait_until(lambda: "installing and starting it again" in supervisor.text(), "notice")
    wait_until(supervisor.launched, "second launch")
    supervisor.finish()
    assert "the run is done" in supervisor.wait()
    assert "delete" not in ready.changes()


@pytest.mark.slow
def test_supervise_saved_run_and_failed_run_are_launched_again(ready, supervise):
    supervisor = supervise("--max-restarts=3", "--", *TRAIN)
    wait_until(supervisor.launched, "launch")
    ready("stop.sh")
    wait_until(lambda: "asked to stop and has saved: launching again" in supervisor.text(), "notice")
    wait_until(lambda: all(state.startswith("running") for state in states(ready)), "second launch")
    supervisor.finish("75")
    wait_until(lambda: "a process was stuck (exit code 75" in supervisor.text(), "the end")
    supervisor.finish("0")
    out = supervisor.wait()
    assert "failure 1 of at most 3 in a row" in out and "the run is done" in out
    assert ready.changes().count("create") == 1


@pytest.mark.slow
def test_supervise_gives_up(ready, supervise):
    """Failures in a row are counted and waited for; input that cannot be used is not tried again."""
    out = supervise("--max-restarts=1", "--", "gqe", "fail", "1", "--distributed").wait(code=1)
    assert "failure 1 of at most 1 in a row; next try in 1 x 0.2 s" in out
    assert "the run ended with exit codes 1; that was failure 2 in a row: gave up" in out and PAID_FOR in out
    out = supervise("--", "gqe", "fail", "2", "--distributed").wait(code=2)
    assert "cannot use its input (exit code 2), which another try would not change" in out and PAID_FOR in out


@pytest.mark.parametrize(
    "command, message",
    [
        (TRAIN[:2] + TRAIN[3:], "v5p-16 has 2 hosts, and without --distributed"),
        (["gqe", "train", "--distributed", "--run", "here"], "--run must be a directory that all 2 hosts share"),
    ],
)
def test_what_launch_refuses_is_refused_before_anything_is_created(cloud, supervise, command, message):
    assert message in supervise("--", *command).wait(code=2)
    assert not cloud.calls()


def test_supervise_takes_up_a_run_that_is_alive(ready, supervise):
    ready("launch.sh", "--", *TRAIN)
    before = states(ready)
    supervisor = supervise("--", *TRAIN)
    wait_until(lambda: "2 running, 0 ended" in supervisor.text(), "look")
    assert states(ready) == before
    supervisor.finish()
    supervisor.wait()


@pytest.mark.parametrize("road", [[], ON_COMPUTE], ids=["queued", "compute"])
def test_supervise_another_command_is_alive(cloud, supervise, road):
    """It is refused at once, and the word on the cost follows."""
    cloud("create.sh", *road)
    cloud("setup.sh", *road)
    cloud("launch.sh", *road, "--", *TRAIN)
    out = supervise(*road, "--", *TRAIN, "--config.train.steps=9").wait(code=2)
    assert "another command is alive" in out and "another try would not change" in out and PAID_FOR in out


def test_a_request_that_waits_too_long_is_withdrawn(cloud, supervise):
    cloud.put("after_create", "WAITING_FOR_RESOURCES")
    out = supervise("--max-queue=2", "--", *TRAIN).wait(code=1)
    assert "WAITING_FOR_RESOURCES for 2 looks (--max-queue)" in out and NOTHING_LEFT in out and not cloud.exists()


@pytest.mark.slow
def test_a_pod_that_is_never_gone_is_given_up(cloud, supervise):
    """A deletion that does not end is asked for again, and not waited for without end."""
    cloud.put("after_create", "DELETING")
    out = supervise("--max-restarts=0", "--", *TRAIN).wait(code=1)
    assert "the pod has been DELETING for 30 looks" in out and "pod is still there (DELETING)" in out


def test_the_log_is_not_cut(cloud, supervise):
    """What was printed first is still there at the end, where the output is a file."""
    workers_end_at_once(cloud)
    out = supervise("--", *TRAIN).wait()
    assert out.index("asking for 1 x v5p-16") < out.index("started process") < out.index(PAID_FOR)


# ---------------------------------------------------------------- a cloud that breaks everywhere

PLACES = (
    "describe", "create", "gqe-version", "scp", "install.sh", "start.sh", "state.sh", "describe-vm", "stop.sh",
    "delete",
)  # fmt: skip
ON_GROUPS = (
    "list-instances", "create-resource-policies", "create-instance-templates", "create", "gqe-version", "scp",
    "install.sh", "start.sh", "state.sh", "delete",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("road", "places", "faults"),
    [
        ([], PLACES, ["fail"]), ([], PLACES, ["hang"]), ([], PLACES, ["gone"]),
        (ON_COMPUTE, ON_GROUPS, ["fail", "hang", "gone"]),
    ],
    ids=["fail", "hang", "gone", "compute"],
)  # fmt: skip
def test_each_place_breaks_once_and_the_run_ends_well(cloud, supervise, road, places, faults):
    """At every call of gcloud, one after the other, the first try fails, is never answered, or takes the VMs away."""
    workers_end_at_once(cloud)
    cloud.put("call_seconds", "4")
    for place, fault in zip(places, itertools.cycle(faults), strict=False):
        cloud.fault(place, fault)
    out = supervise("--max-restarts=40", "--delete-when-done", *road, "--", *TRAIN).wait()
    assert knows_what_is_paid_for(cloud, out) and "the run is done" in out and not cloud.exists()
    met = [place for place in places if not (cloud.root / "faults" / place).read_text()]
    assert set(places) - set(met) <= {"describe-vm", "stop.sh"}, "a place that no call came to"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "places"),
    [("fail", PLACES), ("hang", ("describe", "create", "scp", "start.sh", "delete")), ("gone", PLACES[2:7])],
)  # what hangs takes as long as a call may: not at every place
def test_each_place_breaks_for_ever_and_the_supervisor_ends(tmp_path, fault, places):
    """Every end is bounded, and says what is left to pay for."""
    supervisors = {}
    for place in places:
        (tmp_path / place).mkdir()
        cloud = Cloud(tmp_path / place)
        workers_end_at_once(cloud)
        cloud.put("call_seconds", "2")
        cloud.fault(place, f"always {fault}")
        if place in ("describe-vm", "stop.sh"):  # they are asked where workers do not answer
            cloud.fault("state.sh", "always fail")
        supervisors[place] = Supervisor(cloud, "--max-restarts=1", "--max-queue=3", "--", *TRAIN)
    ends = {}
    for place, supervisor in supervisors.items():
        code = supervisor.child.wait(timeout=BOUND)
        supervisor.cloud.end()
        out = supervisor.text()
        ends[place] = code, knows_what_is_paid_for(supervisor.cloud, out), out.splitlines()[-2:]
    assert all(code in (0, 1, 2) and known for code, known, _ in ends.values()), ends
    assert sum(code != 0 for code, *_ in ends.values()) >= 3, ends
