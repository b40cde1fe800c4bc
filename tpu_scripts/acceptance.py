"""What a new pod must show before a long run starts on it; writes one JSON record. acceptance.sh runs it everywhere.

Every worker runs this file; it starts one process after the other, each of them on all hosts at once, and reads from
their output what they did. The first host writes the record: for each item name, passed (null: not shown here), what
was measured, and why it matters. `--rehearse N` does all of it on this machine's CPU, with N processes.

  python tpu_scripts/acceptance.py --out gs://BUCKET/acceptance
  python tpu_scripts/acceptance.py --out /tmp/acceptance --rehearse 2
"""

import argparse
import atexit
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

PROBE = Path(__file__).with_name("acceptance_probe.py")
GQE = ("-m", "gqe_jax.cli")

# One host of a slice alone: libtpu otherwise waits for the other hosts.
ALONE = {"TPU_PROCESS_BOUNDS": "1,1,1", "TPU_CHIPS_PER_PROCESS_BOUNDS": "2,2,1", "TPU_VISIBLE_DEVICES": "0,1,2,3"}
LOSS_TOLERANCE = {"cpu": 1e-5, "tpu": 1e-3}
"""Relative difference of losses between numbers of hosts: sums in another order; on TPUs, matmuls in bfloat16."""

SPEED_ROWS = 8  # of each chip, in the measured MFU


@dataclasses.dataclass
class Item:
    """One line of the list.

    Attributes:
      name: what is claimed.
      why: what goes wrong on a pod where it does not hold.
      passed: None where this place cannot show it.
      measured: numbers behind `passed`, or why it is None.
    """

    name: str
    why: str
    passed: bool | None = None
    measured: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Ended:
    """Processes that ended: the exit code of each that this machine started, and what the first of them printed."""

    codes: tuple[int, ...]
    output: str


class Hosts:
    """Starts the same command on all hosts.

    On a pod every worker runs this program, so each starts one process, and `gqe --distributed` joins them. In a
    rehearsal this machine starts all of them, on CPU devices, joined over loopback.

    Args:
      rehearse: number of processes here; None: a pod.
      devices: CPU devices of all processes together, in a rehearsal.
    """

    def __init__(self, rehearse: int | None, devices: int):
        self.rehearse = rehearse
        self.devices = devices
        self.cache = tempfile.mkdtemp(prefix="gqe_acceptance_cache_")
        atexit.register(shutil.rmtree, self.cache)

    def run(self, command: Sequence[str], *, alone: bool = False, stop_at: int | None = None) -> Ended:
        """Runs `python COMMAND` on all hosts, or on one alone, and waits for its end.

        Args:
          command: arguments of Python.
          alone: on this host only.
          stop_at: when the first process prints that step, it alone is sent SIGTERM, as a preemption would.
        """
        processes = 1 if alone or self.rehearse is None else self.rehearse
        port = _free_port()
        children = []
        for index in range(processes):
            environment, joined = os.environ | {"PYTHONUNBUFFERED": "1"}, []
            if self.rehearse is not None:
                environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": _cpu_flags(self.devices // processes)}
                environment |= {
                    "JAX_COMPILATION_CACHE_DIR": self.cache,
                    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                }
                if processes > 1:
                    joined = [f"--coordinator=localhost:{port}", f"--process-id={index}"]
                    joined.append(f"--num-processes={processes}")
            elif alone:
                environment |= ALONE
            else:
                joined = ["--distributed"]
            children.append(
                subprocess.Popen(
                    [sys.executable, *command, *joined],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env=environment,
                    cwd=PROBE.parents[1],
                )
            )
        outputs: list[list[str]] = [[] for _ in children]
        readers = [
            threading.Thread(target=_read, args=(child, lines, stop_at if child is children[0] else None))
            for child, lines in zip(children, outputs, strict=True)
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        codes = tuple(child.wait() for child in children)
        return Ended(codes, "".join(outputs[0]))


def _read(child: subprocess.Popen, lines: list[str], stop_at: int | None) -> None:
    for line in child.stdout:
        lines.append(line)
        print(f"    {line}", end="", flush=True)
        found = re.match(r"step +(\d+)/", line)
        if stop_at is not None and found and int(found[1]) >= stop_at:
            child.send_signal(signal.SIGTERM)
            stop_at = None


def _cpu_flags(devices: int) -> str:
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={max(devices, 1)}".strip()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Acceptance:
    """The list, item by item.

    Args:
      hosts: how to start processes.
      out: directory that all hosts share, for the runs and the record.
      config: `gqe train --config` of the items about correctness.
      speed_config: of the measured MFU.
      overrides: `--config.a.b=value` for all runs: the mesh, say.
      steps: of the runs about correctness; enough that a signal arrives before the last.
    """

    def __init__(
        self,
        hosts: Hosts,
        out: epath.Path,
        *,
        config: str,
        speed_config: str,
        overrides: Sequence[str],
        steps: int,
        speed_steps: int,
    ):
        self.hosts = hosts
        self.out = out
        self.config = config
        self.speed_config = speed_config
        self.overrides = tuple(overrides)
        self.steps = steps
        self.speed_steps = speed_steps
        self.probes: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """The record; `probe` first, for it says on which devices everything runs."""
        items = self.probe()
        for item, check in (
            (
                Item("preempted_run", "a run that is moved must not repeat or skip a batch, nor lose its state"),
                self.preempted_run,
            ),
            (
                Item("other_host_count", "after a preemption the capacity that is left may have another size"),
                self.other_host_count,
            ),
            (Item("mfu", "days and cost follow from it; compare with gqe plan's estimate"), self.mfu),
        ):
            print(f"== {item.name}", flush=True)
            if self.probes:
                check(item)
            else:
                item.measured["not shown"] = "the probe failed"
            items.append(item)
        return {
            "passed": all(item.passed is not False for item in items) and bool(self.probes),
            "rehearsal": self.hosts.rehearse,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "config": [self.config, self.speed_config, *self.overrides],
            "items": [dataclasses.asdict(item) for item in items],
        }

    def probe(self) -> list[Item]:
        """The items that one program on all hosts can show, from `acceptance_probe.py`."""
        print("== probe", flush=True)
        with tempfile.TemporaryDirectory(prefix="gqe_acceptance_") as scratch:
            ended = self.hosts.run([str(PROBE), f"--out={scratch}", f"--config={self.config}", *self._overrides()])
            files = sorted(Path(scratch).glob("*.json"), key=lambda file: int(file.stem))
            self.probes = [json.loads(file.read_text()) for file in files]
        if any(ended.codes) or not self.probes:
            self.probes = []
            return [Item("probe", "nothing can be shown without it", False, _failure(ended))]
        return [Item(**item) for item in self.probes[0]["items"]]

    @property
    def is_first(self) -> bool:
        return not self.probes or self.probes[0]["process_index"] == 0

    @property
    def platform(self) -> str:
        return self.probes[0]["platform"]

    def preempted_run(self, item: Item) -> None:
        """An uninterrupted run beside one whose first host gets SIGTERM and which is then started again."""
        whole = self._train("whole")
        stopped = self._train("preempted", stop_at=self.steps // 3)
        again = self._train("preempted")
        if not self._expect(item, [(whole, 0), (stopped, 128 + signal.SIGTERM), (again, 0)]):
            return
        expected, found = self._losses("whole"), self._losses("preempted")
        item.measured = {
            "steps": len(found),
            "resumed_from": _resumed_from(again),
            "largest_difference": _largest_difference(expected, found),
        }
        item.passed = found == expected and len(found) == self.steps

    def other_host_count(self, item: Item) -> None:
        """All hosts, then one alone, then all again; against the uninterrupted run."""
        if self.probes[0]["process_count"] == 1:
            item.measured["not shown"] = "there is one process only"
            return
        many = self._train("moved", stop_at=self.steps // 3)
        one = self._train("moved", alone=True, stop_at=2 * self.steps // 3) if self.is_first else None
        rest = self._train("moved")
        ends = [(many, 128 + signal.SIGTERM), (rest, 0)] + ([(one, 128 + signal.SIGTERM)] if one is not None else [])
        if not self._expect(item, ends):
            return
        expected, found = self._losses("whole"), self._losses("moved")
        difference = _largest_difference(expected, found)
        tolerance = LOSS_TOLERANCE[self.platform]
        item.measured = {"steps": len(found), "largest_difference": difference, "tolerance": tolerance}
        item.passed = found.keys() == expected.keys() and difference <= tolerance

    def mfu(self, item: Item) -> None:
        """Median over the later log lines of a run that is only there to be fast."""
        ended = self._train("speed", config=self.speed_config, steps=self.speed_steps)
        if not self._expect(item, [(ended, 0)]):
            return
        lines = [line for line in self._metrics("speed") if "tokens_per_second" in line][self.speed_steps // 3 :]
        item.measured = {
            name: statistics.median(line[name] for line in lines)
            for name in ("mfu", "tokens_per_second")
            if all(line.get(name) is not None for line in lines)
        }
        if "mfu" not in item.measured:
            item.measured["not shown"] = f"the peak of {self.probes[0]['device_kind']} is not known"
        else:
            item.passed = 0 < item.measured["mfu"] < 1

    def _train(
        self,
        run: str,
        *,
        alone: bool = False,
        stop_at: int | None = None,
        config: str | None = None,
        steps: int | None = None,
    ) -> Ended:
        steps = self.steps if steps is None else steps
        settings = {
            "steps": steps,
            "log_every": 1,
            "eval_every": 0,
            "checkpoint_every": max(steps // 4, 1),
        }
        command = [*GQE, "train", "--config", config or self.config, "--run", str(self.out / run)]
        command += [f"--config.train.{name}={value}" for name, value in settings.items()]
        if not any(override.startswith("data.batch_size=") for override in self.overrides):
            probe = self.probes[0]
            rows = SPEED_ROWS * probe["device_count"] if self.platform == "tpu" and config else probe["batch_size"]
            command.append(f"--config.data.batch_size={rows}")
        return self.hosts.run([*command, *self._overrides()], alone=alone, stop_at=stop_at)

    def _overrides(self) -> list[str]:
        return [f"--config.{override}" for override in self.overrides]

    def _metrics(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.out / run / "metrics.jsonl").read_text().splitlines()]

    def _losses(self, run: str) -> dict[int, float]:
        """Training loss by step. A step that was logged twice is one that the run repeated: it shows as NaN."""
        losses: dict[int, float] = {}
        for line in self._metrics(run):
            if "loss" in line:
                losses[line["step"]] = math.nan if line["step"] in losses else line["loss"]
        return losses

    def _expect(self, item: Item, ends: Sequence[tuple[Ended, int]]) -> bool:
        for ended, code in ends:
            if any(found != code for found in ended.codes):
                item.passed = False
                item.measured = {"expected_exit_code": code} | _failure(ended)
                return False
        return True


def _failure(ended: Ended) -> dict[str, Any]:
    return {"exit_codes": list(ended.codes), "output": ended.output[-2000:]}


def _resumed_from(ended: Ended) -> int | None:
    found = re.search(r"from step (\d+)", ended.output)
    return int(found[1]) if found else None


def _largest_difference(expected: dict[int, float], found: dict[int, float]) -> float:
    """Relative, over the steps that both have."""
    both = expected.keys() & found.keys()
    return max((abs(found[step] - expected[step]) / abs(expected[step]) for step in both), default=math.inf)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="DIR", help="directory that all hosts share: runs, record.json")
    parser.add_argument("--rehearse", type=int, metavar="N", help="N processes on this machine's CPU instead of a pod")
    parser.add_argument("--devices", type=int, metavar="N", help="of a rehearsal, in all (default: one a process)")
    parser.add_argument("--config", default="smoke", metavar="FILE[:ARG]", help="of the runs about correctness")
    parser.add_argument("--speed-config", metavar="FILE[:ARG]", help="of the measured MFU")
    parser.add_argument("--steps", type=int, default=300, help="of the runs about correctness")
    parser.add_argument("--speed-steps", type=int, default=60)
    args, rest = parser.parse_known_args(argv)
    overrides = [arg.removeprefix("--config.") for arg in rest if arg.startswith("--config.") and "=" in arg]
    if len(overrides) < len(rest):
        parser.error(f"unknown arguments {' '.join(rest)}: beside those above there is --config.a.b=VALUE")
    if args.rehearse is not None and args.rehearse < 1:
        parser.error(f"--rehearse {args.rehearse} must be a number of processes")
    out = epath.Path(args.out)
    if out.exists() and any(out.iterdir()):
        parser.error(f"--out {args.out} is not empty: choose another directory, for its runs would be continued")

    acceptance = Acceptance(
        Hosts(args.rehearse, args.devices or args.rehearse or 1),
        out,
        config=args.config,
        speed_config=args.speed_config or (args.config if args.rehearse else "gqe_250m:head_dim=128"),
        overrides=overrides,
        steps=args.steps,
        speed_steps=args.speed_steps,
    )
    record = acceptance.run()
    for item in record["items"]:
        verdict = {True: "passed", False: "FAILED", None: "not shown"}[item["passed"]]
        print(f"{verdict:10}{item['name']:20}{json.dumps(item['measured'])[:200]}")
    if acceptance.is_first:
        out.mkdir(parents=True, exist_ok=True)
        (out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"record: {out / 'record.json'}")
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
