"""Trains the cells of a study, each in a process of its own, several at a time; finished ones are skipped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

from etils import epath

from gqe_jax.config import ConfigError
from gqe_jax.data.reading.prepared import open_data
from gqe_jax.flops import flops_per_step
from gqe_jax.processes.place import find_place
from gqe_jax.runs.metrics import format_duration, read_metrics
from gqe_jax.runs.record import read_run
from gqe_jax.study import records
from gqe_jax.study.definition import Cell, Study
from gqe_jax.study.records import code_hash

RUNS, LOGS = "runs", "logs"  # folders beside the records
POLL = 1.0  # seconds between looks at the running cells
START_TIMEOUT = 300.0  # seconds for the platform to say which machine this is
BAR = 20  # characters
_IN_A_LOG = 60.0  # seconds between progress lines where there is no terminal


def data_hash(planned: Sequence[Cell]) -> str:
    """Opens the data of every cell, which is prepared and verified, and returns its hash.

    Raises:
      ConfigError: as `open_data`; rows of another length than the model's context, or arms that read different data.
    """
    settings = {}
    for cell in planned:
        data, context = cell.config.data, cell.config.model.context
        key = data.path, data.mixture, data.tokenizer, context, cell.config.model.vocab_size
        settings.setdefault(key, cell)
    found = {}
    for cell in settings.values():
        opened = open_data(cell.config.data, cell.config.model)
        if opened.seq_len != cell.config.model.context:
            raise ConfigError(
                f"arm {cell.arm}: the rows of {opened.name} have {opened.seq_len} tokens, and model.context="
                f"{cell.config.model.context} counts others: set model.context={opened.seq_len} for all arms"
            )
        found[cell.arm] = opened.digest
    if len(set(found.values())) > 1:
        raise ConfigError(
            f"arms {', '.join(found)} read different data, so their losses cannot be compared: give all arms the same "
            f"data.path and model.context"
        )
    return next(iter(found.values()))


def run_study(
    study: Study, planned: Sequence[Cell], out: epath.Path, *, jobs: int, distributed: bool, stream: TextIO = sys.stderr
) -> list[str]:
    """Trains all cells that are not finished.

    `out` gets `cells/` (records), `runs/` (directories of `gqe train`) and `logs/` (what each process printed).

    Args:
      planned: the cells of `definition.cells`.
      jobs: how many train at a time.
      distributed: each machine of a pod calls this, with one `out` for all, and trains its part of each cell; machine 0
        keeps the records. What the cells print goes where this process prints.
      stream: for the progress line.

    Returns:
      One line for each cell that failed.

    Raises:
      ConfigError: cells in `out` belong to another study, other code, data or settings; nothing was trained.
      StartFailed: as `find_place`.
    """
    leads = not distributed or find_place(START_TIMEOUT).process_id == 0
    known = records.read_records(out, study)
    code, data = code_hash(), data_hash(planned)
    records.check_same(list(known.values()), code, data, out)
    records.check_settings(list(known.values()), planned, out)
    _require_records(planned, known.keys(), out)
    done = {key for key, record in known.items() if record.result is not None}
    waiting = deque(cell for cell in planned if (cell.arm, cell.seed) not in done)
    progress = _Progress(planned, [cell for cell in planned if cell not in waiting], stream)
    running: dict[subprocess.Popen[bytes], Cell] = {}
    failures = []
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                if code_hash() != code:
                    raise ConfigError(
                        "the sources of gqe_jax have changed since the study began: start it again with the code that "
                        "its cells have, or with another --out"
                    )
                cell = waiting.popleft()
                if leads:
                    records.write(out, records.started(study, cell, code, data))
                running[_start(cell, out, distributed)] = cell
            for process in [process for process in running if process.poll() is not None]:
                cell = running.pop(process)
                if process.returncode != 0:
                    where = "above" if distributed else _log(cell, out)
                    failures.append(f"{cell.name}: exit code {process.returncode}, see {where}")
                    continue
                progress.finished.append(cell)
                if leads:
                    record = records.started(study, cell, code, data)
                    records.write(out, records.finished(record, read_run(out / RUNS / cell.name)))
            if progress.due() or not running:
                progress.show({cell: _steps(cell, out) for cell in running.values()}, len(failures))
            if running:
                time.sleep(POLL)
    finally:
        for process in running:
            process.terminate()  # it saves; a Ctrl-C has reached it too, and both count as one
        for process in running:
            process.wait()
        progress.close()
        signal.signal(signal.SIGTERM, before)
    return failures


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _require_records(planned: Sequence[Cell], known: Collection[tuple[str, int]], out: epath.Path) -> None:
    """Refuses runs without a record, as nobody knows which code has trained them."""
    new = [cell.name for cell in planned if (cell.arm, cell.seed) not in known]
    unknown = [name for name in new if (out / RUNS / name).exists()]
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)} in {str(out / RUNS)!r}: there is a run, but no record of the code and data that "
            f"trained it: delete the run, or bring the record back"
        )


def _start(cell: Cell, out: epath.Path, distributed: bool) -> subprocess.Popen[bytes]:
    package = str(Path(__file__).parents[2])
    # -P and this path: the child runs the code that was hashed, wherever it is started.
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-P", "-m", "gqe_jax.study.child", *_command(cell, out, distributed)]
    environment = os.environ | {"PYTHONPATH": path}
    if distributed:
        return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
    log = _log(cell, out)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment)


def _log(cell: Cell, out: epath.Path) -> Path:
    return Path(out / LOGS / f"{cell.name}.log")


def _steps(cell: Cell, out: epath.Path) -> int:
    """Steps that the cell has logged."""
    return max((line["step"] for line in read_metrics(out / RUNS / cell.name)), default=0)


class _Progress:
    """One line: cells done, where the running ones are, and the time left by the FLOPs that are still to do."""

    def __init__(self, planned: Sequence[Cell], finished: Sequence[Cell], stream: TextIO):
        self.finished = list(finished)
        self._stream, self._terminal = stream, stream.isatty()
        self._work = {cell.name: self._flops(cell, cell.config.train.steps) for cell in planned}
        self._since: tuple[float, int] | None = None  # when the first step was seen, and the work done by then
        self._idle, self._shown = None, 0.0

    @staticmethod
    def _flops(cell: Cell, steps: int) -> int:
        return steps * flops_per_step(cell.config.model, cell.config.data.batch_size, cell.config.model.context)

    def due(self) -> bool:
        return time.monotonic() - self._shown >= (POLL if self._terminal else _IN_A_LOG)

    def show(self, running: dict[Cell, int], failed: int) -> None:
        """Shows the line; `running`: cell → its steps so far."""
        now = self._shown = time.monotonic()
        total = sum(self._work.values())
        done = sum(self._work[cell.name] for cell in self.finished)
        done += sum(self._flops(cell, steps) for cell, steps in running.items())
        if self._idle is None:
            self._idle = done
        if self._since is None and done > self._idle:  # before, the cells compiled
            self._since = now, done
        rate = (done - self._since[1]) / (now - self._since[0] + 1e-9) if self._since else 0.0
        parts = [f"{len(self.finished)} of {len(self._work)} cells done"]
        parts += [f"{failed} failed"] if failed else []
        parts += [f"{cell.name} {steps}/{cell.config.train.steps}" for cell, steps in running.items()]
        parts += [f"{format_duration((total - done) / rate)} left"] if rate > 0 and running else []
        line = f"[{'#' * (BAR * done // total):<{BAR}}] " + ", ".join(parts)
        self._stream.write(f"\r{line}\x1b[K" if self._terminal else f"{line}\n")
        self._stream.flush()

    def close(self) -> None:
        if self._terminal:
            self._stream.write("\n")


def _command(cell: Cell, out: epath.Path, distributed: bool) -> list[str]:
    """Returns the words behind `gqe`."""
    return cell.command(out / RUNS / cell.name) + ["--distributed"] * distributed


def commands(planned: Sequence[Cell], out: epath.Path, *, distributed: bool) -> Iterator[list[str]]:
    """Gives the words of the command of every cell, as a person would type them."""
    for cell in planned:
        yield ["gqe", *_command(cell, out, distributed)]
