"""The command `gqe` in a process that asks itself to stop, and so saves, when the study that started it is gone.

`python -m gqe_jax.study.child VERB ...`; the study holds the other end of standard input.
"""

import os
import runpy
import signal
import threading


def _stop_with_parent() -> None:
    # Returns when no process holds the other end any more, however that one ended. Not by `sys.stdin`, whose lock a
    # thread that waits would still hold at the end of the interpreter.
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_stop_with_parent, daemon=True, name="stop_with_parent").start()
    runpy.run_module("gqe_jax.cli", run_name="__main__", alter_sys=True)
