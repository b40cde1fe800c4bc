"""How a run is asked to stop before its end, by a signal or by notice of preemption, on all processes at one moment."""

import contextlib
import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

SAME_SIGNAL = 1.0  # seconds; sooner after the first, a signal is the same request: terminals and supervisors send two


class Interrupted(Exception):
    """A signal asked the run to stop; the state was saved first. `signal_number` says which signal."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}; its checkpoint is saved")
        self.signal_number = signal_number


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], int | None]]:
    """Gives a function that says which signal has asked the run to stop, or None.

    Inside, the first SIGTERM or SIGINT does not end the process: a line on standard error acknowledges it at once, also
    while a long step runs. Further ones within `SAME_SIGNAL` seconds are ignored; a later one ends the process without
    saving, with exit code 128 + its number.

    Several processes have to ask equally often: a signal to one of them, or the platform's notice of preemption, which
    is a SIGTERM, gives all of them the same answer, SIGTERM, from the same call on. A process enters it once.
    """
    several = jax.distributed.is_initialized()
    # JAX's coordination service listens for SIGTERM itself, with a handler that ours would replace.
    signals = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    received: list[int] = []
    agreed: list[int] = []
    calls = itertools.count(1)

    def receive(number: int, frame: Any) -> None:
        received.append(number)

    def asked() -> int | None:
        if not several:
            return received[0] if received else None
        if not agreed and multihost_utils.reached_preemption_sync_point(next(calls)):
            agreed.append(signal.SIGTERM)
            if not received:
                _acknowledge("the processes were asked to stop")
        return agreed[0] if agreed else None

    # Python calls `receive` only between two steps of the interpreter, which may be minutes apart; the wake-up socket
    # hears of a signal at once.
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    listener = threading.Thread(target=_listen, args=(ours, signals, several), name="gqe-signals", daemon=True)
    listener.start()
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    previous = {number: signal.signal(number, receive) for number in signals}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        theirs.close()
        listener.join()
        ours.close()


def _listen(connection: socket.socket, signals: tuple[int, ...], several: bool) -> None:
    first = None
    while heard := connection.recv(1):
        number = heard[0]
        if number not in signals:
            continue
        name = signal.Signals(number).name
        if first is None:
            first = time.monotonic()
            _acknowledge(name)
            if several:
                os.kill(os.getpid(), signal.SIGTERM)
        elif time.monotonic() - first >= SAME_SIGNAL:
            os.write(2, f"gqe: {name} again: ending without saving\n".encode())
            os._exit(128 + number)


def _acknowledge(what: str) -> None:
    line = (
        f"gqe: {what}: stopping after this step and saving; another signal, from {SAME_SIGNAL:.0f} s on, ends without "
        f"saving\n"
    )
    os.write(2, line.encode())
