"""The directory of a run that starts from given parameters, which are saved as the checkpoint of step 0."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gqe_jax.attention import Buffer
from gqe_jax.config import RunConfig
from gqe_jax.config_dict import to_dict
from gqe_jax.data.reading.position import BEGINNING
from gqe_jax.data.tokenizer import Tokenizer
from gqe_jax.models.transformer import abstract_model
from gqe_jax.runs import directory as runs
from gqe_jax.runs.checkpoint import CheckpointFailed, Checkpoints, cause_of
from gqe_jax.runs.state import TrainState, initial_keys, items_of

TOKENIZER = "tokenizer"  # folder of the run
CONFIG_FILE = "config.py"


def save_run(folder: Path, config: RunConfig, tokenizer: Tokenizer, arrays: Mapping[str, jax.Array]) -> None:
    """Writes configuration, tokenizer and a checkpoint of step 0 without optimizer state into `folder`.

    Args:
      folder: of the run; exists.
      config: of the run.
      tokenizer: of the model.
      arrays: path ("layers.attention.q_proj.kernel") → parameter or buffer.
    """
    model = abstract_model(config.model)

    def take(kind: type[nnx.Variable]) -> dict[str, Any]:
        tree = nnx.to_pure_dict(nnx.state(model, kind))
        name = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
        return jax.tree.map_with_path(lambda path, _: arrays[name(path)], tree)

    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=take(nnx.Param),
        opt_state=None,
        buffers=take(Buffer),
        key=initial_keys(config.train.seed)[1],
    )
    runs.write_config(folder, config)
    (folder / TOKENIZER).mkdir()
    for name, content in tokenizer.files().items():
        (folder / TOKENIZER / name).write_bytes(content)
    try:
        with Checkpoints(folder / runs.CHECKPOINTS, sparing=True) as checkpoints:
            checkpoints.save(
                0,
                **items_of(state),
                data={"seed": config.data.seed, "step": 0, "position": BEGINNING.to_json()},
                config=to_dict(config),
                tokenizer=tokenizer.files(),
                wait=True,
            )
    except CheckpointFailed as error:
        raise OSError(cause_of(error.__cause__)) from error


def config_file(what: str, settings: Mapping[str, Any], **constants: str) -> str:
    """Returns a Python file with the `get_config` of a run.

    Args:
      what: the run is, a sentence.
      settings: fields of `RunConfig` that differ from their defaults, in groups; `model` has a group `attention`.
      **constants: names for the user to read at the top of the file.
    """
    model = dict(settings["model"])

    def arguments(values: Mapping[str, Any], indent: int) -> str:
        return "".join(f"{' ' * indent}{key}={value!a},\n" for key, value in values.items())

    attention = arguments(model.pop("attention"), 8)
    groups = {name: group for name, group in settings.items() if isinstance(group, Mapping)} | {"model": model}
    # What comes from outside stands here as values only: a folder's name may hold quotes, and so code.
    return (
        f'"""{what}\n\n  gqe train --config RUN/{CONFIG_FILE} --run RUN --config.data.path=DIR\n"""\n\n'
        "from gqe_jax.config_dict import defaults\n\n"
        + "".join(f"{name} = {value!a}\n" for name, value in constants.items())
        + f"\n\ndef get_config(argument=None):\n    config = defaults(\n{attention}    )\n"
        f"    config.name = {settings['name']!a}\n"
        + "".join(
            f"    config.{name}.update(\n{arguments(group, 8)}    )\n" for name, group in groups.items() if group
        )
        + "    return config\n"
    )


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Returns the fields of a configuration that differ from their defaults, in groups, and its name: for
    `config_file`."""
    groups = {name: _changed(getattr(config, name)) for name in ("data", "optimizer", "mesh", "train")}
    attention = {"kind": config.model.attention.kind} | _changed(config.model.attention)
    model = _changed(config.model) | {"attention": attention}
    return {"name": config.name, "model": model} | groups


def _changed(group: Any) -> dict[str, Any]:
    fields = {field.name: field.default for field in dataclasses.fields(group)}
    values = {name: getattr(group, name) for name, default in fields.items() if getattr(group, name) != default}
    return {
        name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()
    }
