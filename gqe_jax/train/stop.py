"""How a run is asked to stop before its end, by a signal or by notice of preemption, on all processes at one step."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


class Interrupted(Exception):
    """A signal asked the run to stop; the state was saved first. `signal_number` says which signal."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}; its checkpoint is saved")
        self.signal_number = signal_number


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], int | None]]:
    """A function of the step just dispatched: the number of the signal that ends the run after it, or None.

    Inside, SIGTERM and SIGINT do not end the process; a second SIGINT (of one process, a second of either) does, as
    usual. Several processes have to ask at every step: a signal to one of them, or the platform's notice of preemption,
    which is a SIGTERM, gives all of them the same step, the first that none has yet asked about.
    """
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(step: int) -> int | None:
        if several:
            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None
        return received[0] if received else None

    # JAX's coordination service listens for SIGTERM itself, with a handler that ours would replace.
    several = jax.distributed.is_initialized()
    signals = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, receive) for number in signals}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
