"""No process outlives its parent, however the parent ended."""

import multiprocessing
import multiprocessing.connection
import os
import threading


def end_with_parent() -> None:
    """Ends this process, started by `multiprocessing`, as soon as its parent is gone; also after a kill.

    The sentinel that is waited for is the end of a pipe that the parent alone holds open, so the operating system
    reports its death. Linux's own signal for that (PR_SET_PDEATHSIG) comes already when the thread ends that started
    the process, which for grain's is not the thread that reads.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait_and_end, args=(parent.sentinel,), daemon=True, name="end_with_parent").start()


def _wait_and_end(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)  # nobody is left to hear of it, and what is still to be written nobody waits for
