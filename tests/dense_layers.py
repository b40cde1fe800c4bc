"""Dense layers for tests of conversions: float64 parameters by path, and the layer in NumPy from them."""

import dataclasses

import numpy as np
import spec_numpy

from gqe_jax.attention import GQAConfig, GQEConfig, MLAConfig
from gqe_jax.config import ModelConfig
from gqe_jax.convert.layers import Calibration
from gqe_jax.convert.refit import Regression
from gqe_jax.pytorch.names import ATTENTION_ROWS

WIDTH, DIM = 12, 4


def config(heads=4, kv_heads=2, **options):
    """A dense model's configuration: d = 12, D = 4, two layers."""
    attention = GQAConfig(num_query_heads=heads, num_kv_heads=kv_heads, **{"head_dim": DIM} | options)
    return ModelConfig(vocab_size=11, d_model=WIDTH, num_layers=2, d_ff=16, context=16, attention=attention)


def params(model, seed=0):
    """Random parameters of one dense layer, biases too where it has them."""
    rng = np.random.default_rng(seed)
    attention = model.attention
    groups, members = attention.num_kv_heads, attention.num_query_heads // attention.num_kv_heads
    dim = attention.head_dim
    shapes = {"q_proj": (groups, members, dim), "k_proj": (groups, dim), "v_proj": (groups, dim)}
    result = {f"{name}.kernel": rng.normal(size=(WIDTH, *shape)) / 3 for name, shape in shapes.items()}
    result["o_proj.kernel"] = rng.normal(size=(*shapes["q_proj"], WIDTH)) / 3
    if attention.bias:
        result |= {f"{name}.bias": rng.normal(size=shape) / 5 for name, shape in shapes.items()}
    if attention.has_out_bias:
        result["o_proj.bias"] = rng.normal(size=WIDTH) / 5
    if attention.qk_norm:
        result |= {"q_norm.scale": rng.uniform(0.5, 1.5, dim), "k_norm.scale": rng.uniform(0.5, 1.5, dim)}
    return result


def inputs(seed=1, batch=3, length=9):
    return np.random.default_rng(seed).normal(size=(batch, length, WIDTH))


def output(layer, attention, x):
    """y [B, S, d] in float64, by the equations alone; `layer` is a layer of any kind that they state."""
    state = {}
    for name, parts in ATTENTION_ROWS.items():
        there = [part for part in parts if part.path in layer]
        if there:
            state[name] = np.concatenate([part.to_torch(layer[part.path]) for part in there], axis=-1)
    if isinstance(attention, GQEConfig) and attention.router.kind == "fixed":
        state["router.weight"] = np.zeros((attention.num_query_experts, WIDTH))
    routed = {"top_k": attention.top_k, "variant": attention.variant} if isinstance(attention, GQEConfig) else {}
    names = ("num_kv_heads", "head_dim", "rope_theta", "softcap")
    if isinstance(attention, MLAConfig):
        options = {name: getattr(attention, name) for name in (*names, "rope_dim", "rope_repeats")}
        return spec_numpy.latent_layer(state, x, **options).y
    options = {name: getattr(attention, name) for name in (*names, "qk_norm_eps")}
    return spec_numpy.layer(state, x, **options, **routed).y


def features(layer, attention, x):
    """What W_o multiplies, float64 [tokens, f]: the output where W_o is the identity and has no bias, row by row."""
    paths = [path for path in ("o_proj.kernel", "o_extra.kernel") if path in layer]
    count = sum(layer[path].size // WIDTH for path in paths)
    columns = []
    for first in range(0, count, WIDTH):
        rows, begin, probe = np.eye(count)[:, first : first + WIDTH], 0, {}
        rows = np.pad(rows, [(0, 0), (0, WIDTH - rows.shape[1])])
        for path in paths:
            end = begin + layer[path].size // WIDTH
            probe[path], begin = rows[begin:end].reshape(layer[path].shape), end
        probed = layer | probe
        probed.pop("o_proj.bias", None)
        columns.append(output(probed, attention, x))
    return np.concatenate(columns, axis=-1)[..., :count].reshape(-1, count)


def calibration(layer, model, x):
    """What calibration says of a layer whose input is x in both streams."""
    flat = np.concatenate([x.reshape(-1, WIDTH), np.ones((x.size // WIDTH, 1))], axis=1)
    target = output(layer, model.attention, x).reshape(-1, WIDTH)

    def regress(attention, other):
        f, y = features(other, attention, x), target - other.get("o_proj.bias", 0.0)
        return Regression(f.T @ f, f.T @ y, float((y * y).sum()))

    return Calibration(flat.T @ flat, regress, iter(()))


def converted(make, model, layer, x, **options):
    """(configuration, layer before its output projection is fitted) of a conversion."""
    conversion = make(model, **options)
    result, _ = conversion.layer(dict(layer), calibration(layer, model, x), 0)
    return conversion.config, result


def with_attention(model, **options):
    return dataclasses.replace(model, attention=dataclasses.replace(model.attention, **options))
