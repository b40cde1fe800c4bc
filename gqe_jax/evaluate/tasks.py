"""`gqe eval --tasks`: scores on the tasks of EleutherAI's lm-eval, with data from the Hub or from local files."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import os
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gqe_jax.config import ConfigError, nearest

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

SPLIT_FIELDS = ("training_split", "validation_split", "test_split", "fewshot_split")
SPLIT_NAMES = {"train": ("training",), "validation": ("valid", "val", "dev")}  # what else a split's file may be called
SUFFIXES = (".jsonl", ".json")
BOOTSTRAP = 1000  # resamples, for standard errors that have no formula
SEEDS = {"random_seed": 0, "numpy_seed": 1234, "fewshot_seed": 1234}  # lm-eval's own


def score(
    model: LM,
    names: Sequence[str],
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """Scores a model on tasks, as `lm_eval.simple_evaluate` does, but for torch, which is not imported.

    Args:
      model: a `JaxLM`, or any other of lm-eval's.
      names: tasks, groups or tags of lm-eval.
      data_dir: folder of JSON files that stand in for the Hub's data sets, found by name (`local_splits`).
      limit: of the items of each task; None: all.
      num_fewshot: solved examples before each item; None: as many as the task says.

    Returns:
      lm-eval's results: "results" by task, "configs", "versions", ..., and "samples", the items with their scores.

    Raises:
      ConfigError: lm-eval is missing, a name is unknown, data are not there or do not fit, numbers out of range.
    """
    check(data_dir, limit, num_fewshot)
    from lm_eval import evaluate

    # Some tasks shuffle their choices when they are loaded.
    random.seed(SEEDS["random_seed"])
    np.random.seed(SEEDS["numpy_seed"])
    loaded = load_tasks(names, data_dir, num_fewshot)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval would bootstrap in forks: JAX's threads do not survive
    results = evaluate(model, loaded, limit=limit, bootstrap_iters=BOOTSTRAP)
    settings = {"limit": limit, "num_fewshot": num_fewshot, "bootstrap_iters": BOOTSTRAP, **SEEDS}
    return results | {
        "config": {"model": type(model).__name__, **settings},
        "date": datetime.datetime.now(datetime.UTC).timestamp(),
        "lm_eval_version": importlib.metadata.version("lm_eval"),
    }


# ---------------------------------------------------------------------------- tasks


def load_tasks(
    names: Sequence[str], data_dir: str | Path | None = None, num_fewshot: int | None = None
) -> dict[str, Any]:
    """Returns the tasks and their data, as `TaskManager.load` returns them: "tasks", "groups" and "group_map" by name.

    Raises:
      ConfigError: as `score`.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in names:
        if name not in manager.task_index:
            raise ConfigError(
                f"--tasks: lm-eval has no task, group or tag {name!r} ({_nearest_tasks(name, manager)}); "
                f"`lm_eval ls tasks` lists all"
            )
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    lacking: dict[str, str] = {}  # task → the split of its solved examples, if there is no file for it
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            leaves, files = _leaves(name, manager), []
            if twice := sorted(leaves & loaded["tasks"].keys()):
                raise ConfigError(f"--tasks: {', '.join(twice)} is named twice, the second time by {name}: leave one")
            _check_kind(leaves, manager)
            if data_dir is not None:
                for leaf in sorted(leaves):
                    files += _repoint(leaf, manager, Path(data_dir), Path(directory), lacking)
                own = TaskManager(include_path=directory, include_defaults=False)
                manager.task_index.update({leaf: own.task_index[leaf] for leaf in leaves})
            for kind, found in _load(name, manager, files).items():
                loaded[kind] |= found
    for name, task in loaded["tasks"].items():
        if task.get_config("num_fewshot") is None or (num_fewshot is not None and task.get_config("num_fewshot") != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=SEEDS["fewshot_seed"])
        if name in lacking and (count := task.get_config("num_fewshot")):  # lm-eval would take them from what it scores
            raise ConfigError(
                f"--data-dir={str(data_dir)!r} has no file for split {lacking[name]} of task {name}, from which the "
                f"{count} solved examples before each item come: add {name}_{lacking[name]}{SUFFIXES[0]}, or leave "
                f"them out with --num-fewshot 0"
            )
    return loaded


def _check_kind(leaves: set[str], manager: TaskManager) -> None:
    for name in sorted(leaves & manager.task_index.keys()):
        definition = manager.task_index[name].cfg
        if definition.get("unsafe_code"):
            raise ConfigError(
                f"--tasks: {name} runs code that the model writes, which gqe eval does not do: leave it out, or export "
                f"the model and score it with lm-eval itself"
            )
        if definition.get("doc_to_image") or definition.get("doc_to_audio"):
            raise ConfigError(f"--tasks: {name} is not of text alone, which the model cannot read: leave it out")


def _nearest_tasks(name: str, manager: TaskManager) -> str:
    """Returns names close to the one given, also those that begin alike, and never all fourteen thousand."""
    alike = [known for known in manager.all_tasks if known.startswith(name)][:8]
    if alike:
        return f"there is {', '.join(alike)}"
    hint = nearest(name, manager.all_tasks)
    return hint if hint.startswith("did") else "none is near"


def _load(name: str, manager: TaskManager, files: list[Path]) -> dict[str, Any]:
    """Loads the tasks; `files` replace the Hub's data sets, and are empty where the Hub's are used."""
    try:
        return manager.load([name])
    except Exception as error:  # lm-eval, its tasks' own code and the data-set library raise anything
        reason = f"{type(error).__name__}: {error}"
        if not files:
            raise ConfigError(
                f"--tasks: the data of {name} could not be read from the Hub ({reason}): connect to it, or give local "
                f"files with --data-dir"
            ) from error
        raise ConfigError(
            f"--data-dir: {name} could not be made of local files ({reason}): they must hold one object per line, with "
            f"the fields that lm-eval's task reads; {'; '.join(map(_describe, files[:5]))}"
        ) from error


def _describe(path: Path) -> str:
    """Returns the file and the fields of its first item, for an error message."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        first = next((line for line in lines if line.strip()), "")
    try:
        item = json.loads(first)
    except ValueError:
        return f"{path.name} does not begin with a JSON object on a line of its own"
    return f"{path.name} has the fields {', '.join(item) if isinstance(item, dict) else '(none)'}"


def _leaves(name: str, manager: TaskManager) -> set[str]:
    """Returns the tasks that a name of a task, a tag or a group stands for; also those that a group defines by
    itself."""
    entry = manager.task_index.get(name)
    if entry is None or entry.kind.name not in ("TAG", "GROUP"):
        return {name}
    members = entry.tags if entry.kind.name == "TAG" else entry.cfg["task"]
    names = [member if isinstance(member, str) else member.get("task", member.get("group")) for member in members]
    return set().union(*(_leaves(member, manager) for member in names))


# ---------------------------------------------------------------------------- local data


def _repoint(name: str, manager: TaskManager, data_dir: Path, directory: Path, lacking: dict[str, str]) -> list[Path]:
    """Writes a task's definition anew into `directory`: lm-eval's own, but for the data's files, which are returned.

    If the split that the solved examples come from has no file, `lacking` receives it.
    """
    entry = manager.task_index.get(name)
    if entry is None or entry.kind.name != "TASK":
        raise ConfigError(
            f"--data-dir: task {name} is made by code or by a group of its own, so that no files can be given for it: "
            f"leave out the task or --data-dir"
        )
    splits = {field: entry.cfg.get(field) for field in SPLIT_FIELDS}
    files = local_splits(name, [split for split in splits.values() if split is not None], data_dir)
    used = {field: split if split in files else None for field, split in splits.items()}
    if used["validation_split"] is None and used["test_split"] is None:
        wanted = [splits[field] for field in ("validation_split", "test_split") if splits[field] is not None]
        looked = " or ".join(f"{name}_{split}{SUFFIXES[0]}" for split in wanted)
        there = sorted(path.name for path in data_dir.iterdir())
        raise ConfigError(
            f"--data-dir={str(data_dir)!r} has no file for task {name}: looked for {looked} (also with '-' or '.' for "
            f"'_', as {name}/{wanted[0]}{SUFFIXES[0]}, ending in {SUFFIXES[1]}, and with valid, val or dev for "
            f"validation); there is {', '.join(there[:20]) + (', ...' if len(there) > 20 else '') or 'nothing'}"
        )
    examples = splits["fewshot_split"] or splits["training_split"] or splits["validation_split"]
    if examples is not None and examples not in files and "samples" not in (entry.cfg.get("fewshot_config") or {}):
        lacking[name] = examples
    definition = {
        "include": str(entry.yaml_path),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "custom_dataset": None,
        "dataset_kwargs": {"data_files": {split: str(path.resolve()) for split, path in files.items()}},
        **used,
    }
    (directory / f"{name}.yaml").write_text(json.dumps(definition))  # JSON is YAML
    return list(files.values())


def local_splits(task: str, splits: Sequence[str], data_dir: Path) -> dict[str, Path]:
    """Split → its file, for those of a task's splits that `data_dir` has one for.

    Split `validation` of `piqa` is `piqa_validation.jsonl`; or with `-` or `.` for `_`, or `piqa/validation.jsonl`; or
    ending in `.json`; or with one of `SPLIT_NAMES` for the split's name, unless the task has a split of that name.

    Raises:
      ConfigError: several files for one split.
    """
    files = {}
    for split in dict.fromkeys(splits):
        names = [split, *(name for name in SPLIT_NAMES.get(split, ()) if name not in splits)]
        found = [
            path
            for name in names
            for sign in "_-./"
            for suffix in SUFFIXES
            if (path := data_dir / f"{task}{sign}{name}{suffix}").is_file()
        ]
        if len(found) > 1:
            raise ConfigError(
                f"--data-dir={str(data_dir)!r} has several files for split {split} of task {task} "
                f"({', '.join(path.name for path in found)}): leave one of them"
            )
        if found:
            files[split] = found[0]
    return files


# ---------------------------------------------------------------------------- a run


def score_run(
    run: str,
    names: Sequence[str],
    *,
    step: int | None,
    batch_size: int,
    data_dir: str | None,
    limit: int | None,
    num_fewshot: int | None,
    out: str | None,
) -> None:
    """Scores a run's model, prints lm-eval's table and writes its JSON.

    Args:
      run: directory of the run.
      step: of the checkpoint; None: the newest.
      batch_size: rows that are computed together.
      out: the file to write; None: one named by the time, in the run's `lm_eval/`.
      names, data_dir, limit, num_fewshot: as `score` takes them.

    Raises: as `score` and `load_model`.
    """
    from lm_eval.utils import handle_non_serializable, make_table

    from gqe_jax.evaluate.lm_eval_model import JaxLM
    from gqe_jax.runs.load import load_model

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # the results say how tasks were set up
    trained = load_model(run, step)
    results = score(
        JaxLM(trained, batch_size=batch_size), names, data_dir=data_dir, limit=limit, num_fewshot=num_fewshot
    )
    results["config"] |= {"run": run, "step": trained.step, "batch_size": batch_size}
    del results["samples"]
    time = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H-%M-%S.%f")
    path = Path(out) if out is not None else Path(run) / "lm_eval" / f"results_{time}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(path.name + ".partial")
    written.write_text(json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n")
    written.replace(path)
    print(f"{run}, step {trained.step}" + (f", the first {limit} items of each task" if limit else ""))
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    print(f"results: {path}")


def check(data_dir: str | Path | None, limit: int | None, num_fewshot: int | None) -> None:
    """Raises ConfigError where `score` would, as far as it can be seen before a model is loaded."""
    for option, value, least in (("--limit", limit, 1), ("--num-fewshot", num_fewshot, 0)):
        if value is not None and value < least:
            raise ConfigError(f"{option}={value} must be at least {least}: raise it, or leave it out")
    if data_dir is not None and not Path(data_dir).is_dir():
        raise ConfigError(f"--data-dir={str(data_dir)!r} is no folder: name one that holds the tasks' JSON files")
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--tasks needs lm-eval, which cannot be imported ({error}): pip install 'gqe_jax[eval]'"
        ) from error
