"""The end of a process that lives but no longer trains: waiting for another one, for a disk, for ever."""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Iterator

import jax

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: another try may succeed
LEAST_BOUND = 300.0  # seconds
STEPS = 20  # the longest step so far, so many times
PATIENCE = 10  # saves and evaluations may take so many times as long as a step

_TICK = 1.0  # seconds
_OTHERS = 5.0  # seconds; the other processes are as stuck as this one, and say where before its end ends them


class Watchdog:
    """Ends the process, with the stack of every thread, when it is silent for longer than a bound. A context manager.

    Time is counted while the process runs: one that was stopped (SIGSTOP, a sleeping laptop) is not stuck afterwards.

    Args:
      bound: seconds; None: `STEPS` times the longest step so far, and at least `LEAST_BOUND`.
    """

    def __init__(self, bound: float | None):
        self._bound = bound
        self._longest = 0.0
        self._patience = 1
        self._silent = 0.0
        self._since: float | None = None
        self._left = threading.Event()

    def alive(self) -> None:
        """A step, or a batch of an evaluation, has ended."""
        now = time.monotonic()
        if self._since is not None and self._patience == 1:
            self._longest = max(self._longest, now - self._since)
        self._since, self._silent = now, 0.0

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Inside is no step: it may take `PATIENCE` times as long, and the bound is not derived from it."""
        self._patience, self._silent = PATIENCE, 0.0
        yield
        self._patience, self._silent, self._since = 1, 0.0, None

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, name="gqe-watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()

    def _watch(self) -> None:
        tick = _TICK if self._bound is None else min(_TICK, self._bound / 4)
        while not self._left.wait(tick):
            self._silent += tick
            bound = self._patience * (self._bound or max(LEAST_BOUND, STEPS * self._longest))
            if self._silent > bound:
                self._end(bound)

    def _end(self, bound: float) -> None:
        line = (
            f"gqe: process {jax.process_index()} is stuck: nothing has ended for {bound:.0f} s (train.stall_seconds). "
            f"Its threads, innermost call first:\n"
        )
        os.write(2, line.encode())
        faulthandler.dump_traceback(2, all_threads=True)
        line = (
            f"gqe: process {jax.process_index()} ends with exit code {EXIT_CODE}: the same command, on all machines, "
            f"continues the run; if steps take that long, raise train.stall_seconds\n"
        )
        os.write(2, line.encode())
        if jax.process_count() > 1:
            time.sleep(_OTHERS)
        os._exit(EXIT_CODE)
