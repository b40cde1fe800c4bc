#!/usr/bin/env python3
"""A `gcloud` for tests: keeps the state of one queued resource in a directory and has shells for workers.

$FAKE_GCLOUD is that directory: `calls.jsonl` (arguments of every call); `states` (of the queued resource, one a line:
each `describe` takes the first and leaves the last; no file: there is no such resource); `after_create` (what `states`
becomes); `workers/<n>` (home directories: `ssh` runs its command in each); `unreachable` (if it is there, `ssh` fails);
`refuse` (if it is there, every call fails with its text); `bucket/<name>/...` (what `storage cat` finds).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

root = Path(os.environ["FAKE_GCLOUD"])
arguments = sys.argv[1:]
with (root / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps(arguments) + "\n")
flags = dict(x.removeprefix("--").split("=", 1) for x in arguments if x.startswith("--") and "=" in x)
words = [x for x in arguments if not x.startswith("--")]
states = root / "states"


def fail(message: str) -> None:
    print(f"ERROR: (gcloud.{'.'.join(words[:4])}) {message}", file=sys.stderr)
    sys.exit(1)


def workers() -> list[Path]:
    if not states.exists() or states.read_text().split()[0] != "ACTIVE" or (root / "unreachable").exists():
        fail("could not connect")
    return sorted((root / "workers").iterdir())


if (root / "refuse").exists():
    fail((root / "refuse").read_text())
match words[:4]:
    case ["compute", "tpus", "queued-resources", "describe"]:
        if not states.exists():
            fail("NOT_FOUND: Resource was not found.")
        if flags["format"] == "value(state.state)":
            first, *rest = states.read_text().split()
            print(first)
            states.write_text("\n".join(rest or [first]))
        elif flags["format"] == "yaml(state)":
            print("state:\n  failedData:\n    error:\n      message: no more capacity in the zone")
        else:
            print((root / "type").read_text())
    case ["compute", "tpus", "queued-resources", "create"]:
        if states.exists():
            fail("ALREADY_EXISTS")
        states.write_text((root / "after_create").read_text())
        (root / "type").write_text(flags["accelerator-type"])
        for n in range(int((root / "hosts").read_text())):
            (root / "workers" / str(n)).mkdir(parents=True)
    case ["compute", "tpus", "queued-resources", "delete"]:
        states.unlink()
        shutil.rmtree(root / "workers")
    case ["compute", "tpus", "tpu-vm", "describe"]:
        print((root / "vm_state").read_text())
    case ["compute", "tpus", "queued-resources", "scp"]:
        for home in workers():
            for source in words[4:-1]:
                shutil.copy(source, home)
    case ["compute", "tpus", "queued-resources", "ssh"]:
        code = 0
        for n, home in enumerate(workers()):
            environment = os.environ | {"HOME": str(home), "FAKE_HOSTNAME": f"t1v-n-abc-w-{n}", "GRACE": "3"}
            code |= subprocess.run(["bash", "-c", flags["command"]], cwd=home, env=environment, check=False).returncode
        sys.exit(code)
    case ["storage", "cat", url]:
        print((root / "bucket" / url.removeprefix("gs://")).read_text(), end="")
    case _:
        fail(f"unknown command {words}")
