"""Checkpoints: asynchronous saves that a kill cannot spoil, restores that say what does not fit or is damaged.

A checkpoint is the directory `<step>/` with the items `params`, `opt_state` and `train` (arrays, in Orbax's format),
`data`, `config`, `tokenizer` and `format` (JSON), and `integrity.json`: size and CRC-32 of every file. `opt_state` is
missing where a model was imported: training then starts with a fresh optimizer. A checkpoint appears under its name
in one rename after all of that is written, so a run killed at any moment leaves complete checkpoints only; what was
half-written is named `<step>.orbax-checkpoint-tmp` and is cleared away by the next run that saves.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from gqe_jax.checked_json import read_object, shown
from gqe_jax.config import ConfigError
from gqe_jax.processes.joined import every_text, first_says
from gqe_jax.runs import integrity
from gqe_jax.runs.state import FORMAT

SPARING_PIECE = 1 << 26  # bytes

_JSON_FILE = "metadata"  # of Orbax, in the folder of an item


class CheckpointDamaged(ConfigError):
    """A checkpoint's files are not the ones that were written."""


class CheckpointFailed(OSError):
    """A checkpoint could not be written."""


def least_bytes(size: int) -> int:
    """Returns the least that parameters of `size` bytes take in a checkpoint: compressed, those of trained models take
    more."""
    return size // 3


@contextlib.contextmanager
def unread_arrays_named(checkpoint: epath.Path) -> Iterator[None]:
    """Turns whatever Orbax and TensorStore raise for arrays that nobody saved into a ConfigError of one line."""
    try:
        yield
    except (ConfigError, jax.errors.JaxRuntimeError):  # which say what does not fit, or that memory is short
        raise
    except Exception as error:
        raise ConfigError(
            f"the arrays of {checkpoint} cannot be read ({cause_of(error)[:300]}): copy the checkpoint again from "
            f"where it came from"
        ) from error


def cause_of(error: BaseException | None) -> str:
    """Returns one line of what Orbax raised, by its cause in the operating system where that is known."""
    system = re.search(r"os_error_code='(\d+)'", str(error))  # at the end of a page from the storage library
    return os.strerror(int(system.group(1))) if system else (str(error) or repr(error)).splitlines()[0]


class Checkpoints:
    """Holds the checkpoints of one run. It is a context manager: leaving it waits for the save in progress.

    Opening changes nothing on disk, so that others may read the checkpoints of a run that is being trained.

    Args:
      directory: where the steps are; made by the first save.
      keep: how many of the newest stay; None: all.
      every: interval, in steps, of `should_save`; None: never.
      sparing: save one array after the other, in pieces and into files of their own, by one process. It takes little
        memory beyond the arrays; otherwise all are compressed at a time and collected in few files.
    """

    def __init__(
        self, directory: str | Path, *, keep: int | None = None, every: int | None = None, sparing: bool = False
    ):
        _quiet_orbax()
        self._remote = "://" in str(directory)
        self.directory = epath.Path(directory) if self._remote else epath.Path(Path(directory).absolute())
        self._keep = keep
        self._every = every
        self._sparing = sparing
        self._writer: _Writer | None = None
        self._saving: int | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.directory.is_dir():
            return []
        return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(self.directory))

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def newest_in_words(self) -> str:
        """Returns what there is to go on from, for a message."""
        newest = self.latest()
        if newest is None:
            return "there is no complete checkpoint yet, so the same command starts from the beginning"
        return f"the checkpoint of step {newest} is complete, and the same command goes on from it"

    def should_save(self, step: int) -> bool:
        """Says whether `step` is due by the interval; what makes saving impossible shows here, at the first step."""
        with self._failures_named(step):
            self._open_writer()
        return self._every is not None and step % self._every == 0

    def save(
        self,
        step: int,
        *,
        params: Any,
        opt_state: Any | None,
        train: Any,
        data: Mapping[str, Any],
        config: Mapping[str, Any],
        tokenizer: Mapping[str, bytes],
        wait: bool = False,
    ) -> bool:
        """Starts to save; the arrays may be donated or changed as soon as this returns.

        Args:
          step: number of steps taken.
          params: parameters, tree of arrays.
          opt_state: optimizer state, tree of arrays; None: the checkpoint is one of parameters alone.
          train: the rest of the training state, tree of arrays.
          data: JSON-serialisable: seed, step, and the position in the data as `Position.to_json` gives it.
          config: resolved configuration, JSON-serialisable.
          tokenizer: files of the tokenizer, by name.
          wait: return only when the checkpoint is complete.

        Returns:
          False if `step` is saved already.

        Raises:
          CheckpointFailed: this save cannot start, or the one before it failed.
        """
        self.wait()
        arrays = {"params": params, "opt_state": opt_state, "train": train}
        arrays = {name: tree for name, tree in arrays.items() if tree is not None}
        if first_says("saved" if step in self.steps() else ""):
            return False
        files = {name: base64.b64encode(content).decode("ascii") for name, content in tokenizer.items()}
        texts = {"data": dict(data), "config": dict(config), "tokenizer": files, "format": {"version": FORMAT}}
        items = {name: ocp.args.StandardSave(tree, self._pieces(tree)) for name, tree in arrays.items()}
        items |= {name: ocp.args.JsonSave(value) for name, value in texts.items()}
        self._saving = step
        with self._failures_named(step):
            writer = self._open_writer()
            self._check_space(params)
            writer.save(step, args=ocp.args.Composite(**items), force=True)
        if wait:
            self.wait()
        return True

    def wait(self) -> None:
        """Returns when no save is in progress.

        Raises:
          CheckpointFailed: the save failed.
        """
        if self._writer is not None:
            with self._failures_named(self._saving):
                self._writer.wait_until_finished()

    def close(self) -> None:
        """Waits for the save in progress and releases its threads.

        Raises:
          CheckpointFailed: the save failed.
        """
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with self._failures_named(self._saving):
                writer.close()

    def read_config(self, step: int) -> dict[str, Any]:
        """Returns the configuration saved with `step`."""
        return self._read_json(step, "config")

    def read_tokenizer(self, step: int) -> dict[str, bytes]:
        """Returns the tokenizer's files, by name, saved with `step`."""
        files = self._read_json(step, "tokenizer")
        try:
            return {name: base64.b64decode(content, validate=True) for name, content in files.items()}
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"the tokenizer of step {step} in {self.directory} is none that was saved ({error}): copy the "
                f"checkpoint again from where it came from"
            ) from error

    def read_format(self, step: int) -> int:
        """Returns the number of the form in which `step` was written.

        Raises:
          ConfigError: a newer version of gqe_jax wrote it, in a form that this one cannot read.
        """
        form = self._read_json(step, "format").get("version") if self._has(step, "format") else 1
        if type(form) is not int or not 1 <= form <= FORMAT:
            raise ConfigError(
                f"the checkpoint of step {step} in {self.directory} has format {shown(form)}, but this gqe_jax reads "
                f"formats 1 to {FORMAT}: use the newer version of gqe_jax that wrote it"
            )
        return form

    def has_optimizer(self, step: int) -> bool:
        """Says whether `step` holds an optimizer state, and not parameters alone."""
        return self._has(step, "opt_state")

    def _has(self, step: int, item: str) -> bool:
        """Tells whether the item was written; locally the record decides, as a recorded item that is gone is damage."""
        root = self.directory / str(step)
        self.verify(step, items=())
        found = (root / item).is_dir() if self._remote else item in integrity.recorded_items(Path(root))
        return bool(first_says(item if found else ""))

    def read_data(self, step: int) -> dict[str, Any]:
        """Seed, step and position in the data, saved with `step`."""
        return self._read_json(step, "data")

    def restore(self, step: int, *, params: Any, opt_state: Any = None, train: Any = None) -> dict[str, Any]:
        """Returns the arrays of `step`, on the mesh of the abstract trees (any mesh, not only the one that saved).

        Only the items given are read.

        Args:
          step: one of `steps()`.
          params: tree of `jax.ShapeDtypeStruct` with shardings.
          opt_state: the same, or None to leave it out.
          train: the same, or None to leave it out.

        Returns:
          The items given, by name.

        Raises:
          ConfigError: shapes, dtypes or names differ from the checkpoint's; every difference is listed.
          CheckpointDamaged: a file of these items is missing or is not what was written.
        """
        abstract = {"params": params, "opt_state": opt_state, "train": train}
        abstract = {name: tree for name, tree in abstract.items() if tree is not None}
        self.verify(step, items=tuple(abstract))
        items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        with unread_arrays_named(self.directory / str(step)):
            self._check_fit(step, abstract)
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
                return dict(reader.restore(self.directory / str(step), args=ocp.args.Composite(**items)).items())

    def verify(self, step: int, items: Sequence[str] | None = None) -> None:
        """Compares the files of `items` (None: of all) with the record made when they were written; reads each once.

        Several processes, which have to call together, read a part each and raise the same.

        Raises:
          CheckpointDamaged: naming files, what is wrong with them and the remedy.
          ConfigError: there is no such step.
        """
        if step not in self.steps():
            known = ", ".join(map(str, self.steps())) or "none yet"
            raise ConfigError(f"no checkpoint of step {step} in {self.directory}: choose one that is there ({known})")
        if self._remote:
            return
        problems = integrity.problems(
            Path(self.directory) / str(step), items, part=jax.process_index(), parts=jax.process_count()
        )
        found = {problem: None for text in every_text(json.dumps(problems)) for problem in json.loads(text)}
        if found:
            raise self._damaged(step, list(found))

    def set_aside_damaged(self, newest: int) -> list[epath.Path]:
        """Sets aside the damaged checkpoint of `newest`, and those before it down to the first that is whole.

        Returns:
          Their new paths; they are kept and can be renamed back.

        Raises:
          CheckpointDamaged: none before it is whole, and none has been set aside.
        """
        damaged = [newest]
        for step in sorted((step for step in self.steps() if step < newest), reverse=True):
            try:
                self.verify(step)
            except CheckpointDamaged:
                damaged.append(step)
            else:
                return [self._set_aside(step) for step in damaged]
        raise CheckpointDamaged(
            f"no checkpoint in {self.directory} is whole (those of steps {', '.join(map(str, sorted(damaged)))} are "
            f"damaged), and all are where they were: copy one back from a backup, or train anew in another directory"
        )

    def _set_aside(self, step: int) -> epath.Path:
        source = self.directory / str(step)
        name = ""
        if jax.process_index() == 0:
            taken = {path.name for path in self.directory.iterdir()}
            names = (f"{step}.set_aside" + (f".{count}" if count else "") for count in range(len(taken) + 1))
            name = next(name for name in names if name not in taken)
            source.rename(source.with_name(name))
        name = first_says(name)
        if self._writer is not None:
            self._writer.reload()
        return source.with_name(name)

    def _open_writer(self) -> _Writer:
        if self._writer is None:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep,
                cleanup_tmp_directories=True,
                async_options=ocp.options.AsyncOptions(
                    post_finalization_callback=None if self._remote else self._write_record
                ),
            )
            handlers = None
            if self._sparing:
                handlers = {name: _sparing_handler() for name in ("params", "opt_state", "train")}
                handlers |= {name: ocp.JsonCheckpointHandler() for name in ("data", "config", "tokenizer", "format")}
            self._writer = _Writer(self.directory, options=options, item_handlers=handlers)
        return self._writer

    def _pieces(self, tree: Any) -> Any:
        piece = ocp.SaveArgs(chunk_byte_size=SPARING_PIECE)
        return jax.tree.map(lambda _: piece, tree) if self._sparing else None

    def _write_record(self) -> None:
        # Orbax calls this on the primary process, in the saving thread, when all processes have written everything and
        # before the rename that makes the step visible: no kill can come between a checkpoint and its record.
        integrity.write_record(Path(self.directory) / f"{self._saving}{ocp.path.atomicity.TMP_DIR_SUFFIX}")

    def _check_space(self, params: Any) -> None:
        # A write that fails half-way fails safely too, but only after minutes. It is as large as the one before.
        if self._remote:
            return
        newest = self.latest()
        size = 0 if newest is None else integrity.recorded_bytes(Path(self.directory) / str(newest))
        size = size or least_bytes(sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
        free = shutil.disk_usage(self.directory).free
        if found := first_says(f"{size / 1e9:.3g} GB and the disk has {free / 1e9:.3g} GB left" if free < size else ""):
            raise OSError(f"it takes {found}")

    @contextlib.contextmanager
    def _failures_named(self, step: int | None) -> Iterator[None]:
        try:
            yield
        # Orbax reports a failed write as OSError, ValueError, TimeoutError or plain Exception, by where it happened.
        except Exception as error:
            last = "the directory cannot be read"
            with contextlib.suppress(OSError):
                last = self.newest_in_words()
            raise CheckpointFailed(
                f"could not save the checkpoint of step {step} in {self.directory}: {cause_of(error)}; {last}. Free "
                f"disk space or make the directory writable first"
            ) from error

    def _read_json(self, step: int, item: str) -> dict[str, Any]:
        self.verify(step, items=(item,))
        return read_object(self.directory / str(step) / item / _JSON_FILE)

    def _check_fit(self, step: int, abstract: Mapping[str, Any]) -> None:
        differences = []
        for item, tree in abstract.items():
            metadata = ocp.StandardCheckpointHandler().metadata(self.directory / str(step) / item)
            found, expected = _describe(item, metadata.tree), _describe(item, tree)
            for path in sorted(found.keys() | expected.keys()):
                if found.get(path) != expected.get(path):
                    differences.append(_explain(path, expected.get(path), found.get(path)))
        if differences:
            raise ConfigError(
                f"the checkpoint of step {step} in {self.directory} was made with another configuration "
                f"({len(differences)} differences); use the configuration saved with it, or another directory:\n  "
                + "\n  ".join(differences)
            )

    def _damaged(self, step: int, problems: Sequence[str]) -> CheckpointDamaged:
        more = f" and {len(problems) - 5} more files" if len(problems) > 5 else ""
        before = max((other for other in self.steps() if other < step), default=None)
        remedy = (
            "there is none before it, so copy the files back from a backup, or train anew in another directory"
            if before is None
            else f"copy the files back from a backup, or give `gqe train` the flag --previous-checkpoint, which sets "
            f"this checkpoint aside and goes on from the one before it (other commands: --step {before})"
        )
        return CheckpointDamaged(
            f"the checkpoint of step {step} in {self.directory} is damaged: {'; '.join(problems[:5])}{more}: {remedy}"
        )


class _Writer(ocp.CheckpointManager):
    """Does not ask JAX about preemption at each save: `train/stop.py` does, by numbers of its own."""

    def reached_preemption(self, step: int) -> bool:
        return False


def _sparing_handler() -> ocp.StandardCheckpointHandler:
    return ocp.StandardCheckpointHandler(save_concurrent_gb=1, use_ocdbt=False)


def _describe(item: str, tree: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{path: (dtype, shape)} of the arrays of a tree; paths as Orbax has them, where named tuples are dictionaries."""
    return {
        f"{item}/{jax.tree_util.keystr(path, simple=True, separator='/')}": (str(leaf.dtype), tuple(leaf.shape))
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _explain(path: str, expected: tuple[str, tuple] | None, found: tuple[str, tuple] | None) -> str:
    """Returns one difference between model and checkpoint, and the configuration keys that make it."""

    def show(entry: tuple[str, tuple] | None) -> str:
        return "nothing" if entry is None else f"{entry[0]}{list(entry[1])}"

    if expected is None or found is None:
        if path.startswith("opt_state"):
            check = "optimizer and what applies to its parameter"
        else:
            check = "model.attention (kind, variant, router.kind, qk_norm, bias) and model.tie_embeddings"
    elif expected[1] == found[1]:
        check = "model.param_dtype"
    elif "embed" in path or "lm_head" in path:
        check = "the tokenizer, model.vocab_size and model.d_model"
    elif len(expected[1]) == len(found[1]) > 1 and expected[1][1:] == found[1][1:]:
        check = "model.num_layers"
    else:
        check = "model.d_model, model.d_ff and the head counts and head_dim of model.attention"
    return f"{path}: expected {show(expected)}, found {show(found)}; check {check}"


def _drop_chatter(record: logging.LogRecord) -> bool:
    # Errors with a traceback are dropped as well: Orbax logs each of them several times and then raises it to us.
    if "orbax" not in Path(record.pathname).parts:
        return True
    # That there was nothing to merge comes with every checkpoint whose arrays have files of their own; that it stops,
    # the run says itself.
    expected = any(text in str(record.msg) for text in ("Skipping merge of OCDBT", "Reached preemption sync point"))
    return record.levelno >= logging.WARNING and not record.exc_info and not expected


def _drop_unretrieved(record: logging.LogRecord) -> bool:
    # Of several writes that fail Orbax raises one to us; nobody asks for the others, and their event loop complains.
    failed = record.exc_info is not None and isinstance(record.exc_info[1], OSError)
    return not (failed and "exception was never retrieved" in record.getMessage())


def _quiet_orbax() -> None:
    logging.getLogger("absl").addFilter(_drop_chatter)  # adding the same filter again does nothing
    logging.getLogger("asyncio").addFilter(_drop_unretrieved)
