"""A line of progress: how far, how fast, how much longer."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_EVERY = 0.5  # seconds between lines of a terminal
_EVERY_IN_A_LOG = 30.0


class ProgressLine:
    """Rewrites one line of a terminal; elsewhere (a log file) writes a line every half minute. Ends it on `close`."""

    def __init__(self, what: str, total: int, done: int = 0, stream: TextIO | None = None):
        """total: bytes of all the work. done: how many of them were done before."""
        self._what, self._total, self._before = what, total, done
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._began = time.monotonic()
        self._written = self._began if not self._terminal else 0.0
        self._shown = False

    def update(self, done: int) -> None:
        """done: bytes of the work that are done by now, in all."""
        now = time.monotonic()
        if now - self._written >= (_EVERY if self._terminal else _EVERY_IN_A_LOG):
            self._written = now
            line = progress_text(self._what, self._before, done, self._total, now - self._began)
            self._stream.write(f"\r{line}\x1b[K" if self._terminal else f"{line}\n")
            self._stream.flush()
            self._shown = True

    def close(self) -> None:
        if self._shown and self._terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def progress_text(what: str, before: int, done: int, total: int, seconds: float) -> str:
    """Formats the line; `before` is the number of bytes that were done when the clock of `seconds` started."""
    rate = (done - before) / max(seconds, 1e-9)
    left = f", {duration((total - done) / rate)} left" if rate else ""
    share = done / total if total else 1.0
    return f"{what}: {share:4.0%} of {size_text(total)}, {size_text(rate)}/s{left}"


def size_text(count: float) -> str:
    """Returns a number of bytes for people, to three digits."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def duration(seconds: float) -> str:
    """Seconds in words: "2 h 05 min", "3 min 20 s", "7 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
