"""The directory of a run that starts from given parameters: filled tensor by tensor, saved as the checkpoint of step 0.

A checkpoint holds the optimizer's state too, and a fresh one is twice the model in zeros. They are never touched here,
so they take no memory, and compressed no room on disk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gqe_jax.attention import RouterBias
from gqe_jax.config import RunConfig
from gqe_jax.config_dict import to_dict
from gqe_jax.data.tokenizer import Tokenizer
from gqe_jax.models.transformer import Transformer
from gqe_jax.pytorch.model import TorchTensor
from gqe_jax.pytorch.safetensors_io import StoredTensor
from gqe_jax.runs import directory as runs
from gqe_jax.runs.checkpoint import CheckpointFailed, Checkpoints
from gqe_jax.train.optimizer import make_optimizer
from gqe_jax.train.step import TrainState

TOKENIZER = "tokenizer"  # folder of the run


def parameter_bytes(abstract: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Size of the parameters, which are given by path."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in abstract.values())


def fill(
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    tensors: Sequence[TorchTensor],
    stored: Mapping[str, StoredTensor],
    look: Callable[[str, np.ndarray], None] = lambda name, value: None,
) -> dict[str, jax.Array]:
    """Path → array, filled in the order in which the tensors lie on disk: one of them in memory at a time.

    `look` is called with each tensor's name and value.
    """
    arrays = {path: _zeros(leaf.shape, leaf.dtype) for path, leaf in abstract.items()}
    places = {tensor.name: (stored[tensor.name].file, stored[tensor.name].begin) for tensor in tensors}
    for tensor in sorted(tensors, key=lambda tensor: places[tensor.name]):
        value = stored[tensor.name].read()
        look(tensor.name, value)
        tensor.scatter(value, arrays)
        del value
    return {path: jax.device_put(array) for path, array in arrays.items()}


def _zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory that JAX takes over without a copy (aligned to 64 bytes), and of which only what is written exists."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.zeros(size + 64, np.uint8)
    begin = -buffer.ctypes.data % 64
    return buffer[begin : begin + size].view(dtype).reshape(shape)


def fresh_optimizer_state(config: RunConfig) -> Any:
    """The optimizer's state before the first step; its large arrays are all zeros, which take no memory here."""
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    model = nnx.eval_shape(lambda: Transformer(config.model, rngs=nnx.Rngs(0)))
    abstract = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    small = optimizer.init(jax.tree.map(lambda leaf: jnp.zeros((), leaf.dtype), abstract))
    whole = jax.eval_shape(optimizer.init, abstract)

    def expand(value: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if value.shape == leaf.shape:
            return value
        assert not value.any()
        return jax.device_put(_zeros(leaf.shape, leaf.dtype))

    return jax.tree.map(expand, small, whole)


def save_run(
    folder: Path, config: RunConfig, tokenizer: Tokenizer, arrays: Mapping[str, jax.Array], opt_state: Any
) -> None:
    """Writes configuration, tokenizer and the checkpoint of step 0 into `folder`; `arrays` by path."""
    model = nnx.eval_shape(lambda: Transformer(config.model, rngs=nnx.Rngs(0)))

    def take(kind: type[nnx.Variable]) -> dict[str, Any]:
        tree = nnx.to_pure_dict(nnx.state(model, kind))
        name = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
        return jax.tree.map_with_path(lambda path, _: arrays[name(path)], tree)

    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=take(nnx.Param),
        opt_state=opt_state,
        router_bias=take(RouterBias),
        key=jax.random.split(jax.random.key(config.train.seed))[1],  # as `Step.init` has it
    )
    runs.write_config(folder, config)
    (folder / TOKENIZER).mkdir()
    for name, content in tokenizer.files().items():
        (folder / TOKENIZER / name).write_bytes(content)
    try:
        with Checkpoints(folder / runs.CHECKPOINTS, sparing=True) as checkpoints:
            checkpoints.save(
                0,
                **runs.checkpoint_items(state),
                data={"seed": config.data.seed, "step": 0, "prepared": ""},
                config=to_dict(config),
                tokenizer=tokenizer.files(),
                wait=True,
            )
    except CheckpointFailed as error:
        raise OSError(str(error.__cause__)) from error
