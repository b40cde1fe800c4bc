"""What the compiled step takes of a device's memory, and a trace of some of its runs."""

import math
import tempfile
from pathlib import Path
from typing import Any

import jax
from etils import epath

from gqe_jax.train.log import say


def memory_line(compiled: jax.stages.Compiled, state: Any) -> str:
    """Bytes per device of the training step, as the compiler planned them, beside the device's memory if it is known.

    Args:
      compiled: the training step.
      state: the `TrainState` that it takes and gives back in place.
    """
    plan = compiled.memory_analysis()
    held = sum(_bytes_on_a_device(leaf) for leaf in jax.tree.leaves(state))
    parameters = sum(_bytes_on_a_device(leaf) for leaf in jax.tree.leaves(state.params))
    own = plan.output_size_in_bytes - plan.alias_size_in_bytes
    total = plan.argument_size_in_bytes + own + plan.temp_size_in_bytes
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return (
        f"{_gigabytes(total)}{f' of {_gigabytes(limit)}' if limit else ''}: parameters {_gigabytes(parameters)}, "
        f"optimizer {_gigabytes(held - parameters)}, temporaries {_gigabytes(plan.temp_size_in_bytes)}"
    )


def _bytes_on_a_device(leaf: jax.Array) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


class Profile:
    """Traces the steps of a window with `jax.profiler`, on the first process. A context manager.

    Args:
      window: first and last step; None: no trace.
      directory: receives the trace, for TensorBoard's profile plugin, XProf or Perfetto.
    """

    def __init__(self, window: tuple[int, int] | None, directory: epath.Path):
        self._first, self._last = window if window and jax.process_index() == 0 else (0, -1)
        self._directory = directory
        self._local: tempfile.TemporaryDirectory | None = None  # the profiler cannot write to a bucket

    def before(self, step: int) -> None:
        """Called before `step` is dispatched."""
        if self._first <= step <= self._last and self._local is None:
            self._local = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._local.name)

    def after(self, step: int, results: Any) -> None:
        """Called when `step` was dispatched, with arrays that it computes."""
        if self._local is not None and step >= self._last:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        with self._local as local:
            for path in filter(Path.is_file, Path(local).rglob("*")):
                copy = self._directory / path.relative_to(local).as_posix()
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
        self._local, self._last = None, -1
        say(f"traced the steps of train.profile_steps: {self._directory}")

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._local is not None:
            self._stop()
