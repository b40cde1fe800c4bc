"""A Cloud for tests of tpu_scripts/: a checkout, a gcloud that records its calls, and shells that stand for workers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tpu_scripts"
TRAIN = ["gqe", "train", "--distributed", "--config", "gqe_250m", "--run", "gs://bucket/run"]
ON_COMPUTE = ["--road=compute", "--type=v6e:2x4"]  # two hosts
MUTATING = {"create", "delete", "scp", "ssh"}

# What the tests' `uv venv` makes: a gqe that works until told to end, and on SIGTERM ends with 128 + 15, as ours does.
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
            "curl": "#!/bin/sh\n[ -n \"$FAKE_SLICE\" ] && echo \"MEGASCALE_SLICE_ID: '$FAKE_SLICE'\"\n",
        }.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        self.tools = tools
        self.put("gqe", GQE)
        self.put("after_create", "ACTIVE")
        self.put("hosts", "2")
        self.put("vm_state", "READY")
        self.put("call_seconds", "60")

    def put(self, name: str, text: str) -> None:
        (self.root / name).write_text(text)

    def fault(self, place: str, *lines: str) -> None:
        """What the next calls at a place meet (`fake_gcloud`)."""
        (self.root / "faults").mkdir(exist_ok=True)
        (self.root / "faults" / place).write_text("\n".join(lines))

    def exists(self) -> bool:
        """Whether there is a pod, which somebody pays for."""
        return (self.root / "states").exists()

    def environment(self) -> dict[str, str]:
        settings = {
            "PATH": f"{self.tools}{os.pathsep}{os.environ['PATH']}",
            "FAKE_GCLOUD": str(self.root),
            "GQE_POLL_SECONDS": "0.2",
            "GQE_CALL_SECONDS": (self.root / "call_seconds").read_text(),
        }
        return os.environ | settings

    def arguments(self, script: str, *arguments: str) -> list[str]:
        settings = ["--project=p", "--zone=z", "--name=pod"]
        if not any(x.startswith(("--type", "--road")) for x in arguments):
            settings.append("--type=v5litepod-8" if self.hosts() == 1 else "--type=v5p-16")
        return ["bash", str(self.checkout / "tpu_scripts" / script), *settings, *arguments]

    def hosts(self) -> int:
        return int((self.root / "hosts").read_text())

    def __call__(self, script: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
        done = subprocess.run(
            self.arguments(script, *arguments), env=self.environment(), cwd=self.root.parent, capture_output=True,
            text=True, timeout=180, check=False,
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

    def lose_disk(self, worker: int) -> None:
        """What a VM that was made anew looks like."""
        home = self.workers()[worker]
        kill_run(home)
        shutil.rmtree(home)
        home.mkdir()

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


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def states(cloud: Cloud) -> list[str]:
    """What each worker's run does, by watch.sh."""
    return [line.split(" ", 1)[1] for line in cloud("watch.sh", "--state").stdout.splitlines()]
