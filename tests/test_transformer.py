"""The decoder: loss in chunks, rematerialisation, packing, parameter count, decode."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from gqe_jax.attention import GQAConfig, GQEConfig, LayerReport
from gqe_jax.config import ModelConfig
from gqe_jax.models.transformer import Transformer
from gqe_jax.plan.memory import activation_width

GQE = GQEConfig(num_query_experts=4, num_kv_heads=2, head_dim=8, implementation="reference")
GQA = GQAConfig(num_query_heads=4, num_kv_heads=2, head_dim=8, implementation="reference")
CONFIG = ModelConfig(
    vocab_size=37, d_model=16, num_layers=2, d_ff=24, context=32, dtype="float32", init_std=0.2, attention=GQE
)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(1, 37, (2, 11)).astype(np.int32)
TARGETS = RNG.integers(1, 37, (2, 11)).astype(np.int32)


@functools.cache
def make(config=CONFIG):
    """(graphdef, state) of a model; arrays are made once for all tests."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    return graphdef, tiny.jit(lambda: nnx.split(Transformer(config, rngs=nnx.Rngs(0)))[1])()


def cross_entropy(x, table, targets):
    """-log softmax(x tableᵀ)[target] in float64, from all logits at once."""
    logits = np.asarray(x, np.float64) @ np.asarray(table, np.float64).T
    top = logits.max(-1, keepdims=True)
    log_z = top[..., 0] + np.log(np.exp(logits - top).sum(-1))
    return log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0]


@pytest.mark.parametrize(("chunk", "tied"), [(1, True), (4, True), (4, False), (64, True)])
def test_loss_in_chunks_is_the_loss(chunk, tied):
    """Also where the chunk does not divide the length, or exceeds it; its gradient by the closed form
    (softmax - onehot) · table."""
    graphdef, state = make(dataclasses.replace(CONFIG, tie_embeddings=tied))
    model = nnx.merge(graphdef, state)
    x = RNG.standard_normal((2, 11, 16)).astype(np.float32)
    table = np.asarray((model.vocabulary.embedding if tied else model.vocabulary.lm_head).get_value(), np.float64)
    weight = RNG.standard_normal((2, 11))

    @tiny.jit
    @functools.partial(jax.grad, argnums=1, has_aux=True)
    def gradient_and_losses(state, x):
        losses = nnx.merge(graphdef, state).losses(x, TARGETS, chunk)
        return jnp.sum(losses * weight), losses

    gradient, losses = gradient_and_losses(state, x)
    np.testing.assert_allclose(losses, cross_entropy(x, table, TARGETS), atol=1e-5)
    logits = x @ table.T
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(gradient, weight[..., None] * ((probs - np.eye(37)[TARGETS]) @ table), atol=1e-5)


def test_no_array_of_all_logits_exists():
    """At long context [B, S, V] in float32 would exceed the rest of the step: the compiled gradient holds none, nor its
    flattened form, and the chunks' logits are there (so the names searched for are right)."""
    config = dataclasses.replace(CONFIG, vocab_size=101)
    graphdef, state = make(config)
    x, targets = np.zeros((2, 64, 16), np.float32), np.zeros((2, 64), np.int32)

    def hlo(chunk):
        loss = lambda state, x: nnx.merge(graphdef, state).losses(x, targets, chunk).sum()  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1))).lower(state, x).compile().as_text()

    assert "f32[2,8,101]" in hlo(8) or "f32[16,101]" in hlo(8)
    for whole in ("f32[2,64,101]", "f32[128,101]", "f32[8,2,8,101]", "f32[8,16,101]"):
        assert whole not in hlo(8), whole


@pytest.mark.slow
def test_remat_changes_no_gradient():
    """What is computed again is the same; "none" is the measure."""

    def gradient(remat):
        graphdef, state = make(dataclasses.replace(CONFIG, remat=remat))

        def loss(state):
            model = nnx.merge(graphdef, state)
            x, report = model(TOKENS)
            return model.losses(x, TARGETS, 4).mean() + report.metrics["load_balance_loss"].sum()

        return tiny.jit(jax.grad(loss))(state)

    want = gradient("none")
    for remat in ("dots", "attention", "full"):
        for got, leaf in zip(jax.tree.leaves(gradient(remat)), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(got, leaf, atol=1e-6, rtol=1e-5, err_msg=remat)


@pytest.mark.parametrize("remat", ["dots", "attention", "full"])
@pytest.mark.parametrize("attention", [GQE, GQA, dataclasses.replace(GQE, variant="hard_concat")])
def test_remat_keeps_what_the_plan_counts(attention, remat):
    """The scan over layers stacks what each layer keeps for its backward pass: arrays [L, B, S, ...]. Among them is one
    sum of attention's products with W_o, not the summands, and nothing of the MLP's result: no gradient needs them."""
    config = dataclasses.replace(CONFIG, remat=remat, attention=dataclasses.replace(attention, implementation="xla"))
    kept = kept_by_the_layers(config)
    assert sum(math.prod(shape) for shape in kept) * 4 == activation_width(config, remat)
    attention_out = (2, 4 // 2 if attention is GQA else 1, 8)
    assert (attention_out in kept) == (remat != "full")


def test_without_remat_the_result_of_attention_is_kept():
    config = dataclasses.replace(CONFIG, attention=dataclasses.replace(GQE, implementation="xla"))
    assert (2, 1, 8) in kept_by_the_layers(config)


def kept_by_the_layers(config) -> list[tuple[int, ...]]:
    """Shapes, without [L, B, S], of the float32 arrays that the forward scan of a step hands to the backward."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    program = jax.make_jaxpr(jax.grad(lambda state: nnx.merge(graphdef, state)(TOKENS)[0].sum()))(state)
    scan = next(x for x in program.eqns if x.primitive.name == "scan" and not x.params["reverse"])
    leading = (config.num_layers, *TOKENS.shape)
    shapes = [x.aval.shape for x in scan.outvars if x.aval.dtype == jnp.float32]
    return [shape[3:] for shape in shapes if shape[:3] == leading]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("attention", [GQE, GQA, dataclasses.replace(GQE, variant="hard_concat", qk_norm=True)])
def test_parameter_count(attention, tied):
    """Counted from the equations: embedding, per layer attention, three SwiGLU matrices and two norms, a last norm."""
    config = dataclasses.replace(CONFIG, attention=attention, tie_embeddings=tied)
    d, D, G, V = config.d_model, 8, 2, config.vocab_size
    heads = 4
    count = heads * D * d + 2 * G * D * d  # q, k, v
    if attention is GQA:
        count += heads * D * d
    else:
        count += heads * d + G * D * d  # router, routed slots (k = 1) of W_o
        count += 3 * D * d if attention.variant == "gqe" else 0  # shared query, rows of ō and s
        count += 2 * D if attention.qk_norm else 0
    want = V * d * (1 if tied else 2) + config.num_layers * (count + 3 * d * config.d_ff + 2 * d) + d
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == want


def test_layers_start_unlike_each_other_and_with_the_stated_spread():
    """Stacked initialisation draws each layer from its own key; projections back into the residual stream start
    smaller by sqrt(2 · num_layers), norms at 1."""
    config = dataclasses.replace(CONFIG, d_model=64, d_ff=96, num_layers=4, init_std=0.02)
    params = nnx.to_pure_dict(make(config)[1])["layers"]
    up, down = params["mlp"]["up_proj"]["kernel"], params["mlp"]["down_proj"]["kernel"]
    assert up.shape == (4, 64, 96) and (up[0] != up[1]).all()
    np.testing.assert_allclose([up.std(), down.std()], [0.02, 0.02 / np.sqrt(8)], rtol=0.03)
    np.testing.assert_allclose(params["attention"]["o_proj"]["kernel"].std(), 0.02 / np.sqrt(8), rtol=0.05)
    assert np.all(params["mlp_norm"]["scale"] == 1.0)


@pytest.mark.parametrize("attention", [GQE, GQA], ids=["gqe", "gqa"])
def test_packed_documents_do_not_meet(attention):
    """Two documents and padding in one row, with their own positions: each has the losses it has alone in its row."""
    graphdef, state = make(dataclasses.replace(CONFIG, attention=attention))

    @tiny.jit
    def losses(tokens, targets, segment_ids, positions):
        model = nnx.merge(graphdef, state)
        x, _ = model(tokens, segment_ids=segment_ids, positions=positions)
        return model.losses(x, targets, 4)

    first, second, length = 4, 5, 11
    segment_ids = np.array([[1] * first + [2] * second + [0] * 2])
    positions = np.concatenate([np.arange(first), np.arange(second), np.zeros(2)])[None].astype(np.int32)
    packed = losses(TOKENS[:1], TARGETS[:1], segment_ids, positions)[0]
    for start, count in ((0, first), (first, second)):
        rows = [np.zeros((1, length), np.int32) for _ in range(2)]
        for row, source in zip(rows, (TOKENS, TARGETS), strict=True):
            row[0, :count] = source[0, start : start + count]
        alone = losses(*rows, (np.arange(length) < count)[None].astype(np.int32), np.arange(length)[None])[0]
        np.testing.assert_allclose(packed[start : start + count], alone[:count], atol=1e-5)


def test_prefill_and_decode_equal_one_full_pass():
    """Through the stacked cache: logits of every position, one token at a time after an unequal prefill."""
    graphdef, state = make()
    apply = tiny.jit(lambda tokens, **kwargs: nnx.merge(graphdef, state)(tokens, **kwargs))
    model = nnx.merge(graphdef, state)
    full, lengths = apply(TOKENS)[0], np.array([3, 5])
    segment_ids = (np.arange(6) < lengths[:, None]).astype(np.int32)
    x, _, cache = apply(TOKENS[:, :6], segment_ids=segment_ids, cache=model.init_cache(2, 12))
    np.testing.assert_allclose(x[segment_ids == 1], full[:, :6][segment_ids == 1], atol=1e-5)
    for step in range(6):
        at = lengths + step
        x, _, cache = apply(TOKENS[np.arange(2), at][:, None], cache=cache)
        np.testing.assert_allclose(x[:, 0], full[np.arange(2), at], atol=1e-5)
    np.testing.assert_array_equal(cache.length, np.broadcast_to(lengths + 6, (2, 2)))


def test_router_statistics_come_per_layer_and_reduced():
    """Per-token arrays of every layer would be gigabytes at scale; the reduced ones carry a layer axis."""
    graphdef, state = make()
    report = tiny.jit(lambda state: nnx.merge(graphdef, state)(TOKENS)[1])(state)
    assert type(report) is LayerReport
    assert report.metrics["load"].shape == (2, 2, 2) and report.metrics["load_balance_loss"].shape == (2,)
    assert report.auxiliary_loss.shape == (2,)
