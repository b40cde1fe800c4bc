"""Conversions of one layer, in float64 against the equations: what is exact, and what is fitted, a least square."""

import itertools

import dense_layers
import numpy as np
import pytest
from dense_layers import DIM, WIDTH

from gqe_jax.attention import RouterConfig
from gqe_jax.config import ConfigError
from gqe_jax.convert.align import orthogonal_turns, pair_moments, plane_turns, turn_planes
from gqe_jax.convert.heads import best_heads
from gqe_jax.convert.pool import aligned, to_gqa
from gqe_jax.convert.refit import RIDGE, Regression
from gqe_jax.convert.upcycle import gqe, to_gqe

X = dense_layers.inputs()
KINDS = {
    "rotary": {},
    "biases": {"bias": True},
    "Qwen2's biases": {"bias": True, "out_bias": False},
    "no rotary": {"rope_theta": None},
    "QK norm": {"qk_norm": True},
}


def regression(f, y):
    return Regression(f.T @ f, f.T @ y, float((y * y).sum()))


def drawn(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


# ---------------------------------------------------------------------------- fewer KV heads


@pytest.mark.parametrize("case", KINDS)
def test_alignment_alone_changes_nothing(case):
    """Values are turned and turned back by W_o; queries turn with keys, by planes that the rotary embedding turns too.
    With QK norm keys stay. Something is turned in every case."""
    model = dense_layers.config(heads=8, kv_heads=4, **KINDS[case])
    layer = dense_layers.params(model)
    moments = dense_layers.calibration(layer, model, X).moments
    turned = aligned(layer, np.arange(4).reshape(2, 2), moments, model.attention)
    assert not np.allclose(turned["v_proj.kernel"], layer["v_proj.kernel"])
    assert np.allclose(turned["k_proj.kernel"], layer["k_proj.kernel"]) == (case == "QK norm")
    expected = dense_layers.output(layer, model.attention, X)
    np.testing.assert_allclose(dense_layers.output(turned, model.attention, X), expected, atol=1e-12)


@pytest.mark.parametrize("pool", ["mean", "first"])
@pytest.mark.parametrize("case", KINDS)
def test_heads_that_are_turned_copies_pool_without_loss(case, pool):
    """Alignment finds the turns that made them: any reflection for values, planes of keys with a rotary embedding (with
    QK norm the keys are equal, for no turn of them could be undone)."""
    model = dense_layers.config(heads=4, kv_heads=2, **KINDS[case])
    layer = dense_layers.params(model)
    turn = np.linalg.qr(drawn(3, DIM, DIM))[0]
    planes = np.exp(1j * drawn(4, DIM // 2))
    keys = {"no rotary": lambda k: k @ turn, "QK norm": lambda k: k}.get(case, lambda k: turn_planes(k, planes))
    for path in [path for path in layer if path.startswith(("k_proj", "v_proj"))]:
        heads = np.moveaxis(layer[path], -2, 0)
        heads[1] = heads[0] @ turn if path.startswith("v") else keys(heads[0])
    config, pooled = dense_layers.converted(to_gqa, model, layer, X, num_kv_heads=1, pool=pool)
    expected = dense_layers.output(layer, model.attention, X)
    np.testing.assert_allclose(dense_layers.output(pooled, config, X), expected, atol=1e-10)
    config, naive = dense_layers.converted(to_gqa, model, layer, X, num_kv_heads=1, pool=pool, align=False)
    assert np.abs(dense_layers.output(naive, config, X) - expected).max() > 1e-2


def test_means_of_heads_are_the_papers():
    """Pooling equals the reshape and mean of a PyTorch weight [(G D), d], in two steps or in one; query heads keep
    their order; the norm of a mean of unrelated heads shrinks by the root of their number."""
    model = dense_layers.config(heads=8, kv_heads=4)
    layer = dense_layers.params(model)
    two, once = dense_layers.converted(to_gqa, model, layer, X, num_kv_heads=2, align=False)
    weight = layer["k_proj.kernel"].reshape(WIDTH, 4 * DIM).T
    expected = weight.reshape(2, 2, DIM, WIDTH).mean(axis=1).reshape(2 * DIM, WIDTH)
    np.testing.assert_allclose(once["k_proj.kernel"].reshape(WIDTH, -1).T, expected, rtol=1e-15)
    assert np.array_equal(once["q_proj.kernel"].reshape(WIDTH, -1), layer["q_proj.kernel"].reshape(WIDTH, -1))
    assert np.array_equal(once["o_proj.kernel"].reshape(-1, WIDTH), layer["o_proj.kernel"].reshape(-1, WIDTH))
    half = dense_layers.with_attention(model, num_kv_heads=2)
    assert half.attention == two
    _, twice = dense_layers.converted(to_gqa, half, once, X, num_kv_heads=1, align=False)
    _, direct = dense_layers.converted(to_gqa, model, layer, X, num_kv_heads=1, align=False)
    np.testing.assert_allclose(twice["v_proj.kernel"], direct["v_proj.kernel"], rtol=1e-13, atol=1e-15)


def test_order_of_kv_heads_within_a_group_changes_nothing():
    """Permuting KV heads together with their query heads permutes the pooled layer's query heads alone: its output is
    the same, for the mean has no order and neither has the best alignment."""
    model = dense_layers.config(heads=4, kv_heads=2)
    layer = dense_layers.params(model)
    axes = {"q_proj.kernel": 1, "k_proj.kernel": 1, "v_proj.kernel": 1, "o_proj.kernel": 0}
    swapped = {path: np.flip(x, axes[path]) for path, x in layer.items()}
    config, one = dense_layers.converted(to_gqa, model, layer, X, num_kv_heads=1)
    _, other = dense_layers.converted(to_gqa, model, swapped, X, num_kv_heads=1)
    np.testing.assert_allclose(
        dense_layers.output(one, config, X), dense_layers.output(other, config, X), atol=1e-9
    )


def test_moments_of_pairs_are_those_of_the_heads_outputs():
    """Σ (x, 1)(x, 1)ᵀ is all that is kept of the calibration text, biases included."""
    model = dense_layers.config(kv_heads=2, bias=True)
    layer = dense_layers.params(model)
    moments = dense_layers.calibration(layer, model, X).moments
    a = X.reshape(-1, WIDTH) @ layer["k_proj.kernel"].reshape(WIDTH, -1) + layer["k_proj.bias"].ravel()
    expected = (a.T @ a).reshape(2, DIM, 2, DIM).transpose(0, 2, 1, 3)
    found = pair_moments(moments, layer["k_proj.kernel"], layer["k_proj.bias"])
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_turns_are_the_nearest():
    """Two heads: no orthogonal matrix, and no rotation of a plane, brings them closer than the one that is found; its
    distance is |a|² + |b|² − 2 · nuclear norm of aᵀb. More heads: closer than without turns."""
    a, b = drawn(5, 40, DIM), drawn(6, 40, DIM)
    pairs = np.einsum("hta,itb->hiab", [a, b], [a, b])
    first, second = orthogonal_turns(pairs)
    nuclear = np.linalg.svd(a.T @ b, compute_uv=False).sum()
    best = (a * a).sum() + (b * b).sum() - 2 * nuclear
    assert np.square(a @ first - b @ second).sum() == pytest.approx(best, rel=1e-9)
    turns = plane_turns(pairs)
    found = np.square(turn_planes(a, turns[0]) - turn_planes(b, turns[1])).sum()
    for angles in itertools.product(np.linspace(0, 2 * np.pi, 60), repeat=DIM // 2):
        assert found < np.square(a - turn_planes(b, np.exp(1j * np.array(angles)))).sum() + 1e-9

    heads = drawn(7, 5, 40, DIM)
    pairs = np.einsum("hta,itb->hiab", heads, heads)

    def distance(heads):
        return np.square(heads - heads.mean(0)).sum()

    assert distance(heads @ orthogonal_turns(pairs)) < 0.9 * distance(heads)
    assert distance(turn_planes(heads, plane_turns(pairs)[:, None])) < 0.95 * distance(heads)


# ---------------------------------------------------------------------------- the fitted output projection


def test_ridge_is_the_regularised_least_square():
    """The gradient of |Y − F W|² + λ |W − W0|² is 0, so it is never worse than the prior on its tokens; without a pull
    the residual is orthogonal to the features; a layer's own output gives its own W back; sums of batches add up."""
    f, y, prior = drawn(0, 50, 6), drawn(1, 50, 3), drawn(2, 6, 3)
    sums = regression(f, y)
    fitted = sums.ridge(prior)
    pull = RIDGE * np.trace(f.T @ f) / 6
    np.testing.assert_allclose(f.T @ (y - f @ fitted), pull * (fitted - prior), atol=1e-9)
    for weights in (fitted, prior):
        expected = np.linalg.norm(f @ weights - y) / np.linalg.norm(y)
        assert sums.relative_error(weights) == pytest.approx(expected, rel=1e-9)
    assert sums.relative_error(fitted) < sums.relative_error(prior)
    np.testing.assert_allclose(f.T @ (y - f @ sums.ridge(prior, 1e-14)), 0.0, atol=1e-8)
    np.testing.assert_allclose(regression(f, f @ prior).ridge(prior), prior, rtol=1e-9)
    assert sums.ridge(prior, np.inf) is prior
    assert regression(0 * f, y).ridge(prior) is prior
    parts = [regression(f[part], y[part]) for part in (slice(20), slice(20, 50))]
    added = Regression(*(sum(getattr(p, name) for p in parts) for name in ("gram", "cross", "energy")))
    np.testing.assert_allclose(added.ridge(prior), fitted, rtol=1e-10)


@pytest.mark.parametrize("groups, members", [(2, 3), (6, 4)])
def test_heads_that_make_the_target_are_chosen(groups, members):
    """The target is made of one head in each group, by exhaustive choice (9 ways) and by descent (4⁶ ways)."""
    f = drawn(8, 400, groups, members, DIM)
    chosen = np.random.default_rng(9).integers(0, members, groups)
    y = sum(f[:, g, m] @ drawn(10 + g, DIM, WIDTH) for g, m in enumerate(chosen))
    found = best_heads(regression(f.reshape(400, -1), y), groups, members, 1)
    np.testing.assert_array_equal(found[:, 0], chosen)


def test_choices_that_tie_go_to_the_lower_head():
    """Equal heads predict equally well."""
    f = np.repeat(drawn(8, 100, 2, 1, DIM), 3, axis=2)
    for keep in (1, 2):
        found = best_heads(regression(f.reshape(100, -1), drawn(9, 100, WIDTH)), 2, 3, keep)
        np.testing.assert_array_equal(found, np.tile(np.arange(keep), (2, 1)))


def test_all_query_heads_kept_are_the_layer():
    """Head selection with H' = H is the identity, and with a head that is without effect that head goes."""
    model = dense_layers.config(heads=6, kv_heads=2)
    layer = dense_layers.params(model)
    layer["o_proj.kernel"][:, 1] = 0.0
    config, fewer = dense_layers.converted(to_gqa, model, layer, X, num_query_heads=4)
    np.testing.assert_allclose(
        dense_layers.output(fewer, config, X), dense_layers.output(layer, model.attention, X), atol=1e-12
    )
    assert to_gqa(model, num_query_heads=6).config == model.attention


# ---------------------------------------------------------------------------- upcycling


@pytest.mark.parametrize("case", KINDS)
def test_all_heads_with_a_fixed_router_are_the_dense_layer(case):
    model = dense_layers.config(heads=6, kv_heads=2, **KINDS[case])
    layer = dense_layers.params(model)
    config, result = dense_layers.converted(to_gqe, model, layer, X, top_k=3, exact=True)
    expected = dense_layers.output(layer, model.attention, X)
    np.testing.assert_allclose(dense_layers.output(result, config, X), expected, atol=1e-12)
    for path in ("k_proj.kernel", "v_proj.kernel"):
        assert result[path] is layer[path]


def test_copies_of_an_mhas_heads_are_the_dense_layer_for_every_router():
    """Whichever copy is selected, it is the group's one head: sparse upcycling without loss, at M' experts a group."""
    model = dense_layers.config(heads=3, kv_heads=3, bias=True)
    layer = dense_layers.params(model)
    config, result = dense_layers.converted(to_gqe, model, layer, X, experts_per_group=4, exact=True)
    result["router.proj.kernel"] = drawn(11, *result["router.proj.kernel"].shape)
    assert config.experts_per_group == 4
    expected = dense_layers.output(layer, model.attention, X)
    np.testing.assert_allclose(dense_layers.output(result, config, X), expected, atol=1e-12)


def test_copies_do_not_depend_on_the_router_but_through_its_weights():
    """The slots of copies are the same for every router; only ō, whose rows of W_o start at 0, sees it."""
    model = dense_layers.config(heads=6, kv_heads=2)
    layer = dense_layers.params(model)
    config, result = dense_layers.converted(to_gqe, model, layer, X)
    other = result | {"router.proj.kernel": drawn(12, *result["router.proj.kernel"].shape)}
    outputs = [dense_layers.output(each, config, X) for each in (result, other)]
    np.testing.assert_allclose(*outputs, atol=1e-12)


@pytest.mark.parametrize("experts", ["copies", "own"])
def test_a_fitted_gqe_layer_predicts_better_than_its_start(experts):
    model = dense_layers.config(heads=4, kv_heads=2)
    layer = dense_layers.params(model)
    config, result = dense_layers.converted(to_gqe, model, layer, X, experts=experts)
    sums = dense_layers.calibration(layer, model, X).regress(config, result)
    prior = np.concatenate([result[f"{name}.kernel"].reshape(-1, WIDTH) for name in ("o_proj", "o_extra")])
    assert sums.relative_error(sums.ridge(prior)) < 0.9 * sums.relative_error(prior)


def test_random_weights_are_those_of_the_seed():
    model = dense_layers.config(heads=4, kv_heads=2)
    layer = dense_layers.params(model)
    layers = [dense_layers.converted(to_gqe, model, layer, X, seed=seed)[1] for seed in (3, 3, 4)]
    kernels = [each["router.proj.kernel"] for each in layers]
    assert np.array_equal(kernels[0], kernels[1]) and not np.array_equal(kernels[0], kernels[2])
    assert kernels[0].std() == pytest.approx(RouterConfig().init_std, rel=0.3)


# ---------------------------------------------------------------------------- settings that are refused


@pytest.mark.parametrize(
    "make, options, said",
    [
        (to_gqa, {"num_kv_heads": 3}, "--num-kv-heads=3 does not divide the run's num_kv_heads=4: .* one of 1, 2, 4"),
        (to_gqa, {"num_query_heads": 6}, "--num-query-heads=6 does not leave each of the run's 4 KV heads"),
        (to_gqa, {"num_query_heads": 12}, "equally many of its 2 query heads: use one of 4, 8"),
        (to_gqa, {"num_kv_heads": 2, "pool": "max"}, "--pool='max' is unknown: use one of mean, first, random"),
        (to_gqe, {"top_k": 3}, "--top-k=3 must lie between 1 and the 2 query heads of a KV group"),
        (to_gqe, {"top_k": 2, "experts": "copies"}, "would fill the 2 slots of a group with the same output"),
        (to_gqe, {"top_k": 2, "experts_per_group": 4}, "--experts-per-group=4 is a number of copies"),
        (to_gqe, {"exact": True}, "--exact needs every one of the 2 query heads"),
        (to_gqe, {"top_k": 2, "exact": True, "reconstruct": 4}, "--exact leaves nothing to reconstruct"),
        (to_gqe, {"reconstruct": -1}, "--reconstruct=-1 is a number of steps"),
    ],
)
def test_settings_that_cannot_be(make, options, said):
    with pytest.raises(ConfigError, match=said):
        make(dense_layers.config(heads=8, kv_heads=4), **options)


def test_sources_that_are_not_dense():
    """A GQE run has no dense heads to pool or to copy."""
    model = dense_layers.config()
    routed = to_gqe(model).config
    for make in (to_gqa, to_gqe):
        with pytest.raises(ConfigError, match=r"converts dense attention .* and the run's is 'gqe'"):
            make(type(model)(**{**vars(model), "attention": routed}))


def test_a_reconstruction_needs_rows_of_its_own():
    """Without them there would be nothing to learn from; that is said before anything is computed."""
    with pytest.raises(ConfigError, match="reconstruct=4 learns from rows that the fit does not see"):
        gqe({}, None, [], reconstruct=4)
