"""Dense attention as latent attention: what each step keeps, in float64, and what the lossy ones lose."""

import dataclasses

import dense_layers
import jax
import numpy as np
import pytest
import spec_numpy
import tiny
import torch_folder
from converted import arrays_of, logits, tokens
from flax import nnx

import gqe_jax
from gqe_jax.attention import GQAConfig, make_attention
from gqe_jax.config import ConfigError, RopeScaling
from gqe_jax.convert import latent
from gqe_jax.convert.align import pair_moments
from gqe_jax.convert.layers import Calibration
from gqe_jax.models.transformer import Transformer

WIDTH = dense_layers.WIDTH


def drawn(seed, **options):
    """A dense layer of random sizes and features, its model's configuration, and an input."""
    rng = np.random.default_rng(seed)
    groups, members, dim = (int(rng.choice(of)) for of in ([1, 2, 3], [1, 2], [4, 8, 12]))
    features = {"bias": bool(rng.integers(2)), "out_bias": [None, False, True][rng.integers(3)], "rope_theta": 50.0}
    features |= {"head_dim": dim, "softcap": [None, 3.0][rng.integers(2)]}
    model = dense_layers.config(**{"heads": groups * members, "kv_heads": groups} | features | options)
    return model, dense_layers.params(model, seed), dense_layers.inputs(seed + 1)


def sizes(model):
    return model.attention.num_kv_heads, model.attention.head_dim


def check_equal(conversion, layer, model, x, atol=1e-9):
    result, _ = conversion.layer(dict(layer), dense_layers.calibration(layer, model, x), 0)
    found = dense_layers.output(result, conversion.config, x)
    np.testing.assert_allclose(found, dense_layers.output(layer, model.attention, x), atol=atol)
    return result


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tied", [True, False])
def test_merging_and_turning_all_heads_keys_changes_nothing(seed, tied):
    """With nothing stripped of its rotary embedding (R = GD, each frequency G times) and the values whole, the layer is
    the dense one: a frequency turns x and y of all heads alike, and so commutes with one turn of both over the heads.
    Without calibration likewise."""
    model, layer, x = drawn(seed)
    whole = np.prod(sizes(model))
    for options in ({"latent": whole, "rope_dim": whole, "freqfold": 1}, {"exact": True}):
        conversion = latent.to_mla(model, **options, tied_groups=tied)
        check_equal(conversion, layer, model, x)
        assert conversion.config.tied_groups == (tied and model.attention.num_query_heads > sizes(model)[0])


def test_both_halves_need_the_same_turn():
    """With another turn of the second halves, undone in the queries, the layer is another: the rotary embedding mixes
    the halves of a frequency."""
    model, layer, x = drawn(3, kv_heads=2, heads=2, head_dim=4)
    conversion = latent.to_mla(model, exact=True)
    result = check_equal(conversion, layer, model, x)
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(2, 2)))
    other = np.kron(np.eye(2), turn)  # for each of the two frequencies, over the heads
    changed = dict(result)
    for path in ("k_rope.kernel", "q_proj.kernel", "k_rope.bias", "q_proj.bias"):
        if path in changed:
            changed[path] = np.concatenate([changed[path][..., :-4], changed[path][..., -4:] @ other], axis=-1)
    assert np.abs(dense_layers.output(changed, conversion.config, x)
                  - dense_layers.output(result, conversion.config, x)).max() > 1e-3  # fmt: skip
    both = dict(changed)
    for path in ("k_rope.kernel", "q_proj.kernel", "k_rope.bias", "q_proj.bias"):
        if path in both:
            first = both[path][..., -8:-4] @ other
            both[path] = np.concatenate([both[path][..., :-8], first, both[path][..., -4:]], axis=-1)
    np.testing.assert_allclose(
        dense_layers.output(both, conversion.config, x), dense_layers.output(result, conversion.config, x), atol=1e-9
    )


@pytest.mark.parametrize("seed", range(3))
def test_turns_are_the_same_before_and_after_the_rotary_embedding(seed):
    """Σ x xᵀ + y yᵀ of a frequency is that of its keys turned by any angles."""
    model, layer, x = drawn(seed)
    groups, dim = sizes(model)
    keys = (x @ layer["k_proj.kernel"].reshape(WIDTH, -1) + layer.get("k_proj.bias", np.zeros((groups, dim))).ravel())
    keys = keys.reshape(-1, groups, dim)
    turned = spec_numpy.rotary(keys, np.arange(len(keys)), 50.0)
    before, after = (
        latent.rotary_turns(np.einsum("tgd,the->ghde", k, k), fold=1) for k in (keys, turned)
    )
    np.testing.assert_allclose(after, before, atol=1e-8)
    moments = dense_layers.calibration(layer, model, x).moments
    pairs = pair_moments(moments, layer["k_proj.kernel"], layer.get("k_proj.bias"))
    np.testing.assert_allclose(latent.rotary_turns(pairs, fold=1), before, atol=1e-8)


def partial_rotary(layer, attention, x, fold, kept):
    """Attention whose keys and queries, in the basis of each band's principal components, turn in the first `kept`
    components alone, component j of band b with frequency b·f + j·c: steps 1 to 4, stated without a latent."""
    groups, dim = attention.num_kv_heads, attention.head_dim
    members, half, length = attention.num_query_heads // groups, dim // 2, x.shape[1]
    collapse = fold / kept if fold > 1 else 0
    project = {
        name: (x @ layer[f"{name}.kernel"].reshape(WIDTH, -1) + layer.get(f"{name}.bias", np.zeros(())).ravel())
        if f"{name}.bias" in layer
        else x @ layer[f"{name}.kernel"].reshape(WIDTH, -1)
        for name in ("q_proj", "k_proj", "v_proj")
    }
    q = project["q_proj"].reshape(len(x), length, groups, members, dim)
    k, v = (project[name].reshape(len(x), length, groups, dim) for name in ("k_proj", "v_proj"))
    z = (k[..., :half] + 1j * k[..., half:]).reshape(len(x), length, groups, half // fold, fold)
    zq = (q[..., :half] + 1j * q[..., half:]).reshape(len(x), length, groups, members, half // fold, fold)
    scores = 0
    t = np.arange(length)
    for b in range(half // fold):
        channels = z[..., b, :].reshape(-1, groups * fold)
        _, basis = np.linalg.eigh(channels.real.T @ channels.real + channels.imag.T @ channels.imag)
        basis = basis[:, ::-1].reshape(groups, fold, -1)
        components = np.einsum("btgi,gic->btc", z[..., b, :], basis)
        queries = np.einsum("btgmi,gic->btgmc", zq[..., b, :], basis)
        frequency = 50.0 ** (-2 * (b * fold + collapse * np.arange(groups * fold)) / dim)
        turn = np.where(np.arange(groups * fold) < kept, np.exp(1j * t[:, None] * frequency), 1.0)
        scores = scores + np.einsum(
            "bsgmc,btc->bgmst", queries * turn[:, None, None], (components * turn).conj(), optimize=True
        ).real
    scores = scores / np.sqrt(dim)
    if attention.softcap is not None:
        scores = attention.softcap * np.tanh(scores / attention.softcap)
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * np.tri(length)
    o = np.einsum("bgmst,btgd->bsgmd", weights / weights.sum(-1, keepdims=True), v)
    return np.einsum("bsgmd,gmdx->bsx", o, layer["o_proj.kernel"]) + layer.get("o_proj.bias", 0.0)


@pytest.mark.parametrize("seed", range(8))
def test_at_full_rank_the_layer_is_that_of_partial_rotary_embedding(seed):
    """r = 2GD − R: the latent holds the stripped keys and the values in another basis. R, and the frequencies that R
    dimensions of DeepSeek's table have, are as if each component turned with its own band's."""
    model, layer, x = drawn(seed, kv_heads=[2, 3][seed % 2], heads=6)
    (groups, dim), rng = sizes(model), np.random.default_rng(seed)
    collapse = int(rng.choice([c for c in range(1, dim // 2 + 1) if dim // 2 % c == 0]))
    folds = [f for f in range(collapse, dim // 2 + 1, collapse) if dim // 2 % f == 0]
    fold = int(rng.choice(folds))
    rope_dim, kept = (dim // collapse, fold // collapse) if seed < 6 else (dim * 2, 2)
    fold = fold if seed < 6 else 1
    options = {"latent": 2 * groups * dim - rope_dim, "rope_dim": rope_dim, "freqfold": fold}
    conversion = latent.to_mla(model, **options)
    result, _ = conversion.layer(dict(layer), dense_layers.calibration(layer, model, x), 0)
    found = dense_layers.output(result, conversion.config, x)
    np.testing.assert_allclose(found, partial_rotary(layer, model.attention, x, fold, kept), atol=1e-8)
    (control,) = conversion.controls.values()
    assert control.config == conversion.config


def test_folding_is_exact_where_frequencies_are_equal_and_only_there():
    """One KV head, R = D: with f = 2 a band's two components are both kept. At rope_theta = 1 all frequencies are 1 and
    nothing is lost; else the components mix two frequencies. f = 1 keeps each for itself, exactly."""
    for theta, fold, exact in ((1.0, 2, True), (1.0, 1, True), (50.0, 1, True), (50.0, 2, False)):
        model, layer, x = drawn(2, kv_heads=1, heads=2, head_dim=8, rope_theta=theta)
        conversion = latent.to_mla(model, latent=8, rope_dim=8, freqfold=fold)
        result, _ = conversion.layer(dict(layer), dense_layers.calibration(layer, model, x), 0)
        error = np.abs(
            dense_layers.output(result, conversion.config, x) - dense_layers.output(layer, model.attention, x)
        ).max()
        assert error < 1e-9 if exact else error > 1e-3


@pytest.mark.parametrize("kept", [1, 2])
def test_the_largest_components_of_each_frequency_are_kept(kept):
    """Keys of three heads that are combinations of `kept` keys have that many components at each frequency: keeping
    them, R = kept · D, loses nothing, and one fewer does."""
    model, layer, x = drawn(5, kv_heads=3, heads=3, head_dim=8, bias=False)
    rng = np.random.default_rng(0)
    few = rng.normal(size=(WIDTH, kept, 8)) / 3
    layer["k_proj.kernel"] = np.einsum("xjD,gj->xgD", few, rng.normal(size=(3, kept)))
    check_equal(latent.to_mla(model, latent=48 - kept * 8, rope_dim=kept * 8), layer, model, x)
    with pytest.raises(AssertionError):
        check_equal(latent.to_mla(model, latent=48 - kept * 4, rope_dim=kept * 4, freqfold=[2, 1][kept - 1]), layer,
                    model, x)  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_the_balance_of_keys_and_values_changes_nothing_at_full_rank(seed, monkeypatch):
    """ρ divides keys before the analysis and multiplies them after it: it sets what a smaller rank keeps."""
    model, layer, x = drawn(seed, kv_heads=2, heads=4)
    groups, dim = sizes(model)
    outputs = {}
    for rank in (2 * groups * dim - dim, 4):
        for balance in (0.3, 20.0):
            monkeypatch.setattr(latent, "balance_of", lambda *_, balance=balance: balance)
            config, result = dense_layers.converted(latent.to_mla, model, layer, x, latent=rank, rope_dim=dim)
            outputs[rank, balance] = dense_layers.output(result, config, x)
    whole, _ = max(outputs)
    np.testing.assert_allclose(outputs[whole, 0.3], outputs[whole, 20.0], atol=1e-8)
    assert np.abs(outputs[4, 0.3] - outputs[4, 20.0]).max() > 1e-3


def test_a_rank_loses_the_energy_of_the_components_that_it_leaves_out():
    """Of the stripped keys over ρ and the values together, |Δ|² is the sum of the squared singular values behind the
    r-th, and falls with r to 0. Keys are compared in the heads' own dimensions, which are an isometry away."""
    _, layer, x = drawn(4, kv_heads=2, heads=4, head_dim=8, bias=True)
    flat = np.concatenate([x.reshape(-1, WIDTH), np.ones((x.size // WIDTH, 1))], axis=1)
    moments = flat.T @ flat

    def keys_and_values(rank):
        result = latent.latent_layer(layer, moments, fold=2, rope_dim=4, rank=rank)
        c = flat @ np.concatenate([result["kv_down.kernel"], result["kv_down.bias"][None]])
        return (np.einsum("tr,rgD->tgD", c, result[f"{name}.kernel"]) for name in ("k_up", "v_up"))

    whole_k, whole_v = keys_and_values(28)
    np.testing.assert_allclose(whole_v.reshape(len(flat), -1), flat @ latent.affine(layer, "v_proj").reshape(13, -1))
    turns = latent.rotary_turns(pair_moments(moments, layer["k_proj.kernel"], layer["k_proj.bias"]), 2)
    still = flat @ np.einsum("xgD,gDN->xN", latent.affine(layer, "k_proj"), latent.heads_to_components(turns[..., 1:]))
    values = whole_v.reshape(len(flat), -1)
    balance = np.mean(np.linalg.norm(still, axis=0)) / np.mean(np.linalg.norm(values, axis=0))
    singular = np.linalg.svd(np.concatenate([still / balance, values], axis=1), compute_uv=False)
    lost = []
    for rank in range(1, 14):
        k, v = keys_and_values(rank)
        lost.append(np.sum((k - whole_k) ** 2) / balance**2 + np.sum((v - whole_v) ** 2))
        np.testing.assert_allclose(lost[-1], np.sum(singular[rank:] ** 2), rtol=1e-6, atol=1e-8 * singular[0] ** 2)
    assert (np.diff(lost) <= 1e-9).all() and lost[-1] < 1e-9 < lost[0]  # inputs have 13 dimensions, the bias among them


def test_damping_changes_no_component():
    """A multiple of the identity moves eigenvalues alone: the 1% that others add to moments would change nothing."""
    a = np.random.default_rng(0).normal(size=(9, 6))
    moment = a.T @ a
    damped = moment + 0.01 * np.trace(moment) / 6 * np.eye(6)
    np.testing.assert_allclose(latent.principal(damped, 6), latent.principal(moment, 6), atol=1e-10)


@pytest.mark.parametrize("scaling, tied", [("llama3", True), ("yarn", False)])
def test_merging_and_turning_keep_the_model_s_function(scaling, tied):
    """Through a whole model in float32, logits agree to 1e-5 of their size, with biases and scaled frequencies."""
    scaling = RopeScaling(kind=scaling, factor=4.0, original_context=16)
    dense = GQAConfig(num_query_heads=4, num_kv_heads=2, head_dim=8, bias=True, rope_scaling=scaling)
    model = torch_folder.make_model(torch_folder.model_config(dense))
    ids = tokens(101)
    batch = {
        "tokens": jax.numpy.asarray(ids),
        "segment_ids": np.ones_like(ids),
        "positions": np.broadcast_to(np.arange(ids.shape[1]), ids.shape),
    }
    wanted = logits(model, ids)
    ways = [{"exact": True}]
    if scaling.kind != "yarn":
        ways.append({"latent": 16, "rope_dim": 16, "refit": False})
    for options in ways:
        converted = gqe_jax.convert.mla(arrays_of(model), model.config, [batch], tied_groups=tied, **options)
        other = nnx.eval_shape(lambda config=converted.config: Transformer(config, rngs=nnx.Rngs(0)))
        nnx.update(other, nnx.from_flat_state(
            {tuple(path.split(".")): jax.device_put(x) for path, x in converted.params.items()}
        ))  # fmt: skip
        np.testing.assert_allclose(logits(other, ids), wanted, atol=1e-5 * np.abs(wanted).max())
        assert max(converted.errors) < 1e-5


@pytest.mark.parametrize(
    "model, options, message",
    [
        ({"qk_norm": True}, {}, "QK norm"),
        ({"rope_theta": None}, {}, "the run has none"),
        ({"rope_scaling": RopeScaling(kind="yarn", factor=2.0)}, {}, "rope_scaling.kind='yarn' depend on their number"),
        ({}, {"rope_dim": 6}, r"--rope-dim=6 is neither .* use one of 2, 4, 8, 16"),
        ({}, {"rope_dim": 24}, r"--rope-dim=24 .* use one of 2, 4, 8, 16"),
        ({}, {"rope_dim": 0}, r"--rope-dim=0 .* use one of 2, 4, 8, 16"),
        ({}, {"rope_dim": 4}, r"--latent=512 must lie in 1\.\.28"),
        ({}, {"rope_dim": 4, "latent": -1}, r"--latent=-1 must lie in 1\.\.28"),
        ({}, {"rope_dim": 4, "latent": 9, "freqfold": 3}, r"--freqfold=3 has to divide head_dim / 2 = 4 .* of 2, 4"),
        ({}, {"rope_dim": 16, "latent": 9, "freqfold": 2}, r"--freqfold=2 .* use one of 1$"),
        ({}, {"exact": True, "freqfold": 2}, "--exact keeps everything"),
    ],
)
def test_what_cannot_be_converted(model, options, message):
    with pytest.raises(ConfigError, match=message):
        latent.to_mla(dense_layers.config(4, 2, head_dim=8, **model), **options)


def test_other_sources_are_refused():
    model = dense_layers.config()
    with pytest.raises(ConfigError, match=r"--to mla converts dense attention .* and GQE .*'mla': name another run"):
        latent.to_mla(dataclasses.replace(model, attention=tiny.mla().config))
    with pytest.raises(ConfigError, match="--no-tied-groups gives each query head up-projections of its own"):
        latent.to_mla(dataclasses.replace(model, attention=tiny.gqe().config), exact=True, tied_groups=False)


@pytest.mark.parametrize("seed", range(4))
def test_gqe_on_a_latent_is_gqe(seed):
    """With nothing stripped and values whole, every expert and the shared head, which reads the mean of the keys that
    the latent expands to, and with them routers and weights, are the source's: a full pass, and a prompt with tokens
    behind it, absorbed, one by one."""
    rng = np.random.default_rng(seed)
    options = {"variant": ["gqe", "weighted_concat", "gqe", "hard_concat"][seed], "bias": bool(seed % 2)}
    options |= {"softcap": [None, 3.0][seed // 2], "window": [None, 6][rng.integers(2)]}
    layer, x = tiny.gqe(2, 3, 1 + seed % 2, seed=seed, **options), tiny.inputs(2, 11)
    model = dataclasses.replace(dense_layers.config(), d_model=tiny.D_MODEL, attention=layer.config)
    conversion = latent.to_mla(model, **({"exact": True} if seed == 0 else {"latent": 16, "rope_dim": 16}))
    paths = {path: variable for path, variable in nnx.to_flat_state(nnx.state(layer))}
    params = {".".join(path): np.asarray(variable.get_value(), np.float64) for path, variable in paths.items()}
    flat = np.concatenate([x.reshape(-1, tiny.D_MODEL), np.ones((22, 1))], axis=1)
    result, _ = conversion.layer(params, Calibration(flat.T @ flat, None, iter(())), 0)

    other = nnx.eval_shape(lambda: make_attention(conversion.config, tiny.D_MODEL, rngs=nnx.Rngs(0)))
    state = {tuple(path.split(".")): jax.numpy.asarray(value, "float32") for path, value in result.items()}
    assert {path: value.shape for path, value in state.items()} == {
        path: variable.shape for path, variable in nnx.to_flat_state(nnx.state(other))
    }
    nnx.update(other, nnx.from_flat_state(state))
    wanted = tiny.call(layer, x)[0]
    apply, *rest = tiny.split_jit(other)
    np.testing.assert_allclose(apply(*rest, x)[0], wanted, atol=2e-5)
    cache, parts = other.init_cache(2, 11), []
    for first, end in ((0, 8), (8, 9), (9, 10), (10, 11)):
        y, _, cache = apply(*rest, x[:, first:end], cache=cache)
        parts.append(y)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), wanted, atol=2e-5)
