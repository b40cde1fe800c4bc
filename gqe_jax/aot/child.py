"""A child process in which libtpu compiles for TPUs: it reads its settings as it starts, and may end its process.

A function is named as "package.module:name"; its keyword arguments and its result are what JSON can hold.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from typing import IO, Any

from gqe_jax.config import ConfigError


class CompileError(ConfigError):
    """The compiler refuses a function: its message."""


class Child:
    """A process that computes one call after the other; another takes its place where the compiler ends it.

    Args:
      libtpu_flags: in place of those of the environment variable LIBTPU_INIT_ARGS.

    Raises:
      CompileError: libtpu is not installed.
    """

    def __init__(self, libtpu_flags: str | None = None):
        if importlib.util.find_spec("libtpu") is None:
            raise CompileError(
                "libtpu, which compiles for TPUs, is not installed: pip install 'gqe_jax[tpu]' (it needs no TPU)"
            )
        self._flags = libtpu_flags
        self._process: subprocess.Popen | None = None
        self._log: IO[str] = tempfile.TemporaryFile("w+", errors="replace")

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._log.close()

    def call(self, function: str, **arguments: Any) -> Any:
        """Returns the result of a function in the child.

        Raises:
          ConfigError: the function raises one.
          CompileError: it raises something else, or its process ends.
        """
        process = self._process = self._process or self._start()
        try:
            process.stdin.write(json.dumps([function, arguments]) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            answer = ""
        else:
            answer = process.stdout.readline()
        if not answer:
            code = self._end()
            self._log.seek(0)
            raise CompileError(
                f"the compiler's process ended with exit code {code} (-9: the machine ran out of memory):\n"
                f"{self._log.read()[-4000:]}"
            )
        kind, value = json.loads(answer)
        if kind != "result":
            raise {"config": ConfigError, "compile": CompileError}[kind](value)
        return value

    def _start(self) -> subprocess.Popen:
        settings = {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        if self._flags is not None:
            settings["LIBTPU_INIT_ARGS"] = self._flags
        self._log.seek(0)
        self._log.truncate()
        return subprocess.Popen(
            [sys.executable, "-c", "from gqe_jax.aot.child import main; main()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=os.environ | settings,
        )  # fmt: skip

    def _end(self) -> int | None:
        if self._process is None:
            return None
        process, self._process = self._process, None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        return process.wait()


def main() -> None:
    """Runs in the child: a call on each line of its input, an answer on each line of its output."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # whatever else prints is not an answer
        for line in sys.stdin:
            function, arguments = json.loads(line)
            module, name = function.split(":")
            try:
                answer = ["result", getattr(importlib.import_module(module), name)(**arguments)]
            except CompileError as error:
                answer = ["compile", str(error)]
            except ConfigError as error:
                answer = ["config", str(error)]
            except Exception as error:  # a kernel that does not fit, or is not supported: the caller's to judge
                answer = ["compile", f"{type(error).__name__}: {error}"[:4000]]
            print(json.dumps(answer), file=answers, flush=True)
