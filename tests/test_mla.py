"""Latent attention: its equations, the equality of its two forms, its cache, and what it counts and refuses."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spec_numpy
import tiny
import tiny_run
from flax import nnx

from gqe_jax import KVCache, LatentCache
from gqe_jax.attention import GQEMLAConfig, MLAConfig
from gqe_jax.cli import main as cli
from gqe_jax.config import ConfigError, MeshConfig, ModelConfig
from gqe_jax.config_files import load_config
from gqe_jax.convert import layer_to_torch
from gqe_jax.evaluate.kernel_report import report
from gqe_jax.flops import decode_flops, forward_flops, parameter_count
from gqe_jax.generate import Generator
from gqe_jax.models.transformer import Transformer, abstract_model
from gqe_jax.parallel.mesh import check_model, make_mesh
from gqe_jax.plan.memory import estimate, gathered_keys
from gqe_jax.plan.roofline import hbm_bytes

SIZES = {"num_query_heads": 4, "num_kv_heads": 2, "latent_dim": 12, "rope_dim": 4, "head_dim": 8}


def drawn(seed):
    """A layer of random sizes and features, and an input."""
    rng = np.random.default_rng(seed)
    groups, members, dim, rank = (int(rng.choice(of)) for of in ([1, 2, 3], [1, 2, 4], [2, 6, 8], [1, 5, 16, 40]))
    repeats = int(rng.choice([1, 1, 2]))
    options = {
        "rope_repeats": repeats,
        "latent_norm": bool(rng.integers(2)),
        "bias": bool(rng.integers(2)),
        "out_bias": [None, True, False][rng.integers(3)],
        "rope_theta": [None, 100.0, 1e4][rng.integers(3)],
        "softcap": [None, 2.0][rng.integers(2)],
        "window": [None, 4][rng.integers(2)],
    }
    rope_dim = 2 * repeats * int(rng.integers(1, 4))
    layer = tiny.mla(groups, members, rank, rope_dim, seed=seed, head_dim=dim, **options)
    return layer, tiny.inputs(2, 11, seed=seed), rng


def spec(layer, x, **options):
    names = ("num_kv_heads", "head_dim", "rope_dim", "rope_repeats", "rope_theta", "softcap", "window")
    options |= {name: getattr(layer.config, name) for name in names}
    return spec_numpy.latent_layer(layer_to_torch(layer), x, **options)


@pytest.mark.parametrize("seed", range(4))
def test_both_forms_are_the_equations(seed, monkeypatch):
    """A prompt of any length, and tokens behind it one by one, each in the absorbed and in the expanded form, give the
    float64 equations of each head; and the cache holds latent and rotated key, at every rank: absorbing moves W_kup and
    W_vup past sums over tokens, which are linear."""
    layer, x, rng = drawn(seed)
    wanted, prompt = spec(layer, x), int(rng.integers(2, 9))
    for absorbs in (True, False):
        monkeypatch.setattr(MLAConfig, "absorbs", lambda config, q_len, absorbs=absorbs: absorbs)
        apply, params, rest = tiny.split_jit(layer)
        cache, parts, at = layer.init_cache(2, 11), [], 0
        for count in (prompt, *[1] * (11 - prompt)):
            y, _, cache = apply(params, rest, x[:, at : at + count], cache=cache)
            parts.append(y)
            at += count
        np.testing.assert_allclose(np.concatenate(parts, axis=1), wanted.y, atol=1e-5)
        np.testing.assert_allclose(cache.latent, wanted.latents, atol=1e-5)
        assert cache.length.tolist() == [11, 11] and cache.latent.shape[-1] == sum(layer.cached_shape)


@pytest.mark.parametrize("seed", range(3))
def test_documents_and_padding_do_not_see_each_other(seed):
    layer, x, _ = drawn(seed)
    ids = np.array([[1] * 5 + [2] * 6, [1] * 3 + [2] * 4 + [0] * 4])
    y = tiny.call(layer, x, segment_ids=jnp.asarray(ids), positions=jnp.arange(11)[None])[0]
    wanted = spec(layer, x, segment_ids=ids).y
    np.testing.assert_allclose(np.asarray(y)[ids != 0], wanted[ids != 0], atol=1e-5)


def test_gradients_are_those_of_finite_differences():
    """Of every parameter, along a random direction, through both norms of the tied form with all options on."""
    layer = tiny.mla(2, 2, 6, 4, bias=True, latent_norm=True, rope_repeats=2, softcap=3.0)
    x = tiny.inputs(1, 7)
    apply, params, rest = tiny.split(layer)
    def total(params):
        return jnp.sum(jnp.sin(apply(params, rest, x)[0]))

    loss, rng, grads = tiny.jit(total), np.random.default_rng(0), tiny.jit(jax.grad(total))(params)
    for path, grad in jax.tree.flatten_with_path(grads)[0]:
        direction = rng.standard_normal(grad.shape).astype(np.float32)
        direction *= 1e-2 / np.linalg.norm(direction)

        def moved(sign, path=path, direction=direction):
            return loss(jax.tree.map_with_path(lambda p, v: v + sign * direction if p == path else v, params))

        difference = float(moved(1) - moved(-1)) / 2
        assert abs(difference - np.sum(grad * direction)) <= 2e-5 + 0.02 * abs(difference), path


def test_a_model_generates_what_full_passes_say():
    """Greedy tokens of prompts of unequal length, prefilled together, are the argmax of a full pass over each row."""
    config = model(MLAConfig(**SIZES), d_model=32, dtype="float32", init_std=0.3)
    transformer = Transformer(config, rngs=nnx.Rngs(0))
    prompts = [np.arange(1, 12), np.array([5, 3])]
    new = Generator(transformer, eos_id=0).generate(prompts, max_new_tokens=6, stop_tokens=())
    rows = np.zeros((2, 18), int)  # what stands behind a row's tokens changes nothing before it
    for row, prompt, tokens in zip(rows, prompts, new, strict=True):
        row[1 : 1 + len(prompt) + 6] = np.concatenate([prompt, tokens])
    best = np.argmax(tiny.jit(lambda tokens: transformer.logits(transformer(tokens)[0]))(rows), -1)
    for row, prompt, tokens in zip(best, prompts, new, strict=True):
        np.testing.assert_array_equal(row[len(prompt) : len(prompt) + 6], tokens)


def test_a_cache_of_another_layer_is_refused():
    """Of another batch, rank or width, of a stack of layers, and of keys and values."""
    layer, x = tiny.mla(2, 2, 12, 4), tiny.inputs()
    stacked = jax.tree.map(lambda leaf: leaf[None], layer.init_cache(2, 16))
    others = (layer.init_cache(3, 16), tiny.mla(2, 2, 8, 8).init_cache(2, 16), tiny.mla(2, 2, 12, 2).init_cache(2, 16))
    for cache in (*others, stacked):
        with pytest.raises(ValueError, match=r"cache has latents .* 12 \+ 4 numbers: make it by this layer's init"):
            layer(x, cache=cache)
    with pytest.raises(ValueError, match="make it by this layer's init_cache"):
        layer(x, cache=KVCache.empty(2, 16, 2, 8, jnp.float32))
    with pytest.raises(ValueError, match="make it by this layer's init_cache"):
        tiny.gqa()(x, cache=layer.init_cache(2, 16))
    with pytest.raises(ValueError, match="13 new tokens behind the 0 held exceed the cache's capacity of 12"):
        layer(x, cache=layer.init_cache(2, 12))
    with pytest.raises(ValueError, match="batch=2, capacity=0: a cache holds at least one row"):
        layer.init_cache(2, 0)


def test_a_stacked_cache_is_written_in_one_layer_alone():
    """The current layer's latents and lengths move; what padding wrote is written over."""
    one = LatentCache.empty(2, 5, (3, 2), jnp.bfloat16)
    cache = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], 3, axis=0), one).at(jnp.int32(1))
    c, k_rope = jnp.ones((2, 3, 3)), 2 * jnp.ones((2, 3, 2))
    cache = cache.append(c, k_rope, jnp.array([[1, 1, 1], [1, 0, 0]])).append(3 * c[:, :1], 3 * k_rope[:, :1])
    assert cache.length.tolist() == [[0, 0], [4, 2], [0, 0]] and cache.latent.dtype == jnp.bfloat16
    assert cache.latent[1, 0].tolist() == [[1, 1, 1, 2, 2]] * 3 + [[3, 3, 3, 6, 6], [0] * 5]
    assert cache.latent[1, 1, :2].tolist() == [[1, 1, 1, 2, 2], [3, 3, 3, 6, 6]]
    assert not cache.latent[jnp.array([0, 2])].any()


def model(attention, **options):
    return ModelConfig(**{"vocab_size": 16, "d_model": 64, "num_layers": 2, "d_ff": 32, "context": 64} | options,
                       attention=attention)  # fmt: skip


def test_parameters_are_counted_as_they_are_made():
    ways = ({}, {"bias": True}, {"bias": True, "out_bias": False}, {"latent_norm": True, "num_kv_heads": 4})
    routed = SIZES | {"num_query_experts": 8, "top_k": 2}
    routed.pop("num_query_heads")
    kinds = [MLAConfig(**SIZES | options) for options in ways]
    kinds += [GQEMLAConfig(**routed), GQEMLAConfig(**routed, bias=True, variant="hard_concat")]
    for attention in kinds:
        config = model(attention)
        made = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract_model(config))))
        assert parameter_count(config)["total"] == made


def test_plans_count_r_plus_R():
    """d = 64, H = 4, G = 2, D = 8, r = 12, R = 4. A token is cached as 16 numbers in each layer, on every device of
    `expert` alike. FLOPs are twice the multiplications: of each weight for each token, and of a score and a weighted
    value for each pair, D + R and D wide expanded, r + R and r absorbed, where each head has W_kup and W_vup to itself.
    """
    config = model(MLAConfig(**SIZES))
    outside, down, up = 64 * 4 * (8 + 4) + 64 * 4 * 8, 64 * (12 + 4), 2 * 12 * 8
    whole = forward_flops(config, 10)
    assert whole.projections == 2 * 2 * 10 * (outside + down + 2 * up)
    assert whole.attention == 2 * 2 * 4 * (12 + 8) * 55
    last = decode_flops(config, 10)
    assert last.projections == 2 * 2 * (outside + down + 4 * up)
    assert last.attention == 2 * 2 * 4 * (16 + 12) * 10 and last.mlp == whole.mlp / 10
    assert decode_flops(dataclasses.replace(config, attention=MLAConfig(**SIZES, window=4)), 10).attention == (
        2 * 2 * 4 * (16 + 12) * 4
    )

    # GQE of 8 experts, k = 1: 2 + 1 heads attend; W_q has 8 + 1 heads, W_o 2 + 2 slots, the router 8 columns.
    routed = model(GQEMLAConfig(num_query_experts=8, num_kv_heads=2, latent_dim=12, rope_dim=4, head_dim=8))
    outside = 64 * 9 * (8 + 4) + 64 * 4 * 8
    last = decode_flops(routed, 10)
    assert last.projections == 2 * 2 * (outside + down + 3 * up) and last.router == 2 * 2 * 64 * 8
    assert (last.attention, last.shared_head) == (2 * 2 * 2 * 28 * 10, 2 * 2 * 28 * 10)
    assert forward_flops(routed, 10).shared_head == 2 * 2 * (12 + 8) * 55
    assert forward_flops(routed, 10, "dense_equivalent").attention == 2 * 2 * 8 * (12 + 8) * 55

    run = load_config("smoke")
    run = dataclasses.replace(run, model=config)
    for expert in (1, 2):
        mesh = dict(data=1, fsdp=1, expert=expert, context=1)
        assert estimate(run, mesh, "decode", 3, 50)["cache"] == 2 * 2 * 3 * 50 * 16
    more = [hbm_bytes(run, mesh, "decode", 1, length) for length in (50, 51)]
    assert more[1] - more[0] == 2 * 2 * 16
    # The ring or the gathering of `context` moves expanded keys and values, of this device's heads.
    assert gathered_keys(run, mesh | {"context": 2}, 1, 50) == 2 * 50 * 1 * (12 + 8)


def test_kernels_are_named_with_their_widths():
    """At DeepSeek's widths the TPU decodes by its own kernel, one KV head of 576; training takes keys of 192 there, and
    what cannot take such widths says why."""
    attention = MLAConfig(num_query_heads=16, num_kv_heads=16, latent_dim=512, rope_dim=64, head_dim=128)
    run = dataclasses.replace(load_config("smoke"), model=model(attention, d_model=2048, context=4096))
    training, prefill, decode = report(run).split("\n\n")[1:]
    assert "tpu  pallas_tpu        all heads: the fastest on a TPU" in training and "absorbed" not in training
    assert "cudnn needs values as wide as keys, not 128 and 192" in training or "cudnn takes bf" in training
    assert "tpu  pallas_tpu        all heads" in prefill
    assert "tpu  pallas_tpu_decode absorbed heads: the fastest on a TPU" in decode
    routed = GQEMLAConfig(num_query_experts=32, num_kv_heads=8, latent_dim=512, rope_dim=64, head_dim=128)
    run = dataclasses.replace(run, model=model(routed, d_model=2048, context=4096))
    assert "tpu  pallas_tpu_decode absorbed heads: the fastest on a TPU" in report(run)
    assert "tpu  pallas_tpu        routed heads and shared head: the fastest on a TPU" in report(run)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"latent_dim": 0}, "latent_dim=0 must be positive: set latent_dim to at least 1"),
        ({"rope_dim": 3}, r"rope_dim=3 is no multiple of 2 · rope_repeats=2"),
        ({"rope_dim": 4, "rope_repeats": 4}, r"rope_dim=4 is no multiple of 2 · rope_repeats=8"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"qk_norm": True}, "qk_norm=True is not for kind 'mla'.*set latent_norm=True"),
        ({"num_kv_heads": 3}, "num_query_heads=4 is not a multiple of num_kv_heads=3"),
    ],
)
def test_what_cannot_be_configured(options, message):
    with pytest.raises(ConfigError, match=message):
        MLAConfig(**SIZES | options)


def test_meshes_that_do_not_divide_the_latent_are_refused():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    check_model(mesh, model(MLAConfig(**SIZES)))
    wide = type("Mesh", (), {"shape": {"fsdp": 8, "context": 1, "expert": 4}})()
    with pytest.raises(ConfigError) as refused:
        check_model(wide, model(MLAConfig(**SIZES)))
    assert "mesh.expert=4 does not divide model.attention.num_kv_heads=2" in str(refused.value)
    assert "do not divide model.attention.latent_dim=12: choose divisors of 12" in str(refused.value)


@pytest.mark.slow
def test_a_run_trains_resumes_bit_for_bit_evaluates_and_generates(tmp_path, capsys):
    tiny_run.prepare_tiny(tmp_path / "data", documents=60)
    file = tiny_run.write_config(tmp_path / "mla.py", tmp_path / "data")
    text = file.read_text().replace('kind="gqa", num_query_heads=4, **heads', 'kind="mla", num_query_heads=4, '
                                    'latent_dim=12, rope_dim=8, **heads')  # fmt: skip
    file.write_text(text.replace('argument == "gqa"', "True"))
    train = ["train", "--config", str(file), "--run"]
    with tiny_run.quick_compiles(tmp_path / "cache"):
        assert cli.main([*train, str(tmp_path / "run")]) == 0
        shutil.copytree(tmp_path / "run", tmp_path / "resumed")
        for step in (6, 8):
            shutil.rmtree(tmp_path / "resumed/checkpoints" / str(step))
        assert cli.main([*train, str(tmp_path / "resumed")]) == 0
        assert tiny_run.leaf_hashes(tmp_path / "resumed", 8) == tiny_run.leaf_hashes(tmp_path / "run", 8)
        assert cli.main(["eval", "--run", str(tmp_path / "run")]) == 0
        assert cli.main(["generate", "--run", str(tmp_path / "run"), "--prompt", "the", "--max-new-tokens", "4"]) == 0
    assert "bits/byte" in capsys.readouterr().out
