"""No process outlives its parent, and one that is killed is spoken of in one sentence; with real kills."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gqe_jax.data.reading.pipeline import Batches

PREPARING = """
import os, pathlib, sys, time
from gqe_jax.data.preparing import units
from gqe_jax.data.preparing.prepare import prepare
from gqe_jax.data.sources.corpus import files_corpus
from gqe_jax.data.tokenizer import ByteTokenizer

class Stuck(ByteTokenizer):
    def encode_batch(self, texts, threads=1):
        pathlib.Path(__file__).with_name(f"at_work_{os.getpid()}").touch()
        time.sleep(600)

    def __reduce__(self):
        return Stuck, ()

if __name__ == "__main__":
    units._UNIT_BYTES = 1
    corpus = files_corpus([os.path.join(os.path.dirname(__file__), "*.txt")])
    prepare(corpus, sys.argv[1], tokenizer=Stuck(), seq_len=32, workers=2)
"""

READING = """
import pathlib, sys, time
import numpy as np
from gqe_jax.data.reading.pipeline import Batches

def read(number):
    return {"tokens": np.full((4, 100_000), number)}

if __name__ == "__main__":
    with Batches(read, 0, 1000, workers=2) as batches:
        next(batches)
        for number in range(2):
            pathlib.Path(__file__).with_name(f"at_work_{number}").touch()
        time.sleep(600)
"""


def shared_memory() -> set[str]:
    """Names of the blocks of shared memory that Python's processes have made."""
    return {path.name for path in Path("/dev/shm").glob("psm_*")}


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /dev/shm")
@pytest.mark.parametrize("program", [PREPARING, pytest.param(READING, marks=pytest.mark.slow)])
def test_workers_end_with_a_killed_parent(tmp_path, program):
    """All of them hold the parent's output, so its end for who reads it shows that none is left; so does memory."""
    script = tmp_path / "program.py"
    script.write_text(program)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"text {name}\n" * 20)
    before = shared_memory()
    command = [sys.executable, str(script), str(tmp_path / "out")]
    parent = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len([*tmp_path.glob("at_work_*")]) < 2:
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    blocks = shared_memory() - before
    assert blocks or program is PREPARING
    parent.kill()
    parent.communicate(timeout=60)
    while blocks & shared_memory():  # removed by a process of Python's own, after the last of the others
        assert time.monotonic() < deadline
        time.sleep(0.05)


def numbered(number: int) -> dict[str, np.ndarray]:
    return {"tokens": np.full(1000, number)}


@pytest.mark.slow
def test_a_killed_reader_is_one_sentence():
    """It says with which exit code the process ended and what helps, and what was read before is whole."""
    with Batches(numbered, 0, 10**6, workers=2) as batches:
        assert next(batches)["tokens"][0] == 0
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        with pytest.raises(ChildProcessError, match=r"a process that reads data ended with exit code -9, .*set data"):
            for number, batch in enumerate(batches, start=1):
                assert (batch["tokens"] == number).all()
