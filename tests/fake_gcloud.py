#!/usr/bin/env python3
"""A `gcloud` for tests: keeps the state of one pod in a directory and has shells for workers.

$FAKE_GCLOUD is that directory: `calls.jsonl` (arguments of every call); `states` (of the pod, one a line: each question
takes the first and leaves the last; no file: there is no such pod); `after_create` (what `states` becomes);
`workers/<n>` (home directories: `ssh` runs its command in each); `unreachable` (if it is there, `ssh` fails); `refuse`
(if it is there, every call fails with its text); `bucket/<name>/...` (what `storage cat` finds); `faults/<place>` (what
the next calls at a place meet, one a line: ok, fail, hang, refuse, or gone, which takes the VMs away; a last line with
"always" in front stays). A place is a verb, or for ssh what it runs: `place_of`.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

root = Path(os.environ["FAKE_GCLOUD"])
arguments = sys.argv[1:]
flags = dict(x.removeprefix("--").split("=", 1) for x in arguments if x.startswith("--") and "=" in x)
words = [x for x in arguments if not x.startswith("--")]
states = root / "states"
ON_COMPUTE = {"ACTIVE": "RUNNING", "SUSPENDED": "TERMINATED", "FAILED": "STOPPED"}


def fail(message: str, code: int = 1) -> None:
    print(f"ERROR: (gcloud.{'.'.join(words[:4])}) {message}", file=sys.stderr)
    sys.exit(code)


def place_of() -> str:
    """What a call does, in one word."""
    command = flags.get("command", "")
    for place in ("state.sh", "start.sh", "stop.sh", "install.sh", "gqe-version", "log.sh"):
        if place in command:
            return place
    verb = next(x for x in words if x in ("describe", "list-instances", "create", "delete", "scp", "ssh", "cat"))
    if verb == "describe" and "tpu-vm" in words:
        return "describe-vm"
    return f"{verb}-{words[1]}" if words[1] in ("resource-policies", "instance-templates") else verb


def take_line(file: Path) -> str | None:
    """The first line of a file, which loses it unless it is the last or says "always"."""
    first, *rest = file.read_text().splitlines() or [None]
    if first is not None and not first.startswith("always "):
        file.write_text("\n".join(rest))
    return first and first.removeprefix("always ")


def lose_vms() -> None:
    for pid in (root / "workers").glob("*/gqe_run/pid"):
        try:
            os.killpg(os.getpgid(int(pid.read_text())), signal.SIGKILL)
        except ProcessLookupError:
            pass
    if states.exists():
        states.write_text("SUSPENDED")


def meet_fault() -> None:
    fault = take_line(root / "faults" / place_of()) if (root / "faults" / place_of()).exists() else None
    if fault == "hang":
        fcntl.flock(calls, fcntl.LOCK_UN)
        time.sleep(3600)
    if fault == "gone":
        lose_vms()
    if fault in ("fail", "gone"):
        fail("INTERNAL: the service is unavailable")
    if fault == "refuse":
        fail("argument --zone: Bad value", 2)


def state(on_compute: bool) -> str:
    if not states.exists():
        fail("NOT_FOUND: Resource was not found.")
    first, *rest = states.read_text().split()
    states.write_text("\n".join(rest or [first]))
    return ON_COMPUTE.get(first, first) if on_compute else first


def workers() -> list[Path]:
    if not states.exists() or states.read_text().split()[0] != "ACTIVE" or (root / "unreachable").exists():
        fail("could not connect")
    homes = sorted((root / "workers").iterdir())
    names = [home for home in homes if f"pod-{home.name}" in " ".join(words)]  # one VM of a group
    return names or homes


def create() -> None:
    if states.exists():
        fail("ALREADY_EXISTS")
    states.write_text((root / "after_create").read_text())
    (root / "type").write_text(flags.get("accelerator-type", ""))
    for n in range(int((root / "hosts").read_text())):
        (root / "workers" / str(n)).mkdir(parents=True)


def delete() -> None:
    if not states.exists():
        fail("NOT_FOUND: Resource was not found.")
    states.unlink()
    shutil.rmtree(root / "workers")


def copy(sources: list[str]) -> None:
    for home in workers():
        for source in sources:
            shutil.copy(source, home)


def run_command() -> None:
    homes, code = workers(), 0
    fcntl.flock(calls, fcntl.LOCK_UN)  # the workers of a group are called at the same time
    for home in homes:
        name = f"t1v-n-abc-w-{home.name}"
        environment = os.environ | {"HOME": str(home), "FAKE_HOSTNAME": name, "GRACE": "3"}
        code |= subprocess.run(["bash", "-c", flags["command"]], cwd=home, env=environment, check=False).returncode
    sys.exit(code)


calls = (root / "calls.jsonl").open("a")
fcntl.flock(calls, fcntl.LOCK_EX)
calls.write(json.dumps(arguments) + "\n")
calls.flush()
if (root / "refuse").exists():
    fail((root / "refuse").read_text())
meet_fault()
match words[1:]:
    case ["tpus", "queued-resources", "describe", *_] if flags["format"] == "value(state.state)":
        print(state(on_compute=False))
    case ["tpus", "queued-resources", "describe", *_] if flags["format"] == "yaml(state)":
        print("state:\n  failedData:\n    error:\n      message: no more capacity in the zone")
    case ["tpus", "queued-resources", "describe", *_]:
        print((root / "type").read_text())
    case ["tpus", "tpu-vm", "describe", *_]:
        print((root / "vm_state").read_text())
    case ["instances", "describe", *_] if flags["format"] == "value(status)":
        print(state(on_compute=True))
    case ["instance-groups", "managed", "list-instances", *_] if flags["format"] == "value(instanceStatus)":
        one = state(on_compute=True)
        print("\n".join([one] * len(list((root / "workers").iterdir()))))
    case ["instance-groups", "managed", "list-instances", *_]:
        print("\n".join(f"pod-{home.name}" for home in sorted((root / "workers").iterdir())))
    case ["instance-groups", "managed", "list-errors", *_] | ["instances", "describe", *_]:
        print("no more capacity in the zone")
    case ["resource-policies" | "instance-templates", "create" | "delete", *_]:
        pass
    case [*_, "create", _]:
        create()
    case [*_, "delete", _]:
        delete()
    case ["tpus", "queued-resources", "scp", *sources, _] | ["scp", *sources, _]:
        copy(sources)
    case ["tpus", "queued-resources", "ssh", _] | ["ssh", _]:
        run_command()
    case ["cat", url]:
        print((root / "bucket" / url.removeprefix("gs://")).read_text(), end="")
    case _:
        fail(f"unknown command {words}")
