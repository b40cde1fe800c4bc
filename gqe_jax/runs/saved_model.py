"""A checkpoint's model, its parameters read one at a time: a conversion needs neither all of them nor a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from gqe_jax.config import ConfigError, RunConfig
from gqe_jax.config_dict import build
from gqe_jax.data.tokenizer import Tokenizer, tokenizer_from_files
from gqe_jax.models.transformer import abstract_model
from gqe_jax.parallel.rules import placed_variables
from gqe_jax.runs.checkpoint import Checkpoints, unread_arrays_named
from gqe_jax.runs.directory import CHECKPOINTS
from gqe_jax.runs.load import chosen_step
from gqe_jax.runs.state import buffers_name


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """Holds what `load_model` returns, except that the parameters are still on disk.

    Attributes:
      run: the run's directory.
      step: of the checkpoint.
      config: of the run.
      tokenizer: of the run.
      read: path → parameter ("layers.attention.q_proj.kernel" [L, d, G, M, D]), from disk at each call.
    """

    run: epath.Path
    step: int
    config: RunConfig
    tokenizer: Tokenizer
    read: Callable[[str], np.ndarray]


def open_model(directory: str | Path, step: int | None = None) -> SavedModel:
    """Opens a run's newest checkpoint, or the one of `step`, after comparing its files with their record.

    Raises:
      ConfigError: no such run or step, or parameters that are not those of its configuration.
      CheckpointDamaged: files that are not what was written.
    """
    with Checkpoints(epath.Path(directory) / CHECKPOINTS) as checkpoints:
        step = chosen_step(checkpoints, directory, step)
        buffers = buffers_name(checkpoints.read_format(step))
        checkpoints.verify(step, items=("config", "tokenizer", "params", "train"))
        config = build(checkpoints.read_config(step))
        tokenizer = tokenizer_from_files(checkpoints.read_tokenizer(step))
        root = checkpoints.directory / str(step)
    handler = ocp.PyTreeCheckpointHandler()
    with unread_arrays_named(root):
        places = {**_leaves(handler, root, "params"), **_leaves(handler, root, "train", buffers)}
        found = {path: tuple(leaf.shape) for path, (_, _, leaf) in places.items()}
    wanted = placed_variables(abstract_model(config.model))
    wanted = {path.replace("/", "."): placed.variable.get_value() for path, placed in wanted.items()}
    if found != {path: leaf.shape for path, leaf in wanted.items()}:
        raise ConfigError(
            f"the parameters of step {step} in {directory} are not those of the configuration saved with them: use the "
            f"version of gqe_jax that wrote the run"
        )

    def read(path: str) -> np.ndarray:
        item, keys, leaf = places[path]
        tree: Any = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        options: Any = ocp.RestoreArgs(restore_type=np.ndarray)
        for key in reversed(keys):
            tree, options = {key: tree}, {key: options}
        args = ocp.args.PyTreeRestore(item=tree, restore_args=options, partial_restore=True)
        with unread_arrays_named(root):
            (value,) = jax.tree.leaves(handler.restore(root / item, args=args))
        return value

    return SavedModel(epath.Path(directory), step, config, tokenizer, read)


def _leaves(handler: ocp.PyTreeCheckpointHandler, root: Any, item: str, *group: str) -> dict[str, tuple]:
    """Path → (item, keys from its root, shape and dtype) of what a checkpoint's item holds below `group`."""
    leaves = jax.tree.leaves_with_path(handler.metadata(root / item).tree)
    named = [([entry.key for entry in path], leaf) for path, leaf in leaves]
    chosen = [(keys, leaf) for keys, leaf in named if keys[: len(group)] == list(group)]
    return {".".join(keys[len(group) :]): (item, keys, leaf) for keys, leaf in chosen}
