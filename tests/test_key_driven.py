"""Key-driven attention: the allocation, once and over steps, the layer against the equations, what it must not see."""

import dataclasses
import functools

import dense_layers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spec_numpy
import tiny
from flax import nnx

from gqe_jax.attention import KeyDrivenAttention, KeyDrivenConfig
from gqe_jax.attention.key_driven import allocate, perturbation
from gqe_jax.config import ConfigError, MeshConfig
from gqe_jax.convert import layer_to_torch
from gqe_jax.convert.asym import to_asym_gqa
from gqe_jax.convert.driven import to_key_driven
from gqe_jax.parallel.mesh import check_model, make_mesh

DIM, GROUPS, HEADS = tiny.HEAD_DIM, 3, 6
QUICK = {"implementation": "reference"}  # the quickest to compile


def layer_of(seed=0, heads=(3, 2, 1), **options):
    layer = tiny._make(seed, KeyDrivenAttention, tiny.D_MODEL, HEADS, GROUPS, DIM, **QUICK | options)
    layer.heads[...] = jnp.asarray(heads, jnp.int32)
    return layer


# ---------------------------------------------------------------------------- the allocation


def shares(values, heads, floor):
    """The allocation of the specification: largest remainder in float64, ties to the lower index."""
    values = np.asarray(values, np.float64)
    fraction = values / values.sum() if 0 < values.sum() < np.inf else np.full(len(values), 1 / len(values))
    quota = (heads - floor * len(values)) * np.round(fraction, 9)
    count = np.floor(np.round(quota, 6)).astype(int)
    order = np.argsort(-np.round(quota - count, 6), kind="stable")
    count[order[: heads - floor * len(values) - count.sum()]] += 1
    return floor + count


def test_allocation_is_by_largest_remainder():
    """400 drawings: the sum is H, nobody has less than the floor, none is further than 1 from its quota, larger values
    never get less, and the numbers are those of float64."""
    rng = np.random.default_rng(0)
    for groups, heads, floor in [(1, 4, 1), (2, 6, 0), (3, 6, 1), (3, 12, 0), (5, 5, 0), (8, 32, 1), (8, 16, 0)]:
        stack = rng.gamma(rng.choice([0.2, 3.0], (60, 1)), size=(60, groups)).astype(np.float32)
        stack[rng.random(stack.shape) < 0.1] = 0.0
        found = np.asarray(tiny.jit(allocate, static_argnums=(1, 2))(stack, heads, floor))
        assert (found.sum(axis=1) == heads).all() and found.min() >= floor
        for values, counts in zip(stack, found, strict=True):
            np.testing.assert_array_equal(counts, shares(values, heads, floor))
            quota = (heads - floor * groups) * values / (values.sum(dtype=np.float64) or 1.0)
            assert not values.sum() or np.abs(counts - floor - quota).max() < 1 + 1e-4
            more = values[:, None] > values
            assert (counts[:, None] >= counts)[more].all()


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0, 0, 0], [2, 2, 2]),
        ([1, np.inf, 1], [2, 2, 2]),
        ([np.nan, 1, 1], [2, 2, 2]),
        ([5, 5, 5], [2, 2, 2]),
        ([1, 0, 0], [4, 1, 1]),
        ([1, 1, 0], [3, 2, 1]),
        ([0, 1, 1], [1, 3, 2]),
    ],
)
def test_nothing_to_tell_heads_apart_is_equal_shares(values, expected):
    """Sums of 0 or beyond all numbers, equal values; what ties goes to the lower index, in every layer of a stack."""
    stacked = jnp.asarray([values, [1, 1, 1]], jnp.float32)
    assert allocate(stacked, 6, 1).tolist() == [expected, [2, 2, 2]]


def test_sums_in_another_order_do_not_matter():
    """Devices add the norms in another order: values that differ by rounding are shared out alike."""
    rng = np.random.default_rng(1)
    values = np.repeat(rng.gamma(1.0, size=(50, 2)), 2, axis=1).astype(np.float32)
    nudged = values * (1 + rng.choice([-1, 0, 1], (50, 4)) * np.float32(1.2e-7))
    assert (values != nudged).any(axis=1).sum() > 30
    np.testing.assert_array_equal(allocate(values, 10, 1), allocate(jnp.asarray(nudged), 10, 1))


@pytest.mark.parametrize("allocation", ["kdgqa", "dgqa_ema", "dgqa_diff", "static"])
def test_allocations_over_steps(allocation):
    """Eight steps with a window of three, two layers: each layer as the recurrences say, in float64."""
    config = KeyDrivenConfig(
        num_query_heads=6, num_kv_heads=3, head_dim=4, allocation=allocation, allocation_window=3, allocation_floor=0
    )
    rng = np.random.default_rng(2)
    buffers = {
        "heads": jnp.full((2, 3), 2, jnp.int32), "key_norm": jnp.zeros((2, 3)), "steps": jnp.zeros((2, 1), jnp.int32)
    }  # fmt: skip
    heads, cache = [np.full(3, 2)] * 2, [None, None]
    update = jax.jit(config.updated_buffers)
    for step in range(1, 9):
        norms = rng.gamma(2.0, size=(2, 3)).astype(np.float32)
        buffers = update(buffers, {"key_norm": jnp.asarray(norms), "loss": jnp.zeros(())})
        for layer, s in enumerate(norms.astype(np.float64)):
            if allocation == "kdgqa":
                heads[layer], cache[layer] = shares(s - s.min(), 6, 0), s
            elif allocation == "dgqa_ema" and step % 3 == 0:
                cache[layer] = s if cache[layer] is None else 0.9 * s + 0.1 * cache[layer]
                heads[layer] = shares(cache[layer], 6, 0)
            elif allocation == "dgqa_diff" and step % 3 == 0:
                change = np.ones(3) if cache[layer] is None else np.abs(s - cache[layer])
                heads[layer], cache[layer] = shares(change, 6, 0), s
        np.testing.assert_array_equal(buffers["heads"], heads)
        if cache[0] is not None:
            np.testing.assert_allclose(buffers["key_norm"], cache, rtol=1e-6)
    assert buffers["heads"].dtype == jnp.int32 and (allocation == "static") == (buffers["steps"].max() == 0)


# ---------------------------------------------------------------------------- the layer


def runs_as_heads(layer):
    """PyTorch's state of an MHA in which head h has the keys and values of the KV head that it reads."""
    state = layer_to_torch(layer)
    index = np.repeat(np.arange(GROUPS), state.pop("heads_per_kv").astype(int))
    del state["key_norm"], state["allocation_steps"]
    rows = (index[:, None] * DIM + np.arange(DIM)).ravel()
    return {name: value[rows] if name.startswith(("k_proj", "v_proj")) else value for name, value in state.items()}


@pytest.mark.parametrize(
    "heads, options",
    [
        ((3, 2, 1), {}),
        ((0, 6, 0), {"bias": True, "qk_norm": True}),
        ((2, 2, 2), {"rope_theta": None, "softcap": 2.0}),
        ((1, 0, 5), {"window": 5, "bias": True, "out_bias": False}),
    ],
)
def test_each_head_reads_its_runs_kv_head(heads, options):
    """By float64 equations; and the norms of the real tokens' keys, which rotation does not change, are means over rows
    of Frobenius norms."""
    layer = layer_of(heads=heads, **options)
    x, segments = tiny.inputs(), np.sort(np.random.default_rng(3).integers(0, 3, (2, 13)), axis=1)[:, ::-1].copy()
    y, report = tiny.call(layer, x, segment_ids=jnp.asarray(segments, jnp.int32))
    options = tiny.spec_options(layer)
    expected = spec_numpy.layer(
        runs_as_heads(layer), x, segment_ids=segments, **options | {"num_kv_heads": HEADS}
    )
    np.testing.assert_allclose(y, expected.y, atol=2e-5)
    unrotated = {name: value for name, value in layer_to_torch(layer).items() if "heads" not in name}
    keys = spec_numpy.layer(
        {k: v for k, v in unrotated.items() if k not in ("key_norm", "allocation_steps")}
        | {"q_proj.weight": np.zeros((GROUPS * DIM, tiny.D_MODEL)), "q_proj.bias": np.zeros(GROUPS * DIM)}
        | {"o_proj.weight": np.zeros((tiny.D_MODEL, GROUPS * DIM))},
        x,
        **options | {"rope_theta": None},
    ).k
    norms = np.sqrt(np.square(keys * (segments != 0)[..., None, None]).sum(axis=(1, 3))).mean(axis=0)
    np.testing.assert_allclose(report.metrics["key_norm"], norms, rtol=1e-5)
    np.testing.assert_array_equal(report.metrics["heads"], heads)


def test_rows_in_another_order_are_allocated_alike():
    layer, x = layer_of(), tiny.inputs(batch=5)
    apply, params, rest = tiny.split_jit(layer)
    norms = [apply(params, rest, rows)[1].metrics["key_norm"] for rows in (x, x[[3, 0, 4, 1, 2]])]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-6)
    assert allocate(norms[0], 6, 0).tolist() == allocate(norms[1], 6, 0).tolist()


def test_equal_runs_are_grouped_query_attention():
    """Before the first allocation, and wherever norms are equal, the function is that of `GQAttention`."""
    layer, x = layer_of(heads=(2, 2, 2), bias=True), tiny.inputs()
    dense = tiny.gqa(GROUPS, 2, bias=True, **QUICK)
    state = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    nnx.update(dense, state)
    np.testing.assert_allclose(tiny.call(layer, x)[0], tiny.call(dense, x)[0], atol=1e-6)
    fresh = nnx.eval_shape(lambda: KeyDrivenAttention(tiny.D_MODEL, HEADS, GROUPS, DIM, rngs=nnx.Rngs(0)))
    assert fresh.heads.shape == (GROUPS,) and fresh.heads.dtype == jnp.int32
    made = tiny.jit(lambda: KeyDrivenAttention(tiny.D_MODEL, HEADS, GROUPS, DIM, rngs=nnx.Rngs(0)).heads[...])()
    assert made.tolist() == [2, 2, 2]


def test_prefill_and_decode_equal_one_pass_and_see_no_future():
    """Heads do not change in generation, so the cache stays valid; a later token changes nothing before it, in
    training with noise neither."""
    layer, x = layer_of(heads=(4, 0, 2), perturb=True), tiny.inputs(length=9)
    apply, params, rest = tiny.split_jit(layer)
    whole, _ = apply(params, rest, x)
    y, report, cache = apply(params, rest, x[:, :4], cache=layer.init_cache(2, 9))
    assert report.metrics == {} and cache.k.size == 2 * 9 * GROUPS * DIM
    parts = [y]
    for at in range(4, 9):
        y, _, cache = apply(params, rest, x[:, at : at + 1], cache=cache)
        parts.append(y)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=2e-5)

    plain = tiny.split(layer)[0]

    @tiny.jit
    def noisy(params, x):
        y, back = jax.vjp(lambda params: plain(params, rest, x, rngs=nnx.Rngs(router=5))[0], params)
        return y, back(jnp.ones_like(y))[0]

    other = x.copy()
    other[:, 6:] += 1.0
    one, two = noisy(params, x)[0], noisy(params, other)[0]
    np.testing.assert_array_equal(one[:, :6], two[:, :6])
    assert np.abs(one - whole).max() > 0.1
    gradient = noisy(params, np.zeros_like(x))[1]  # outputs of 0 have no deviation
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_noise_takes_each_heads_own_mean_and_deviation():
    """Z = standardised noise · deviation of o over D (of n − 1) + mean of o: o − Z has the mean 0, and its spread."""
    rng = np.random.default_rng(4)
    o, noise = rng.normal(2.0, size=(5, 3, DIM)), rng.uniform(size=(5, 3, DIM))
    standard = (noise - noise.mean(-1, keepdims=True)) / noise.std(-1, ddof=1, keepdims=True)
    expected = standard * o.std(-1, ddof=1, keepdims=True) + o.mean(-1, keepdims=True)
    found = perturbation(jnp.asarray(o, jnp.float32), jnp.asarray(noise, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose((o - found).mean(-1), 0.0, atol=1e-6)


# ---------------------------------------------------------------------------- conversions


@pytest.mark.parametrize("case", [{}, {"bias": True, "out_bias": False}, {"qk_norm": True, "rope_theta": None}])
@pytest.mark.parametrize("heads", [(4, 1, 3), (0, 8, 0), (1, 5, 2)])
def test_frozen_is_padded(case, heads):
    """The padded form has the same runs of query heads on the same KV heads: the same function, in float64."""
    dense = dense_layers.config(heads=8, kv_heads=4, **case)
    model = dataclasses.replace(dense, attention=to_key_driven(dense).config)
    counts = np.array([*heads, 0])
    layer = dense_layers.params(dense) | {"heads": counts.astype(float), "key_norm": np.ones(4), "steps": np.ones(1)}
    conversion = to_asym_gqa(model, heads=lambda: counts[None])
    result, said = conversion.layer(dict(layer), None, 0)
    assert conversion.lossless and said == f"groups of {' '.join(map(str, counts))} query heads"
    assert conversion.config.max_group_size == max(heads) and result["head_mask"].sum(axis=1).tolist() == [*counts]
    index, mask = np.repeat(np.arange(4), counts), result["head_mask"] > 0
    one, other = {}, {}
    for path, x in layer.items():
        if path.startswith(("k_proj", "v_proj")):
            one[path] = other[path] = x.take(index, -2)
            np.testing.assert_array_equal(result[path], x)
        elif path.startswith("q_proj") or path == "o_proj.kernel":
            axis = int(path == "q_proj.kernel")
            one[path] = x.reshape(*x.shape[:axis], 8, 1, *x.shape[axis + 2 :])
            places = np.moveaxis(result[path], (axis, axis + 1), (0, 1))[mask]
            other[path] = np.moveaxis(places[:, None], (0, 1), (axis, axis + 1))
        elif path not in ("heads", "key_norm", "steps"):
            one[path] = other[path] = x
    mha, x = dataclasses.replace(dense.attention, num_kv_heads=8), dense_layers.inputs()
    expected = dense_layers.output(one, mha, x)
    np.testing.assert_array_equal(dense_layers.output(other, mha, x), expected)
    assert "heads" not in result and "steps" not in result


def test_calibration_allocates_once():
    """"static" by the norms of the keys over the calibration rows; the others start as the dense function."""
    model, x = dense_layers.config(heads=8, kv_heads=4, bias=True), dense_layers.inputs()
    layer = dense_layers.params(model)
    layer["k_proj.kernel"] *= np.array([1.0, 4.0, 0.5, 2.0])[:, None]
    calibration = dense_layers.calibration(layer, model, x)
    conversion = to_key_driven(model, allocation="static")
    result, _ = conversion.layer(dict(layer), calibration, 0)
    keys = np.einsum("bsd,dgk->bsgk", x, layer["k_proj.kernel"]) + layer["k_proj.bias"]
    norms = np.sqrt(np.square(keys).sum(axis=(0, 1, 3)))
    np.testing.assert_allclose(result["key_norm"], norms, rtol=1e-9)
    np.testing.assert_array_equal(result["heads"], shares(norms, 8, 1))
    assert not conversion.lossless and conversion.config.allocation == "static"
    start = to_key_driven(model, allocation="dgqa_ema")
    assert start.lossless and start.layer(dict(layer), calibration, 0)[0]["heads"].tolist() == [2, 2, 2, 2]


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"allocation": "paper"}, "allocation='paper' is unknown: use one of 'kdgqa', 'dgqa_ema', 'dgqa_diff', 'st"),
        ({"allocation_floor": 3}, "allocation_floor=3 must lie between 0 and num_query_heads / num_kv_heads = 2"),
        ({"num_query_heads": 3 * 2**10}, "num_query_heads=3072 must be below 2048"),
        ({"allocation_window": 0}, "allocation_window=0 must be positive"),
        ({"perturb": True, "head_dim": 1, "rope_theta": None}, "perturb=True with head_dim=1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, said):
    with pytest.raises(ConfigError) as error:
        KeyDrivenConfig(**{"num_query_heads": HEADS, "num_kv_heads": GROUPS} | settings)
    assert said in str(error.value)


def test_devices_on_expert_are_refused(monkeypatch):
    """Runs cross groups: a device that has a part of the KV heads could not serve its queries. Said before anything
    runs, with the reason; and a frozen run's own options are refused."""
    attention = KeyDrivenConfig(num_query_heads=4, num_kv_heads=2, head_dim=4)
    model = dataclasses.replace(dense_layers.config(), attention=attention)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    check_model(mesh, model)
    fake = dataclasses.make_dataclass("Fake", ["shape"])(dict(mesh.shape) | {"expert": 2})
    with pytest.raises(ConfigError, match="expert=2 cannot share out the KV heads: query heads read the KV heads"):
        check_model(fake, model)
    monkeypatch.setattr("gqe_jax.attention.checks.axis_size", lambda axis: 2 if axis == "expert" else 1)
    layer = tiny._make(0, KeyDrivenAttention, tiny.D_MODEL, 4, 2, DIM)
    with pytest.raises(ValueError, match="`expert` axis of 2 devices cannot share out the KV heads: query heads read"):
        layer(tiny.inputs())
    with pytest.raises(ConfigError, match="--num-kv-heads says nothing of a run whose attention is 'key_driven'"):
        to_asym_gqa(model, num_kv_heads=1, heads=functools.partial(np.ones, (2, 2)))
