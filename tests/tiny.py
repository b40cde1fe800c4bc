"""Attention layers small enough for tests, with weights large enough that every path matters."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from gqe_jax.attention import GQAttention, GQEAttention, MLAttention
from gqe_jax.convert import layer_from_torch, layer_to_torch

D_MODEL, HEAD_DIM = 16, 8
# Most of the time of a test on tiny shapes is compilation.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=QUICK)


def gqe(groups=2, experts=2, top_k=1, *, seed=0, d_model=D_MODEL, head_dim=HEAD_DIM, **options):
    """A GQE layer whose parameters are all drawn from a normal distribution, biases and norm scales too."""
    return _make(seed, GQEAttention, d_model, groups * experts, groups, top_k, head_dim, **options)


def gqa(groups=2, heads=2, *, seed=0, d_model=D_MODEL, head_dim=HEAD_DIM, **options):
    return _make(seed, GQAttention, d_model, groups * heads, groups, head_dim, **options)


def mla(groups=2, heads=2, rank=12, rope_dim=4, *, seed=0, d_model=D_MODEL, head_dim=HEAD_DIM, **options):
    return _make(seed, MLAttention, d_model, groups * heads, groups, rank, rope_dim, head_dim, **options)


def _make(seed, cls, *sizes, **options):
    layer = nnx.eval_shape(lambda: cls(*sizes, **options, rngs=nnx.Rngs(0)))  # nothing to compile
    zeros = jax.tree.map(lambda a: jax.device_put(np.zeros(a.shape, a.dtype)), nnx.to_pure_dict(nnx.state(layer)))
    nnx.update(layer, zeros)
    return randomize(layer, seed)


def randomize(layer, seed):
    rng = np.random.default_rng(seed)
    state = layer_to_torch(layer)
    for name, value in state.items():
        if "norm" in name:
            state[name] = rng.uniform(0.5, 1.5, value.shape)
        elif not (name == "router.weight" and layer.config.router.kind != "learned"):
            spread = 0.1 if name == "router.bias_correction" else value.shape[-1] ** -0.5
            state[name] = spread * rng.standard_normal(value.shape)
    layer_from_torch(layer, state)
    return layer


def inputs(batch=2, length=13, *, seed=1, d_model=D_MODEL):
    return np.random.default_rng(seed).standard_normal((batch, length, d_model)).astype(np.float32)


def split(layer):
    """(apply, params, rest): `apply(params, rest, x, **kwargs)` is the layer as a pure function of its state."""
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    return lambda params, rest, x, **kwargs: nnx.merge(graphdef, params, rest)(x, **kwargs), params, rest


def split_jit(layer):
    """`split`, compiled."""
    apply, params, rest = split(layer)
    return jit(apply), params, rest


def call(layer, x, **kwargs):
    """The layer's result, compiled as one function."""
    apply, params, rest = split_jit(layer)
    return apply(params, rest, x, **kwargs)


def spec_options(layer):
    """The layer's configuration as arguments of `spec_numpy.layer`."""
    config = dataclasses.asdict(layer.config)
    names = ("num_kv_heads", "top_k", "head_dim", "variant", "rope_theta", "qk_norm_eps", "softcap", "window")
    return {name: config[name] for name in names if name in config}


