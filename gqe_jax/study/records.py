"""The record of a cell: one small JSON file that says what was trained, with which code and data, and its result.

A record without a result is written before the cell is trained, so that a killed cell is continued by the same code.
Records alone make tables and plots; the runs with their checkpoints may be deleted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from gqe_jax.checked_json import OBJECT, TEXT, Rule, check_record, is_number, is_whole, read_object
from gqe_jax.config import ConfigError, RunConfig
from gqe_jax.config_dict import build, to_dict
from gqe_jax.runs.directory import differences
from gqe_jax.runs.record import RunRecord
from gqe_jax.study.definition import Cell, Study

FORMAT = 1
CELLS = "cells"  # folder of a study's records
POINTS = 200  # of a curve that are kept

NOT_TRAINING = {"aot", "bench", "cli", "configs", "convert", "plan", "pytorch", "study", "generate.py", "cost.py"}
"""What of gqe_jax no training run computes with. A cell's record holds its configuration, so `configs` is among it."""


def code_hash() -> str:
    """Returns a hash of the sources of gqe_jax that decide what a training run computes."""
    package = Path(__file__).parents[1]
    found = sorted(path.relative_to(package) for path in package.rglob("*.py"))
    digest = hashlib.sha256()
    for path in found:
        if path.parts[0] not in NOT_TRAINING:
            content = (package / path).read_bytes()
            digest.update(f"{path.as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Record:
    """A cell as its file tells it.

    Attributes:
      study, arm, seed: which cell it is.
      code, jax: hash of the sources (`code_hash`), and the version of JAX.
      data: hash of the prepared data (`PreparedData.digest`).
      config: of the run.
      result: None until the cell is finished; then

        loss, bits_per_byte: on all held-out text, nats per token.
        by_position: [first, last, loss, tokens] for each range of context (`heldout.PositionLoss`).
        tokens_per_second: of training, the median over its log.
        training, heldout: [tokens, loss] along the run; training losses are means between the points.
        load: [L, G, M] share of tokens that selected each expert on the held-out text; None for dense attention.
    """

    study: str
    arm: str
    seed: int
    code: str
    jax: str
    data: str
    config: RunConfig
    result: dict[str, Any] | None

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.seed}"


def started(study: Study, cell: Cell, code: str, data: str) -> Record:
    """Returns the record of a cell that is about to be trained."""
    return Record(study.name, cell.arm, cell.seed, code, importlib.metadata.version("jax"), data, cell.config, None)


def finished(record: Record, run: RunRecord) -> Record:
    """Returns the record with the result that the run's directory holds.

    Raises:
      ConfigError: the run has not come to its end, or is another one.
    """
    config, last = record.config, run.last("eval/")
    per_step = config.data.batch_size * config.model.context
    if last.get("step") != config.train.steps or "eval/by_position" not in last:
        raise ConfigError(
            f"{run.directory} has no evaluation of step {config.train.steps}, its last: train it on, or delete it"
        )
    if different := differences(run.config, config):
        raise ConfigError(f"{run.directory} is the run of another cell ({'; '.join(different)}): delete it")
    rates = run.series("tokens_per_second")[1]
    result = {
        "loss": last["eval/loss"],
        "bits_per_byte": last["eval/bits_per_byte"],
        "by_position": last["eval/by_position"],
        "tokens_per_second": float(np.median(rates)) if len(rates) else None,
        "training": _thinned(*run.series("loss"), per_step),
        "heldout": _thinned(*run.series("eval/loss"), per_step),
        "load": last["eval/load"],
    }
    return dataclasses.replace(record, result=_rounded(result))


def _thinned(steps: np.ndarray, losses: np.ndarray, tokens_per_step: int) -> list[list[float]]:
    """At most `POINTS` pairs of tokens and loss: means over neighbours, at the last of them."""
    parts = np.array_split(np.arange(len(steps)), min(POINTS, len(steps)) or 1)
    return [[int(steps[part[-1]]) * tokens_per_step, float(losses[part].mean())] for part in parts if len(part)]


def _rounded(value: Any) -> Any:
    """Floats with seven digits, which is what float32 sums are good for."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


# ---- on disk


def write(out: epath.Path, record: Record) -> None:
    """Writes the record into the study's folder, in one rename."""
    values = {"format": FORMAT, **vars(record), "config": to_dict(record.config)}
    path = out / CELLS / f"{record.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    # One line for each field, and no more, whatever a curve holds.
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items()]
    partial.write_text("{" + ",\n ".join(lines) + "}\n")
    partial.replace(path)


def _is_curve(value: Any, width: int) -> bool:
    rows = value if isinstance(value, list) and value else [None]
    return all(isinstance(row, list) and len(row) == width and all(map(is_number(0)[0], row)) for row in rows)


def _is_load(value: Any) -> bool:
    try:
        return value is None or np.asarray(value, np.float64).ndim == 3
    except (ValueError, TypeError):
        return False


_NUMBER = is_number(0)
_RULES: dict[str, Rule] = {
    "format": (lambda v: v == FORMAT, f"{FORMAT}, the form that this version reads"),
    "study": TEXT,
    "arm": TEXT,
    "seed": is_whole(0),
    "code": TEXT,
    "jax": TEXT,
    "data": TEXT,
    "config": OBJECT,
    "result": (lambda v: v is None or type(v) is dict, "an object, or null"),
}
_RESULT_RULES: dict[str, Rule] = {
    "loss": _NUMBER,
    "bits_per_byte": _NUMBER,
    "by_position": (lambda v: _is_curve(v, 4), "a list of [first, last, loss, tokens]"),
    "tokens_per_second": (lambda v: v is None or _NUMBER[0](v), "a number, or null"),
    "training": (lambda v: _is_curve(v, 2), "a list of [tokens, loss]"),
    "heldout": (lambda v: _is_curve(v, 2), "a list of [tokens, loss]"),
    "load": (_is_load, "a list by layer, group and expert, or null"),
}
_REMEDY = "delete the file and the cell's run, and `gqe study run` makes both again"


def read_records(out: epath.Path, study: Study) -> dict[tuple[str, int], Record]:
    """Reads the records in the study's folder: (arm, seed) → record.

    Raises:
      ConfigError: the folder belongs to another study, or a record is none.
    """
    if out.is_file():
        raise ConfigError(f"--out={str(out)!r} is a file: name the folder of the study")
    folder = out / CELLS
    records = [_read(path) for path in sorted(folder.glob("*.json"))]
    others = sorted({record.study for record in records if record.study != study.name})
    if others:
        raise ConfigError(
            f"--out={str(out)!r} is the folder of another study, {', '.join(others)}, not of {study.name}: give each "
            f"study a folder of its own"
        )
    if not records and out.exists() and any(out.iterdir()) and not folder.is_dir():
        raise ConfigError(f"--out={str(out)!r} holds files, but no study's {CELLS}/: give a folder of its own")
    return {(record.arm, record.seed): record for record in records}


def _read(path: epath.Path) -> Record:
    values = check_record(read_object(path, _REMEDY), _RULES, path, _REMEDY)
    if values["result"] is not None:
        check_record(values["result"], _RESULT_RULES, f"{path}, result:", _REMEDY)
    if not re.fullmatch(rf"{re.escape(values['arm'])}-{values['seed']}", path.stem):
        raise ConfigError(f"{path} says that it is cell {values['arm']}-{values['seed']}: {_REMEDY}")
    try:
        config = build(values["config"])
    except ConfigError as error:
        raise ConfigError(f"{path}: its config is none that this version reads ({error}): {_REMEDY}") from error
    del values["format"]
    return Record(**values | {"config": config})


def check_same(records: Sequence[Record], code: str, data: str, out: epath.Path) -> None:
    """Refuses to add cells to those of other code or other data.

    Raises:
      ConfigError: some records have another hash; they are named.
    """
    for what, field, now in (("code", "code", code), ("data", "data", data)):
        changed = [record for record in records if getattr(record, field) != now]
        if changed:
            hashes = ", ".join(sorted({getattr(record, field)[:16] for record in changed}))
            names = ", ".join(record.name for record in changed[:8]) + (", …" if len(changed) > 8 else "")
            raise ConfigError(
                f"{len(changed)} cell(s) in {str(out)!r} were trained with other {what} (hash {hashes}, now "
                f"{now[:16]}): {names}. Go on with the {what} that they had, or take another --out for all cells"
            )


def check_settings(records: Sequence[Record], planned: Sequence[Cell], out: epath.Path) -> None:
    """Refuses cells whose settings the study file has changed since they were begun.

    Raises:
      ConfigError: it lists every such cell with what differs.
    """
    known = {(record.arm, record.seed): record.config for record in records}
    changed = []
    for cell in planned:
        if saved := known.get((cell.arm, cell.seed)):
            changed += [f"{cell.name}: {line}" for line in differences(saved, cell.config)]
    if changed:
        raise ConfigError(
            f"cells in {str(out)!r} were begun with other settings: {'; '.join(changed)}. Take the settings back, "
            f"delete these cells' records and runs, or take another --out"
        )
