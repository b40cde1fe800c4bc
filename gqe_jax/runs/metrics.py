"""The record of a run: metrics.jsonl always, TensorBoard and Weights & Biases on request, one progress line per log."""

from __future__ import annotations

import importlib
import json
import math
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from gqe_jax.config import ConfigError
from gqe_jax.runs.record import METRICS_FILE, metric_lines

Value = float | int | str | list[Any] | None


class MetricWriter:
    """Writes the metrics of a run, from the first process only. A context manager.

    `metrics.jsonl` holds one JSON object per line, with "step" first and numbers that are not finite as null. Each line
    is given to the operating system at once, so a killed run loses at most the half of its last line. Objects in a
    bucket (gs://) cannot grow: there the file is kept locally, and `upload` replaces the object by it.

    `evaluations` has the step and the tokens of each evaluation that the run goes on with.

    Args:
      directory: of the run; made if it is not there.
      resume_step: step that the run goes on from (0: from the start). Lines of later steps, which the run will write
        again, and a half-written last line are dropped first.
      tensorboard: also write TensorBoard event files there (extra `tensorboard`).
      wandb: also log to Weights & Biases (extra `wandb`).
      config: of the run, shown by Weights & Biases.

    Raises:
      ConfigError: the package that `tensorboard` or `wandb` needs is not installed, or metrics.jsonl has a line that no
        run wrote.
      OSError: the directory cannot be written.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        resume_step: int = 0,
        tensorboard: bool = False,
        wandb: bool = False,
        config: Mapping[str, Any],
    ):
        self._file = self._board = self._run = self._object = None
        self.evaluations: list[tuple[int, Any]] = []
        if jax.process_index() != 0:
            return
        remote = "://" in str(directory)
        directory = epath.Path(directory)
        board_class, wandb_module = import_extras(tensorboard=tensorboard, wandb=wandb)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / METRICS_FILE
        kept = _drop_after(path, resume_step)
        self.evaluations = [(line["step"], line.get("eval/tokens")) for line in kept if "eval/loss" in line]
        if remote:
            self._object = path
            self._file = tempfile.TemporaryFile("w+", encoding="utf-8")
            self._file.write(path.read_text() if path.exists() else "")
        else:
            self._file = path.open("a", encoding="utf-8")
        if board_class is not None:
            # Hides what an interrupted run wrote beyond the step that this one goes on from.
            self._board = board_class(str(directory), purge_step=resume_step + 1)
        if wandb_module is not None:
            # The id is kept in the run's directory: a resumed run goes on in its own chart.
            identity = directory / "wandb_id"
            if not identity.exists():
                identity.write_text(secrets.token_hex(4))
            self._run = wandb_module.init(
                project="gqe_jax",
                name=directory.name if remote else Path(directory).absolute().name,
                id=identity.read_text(),
                resume="allow",
                dir=tempfile.gettempdir() if remote else str(directory),
                config=dict(config),
            )

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Appends one line. Lists (router load by layer, group, expert) stay in metrics.jsonl; numbers go everywhere.

        Args:
          step: steps taken when the metrics were measured.
          metrics: plain numbers, strings or nested lists of numbers; arrays are converted.
        """
        if self._file is None:
            return
        plain = {name: _plain(value) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step} | plain) + "\n")
        self._file.flush()
        numbers = {name: value for name, value in plain.items() if isinstance(value, int | float)}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._run is not None:
            self._run.log(numbers, step=step)

    def upload(self) -> None:
        """Replaces the object in the bucket. Done before each checkpoint, no line of a step before it can be lost."""
        if self._object is not None:
            self._file.seek(0)
            self._object.write_text(self._file.read())

    def close(self) -> None:
        """Flushes and closes everything."""
        self.upload()
        for sink, finish in ((self._file, "close"), (self._board, "close"), (self._run, "finish")):
            if sink is not None:
                getattr(sink, finish)()
        self._file = self._board = self._run = self._object = None


def read_metrics(directory: str | Path) -> list[dict[str, Any]]:
    """Returns what the lines of a run's metrics.jsonl say; see `record.metric_lines`."""
    return [record for _, record in metric_lines(epath.Path(directory) / METRICS_FILE)]


def _drop_after(path: epath.Path, step: int) -> list[dict[str, Any]]:
    """Keeps the lines of steps up to `step`, replacing the file in one rename; returns what they say."""
    if not path.exists():
        return []
    kept = [(line, record) for line, record in metric_lines(path) if record["step"] <= step]
    new = path.with_name(path.name + ".new")
    new.write_bytes(b"".join(line + b"\n" for line, _ in kept))
    new.replace(path)
    return [record for _, record in kept]


def _plain(value: Any) -> Value:
    """Numbers and nested lists of numbers as JSON has them: NaN and infinities, which it has not, become None."""
    if value is None or isinstance(value, str):
        return value
    if np.ndim(value):
        return [_plain(part) for part in np.asarray(value)]
    number = np.asarray(value).item()
    return number if math.isfinite(number) else None


def import_extras(*, tensorboard: bool, wandb: bool) -> tuple[Any, Any]:
    """Returns the class of TensorBoard's writer and the module of Weights & Biases; None in place of what is not asked
    for.

    Raises:
      ConfigError: the package that `tensorboard` or `wandb` needs is not installed.
    """
    board_class = _import_extra("tensorboard", "tensorboardX").SummaryWriter if tensorboard else None
    return board_class, _import_extra("wandb", "wandb") if wandb else None


def _import_extra(extra: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"train.{extra}=True needs the package {module}, which is not installed ({error}): "
            f"pip install 'gqe_jax[{extra}]', or set train.{extra}=False"
        ) from error


class Stopwatch:
    """Tokens per second and time left, from training time alone: the caller leaves out compilation, evaluations, saves.

    The rate is that of the time since the last `lap`; the time left uses the mean of the run, which jumps less.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._seconds = 0.0

    def lap(self, steps: int, tokens: int, seconds: float, steps_left: int) -> tuple[float, float]:
        """Takes in a piece of training.

        Args:
          steps: taken in this piece.
          tokens: trained on in this piece.
          seconds: it took.
          steps_left: until the end of the run.

        Returns:
          Tokens per second of this piece, and seconds left.
        """
        self._steps += steps
        self._seconds += seconds
        return tokens / seconds, steps_left * self._seconds / self._steps


def progress_line(
    step: int,
    steps: int,
    *,
    loss: float,
    bits_per_byte: float | None,
    learning_rate: float,
    gradient_norm: float,
    tokens_per_second: float,
    seconds_left: float,
    note: str | None,
    mfu: float | None,
    data_wait: float = 0.0,
) -> str:
    """Returns one line of fixed width for the terminal and the log file.

    Args:
      step: steps taken.
      steps: of the run.
      loss: nats per token.
      bits_per_byte: of text; None where the tokenizer's bytes per token are not known.
      learning_rate: of the step.
      gradient_norm: global norm before clipping.
      tokens_per_second: of training alone.
      seconds_left: until the end of the run.
      note: of the model's kind of attention (`AttentionConfig.progress_note`), or None.
      mfu: model FLOP utilisation; None where the devices' peak is not known.
      data_wait: share of the training time spent waiting for data; shown above 1%.
    """
    fields = [
        f"step {step:>{len(str(steps))}}/{steps}",
        f"loss {loss:7.4f}",
        "bits/byte " + ("     -" if bits_per_byte is None else f"{bits_per_byte:6.4f}"),
        f"lr {learning_rate:.1e}",
        f"grad {gradient_norm:8.3g}",
        f"{tokens_per_second:>9,.0f} tok/s",
        f"{format_duration(seconds_left):>6} left",
    ]
    if note is not None:
        fields.append(note)
    if mfu is not None:
        fields.append(f"mfu {mfu:6.1%}")
    if data_wait > 0.01:
        fields.append(f"data wait {data_wait:4.0%}")
    return "  ".join(fields)


def format_duration(seconds: float) -> str:
    """At most 6 characters below 100 days: 42s, 3m05s, 2h07m, 12d03h."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if hours < 1:
        return f"{minutes}m{seconds % 60:02d}s"
    if days < 1:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{days}d{hours % 24:02d}h"
