"""Runs preparation in a work folder, with several processes if asked."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from ctypes import c_bool, c_longlong
from pathlib import Path
from typing import Any

from gqe_jax.config import ConfigError
from gqe_jax.data.manifest import SOURCES_FILE
from gqe_jax.data.preparing.progress import ProgressLine, size_text
from gqe_jax.data.preparing.units import FULL_DISK, RESULT_FILE, Job
from gqe_jax.processes.parent import end_with_parent

_PLAN_FILE = "plan.json"


@contextlib.contextmanager
def work_folder(out: Path, plan: dict[str, Any]) -> Iterator[Path]:
    """Yields a temporary folder beside `out`, deleted at the end. Work that a killed process left there is resumed.

    plan: what the work depends on, as JSON, and its number of `units`; leftovers of another plan are deleted. After an
    error the folder stays if a unit of the work is finished in it, for the next call with the same plan.
    """
    prefix = f".{out.name}.partial-{socket.gethostname()}-"
    folder = out.parent / f"{prefix}{os.getpid()}-{secrets.token_hex(4)}"
    for stale in sorted(path for path in out.parent.iterdir() if path.name.startswith(prefix)):
        pid = stale.name.removeprefix(prefix).split("-")[0]
        if pid.isdigit() and _alive(int(pid)):
            continue
        difference = _difference(stale, plan)
        if difference is None and not folder.exists():
            with contextlib.suppress(FileNotFoundError):  # another process has taken it
                stale.rename(folder)
        else:
            if difference and any(stale.glob(f"unit-*/{RESULT_FILE}")):
                print(f"{out}: begun before, but {difference}: starting anew", file=sys.stderr)
            shutil.rmtree(stale, ignore_errors=True)
    kept = False
    try:
        if not folder.exists():
            folder.mkdir()
            (folder / _PLAN_FILE).write_text(json.dumps(plan))
        yield folder
    except BaseException as error:
        for partial in folder.glob("unit-*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        finished = len([*folder.glob(f"unit-*/{RESULT_FILE}")])
        refused = isinstance(error, ConfigError) and finished == plan["units"]  # as a whole: going on would not help
        kept = bool(finished) and not refused
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            raise _full_disk(out, folder, plan, error, kept) from error
        if kept:
            print(f"{out}: {finished} finished part(s) are kept; the same command goes on from there", file=sys.stderr)
        raise
    finally:
        if kept:
            folder.rename(out.parent / f"{prefix}stopped-{secrets.token_hex(4)}")
        shutil.rmtree(folder, ignore_errors=True)


def _full_disk(out: Path, folder: Path, plan: dict[str, Any], error: OSError, kept: bool) -> OSError:
    """Returns the error of a full disk: what is needed, judged by the finished units, and what is free."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    written = sum(path.stat().st_size for path in files)
    finished = [path.with_name(SOURCES_FILE) for path in files if path.name == RESULT_FILE]
    read = sum(json.loads(line)["bytes"] for path in finished for line in path.read_text().splitlines())
    total = sum(size for size, _ in plan["sources"].values())
    free = shutil.disk_usage(out.parent).free
    if kept:
        needed = f"about {size_text(written * total / read)} are needed, {size_text(written)} are written and kept"
        remedy = "make room, and the same command goes on from there; or choose --out on another disk"
    else:
        needed, free = f"for {size_text(total)} of text about as much is needed, nothing is kept", free + written
        remedy = "make room, or choose --out on another disk"
    return OSError(
        f"could not write {out} ({os.strerror(error.errno)}): {needed}, and {size_text(free)} are free: {remedy}"
    )


def _difference(stale: Path, plan: dict[str, Any]) -> str | None:
    """Returns what differs between the plan of a stale work folder and this one; None: nothing."""
    try:
        before = json.loads((stale / _PLAN_FILE).read_text())
    except (OSError, ValueError):
        return "its plan is lost"
    if before == plan:
        return None
    if not isinstance(before, dict) or before.keys() != plan.keys():
        return "its plan is another version's"
    if before["sources"] == plan["sources"]:
        return "with other settings"
    names = sorted({*before["sources"], *plan["sources"]})
    changed = [name for name in names if before["sources"].get(name) != plan["sources"].get(name)]
    return f"sources have changed since ({', '.join(changed[:5])}{', ...' if len(changed) > 5 else ''})"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class _Stopped(Exception):
    """Another process has failed, or the user has asked to stop."""


def run_units(job: Job, method: str, pending: Sequence[int], workers: int, shown: str | None) -> None:
    """Calls `job.<method>(number, progress, threads)` for each pending unit, in up to `workers` processes.

    shown: name of the progress line; None: no line. Raises what a unit raises; OSError if a process was killed.
    """
    sizes = [sum(job.stamps[file.name][0] for file in unit) for unit in job.units]
    before = sum(sizes) - sum(sizes[number] for number in pending)
    line = ProgressLine(shown, sum(sizes), before) if shown else None
    try:
        if min(workers, len(pending)) <= 1:
            for number in pending:
                done = before
                getattr(job, method)(number, lambda read, done=done: line and line.update(done + read), workers)
                before += sizes[number]
        else:
            _run_in_processes(job, method, pending, min(workers, len(pending)), before, line)
    finally:
        if line:
            line.close()


def _run_in_processes(
    job: Job, method: str, pending: Sequence[int], workers: int, before: int, line: ProgressLine | None
) -> None:
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of JAX's threads
    read, stop = context.RawArray(c_longlong, len(job.units)), context.RawValue(c_bool, False)
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (job, method, read, stop))
    with pool:
        try:
            futures = {pool.submit(_run_unit, number) for number in pending}
            while futures:
                done, futures = concurrent.futures.wait(futures, 0.2, concurrent.futures.FIRST_EXCEPTION)
                if line:
                    line.update(before + sum(read))
                for future in done:
                    future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise OSError(
                "a process that prepares data was killed, perhaps for want of memory: go on with fewer --workers"
            ) from error
        finally:
            stop.value = True
            pool.shutdown(cancel_futures=True)


def _start_worker(job: Job, method: str, read: Any, stop: Any) -> None:
    global _worker
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides, and tells through `stop`
    os.environ["RAYON_NUM_THREADS"] = "1"  # Hugging Face's tokenizers
    _worker = (job, method, read, stop)


def _run_unit(number: int) -> None:
    job, method, read, stop = _worker

    def progress(position: int) -> None:
        read[number] = position
        if stop.value:
            raise _Stopped

    getattr(job, method)(number, progress, 1)
