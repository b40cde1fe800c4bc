"""Which KV heads are pooled: cost and search against exhaustive float64 statements, and the layers that they give."""

import itertools

import dense_layers
import numpy as np
import pytest
from dense_layers import DIM, WIDTH

from gqe_jax.attention import AsymGQAConfig, GQAConfig
from gqe_jax.config import ConfigError
from gqe_jax.convert.align import turn_planes
from gqe_jax.convert.asym import to_asym_gqa, trimmed
from gqe_jax.convert.groups import best_groups, cost, distances, neighbours, turned, turned_in_planes, unturned
from gqe_jax.convert.pool import to_gqa

X = dense_layers.inputs()


def rng(seed=0):
    return np.random.default_rng(seed)


def gaps_of(heads):
    """Δ of heads [n, tokens, D], from their definition."""
    return np.square(heads[:, None] - heads).sum((-2, -1)) / np.square(heads).sum()


def pairs_of(heads):
    return np.einsum("hta,itb->hiab", heads, heads)


def partitions(count, groups, most):
    """All partitions of 0 … count − 1 into so many groups of at most so many."""
    for labels in itertools.product(range(groups), repeat=count):
        sizes = np.bincount(labels, minlength=groups)
        if sizes.min() > 0 and sizes.max() <= most:
            yield [np.flatnonzero(np.array(labels) == group) for group in range(groups)]


# ---------------------------------------------------------------------------- the cost


def test_the_cost_is_the_energy_that_means_lose():
    """J = Σ |a_h − mean of its group|² / Σ |a_h|², in groups of any size."""
    heads = rng().normal(size=(7, 30, DIM))
    for groups in ([[0, 3], [1], [2, 4, 5, 6]], [[0, 1, 2, 3, 4, 5, 6]], [[h] for h in range(7)]):
        lost = sum(np.square(heads[own] - heads[own].mean(0)).sum() for own in groups)
        found = cost(distances(pairs_of(heads), unturned), [np.array(own) for own in groups])
        assert found == pytest.approx(lost / np.square(heads).sum(), abs=1e-12)


def test_distances_of_turned_heads_are_the_residuals_of_the_best_turns():
    """No orthogonal matrix, and no rotation of planes, brings two heads closer; copies that are turned are at 0."""
    heads = rng(1).normal(size=(3, 40, DIM))
    turn = np.linalg.qr(rng(2).normal(size=(DIM, DIM)))[0]
    planes = np.exp(1j * rng(3).normal(size=DIM // 2))
    energy = np.square(heads).sum()
    matrices = np.linalg.qr(rng(4).normal(size=(200, DIM, DIM)))[0]
    angles = np.exp(3j * rng(5).normal(size=(200, DIM // 2)))
    for overlap, turns, apply in ((turned, matrices, np.matmul), (turned_in_planes, angles, turn_planes)):
        gaps = distances(pairs_of(heads), overlap)
        assert not gaps.diagonal().any() and np.allclose(gaps, gaps.T)
        tried = min(np.square(heads[0] - apply(heads[1], turn)).sum() for turn in turns) / energy
        assert 0.8 * tried < gaps[0, 1] < tried
    assert distances(pairs_of(np.stack([heads[0], heads[0] @ turn])), turned)[0, 1] < 1e-12
    copies = np.stack([heads[0], turn_planes(heads[0], planes)])
    assert distances(pairs_of(copies), turned_in_planes)[0, 1] < 1e-12
    assert not distances(np.zeros((2, 2, DIM, DIM)), unturned).any()


# ---------------------------------------------------------------------------- the search


@pytest.mark.parametrize("seed", range(12))
def test_few_heads_are_searched_exhaustively(seed):
    """No other partition into as many groups, none above the largest size, costs less; of equal sizes likewise."""
    draw = rng(seed)
    count = int(draw.integers(2, 7))
    groups = int(draw.integers(1, count + 1))
    most = int(draw.integers(-(-count // groups), count + 1))
    gaps = gaps_of(draw.normal(size=(count, 5, DIM)))
    found = best_groups(gaps, groups, draw, most=most)
    assert sorted(np.concatenate(found)) == list(range(count)) and max(map(len, found)) <= most
    assert [own[0] for own in found] == sorted(own[0] for own in found) and len(found) == groups
    least = min(cost(gaps, other) for other in partitions(count, groups, most))
    assert cost(gaps, found) == pytest.approx(least, abs=1e-12)
    if count % groups == 0:
        equal = best_groups(gaps, groups, draw)
        assert {len(own) for own in equal} == {count // groups}
        least = min(cost(gaps, other) for other in partitions(count, groups, count // groups))
        assert cost(gaps, equal) == pytest.approx(least, abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_many_heads_are_searched_by_descent(seed):
    """From 16 heads in clusters of unequal size the clusters come back; of noise: no worse than neighbours, than equal
    groups, or than any single move or swap away, and the same again with the same seed."""
    draw = rng(seed)
    sizes = draw.permutation([1, 3, 5, 7])
    label = draw.permutation(np.repeat(np.arange(4), sizes))
    centres = 3 * draw.normal(size=(4, 6, DIM))
    found = best_groups(gaps_of(centres[label] + draw.normal(size=(16, 6, DIM)) / 50), 4, rng(seed), most=8)
    assert sorted(map(tuple, found)) == sorted(tuple(np.flatnonzero(label == own)) for own in range(4))

    gaps = gaps_of(draw.normal(size=(16, 2, DIM)))
    equal = best_groups(gaps, 4, rng(seed))
    assert {len(own) for own in equal} == {4}
    found = best_groups(gaps, 4, rng(seed), most=8, start=equal)
    assert cost(gaps, found) <= cost(gaps, equal) + 1e-12 <= cost(gaps, neighbours(16, 4)) + 2e-12
    label = np.zeros(16, int)
    for group, own in enumerate(found):
        label[own] = group
    for first, second in itertools.combinations(range(16), 2):
        for other in (np.where(np.arange(16) == first, label[second], label), label.copy()):
            if (other == label).all():
                other[[first, second]] = label[[second, first]]
            sizes = np.bincount(other, minlength=4)
            if sizes.min() > 0 and sizes.max() <= 8:
                groups = [np.flatnonzero(other == group) for group in range(4)]
                assert cost(gaps, groups) >= cost(gaps, found) - 1e-9
    again = best_groups(gaps, 4, rng(seed), most=8, start=equal)
    assert all(np.array_equal(one, other) for one, other in zip(found, again, strict=True))


# ---------------------------------------------------------------------------- layers


def output(layer, config, x=X):
    """y in float64: an asymmetric layer as an MHA in which each head has its group's keys and values."""
    if isinstance(config, GQAConfig):
        return dense_layers.output(layer, config, x)
    mask = layer["head_mask"] > 0
    index = np.repeat(np.arange(len(mask)), mask.sum(axis=1))
    mha = {path: value for path, value in layer.items() if path != "head_mask"}
    for path in layer:
        if path.startswith("q_proj") or path == "o_proj.kernel":
            axis = 1 if path == "q_proj.kernel" else 0
            heads = np.moveaxis(layer[path], (axis, axis + 1), (0, 1))[mask]
            mha[path] = np.moveaxis(heads[:, None], (0, 1), (axis, axis + 1))
        if path.startswith(("k_proj", "v_proj")):
            mha[path] = np.take(layer[path], index, -2)
    same = {name: getattr(config, name) for name in ("head_dim", "rope_theta", "qk_norm", "bias", "out_bias")}
    return dense_layers.output(mha, GQAConfig(num_query_heads=len(index), num_kv_heads=len(index), **same), x)


CASES = {
    "rotary": {},
    "biases": {"bias": True},
    "Qwen2's biases": {"bias": True, "out_bias": False},
    "no rotary": {"rope_theta": None},
    "QK norm": {"qk_norm": True},
}


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_planted_copies_are_found_and_pooled_without_loss(case, align):
    """Six KV heads that are copies in groups of 1, 2 and 3, turned copies if they are aligned: the partition is found
    and the layer computes what the source's does. Neighbours, as GQA pools them, do not."""
    model = dense_layers.config(heads=12, kv_heads=6, **CASES[case])
    layer = dense_layers.params(model)
    label = np.array([0, 1, 2, 1, 2, 2])
    draw = rng(7)
    for path in [path for path in layer if path.startswith(("k_proj", "v_proj"))]:
        heads = np.moveaxis(layer[path], -2, 0)
        heads[:] = heads[[0, 1, 2]][label]
    if align:
        for head in range(6):
            turn = np.linalg.qr(draw.normal(size=(DIM, DIM)))[0]
            planes = np.exp(1j * draw.normal(size=DIM // 2))
            for path in [path for path in layer if path.startswith(("k_proj", "v_proj"))]:
                a = layer[path][..., head, :]
                keys = {"no rotary": a @ turn, "QK norm": a}.get(case, turn_planes(a, planes))
                layer[path][..., head, :] = a @ turn if path.startswith("v") else keys
    config, result = dense_layers.converted(to_asym_gqa, model, layer, X, num_kv_heads=3, align=align)
    assert isinstance(config, AsymGQAConfig) and (config.num_query_heads, config.max_group_size) == (12, 8)
    assert result["head_mask"].sum(axis=1).tolist() == [2, 4, 6]
    expected = dense_layers.output(layer, model.attention, X)
    np.testing.assert_allclose(output(result, config), expected, atol=1e-10)
    config, pooled = dense_layers.converted(to_gqa, model, layer, X, num_kv_heads=3, align=align)
    assert np.abs(dense_layers.output(pooled, config, X) - expected).max() > 1e-2


@pytest.mark.parametrize("items", ["k", "v", "weights"])
def test_items_say_what_is_compared(items):
    """Two pairs of heads are alike in keys, other two in values; weights see what their inputs never show."""
    model = dense_layers.config(heads=4, kv_heads=4)
    layer = dense_layers.params(model)
    x = X.copy()
    x[..., 0] = 0.0  # an input that is always 0
    layer["k_proj.kernel"][:, 2:] = layer["k_proj.kernel"][:, :2]
    layer["v_proj.kernel"][:, 1::2] = layer["v_proj.kernel"][:, ::2]
    if items == "weights":  # 0, 3 and 1, 2 are alike in it; the text cannot tell
        for name in ("k_proj", "v_proj"):
            layer[f"{name}.kernel"][0] = 9 * rng(3).normal(size=(2, DIM))[[0, 1, 1, 0]]
    conversion = to_asym_gqa(model, num_kv_heads=2, equal=True, items=items, align=False)
    result, _ = conversion.layer(dict(layer), dense_layers.calibration(layer, model, x), 0)
    expected = {"k": [[0, 2], [1, 3]], "v": [[0, 1], [2, 3]], "weights": [[0, 3], [1, 2]]}[items]
    for name in ("k_proj", "v_proj"):
        mean = layer[f"{name}.kernel"][:, expected].mean(axis=2)
        np.testing.assert_allclose(result[f"{name}.kernel"], mean, atol=1e-12)
    assert conversion.config == GQAConfig(num_query_heads=4, num_kv_heads=2, head_dim=DIM)


def test_equal_neighbours_are_plain_pooling():
    """Where neighbours are the best equal groups the result is that of `--to gqa`, and as many groups as heads change
    nothing: in the padded form each has its own place."""
    model = dense_layers.config(heads=8, kv_heads=4, bias=True)
    layer = dense_layers.params(model)
    for path in [path for path in layer if path.startswith(("k_proj", "v_proj"))]:
        layer[path][..., 1::2, :] = layer[path][..., ::2, :] + 1e-3 * rng().normal(size=layer[path][..., ::2, :].shape)
    one, searched = dense_layers.converted(to_asym_gqa, model, layer, X, num_kv_heads=2, equal=True)
    other, pooled = dense_layers.converted(to_gqa, model, layer, X, num_kv_heads=2)
    assert one == other and searched.keys() == pooled.keys()
    for path, value in pooled.items():
        np.testing.assert_array_equal(searched[path], value)
    assert to_asym_gqa(model, num_kv_heads=4, equal=True).config == model.attention
    conversion = to_asym_gqa(model, num_kv_heads=4)
    result, _ = conversion.layer(dict(layer), dense_layers.calibration(layer, model, X), 0)
    assert conversion.lossless and conversion.config.max_group_size == 2
    expected = dense_layers.output(layer, model.attention, X)
    np.testing.assert_allclose(output(result, conversion.config), expected, atol=1e-12)


def test_means_of_unequal_groups():
    """W_k and W_v of a group are its members' means, and query heads stand one behind the other in their order."""
    assert to_asym_gqa(dense_layers.config(heads=5, kv_heads=5), num_kv_heads=2).config.query_heads[1] == 8
    model = dense_layers.config(heads=10, kv_heads=5)
    layer = dense_layers.params(model)
    config, result = dense_layers.converted(to_asym_gqa, model, layer, X, num_kv_heads=2, align=False)
    assert (config.num_kv_heads, config.max_group_size) == (2, 8)
    mask = result["head_mask"] > 0
    sizes = mask.sum(axis=1) // 2
    assert sizes.sum() == 5 and (np.sort(mask, axis=1)[:, ::-1] == mask).all()
    found = min(
        (cost_of_layer(layer, own), [tuple(group) for group in own]) for own in partitions(5, 2, 4) if own[0][0] == 0
    )
    for group, own in enumerate(found[1]):
        np.testing.assert_allclose(result["v_proj.kernel"][:, group], layer["v_proj.kernel"][:, own].mean(1))
        queries = layer["q_proj.kernel"][:, own].reshape(WIDTH, -1, DIM)
        np.testing.assert_array_equal(result["q_proj.kernel"][:, group, mask[group]], queries)
        outputs = layer["o_proj.kernel"][list(own)].reshape(-1, DIM, WIDTH)
        np.testing.assert_array_equal(result["o_proj.kernel"][group, mask[group]], outputs)
    assert not result["o_proj.kernel"][~mask].any()


def test_places_that_no_layer_fills_are_left_out():
    """The largest group of all layers sets the places; nothing of a head is lost."""
    rng_ = rng(8)
    mask = np.array([[[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]], [[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]], bool)
    shapes = {"q_proj.kernel": (2, 5, 2, 6, DIM), "q_proj.bias": (2, 2, 6, DIM), "o_proj.kernel": (2, 2, 6, DIM, 5)}
    params = {path: rng_.normal(size=shape) for path, shape in shapes.items()} | {"head_mask": mask}
    config = AsymGQAConfig(num_query_heads=4, num_kv_heads=2, max_group_size=4, head_dim=DIM, bias=True)
    fewer, trimmed_config = trimmed(params, config)
    assert trimmed_config.max_group_size == 3 and fewer["head_mask"].tolist() == mask[..., :3].tolist()
    np.testing.assert_array_equal(fewer["q_proj.kernel"], params["q_proj.kernel"][:, :, :, :3])
    np.testing.assert_array_equal(fewer["q_proj.bias"], params["q_proj.bias"][:, :, :3])
    np.testing.assert_array_equal(fewer["o_proj.kernel"], params["o_proj.kernel"][:, :, :3])


def cost_of_layer(layer, groups):
    """Mean over K and V of the energy that the groups' means lose on X."""
    lost = []
    for name in ("k_proj", "v_proj"):
        heads = np.einsum("bsd,dhe->hbse", X, layer[f"{name}.kernel"])
        lost.append(sum(np.square(heads[own] - heads[own].mean(0)).sum() for own in groups) / np.square(heads).sum())
    return np.mean(lost)


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "--to asym_gqa needs to know how many KV heads are left"),
        ({"num_kv_heads": 7}, "--num-kv-heads=7 must lie between 1 and the run's num_kv_heads=6"),
        ({"num_kv_heads": 4, "equal": True}, "--num-kv-heads=4 does not divide the run's num_kv_heads=6"),
        ({"num_kv_heads": 3, "items": "q"}, "--items='q' is unknown: use one of kv, k, v, weights"),
        ({"num_kv_heads": 3, "max_group_size": 3}, "--max-group-size=3 must be a multiple of the 2 query heads"),
        ({"num_kv_heads": 3, "max_group_size": 2}, "--max-group-size=2 must be a multiple of the 2 query"),
        ({"num_kv_heads": 3, "max_group_size": 4, "equal": True}, "--max-group-size=4 says nothing of groups of equal"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, said):
    with pytest.raises(ConfigError) as error:
        to_asym_gqa(dense_layers.config(heads=12, kv_heads=6), **options)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)

