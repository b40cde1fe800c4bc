"""The router: selection, its order, its three kinds, jitter, and loss-free balancing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spec_numpy
import tiny
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gqe_jax.attention import Router, RouterConfig, top_k_experts
from gqe_jax.config import ConfigError
from gqe_jax.convert import layer_from_torch, layer_to_torch

X = tiny.inputs(2, 9)


def route(config, x=X, *, G=2, M=4, k=2, segment_ids=None, rngs=None, bias=None, positions=None, layer_index=0):
    router = Router(x.shape[-1], G, M, k, config, rngs=nnx.Rngs(0))
    if bias is not None:
        router.bias.set_value(jnp.asarray(bias, jnp.float32))
    positions = jnp.arange(x.shape[1])[None] if positions is None else positions
    draws, _ = router.draws(jnp.asarray(x), positions, rngs, layer_index)
    routing = router(jnp.asarray(x), segment_ids=segment_ids, draws=draws, num_groups=G)
    return routing.expert_index, routing.selected_probs, routing.statistics(router.config)


@settings(deadline=None, max_examples=40)
@given(
    hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=5), elements=st.integers(-2, 2).map(float)),
    st.data(),
)
def test_top_k_is_a_stable_descending_sort(scores, data):
    """Few distinct values, so ties abound: among equals the lower index must come first, as a stable sort has it."""
    k = data.draw(st.integers(1, scores.shape[-1]))
    want = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
    np.testing.assert_array_equal(top_k_experts(jnp.asarray(scores), k), want)


def test_a_zero_router_sends_every_token_to_the_lowest_experts():
    """All probabilities tie at 1/M, so experts 0..k-1 take every token: why zero is not the default initialisation."""
    index, probs, stats = route(RouterConfig(init_std=0.0))
    np.testing.assert_array_equal(index, np.broadcast_to([0, 1], (2, 9, 2, 2)))
    np.testing.assert_array_equal(probs, np.full((2, 9, 2, 2), 0.25))
    np.testing.assert_array_equal(stats.load, [[1, 1, 0, 0]] * 2)
    np.testing.assert_allclose(stats.load_balance_loss, 2.0, rtol=1e-6)  # k, as for perfect balance: its gradient tells
    np.testing.assert_allclose(stats.entropy, np.log(4), rtol=1e-6)
    assert (RouterConfig().init_std > 0) and len(np.unique(route(RouterConfig())[0])) == 4


@pytest.mark.parametrize("config", [RouterConfig(init_std=1.0), RouterConfig(init_std=1.0, bias_update_rate=0.1)])
def test_experts_stand_by_descending_probability(config):
    """Under loss-free balancing too, where another score selects; and each carries its own probability."""
    bias = np.random.default_rng(0).standard_normal((2, 4)) if config.bias_update_rate else None
    index, selected, stats = route(config, bias=bias)
    assert np.all(np.diff(selected, axis=-1) <= 0)
    np.testing.assert_array_equal(selected, np.take_along_axis(np.asarray(stats.router_probs), np.asarray(index), -1))


def test_loss_free_bias_selects_but_leaves_probabilities():
    """A bias of 2 exceeds every difference of probabilities: the biased expert is always among the selected, and the
    probabilities, the entropy and the z-loss are those without it."""
    config = RouterConfig(init_std=1.0, bias_update_rate=0.1)
    bias = np.array([[0, 0, 2, 0], [0, 2, 0, 0]])
    _, _, plain = route(config)
    _, _, stats = route(config, bias=bias)
    np.testing.assert_array_equal(stats.load[[0, 1], [2, 1]], [1, 1])
    assert plain.load[0, 2] < 1 and plain.load[1, 1] < 1
    for name in ("router_probs", "mean_prob", "entropy", "z_loss"):
        np.testing.assert_array_equal(getattr(stats, name), getattr(plain, name))


def test_the_bias_is_state_and_no_parameter():
    """Gradients and weight decay must not see it."""
    layer = tiny.gqe(2, 2, 1, router=RouterConfig(bias_update_rate=0.1))
    assert "bias" not in nnx.to_pure_dict(nnx.state(layer, nnx.Param))["router"]
    assert "bias" in nnx.to_pure_dict(nnx.state(layer))["router"]
    assert tiny.gqe(2, 2, 1).router.bias is None


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("variant", ["gqe", "hard_concat"])
def test_fixed_router_is_a_static_layer(variant, k):
    """Experts 0..k-1 always: SQA with k · G query heads; `gqe` adds the shared head, and ō as the mean of all slots."""
    layer = tiny.gqe(2, 3, k, variant=variant, router=RouterConfig(kind="fixed"))
    state = layer_to_torch(layer)
    D, slots = tiny.HEAD_DIM, 2 * k
    static = {name: value for name, value in state.items() if name not in ("router.weight", "q_shared.weight")}
    static["q_proj.weight"] = state["q_proj.weight"].reshape(2, 3, D, -1)[:, :k].reshape(slots * D, -1)
    static["o_proj.weight"] = W = state["o_proj.weight"][:, : slots * D]
    if variant == "gqe":
        W = W + np.tile(state["o_proj.weight"][:, slots * D : (slots + 1) * D], (1, slots)) / slots
        static["o_proj.weight"] = W
    options = {"head_dim": D, "rope_theta": 10_000.0}
    want = spec_numpy.layer(static, X, num_kv_heads=2, **options).y
    if variant == "gqe":  # the shared head is multi-query attention on the mean key and value
        mean = {name: state[name].reshape(2, D, -1).mean(0) for name in ("k_proj.weight", "v_proj.weight")}
        shared = mean | {"q_proj.weight": state["q_shared.weight"], "o_proj.weight": state["o_proj.weight"][:, -D:]}
        want = want + spec_numpy.layer(shared, X, num_kv_heads=1, **options).y
    y, stats = tiny.call(layer, X, rngs=nnx.Rngs(router=1))
    np.testing.assert_allclose(y, want, atol=1e-5)
    np.testing.assert_array_equal(stats.expert_index, np.broadcast_to(np.arange(k), (2, 9, 2, k)))


def chi_square(index, M):
    """Σ (observed - expected)² / expected over the experts, for each group."""
    counts = (np.asarray(index)[..., None] == np.arange(M)).sum((0, 1, 3))
    expected = counts.sum(-1, keepdims=True) / M
    return ((counts - expected) ** 2 / expected).sum(-1)


@pytest.mark.parametrize("source", ["rngs", "position"])
def test_random_router_is_uniform(source):
    """4096 draws of 1 of 4 in each of 4 groups: chi-square with 3 degrees of freedom exceeds 16.3 once in a thousand
    (the seed is fixed). Neighbouring positions and groups must be independent too: their pairs are uniform over 16
    (15 degrees of freedom, 37.7 once in a thousand)."""
    rngs = nnx.Rngs(router=0) if source == "rngs" else None
    index, probs, _ = route(RouterConfig(kind="random"), np.zeros((1, 4096, 16), np.float32), G=4, k=1, rngs=rngs)
    assert np.all(chi_square(index, 4) < 16.3)
    flat = np.asarray(index)[..., 0]
    neighbours = 4 * flat[:, 1:] + flat[:, :-1]
    groups = 4 * flat[:, :, 1:] + flat[:, :, :-1]
    assert np.all(chi_square(neighbours[..., None], 16) < 37.7) and np.all(chi_square(groups[..., None], 16) < 37.7)
    np.testing.assert_array_equal(probs, np.full(probs.shape, 0.25))


def test_random_router_draws_sets_without_replacement():
    """k of M: k different experts, in the order of their (equal) probabilities, that is by index; all sets occur."""
    index, _, stats = route(RouterConfig(kind="random"), np.zeros((1, 500, 16), np.float32), M=4, k=2)
    sets = {tuple(pair) for pair in np.asarray(index)[0, :, 0]}
    assert sets == {(a, b) for a in range(4) for b in range(a + 1, 4)}
    np.testing.assert_allclose(stats.load, 0.5, atol=0.1)


def test_random_router_is_fresh_with_rngs_and_repeatable_without():
    """Training draws anew from its stream at each call and for each row. Without rngs the draw is a function of seed,
    layer and position: the same for each row and call, so that decoding repeats what a full pass chose."""
    config, rngs = RouterConfig(kind="random", seed=7), nnx.Rngs(router=0)
    x = np.zeros((2, 64, 16), np.float32)
    first, second = route(config, x, rngs=rngs)[0], route(config, x, rngs=rngs)[0]
    assert (first != second).any() and (first[0] != first[1]).any()
    still = route(config, x)[0]
    np.testing.assert_array_equal(still[0], still[1])
    np.testing.assert_array_equal(route(config, 1 + x)[0], still)
    assert (route(RouterConfig(kind="random", seed=8), x)[0] != still).any()
    assert 0.6 < (route(config, x, layer_index=1)[0] != still).mean() < 0.9  # of M = 4: unrelated draws differ in 3/4
    np.testing.assert_array_equal(route(config, x[:, :9], positions=jnp.arange(20, 29)[None])[0], still[:, 20:29])


def test_jitter_needs_rngs_and_reaches_the_router_alone():
    """Without rngs (evaluation) it is off. With them the probabilities move, by no more than the factor on the input
    allows: |Δ logit| <= jitter · Σ|x w|."""
    layer = tiny.gqe(2, 4, 1, router=RouterConfig(jitter=0.1))
    _, stats = tiny.call(layer, X)
    want = spec_numpy.layer(layer_to_torch(layer), X, **tiny.spec_options(layer))
    np.testing.assert_allclose(stats.router_probs, want.probs, atol=1e-6)
    _, jittered = tiny.call(layer, X, rngs=nnx.Rngs(router=0))
    assert (jittered.router_probs != stats.router_probs).any()
    bound = 0.1 * np.einsum("bsd,nd->bsn", np.abs(X), np.abs(layer_to_torch(layer)["router.weight"]))
    moved = np.abs(np.log(jittered.router_probs) - np.log(stats.router_probs))
    assert np.all(moved <= 2 * bound.reshape(2, 9, 2, 4).max(-1, keepdims=True) + 1e-6)
    # All but the weights of ō comes from the unjittered input: with zeros for it in W_o, only the choice differs.
    state = layer_to_torch(layer)
    state["o_proj.weight"][:, 2 * tiny.HEAD_DIM : 3 * tiny.HEAD_DIM] = 0
    layer_from_torch(layer, state)
    held = spec_numpy.layer(state, X, **tiny.spec_options(layer), expert_index=np.asarray(jittered.expert_index))
    np.testing.assert_allclose(tiny.call(layer, X, rngs=nnx.Rngs(router=0))[0], held.y, atol=1e-5)


def test_load_balance_loss_has_its_least_gradient_at_balance():
    """M Σ f P with f held: its gradient lowers the probability of overloaded experts. With all tokens on expert 0 of 2,
    dloss/dlogit = M f (p(1-p)) / tokens is positive for expert 0 and the opposite for expert 1."""
    router = Router(4, 1, 2, 1, RouterConfig(init_std=0.0), rngs=nnx.Rngs(0))
    x = jnp.ones((1, 3, 4))
    graphdef, state = nnx.split(router)

    def loss(state):
        router = nnx.merge(graphdef, state)
        return router(x, segment_ids=None, draws=None, num_groups=1).statistics(router.config).load_balance_loss

    gradient = jax.grad(loss)(state)["proj"]["kernel"].get_value()[0, 0]
    np.testing.assert_allclose(gradient, [0.5, -0.5], rtol=1e-6)  # M · f · p(1 - p) = 2 · 1 · 1/4, summed over tokens


@pytest.mark.parametrize("config", [RouterConfig(jitter=0.1), RouterConfig(kind="random")])
def test_rngs_without_randomness_for_the_router_are_refused(config):
    """The stream is `router`, or the default one; a key is no nnx.Rngs."""
    layer = tiny.gqe(router=config, implementation="reference")
    with pytest.raises(ValueError, match="rngs has the streams dropout, but jitter and the `random` router draw from"):
        layer(X, rngs=nnx.Rngs(dropout=0))
    with pytest.raises(ValueError, match=r"rngs=Array.* is no Rngs: pass nnx.Rngs\(router=key_or_seed\), or None"):
        layer(X, rngs=jax.random.key(0))
    assert tiny.call(layer, X, rngs=nnx.Rngs(0))[0].shape == X.shape


@pytest.mark.parametrize("kind", ["fixed", "random"])
@pytest.mark.parametrize("option", ["jitter", "bias_update_rate"])
def test_a_router_without_parameters_refuses_what_it_cannot_do(kind, option):
    """Jitter and balancing act on learned probabilities."""
    with pytest.raises(ConfigError, match=f"router.kind='{kind}' has nothing to learn or to balance: set"):
        RouterConfig(kind=kind, **{option: 0.1})
