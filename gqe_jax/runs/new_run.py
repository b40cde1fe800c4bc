"""The directory of a run that starts from given parameters, which are saved as the checkpoint of step 0."""

from __future__ import annotations

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
from gqe_jax.data.tokenizer import Tokenizer
from gqe_jax.models.transformer import abstract_model
from gqe_jax.runs import directory as runs
from gqe_jax.runs.checkpoint import CheckpointFailed, Checkpoints
from gqe_jax.runs.state import TrainState, initial_keys, items_of

TOKENIZER = "tokenizer"  # folder of the run


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
                data={"seed": config.data.seed, "step": 0, "prepared": ""},
                config=to_dict(config),
                tokenizer=tokenizer.files(),
                wait=True,
            )
    except CheckpointFailed as error:
        raise OSError(str(error.__cause__)) from error
