"""Runs of random weights, to be exported, and folders that transformers wrote, to be imported."""

import dataclasses

import jax
import numpy as np
import tiny
import torch_folder  # keeps transformers off the network: before transformers
from flax import nnx

from gqe_jax.attention import Buffer
from gqe_jax.config import RunConfig
from gqe_jax.data.tokenizer import ByteTokenizer
from gqe_jax.runs.load import load_model
from gqe_jax.runs.new_run import save_run

BYTES = {"vocab_size": 300}  # more than the byte tokenizer has, as padded vocabularies do


def arrays_of(model):
    """Path → array of every parameter, the biases of loss-free balancing among them."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, Buffer)))
    return {".".join(path): np.asarray(variable.get_value()) for path, variable in state}


def write_run(directory, attention=None, *, tokenizer=None, seed=0, **options):
    """A run whose checkpoint of step 0 holds a model of random weights; returns that model."""
    model = torch_folder.make_model(torch_folder.model_config(attention, **(BYTES | options)), seed)
    config = RunConfig(name="random", model=model.config)
    arrays = {path: jax.device_put(array) for path, array in arrays_of(model).items()}
    directory.mkdir(parents=True)
    save_run(directory, config, tokenizer or ByteTokenizer(), arrays)
    return model


def read_run(directory):
    """Path → array of the newest checkpoint, as every other command reads it."""
    return arrays_of(load_model(directory).model)


def tokens(vocab_size, batch=2, length=40, seed=3):
    return np.random.default_rng(seed).integers(0, vocab_size, (batch, length)).astype(np.int32)


def logits(model, ids):
    """float32 [B, S, V] of the JAX model, by the attention that is quickest to compile."""
    attention = model.layers.attention
    attention.config = dataclasses.replace(attention.config, implementation="reference")
    graphdef, state = nnx.split(model)

    @tiny.jit
    def run(state, ids):
        model = nnx.merge(graphdef, state)
        return model.logits(model(ids)[0])

    return np.asarray(run(state, ids))
