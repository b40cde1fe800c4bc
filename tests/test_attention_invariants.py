"""What must hold of the GQE layer whatever its weights: the list of invariants of its specification."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from gqe_jax.attention import GQEAttention, RouterConfig
from gqe_jax.config import ConfigError
from gqe_jax.convert import layer_from_torch, layer_to_torch

X = tiny.inputs()


def assert_close(got, want, **kwargs):
    np.testing.assert_allclose(got, want, **({"atol": 1e-5, "rtol": 1e-5} | kwargs))


@pytest.mark.parametrize("M", [1, 2, 4])
def test_all_experts_and_a_zero_router_are_dense_attention(M):
    """k = M: every head attends; a zero router ties all p, so the slots stand in head order; zero rows of W_o for ō and
    s remove the rest. What is left is GQA with the same weights under the same names."""
    dense, layer = tiny.gqa(2, M), tiny.gqe(2, M, M)
    state = layer_to_torch(layer)
    state["router.weight"] = np.zeros_like(state["router.weight"])
    state["o_proj.weight"] = np.concatenate(
        [layer_to_torch(dense)["o_proj.weight"], np.zeros((tiny.D_MODEL, 2 * tiny.HEAD_DIM))], axis=1
    )
    for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight"):
        state[name] = layer_to_torch(dense)[name]
    layer_from_torch(layer, state)
    y, stats = tiny.call(layer, X)
    assert_close(y, tiny.call(dense, X)[0], atol=1e-6)
    np.testing.assert_array_equal(stats.expert_index, np.broadcast_to(np.arange(M), (*X.shape[:2], 2, M)))


def test_keys_and_values_never_depend_on_the_router():
    """The cache after a prefill is bitwise the same under another router: it can be shared, as in dense GQA."""
    layer = tiny.gqe(2, 4, 2, qk_norm=True)
    apply, params, rest = tiny.split_jit(layer)
    cache = layer.init_cache(2, 16)
    y, _, kept = apply(params, rest, X, cache=cache)
    state = layer_to_torch(layer)
    layer_from_torch(layer, state | {"router.weight": -2 * state["router.weight"]})
    y2, _, kept2 = apply(nnx.state(layer, nnx.Param), rest, X, cache=cache)
    assert np.abs(y - y2).max() > 1e-2
    np.testing.assert_array_equal(kept.k, kept2.k)
    np.testing.assert_array_equal(kept.v, kept2.v)


@pytest.mark.parametrize(
    ("variant", "G", "M", "k", "learns"),
    [
        ("hard_concat", 2, 2, 1, False),
        ("hard_concat", 2, 4, 2, False),
        ("gqe", 2, 2, 1, True),
        ("gqe", 1, 2, 2, True),
        ("gqe", 1, 2, 1, False),  # one weight, always 1
        ("gqe", 2, 1, 1, False),  # one expert, p = 1 always
        ("weighted_concat", 1, 2, 1, True),
    ],
)
def test_language_model_gradient_of_the_router(variant, G, M, k, learns):
    """The output reaches the router only through a weight: in `hard_concat` there is none, so its gradient is exactly
    zero; in `gqe` there is one unless G · k = 1 or M = 1, where the weight is the constant 1 (zero up to rounding)."""
    layer = tiny.gqe(G, M, k, variant=variant, implementation="reference")
    apply, params, rest = tiny.split(layer)
    grads = tiny.jit(jax.grad(lambda params: jnp.sum(apply(params, rest, X)[0] * tiny.inputs(seed=5))))(params)
    gradient = np.abs(grads["router"]["proj"]["kernel"].get_value()).max()
    if learns:
        assert gradient > 1e-2
    elif variant == "hard_concat":
        assert gradient == 0.0
    else:
        assert gradient < 1e-5


CACHED = {
    "gqe": lambda: tiny.gqe(2, 2, 1, qk_norm=True),
    "window": lambda: tiny.gqe(2, 4, 2, window=3, implementation="reference"),
    "random": lambda: tiny.gqe(2, 4, 1, router=RouterConfig(kind="random", seed=3), implementation="reference"),
    "dense": lambda: tiny.gqa(2, 2, implementation="reference"),
}


@pytest.mark.parametrize("kind", CACHED)
def test_prefill_and_decode_equal_one_full_pass(kind):
    """Prompts of unequal length, padded at their end, then one token at a time: each row's outputs are those of the
    whole row at once. The padding takes no place in the cache; the `random` router draws by position."""
    layer = CACHED[kind]()
    apply, params, rest = tiny.split_jit(layer)
    full, lengths, prompt = apply(params, rest, X)[0], np.array([4, 7]), 8
    segment_ids = (np.arange(prompt) < lengths[:, None]).astype(np.int32)
    padded = np.where(segment_ids[..., None] == 1, X[:, :prompt], 1e3).astype(np.float32)
    y, _, cache = apply(params, rest, padded, segment_ids=segment_ids, cache=layer.init_cache(2, 13))
    assert_close(np.asarray(y)[segment_ids == 1], np.asarray(full[:, :prompt])[segment_ids == 1])
    np.testing.assert_array_equal(cache.length, lengths)
    for step in range(5):
        at = lengths + step
        y, _, cache = apply(params, rest, X[np.arange(2), at][:, None], cache=cache)
        assert_close(y[:, 0], full[np.arange(2), at])
    np.testing.assert_array_equal(cache.length, lengths + 5)


def test_decode_in_chunks_equals_one_full_pass():
    """Several tokens behind a filled cache: each sees the cache and those before it in the chunk."""
    layer = tiny.gqe(2, 2, 1, implementation="reference")
    apply, params, rest = tiny.split_jit(layer)
    full, cache, parts = apply(params, rest, X)[0], layer.init_cache(2, 15), []
    for start in (0, 5, 10):
        y, _, cache = apply(params, rest, X[:, start : start + 5], cache=cache)
        parts.append(y)
    assert_close(np.concatenate(parts, axis=1), full)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_the_future_changes_nothing(implementation):
    """By gradient: the output at position 6 has none with respect to later inputs, exactly, and some to all others."""
    layer = tiny.gqe(2, 2, 1, implementation=implementation)
    apply, params, rest = tiny.split(layer)
    gradient = tiny.jit(jax.grad(lambda x: jnp.sum(jnp.square(apply(params, rest, x)[0][:, 6]))))(X)
    assert np.all(gradient[:, 7:] == 0.0)
    assert np.all(np.abs(gradient[:, :7]).max(axis=-1) > 1e-6)


def test_routing_of_the_past_ignores_the_future():
    """The selection is made per token: another future leaves every earlier choice and output bitwise as it was."""
    apply, params, rest = tiny.split_jit(tiny.gqe(2, 4, 2))
    changed = X.copy()
    changed[:, 9:] = -3 * X[:, 9:]
    (y, stats), (y2, stats2) = apply(params, rest, X), apply(params, rest, changed)
    np.testing.assert_array_equal(y[:, :9], y2[:, :9])
    np.testing.assert_array_equal(stats.expert_index[:, :9], stats2.expert_index[:, :9])
    assert (stats.expert_index[:, 9:] != stats2.expert_index[:, 9:]).any()


@pytest.mark.parametrize("variant", ["gqe", "hard_concat", "weighted_concat"])
def test_order_of_experts_within_a_group_means_nothing(variant):
    """Experts of a group permuted together with their router columns: the same output, losses, and permuted load."""
    layer = tiny.gqe(2, 4, 2, variant=variant)
    apply, params, rest = tiny.split_jit(layer)
    y, stats = apply(params, rest, X)
    state, order = layer_to_torch(layer), np.array([[2, 0, 3, 1], [1, 3, 2, 0]])
    for name in ("q_proj.weight", "router.weight"):
        rows = state[name].reshape(2, 4, -1, tiny.D_MODEL)
        state[name] = np.take_along_axis(rows, order[:, :, None, None], axis=1).reshape(-1, tiny.D_MODEL)
    layer_from_torch(layer, state)
    y2, stats2 = apply(nnx.state(layer, nnx.Param), rest, X)
    assert_close(y2, y, atol=1e-6)
    np.testing.assert_array_equal(np.take_along_axis(stats.load, order, 1), stats2.load)
    assert_close(stats2.load_balance_loss, stats.load_balance_loss, atol=1e-6)


@pytest.mark.parametrize(
    ("G", "M", "k", "batch", "length"), [(1, 1, 1, 1, 1), (1, 4, 4, 1, 3), (3, 1, 1, 2, 7), (1, 2, 1, 1, 700)]
)
def test_degenerate_and_odd_sizes(G, M, k, batch, length):
    """One group, one expert, all experts, one row, one token, and a length that is no multiple of any block: each row
    equals the same row computed alone up to a shorter length (causality), so that padding inside a kernel shows."""
    layer = tiny.gqe(G, M, k)
    x = tiny.inputs(batch, length)
    y, stats = tiny.call(layer, x)
    assert y.shape == x.shape and np.isfinite(y).all()
    short = max(1, length - 3)
    assert_close(tiny.call(layer, x[-1:, :short])[0], y[-1:, :short])
    assert_close(stats.load.sum(-1), np.full(G, k))
    assert_close(stats.load_balance_loss, M * (stats.load * stats.mean_prob).sum(-1).mean())


def test_batch_rows_do_not_meet():
    """Outputs and choices of a row are those of the row alone."""
    layer = tiny.gqe(2, 4, 2)
    y, stats = tiny.call(layer, X)
    alone, stats_alone = tiny.call(layer, X[1:])
    assert_close(y[1:], alone, atol=1e-6)
    np.testing.assert_array_equal(stats.expert_index[1:], stats_alone.expert_index)


def test_padding_keys_and_statistics():
    """What stands in padding changes no real output and no statistic, and receives no gradient from them."""
    layer = tiny.gqe(2, 2, 1, implementation="reference")
    apply, params, rest = tiny.split(layer)
    segment_ids = np.array([[1] * 9 + [0] * 4, [1] * 4 + [2] * 9])
    real = segment_ids != 0

    def outputs(x):
        y, stats = apply(params, rest, x, segment_ids=segment_ids)
        return jnp.where(real[..., None], y, 0.0), stats.reduced()

    compiled, filled = tiny.jit(outputs), np.where(real[..., None], X, np.float32(50))
    for got, want in zip(jax.tree.leaves(compiled(filled)), jax.tree.leaves(compiled(X)), strict=True):
        np.testing.assert_array_equal(got, want)
    total = jax.grad(lambda x: sum(jnp.sum(jnp.square(a)) for a in jax.tree.leaves(outputs(x))))
    gradient = tiny.jit(total)(X)
    assert np.all(gradient[~real] == 0.0) and np.abs(gradient[real]).min() > 0


def test_bfloat16_computation_keeps_float32_parameters_and_routing():
    """dtype=bfloat16 rounds the attention to about 1%; parameters and all of the routing stay float32: probabilities
    are those of the float32 layer on the same input, to float32 accuracy."""
    layer, layer_bf16 = tiny.gqe(2, 4, 2), tiny.gqe(2, 4, 2, dtype=jnp.bfloat16)
    assert {a.dtype for a in jax.tree.leaves(nnx.state(layer_bf16))} == {jnp.dtype(jnp.float32)}
    x = jnp.asarray(X, jnp.bfloat16)
    y, stats = tiny.call(layer_bf16, x)
    want, want_stats = tiny.call(layer, x.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    assert {a.dtype for a in jax.tree.leaves(stats)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    np.testing.assert_allclose(stats.router_probs, want_stats.router_probs, atol=1e-6)
    np.testing.assert_array_equal(stats.expert_index, want_stats.expert_index)
    np.testing.assert_allclose(y.astype(jnp.float32), want, atol=0.05)
    assert layer_bf16.init_cache(1, 4, jnp.bfloat16).k.dtype == jnp.bfloat16


def test_layer_under_nnx_jit_and_eagerly_without_a_mesh():
    """`nnx.jit`, plain calls and `jax.jit` over split state are the same function; none needs a mesh."""
    layer = tiny.gqe(2, 2, 1, implementation="reference")
    assert jax.sharding.get_abstract_mesh().empty
    want = tiny.call(layer, X)[0]
    assert_close(layer(X)[0], want, atol=1e-6)
    assert_close(nnx.jit(lambda layer, x: layer(x)[0])(layer, X), want, atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((16, 16, 8, 3), r"top_k=3 exceeds experts_per_group=2 \(num_query_experts=16 / num_kv_heads=8\): lower top_k"),
        ((16, 4, 2, 0), r"top_k=0 must be positive"),
        ((16, 6, 4, 1), r"num_query_experts=6 is not a multiple of num_kv_heads=4: .* change either"),
        ((18, 4, 2, 1), r"head_dim=None means d_model / num_query_experts, but 18 / 4 is no integer: set head_dim"),
        ((16, 4, 2, 1, 5), r"head_dim=5 is odd, but rotary embedding .*: make head_dim even, or set rope_theta=None"),
        ((20, 4, 2, 1), r"head_dim=5 is odd, but rotary embedding"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    """At construction, with field, value, rule and remedy."""
    with pytest.raises(ConfigError, match=message):
        GQEAttention(*sizes, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("make", [tiny.gqe, tiny.gqa])
def test_inputs_that_do_not_fit_are_refused(make):
    """Before anything is computed, with the shape found and the shape needed."""
    layer = make()
    with pytest.raises(ValueError, match=r"x has shape \(2, 13, 15\), but must be \[B, S, d_model=16\]"):
        layer(X[..., :15])
    with pytest.raises(ValueError, match=r"x has shape \(13, 16\), but must be \[B, S, d_model=16\]"):
        layer(X[0])
    with pytest.raises(ValueError, match=r"segment_ids has shape \(2, 12\), but must be \[B, S\] = \(2, 13\) like x"):
        layer(X, segment_ids=np.ones((2, 12), np.int32))
    with pytest.raises(ValueError, match=r"positions has shape \(3, 13\), but must be \[B or 1, S\]"):
        layer(X, positions=np.zeros((3, 13), np.int32))
    with pytest.raises(ValueError, match=r"positions has dtype float32, but must be integers: pass positions.astype"):
        layer(X, positions=np.zeros((2, 13), np.float32))
    with pytest.raises(ValueError, match=r"segment_ids has dtype bool, but must be integers: pass segment_ids.astype"):
        layer(X, segment_ids=np.ones((2, 13), bool))


def test_float64_is_refused_by_the_name_of_the_argument():
    """Where it would be the dtype of the computation; a layer with a dtype casts."""
    with jax.enable_x64(True):
        x = jnp.asarray(X, jnp.float64)
        with pytest.raises(ValueError, match=r"x has dtype float64 .* would compute in float64, .*: cast x, or"):
            tiny.gqe()(x)
        assert tiny.call(tiny.gqe(dtype=jnp.float32), x)[0].dtype == jnp.float32


@pytest.mark.parametrize(
    "argument, message",
    [
        ({"router": "random"}, r"router='random' is no RouterConfig: write gqe_jax.RouterConfig\(kind=...\)"),
        ({"rope_scaling": "yarn"}, r"rope_scaling='yarn' is no RopeScaling: write gqe_jax.RopeScaling\(kind="),
        ({"rngs": jax.random.key(0)}, r"rngs=Array.* is no Rngs: pass nnx.Rngs\(seed\)"),
    ],
)
def test_arguments_of_another_type_are_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        GQEAttention(16, 4, 2, 1, 8, **{"rngs": nnx.Rngs(0)} | argument)


def test_the_reference_has_forward_and_second_derivatives():
    """A directional derivative is the gradient's product with the direction, and second derivatives are symmetric:
    forward over reverse equals reverse over forward."""
    apply, params, rest = tiny.split(tiny.gqe(implementation="reference"))
    direction = jnp.asarray(tiny.inputs(seed=2))

    def value(x):
        return jnp.sum(jnp.square(apply(params, rest, x)[0]))

    def slope(x):
        return jax.jvp(value, (x,), (direction,))[1]

    @tiny.jit
    def derivatives(x):
        gradient, forward = jax.jvp(jax.grad(value), (x,), (direction,))
        return slope(x), jnp.sum(gradient * direction), jax.grad(slope)(x), forward

    along, product, reverse, forward = derivatives(X)
    np.testing.assert_allclose(along, product, rtol=1e-4)
    np.testing.assert_allclose(reverse, forward, atol=1e-3 * np.abs(forward).max())
