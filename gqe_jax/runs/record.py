"""What a run has written beside its checkpoints, read back: its configuration and its metrics."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from gqe_jax.config import ConfigError, RunConfig
from gqe_jax.config_dict import build

METRICS_FILE = "metrics.jsonl"
DIMENSIONS = {
    "loss": 0, "eval/loss": 0, "load": 3, "eval/load": 3, "entropy": 1, "heads": 2, "eval/by_position": 2
}  # fmt: skip
"""Metric → its dimensions, for what is drawn: load [L, G, M], entropy [L], heads [L, G], rows of first, last, loss and
tokens."""


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a run's directory says.

    Attributes:
      directory: of the run.
      config: from config.json.
      metrics: lines of metrics.jsonl, by ascending step; each has "step".
    """

    directory: epath.Path
    config: RunConfig
    metrics: list[dict[str, Any]]

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, finite values) of the lines that have the metric `name`."""
        points = [(line["step"], line[name]) for line in self.metrics if isinstance(line.get(name), int | float)]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return np.asarray(steps, np.int64), np.asarray(values, np.float64)

    def last(self, prefix: str) -> dict[str, Any]:
        """Returns the last line of training (prefix "") or of evaluation ("eval/"), by the names of its metrics."""
        key = prefix + "loss"
        return next((line for line in reversed(self.metrics) if key in line), {})

    def load(self) -> np.ndarray | None:
        """[L, G, M], share of tokens that selected each expert at the last logged step; None for dense attention."""
        loads = (line["load"] for line in reversed(self.metrics) if line.get("load") is not None)
        arrays = (np.asarray(load, np.float64) for load in loads)
        return next((load for load in arrays if np.isfinite(load).all()), None)

    def heads(self) -> list[tuple[int, np.ndarray]]:
        """(step, [L, G] query heads that read each KV head) of the logged steps that say so: key-driven attention."""
        found = [(line["step"], np.asarray(line["heads"], np.float64)) for line in self.metrics if line.get("heads")]
        return [(step, heads) for step, heads in found if heads.shape == found[-1][1].shape]


def read_run(directory: str | Path) -> RunRecord:
    """Reads config.json and metrics.jsonl; a last line that a kill cut short is left out.

    Raises:
      ConfigError: no such directory, none of a run, or files that cannot be understood.
    """
    directory = epath.Path(directory)
    if not directory.is_dir():
        raise ConfigError(f"--run={str(directory)!r} is not a directory: give the one that `gqe train --run` wrote")
    try:
        config = build(json.loads((directory / "config.json").read_bytes()))
    except FileNotFoundError:
        raise ConfigError(
            f"--run={str(directory)!r} has no config.json, so no run was started there: give the directory that "
            "`gqe train --run` wrote"
        ) from None
    except (ValueError, TypeError, AttributeError, RecursionError, OSError) as error:  # not JSON, or not our keys
        raise ConfigError(
            f"--run={str(directory)!r} has a config.json that is not one of a run ({error}): give the directory that "
            "`gqe train --run` wrote, or use the version of gqe_jax that wrote it"
        ) from error
    path = directory / METRICS_FILE
    try:
        metrics = [record for _, record in metric_lines(path, _check_drawn)]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): it must be the file that a run wrote") from error
    return RunRecord(directory, config, sorted(metrics, key=lambda line: line["step"]))


def metric_lines(
    path: epath.Path, check: Callable[[dict[str, Any]], None] = lambda line: None
) -> list[tuple[bytes, dict[str, Any]]]:
    """(line, what it says) of a run's metrics.jsonl, without a half-written last one; none if there is no such file.

    Args:
      path: of the file.
      check: raises ValueError, TypeError or OverflowError for metrics that cannot be used.

    Raises:
      ConfigError: a line, by its number, that is no object with a step, or that `check` refuses.
      OSError: the file cannot be read.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # a kill cut off what follows the last end
    read = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            step = record.get("step") if isinstance(record, dict) else None
            if type(step) is not int or not 0 <= step < 2**63:
                raise ValueError(f"its step is {step!r:.40}")
            check(record)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ConfigError(
                f"{path}, line {number}, is not a JSON object with a step and metrics ({error}): repair or remove that "
                f"line"
            ) from error
        read.append((line, record))
    return read


def _check_drawn(line: dict[str, Any]) -> None:
    """Raises ValueError, TypeError or OverflowError for metrics that are not what a run writes."""
    for name, value in line.items():
        if value is None or (isinstance(value, str | list) and name not in DIMENSIONS):
            continue
        array = np.asarray(value, np.float64)
        if array.ndim != DIMENSIONS.get(name, 0) or 0 in array.shape or np.isinf(array).any():
            raise ValueError(f"its {name:.40} is {value!r:.40}")
