"""Reads a trained model back from the checkpoints of its run."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx

from gqe_jax.attention import Buffer
from gqe_jax.config import ConfigError, RunConfig
from gqe_jax.config_dict import build
from gqe_jax.data.tokenizer import Tokenizer, tokenizer_from_files
from gqe_jax.kernels.choose import platform_lacking, target_platform
from gqe_jax.models.transformer import Transformer, abstract_model
from gqe_jax.parallel.mesh import check_model, make_mesh
from gqe_jax.parallel.rules import state_shardings
from gqe_jax.runs.checkpoint import Checkpoints
from gqe_jax.runs.directory import CHECKPOINTS
from gqe_jax.runs.state import TrainState, items_of, state_of


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model as a checkpoint holds it, with what is needed to use it.

    `config` is the checkpoint's, but for an implementation of attention that the devices cannot run: None stands there,
    and a warning says so.
    """

    step: int
    config: RunConfig
    tokenizer: Tokenizer
    model: Transformer


def load_model(
    directory: str | Path, step: int | None = None, mesh: jax.sharding.Mesh | None = None
) -> TrainedModel:
    """Reads parameters, configuration and tokenizer of a run's newest checkpoint, or of the one of `step`.

    Args:
      directory: of the run.
      step: None: the newest.
      mesh: over which the parameters are spread, as `parallel.rules` says; None: one device holds them.

    Raises:
      ConfigError: no such run or step.
      CheckpointDamaged: files that are not what was written.
    """
    with Checkpoints(epath.Path(directory) / CHECKPOINTS) as checkpoints:
        step = chosen_step(checkpoints, directory, step)
        form = checkpoints.read_format(step)
        checkpoints.verify(step, items=("config", "tokenizer"))
        tokenizer = tokenizer_from_files(checkpoints.read_tokenizer(step))
        if mesh is None:
            mesh = make_mesh(devices=jax.local_devices()[:1])
        config = _that_runs_on(mesh, build(checkpoints.read_config(step)))
        check_model(mesh, config.model)
        abstract = abstract_model(config.model)
        graphdef, params, buffers = nnx.split(abstract, nnx.Param, Buffer)
        state = TrainState(
            step=jax.ShapeDtypeStruct((), jnp.int32),
            params=nnx.to_pure_dict(params),
            opt_state=None,
            buffers=nnx.to_pure_dict(buffers),
            key=jax.eval_shape(lambda: jax.random.key(0)),
        )
        state = state_of(checkpoints.restore(step, **abstract_items(state, form, abstract, mesh)), form)
    model = nnx.merge(graphdef, state.params, state.buffers)
    return TrainedModel(step, config, tokenizer, model)


def _that_runs_on(mesh: jax.sharding.Mesh, config: RunConfig) -> RunConfig:
    """Returns the configuration; without its implementation of attention where that is for other devices than the
    mesh's."""
    attention = config.model.attention
    with jax.set_mesh(mesh):
        platform = target_platform()
    lacking = platform_lacking(attention.implementation, platform)
    if lacking is None:
        return config
    logging.getLogger("gqe_jax").warning(
        "the run names model.attention.implementation=%r, which needs %s: here attention takes the fastest that runs",
        attention.implementation,
        lacking,
    )
    attention = dataclasses.replace(attention, implementation=None)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention=attention))


def chosen_step(checkpoints: Checkpoints, directory: str | Path, step: int | None) -> int:
    """`step`, or the newest one of a run. Raises ConfigError if it has no checkpoint."""
    step = checkpoints.latest() if step is None else step
    if step is None:
        raise ConfigError(
            f"--run={str(directory)!r} holds no checkpoint: name the directory of a run that `gqe train` or `gqe "
            f"import` made, or train one with `gqe train --config smoke --run {directory}`"
        )
    return step


def abstract_items(
    state: TrainState, form: int, model: nnx.Module, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """Returns the items of an abstract state in a checkpoint of the form `form`, with shardings on `mesh`.

    Args:
      state: abstract.
      form: of the checkpoint (`Checkpoints.read_format`).
      model: whose parameters they are; may be abstract.
      mesh: over which they are spread.
    """
    items = jax.eval_shape(lambda state: items_of(state, form), state)
    shardings = state_shardings(mesh, items, model)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), items, shardings)
