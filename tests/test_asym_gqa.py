"""Groups of unequal size: the padded layer against the equations of each head, and what padding must not do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spec_numpy
import tiny

from gqe_jax.attention import AsymGQAConfig, AsymGQAttention
from gqe_jax.config import ConfigError, ModelConfig
from gqe_jax.convert import layer_to_torch
from gqe_jax.flops import forward_flops, scored_pairs
from gqe_jax.kernels import attend

DIM = tiny.HEAD_DIM
QUICK = {"implementation": "reference"}  # the quickest to compile
OPTIONS = [
    {},
    {"bias": True, "qk_norm": True},
    {"rope_theta": None, "softcap": 2.0},
    {"window": 5, "bias": True, "out_bias": False},
]


def drawn(seed, **options):
    """(layer, sizes of its groups): places beyond the sizes hold whatever the drawing gave."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, rng.integers(1, 4))
    places = sizes.max() + rng.integers(0, 2)
    places = int(min(places, sizes.sum()))
    heads = (int(sizes.sum()), len(sizes), places, DIM)
    layer = tiny._make(seed, AsymGQAttention, tiny.D_MODEL, *heads, **QUICK | options)
    layer.head_mask[...] = jnp.asarray(np.arange(places) < sizes[:, None])
    return layer, sizes


def heads_of(layer, sizes):
    """The real heads as PyTorch's state of an MHA, in which each head has a copy of its group's keys and values."""
    state = layer_to_torch(layer)
    mask = state.pop("head_mask").ravel() > 0
    real = np.flatnonzero(np.repeat(mask, DIM))
    copies = (np.repeat(np.arange(len(sizes)), sizes)[:, None] * DIM + np.arange(DIM)).ravel()
    for name, rows in (("q_proj", real), ("k_proj", copies), ("v_proj", copies)):
        for end in ("weight", "bias"):
            if f"{name}.{end}" in state:
                state[f"{name}.{end}"] = state[f"{name}.{end}"][rows]
    state["o_proj.weight"] = state["o_proj.weight"][:, real]
    return state


@pytest.mark.parametrize("seed", range(6))
def test_each_head_attends_to_its_groups_keys(seed):
    """The padded layer is an MHA whose heads h of group g all have K_g and V_g, by float64 equations."""
    layer, sizes = drawn(seed, **OPTIONS[seed % len(OPTIONS)])
    x, segments = tiny.inputs(), np.sort(np.random.default_rng(seed).integers(0, 3, (2, 13)), axis=1)[:, ::-1].copy()
    y, _ = tiny.call(layer, x, segment_ids=jnp.asarray(segments, jnp.int32))
    options = tiny.spec_options(layer) | {"num_kv_heads": int(sizes.sum())}
    expected = spec_numpy.layer(heads_of(layer, sizes), x, segment_ids=segments, **options).y
    np.testing.assert_allclose(y, expected, atol=2e-5)


@pytest.mark.parametrize("seed", range(2))
def test_padding_changes_nothing_and_gets_no_gradient(seed):
    """Whatever stands in padded places, the output keeps its bits; its gradient is exactly 0, that of all else not."""
    layer, _ = drawn(seed, bias=True)
    x = tiny.inputs()
    apply, params, rest = tiny.split(layer)
    mask = np.asarray(layer.head_mask[...])

    @tiny.jit
    def run(params):
        y, back = jax.vjp(lambda params: apply(params, rest, x)[0], params)
        return y, back(jnp.cos(jnp.arange(y.size).reshape(y.shape)))[0]

    y, gradient = run(params)
    kernels = {"q_proj": 1, "o_proj": 0}
    for name, axis in kernels.items():
        places = np.moveaxis(np.asarray(gradient[name].kernel[...]), (axis, axis + 1), (0, 1))
        assert not places[~mask].any() and np.abs(places[mask]).min(axis=(-2, -1)).size == mask.sum()
        assert all(np.abs(place).max() > 0 for place in places[mask])
    assert not np.asarray(gradient["q_proj"].bias[...])[~mask].any()
    for name, axis in kernels.items():
        kernel = np.array(params[name].kernel[...])
        np.moveaxis(kernel, (axis, axis + 1), (0, 1))[~mask] = 1e3
        params[name].kernel[...] = jnp.asarray(kernel)
    np.testing.assert_array_equal(run(params)[0], y)


def test_padded_equals_indexed():
    """The same heads by an index from each to its KV head (`attend`'s kv_head), without padding."""
    layer, sizes = drawn(2)
    x = jnp.asarray(tiny.inputs())
    q, k, v = layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)
    mask = np.asarray(layer.head_mask[...])
    index = np.repeat(np.arange(len(sizes)), sizes)
    attended = tiny.jit(functools.partial(attend, **QUICK))
    indexed = attended(q[:, :, mask][:, :, :, None], k, v, kv_head=index)
    np.testing.assert_allclose(attended(q, k, v)[:, :, mask], indexed[:, :, :, 0], atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_prefill_and_decode_equal_one_pass(seed):
    layer, _ = drawn(seed + 10, **OPTIONS[seed])
    x = tiny.inputs(length=9)
    apply, params, rest = tiny.split_jit(layer)
    whole, _ = apply(params, rest, x)
    y, _, cache = apply(params, rest, x[:, :4], cache=layer.init_cache(2, 9))
    parts = [y]
    for at in range(4, 9):
        y, _, cache = apply(params, rest, x[:, at : at + 1], cache=cache)
        parts.append(y)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=2e-5)
    assert cache.k.size == 2 * 9 * layer.config.num_kv_heads * DIM


def test_a_fresh_layer_has_groups_as_equal_as_can_be():
    mask = tiny.jit(lambda: AsymGQAttention(tiny.D_MODEL, 7, 3, 4, DIM, rngs=tiny.nnx.Rngs(0)).head_mask[...])()
    assert mask.tolist() == [[True, True, True, False], [True, True, False, False], [True, True, False, False]]


def test_real_heads_are_counted():
    """FLOPs are those of H heads, whatever the padding; parameters are those that are stored."""
    attention = AsymGQAConfig(num_query_heads=7, num_kv_heads=3, max_group_size=5, head_dim=DIM)
    model = ModelConfig(d_model=16, num_layers=1, d_ff=8, attention=attention)
    flops = forward_flops(model, 10)
    assert flops.attention == 7 * 2 * 2 * DIM * scored_pairs(10)
    assert flops.projections == 2 * 10 * 16 * DIM * (7 + 3 + 3 + 7)
    assert attention.parameters(16)["attention"] == 16 * DIM * (15 + 3 + 3 + 15)


@pytest.mark.parametrize(
    "sizes, said",
    [
        ({"max_group_size": 2}, "max_group_size=2 must lie between num_query_heads / num_kv_heads = 7 / 3 and 7"),
        ({"max_group_size": 8}, "max_group_size=8 must lie between"),
        ({"num_query_heads": 0}, "num_query_heads=0 must be positive"),
        ({"max_group_size": -1}, "max_group_size=-1 must be positive"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, said):
    fitting = AsymGQAConfig(num_query_heads=7, num_kv_heads=3, max_group_size=3)
    with pytest.raises(ConfigError, match=said):
        dataclasses.replace(fitting, **sizes)
    with pytest.raises(ConfigError, match="d_model / num_query_heads, but 16 / 7 is no integer: set head_dim"):
        fitting.resolve(16)
    assert fitting.resolve(14).head_dim == 2
