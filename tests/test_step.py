"""The training step. With b1 = 0 and no clipping Adam's first moment is the gradient, so it can be read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from gqe_jax.attention import GQAConfig, GQEConfig, RouterConfig
from gqe_jax.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from gqe_jax.train.step import Step

GQA = GQAConfig(num_query_heads=4, num_kv_heads=2, head_dim=8, implementation="reference")


def gqe(**router):
    return GQEConfig(
        num_query_experts=4, num_kv_heads=2, head_dim=8, implementation="reference", router=RouterConfig(**router)
    )


@functools.cache
def make_step(attention, accumulate=1):
    model = ModelConfig(
        vocab_size=37, d_model=16, num_layers=2, d_ff=24, context=16, dtype="float32", init_std=0.2, attention=attention
    )
    train = TrainConfig(steps=10, accumulate=accumulate, loss_chunk=4)
    optimizer = OptimizerConfig(
        learning_rate=1e-30, min_learning_rate=0.0, warmup_steps=0, decay_steps=0, b1=0.0, clip="none"
    )
    config = RunConfig(model=model, data=DataConfig(batch_size=8), train=train, optimizer=optimizer)
    return Step(config)


def make_batch(rows=8, length=7):
    """Rows of unequal numbers of real tokens."""
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(1, 37, (2, rows, length)).astype(np.int32)
    mask = np.arange(length) < rng.integers(2, length + 1, (rows, 1))
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return {
        "tokens": tokens, "targets": targets, "segment_ids": mask.astype(np.int32), "positions": positions, "mask": mask
    }


def initial(step):
    """A state like `step.init()`, drawn with NumPy: nothing to compile."""
    shapes, rng = jax.eval_shape(step.init), np.random.default_rng(1)
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), dataclasses.replace(shapes, key=None))
    params = jax.tree.map_with_path(
        lambda path, a: (path[-1].key == "scale") + 0.2 * rng.standard_normal(a.shape, np.float32), shapes.params
    )
    return dataclasses.replace(zeros, params=params, key=jax.random.key(2))


@functools.cache
def compiled(step, rows):
    """`step.train` for batches of so many rows."""
    return step.train.lower(initial(step), make_batch(rows)).compile(tiny.QUICK)


def train(step, batch, state=None):
    """One step, from the initial state if none is given."""
    return compiled(step, len(batch["tokens"]))(state or initial(step), batch)


def gradient(step, batch):
    """(gradient, metrics) of one step from the initial state."""
    state, metrics = train(step, batch)
    return state.opt_state["adam"].mu, metrics


def assert_trees_close(got, want, **tolerance):
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, **tolerance, err_msg=jax.tree_util.keystr(path))


def forward(step, params, batch):
    """(mean loss per real token, the layers' metrics), from the logits of all tokens at once."""
    model = step.model(jax.tree.map(jnp.asarray, params), initial(step).buffers)
    x, report = model(jnp.asarray(batch["tokens"]), segment_ids=jnp.asarray(batch["segment_ids"]))
    log_probs = jax.nn.log_softmax(model.logits(x))
    losses = -jnp.take_along_axis(log_probs, jnp.asarray(batch["targets"])[..., None], axis=-1)[..., 0]
    return jnp.where(batch["mask"], losses, 0.0).sum() / batch["mask"].sum(), report.metrics


def test_accumulation_changes_nothing_for_dense_models():
    """Four microbatches with unequal numbers of real tokens: each contributes by its tokens, not by its own mean."""
    batch = make_batch()
    want, metrics = gradient(make_step(GQA), batch)
    got, accumulated = gradient(make_step(GQA, accumulate=4), batch)
    np.testing.assert_allclose(accumulated["loss"], metrics["loss"], atol=1e-6)
    want_loss, _ = forward(make_step(GQA), initial(make_step(GQA)).params, batch)
    np.testing.assert_allclose(metrics["loss"], want_loss, atol=1e-5)
    assert accumulated["tokens"] == metrics["tokens"] == batch["mask"].sum()
    assert_trees_close(got, want, atol=1e-6)


def test_accumulated_router_losses_are_those_of_the_microbatches():
    """The balance loss is a product of means, so it is taken per microbatch, and the mean of those enters the total:
    with equally many real tokens in each, the step is the mean of the microbatches' own steps."""
    batch = make_batch() | {"mask": np.ones((8, 7), bool), "segment_ids": np.ones((8, 7), np.int32)}
    got, metrics = gradient(make_step(gqe(load_balance_weight=1.0), accumulate=4), batch)
    alone = make_step(gqe(load_balance_weight=1.0))
    parts = [gradient(alone, {name: rows[part::4] for name, rows in batch.items()}) for part in range(4)]
    grads, part_metrics = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *parts)
    assert_trees_close(got, grads, atol=2e-6)
    for name in ("loss", "load", "load_balance_loss"):
        np.testing.assert_allclose(metrics[name], part_metrics[name], atol=1e-6, err_msg=name)


def test_router_losses_enter_the_total_by_their_weights():
    """The derivative along the gradient's own direction in the routers' parameters is the gradient's length there:
    measured by a central difference of the loss put together here, summed over layers, with the load held."""
    balance_weight, z_weight = 20.0, 5.0
    step, batch = make_step(gqe(load_balance_weight=balance_weight, z_loss_weight=z_weight)), make_batch()
    grads, params = gradient(step, batch)[0], initial(step).params
    direction = grads["layers"]["attention"]["router"]["proj"]["kernel"]
    length = np.sqrt(np.sum(direction**2))

    @tiny.jit
    def total(shift):
        moved = jax.tree.map(lambda p: p, params)
        moved["layers"]["attention"]["router"]["proj"]["kernel"] += shift * direction / length
        loss, metrics = forward(step, moved, batch)
        auxiliary = balance_weight * metrics["load_balance_loss"] + z_weight * metrics["z_loss"]
        return loss + auxiliary.sum(), metrics["load"]

    (above, load), (below, same_load) = total(1e-3), total(-1e-3)
    np.testing.assert_array_equal(load, same_load)  # else the difference runs across a jump of the selection
    assert length > 0.1
    np.testing.assert_allclose((above - below) / 2e-3, length, rtol=0.02)


def test_loss_free_balancing_moves_against_the_load_error():
    """By its rate, against the sign, for every layer, group and expert. It is no parameter: the optimizer stands still
    here. From a bias that gives all tokens to expert 0, it finds an even load."""
    step, batch = make_step(gqe(bias_update_rate=0.1, load_balance_weight=0.0)), make_batch()
    (shape,) = (bias.shape for bias in jax.tree.leaves(initial(step).buffers))
    assert shape == (2, 2, 2)
    lopsided = jax.tree.map(lambda bias: bias + np.float32([1.0, 0.0]), initial(step).buffers)
    state, metrics = train(step, batch, dataclasses.replace(initial(step), buffers=lopsided))
    np.testing.assert_array_equal(metrics["load"], np.broadcast_to([1.0, 0.0], shape))
    np.testing.assert_allclose(*jax.tree.leaves(state.buffers), np.broadcast_to([0.9, 0.1], shape), rtol=1e-6)
    for _ in range(12):
        state, metrics = train(step, batch, state)
    assert np.abs(metrics["load"] - 0.5).max() < 0.25
    assert initial(make_step(GQA)).buffers == {}


def test_padding_rows_contribute_nothing():
    """Rows without a real token leave loss, gradient and token count as they are: batches can be filled up."""
    batch, step = make_batch(2), make_step(gqe(load_balance_weight=1.0))
    padded = {name: rows.copy() for name, rows in batch.items()}
    for name in ("mask", "segment_ids"):
        padded[name] = np.concatenate([padded[name], np.zeros_like(padded[name])])
    for name in ("tokens", "targets", "positions"):
        padded[name] = np.concatenate([padded[name], padded[name][::-1]])
    want, metrics = gradient(step, batch)
    got, padded_metrics = gradient(step, padded)
    assert padded_metrics["tokens"] == metrics["tokens"]
    np.testing.assert_allclose(padded_metrics["loss"], metrics["loss"], atol=1e-6)
    assert_trees_close(got, want, atol=1e-6, rtol=1e-5)


def test_evaluation_sums_over_real_tokens():
    """Nats and tokens of parts add up to those of the whole; they are what the training loss is made of."""
    step, batch = make_step(GQA), make_batch()
    params = initial(step).params
    whole = step.evaluate(params, {}, batch)
    np.testing.assert_allclose(whole["nats"] / whole["tokens"], forward(step, params, batch)[0], rtol=1e-5)
    parts = [step.evaluate(params, {}, {name: rows[i : i + 4] for name, rows in batch.items()}) for i in (0, 4)]
    np.testing.assert_allclose(sum(part["nats"] for part in parts), whole["nats"], rtol=1e-6)
    assert sum(part["tokens"] for part in parts) == whole["tokens"] == batch["mask"].sum()


def test_the_random_router_draws_anew_at_each_step_and_repeats_with_the_seed():
    """Step s draws from fold_in(key, s): another choice each step, the same when a step is repeated."""
    step, batch = make_step(gqe(kind="random")), make_batch()
    (state, first), (_, again) = train(step, batch), train(step, batch)
    _, second = train(step, batch, state)
    np.testing.assert_array_equal(first["load"], again["load"])
    assert (first["load"] != second["load"]).any() and (first["load"][0] != first["load"][1]).any()
    assert first["loss"] != second["loss"]


def test_init_is_a_function_of_the_seed():
    """The same arrays each time, and another model with another seed."""
    step = make_step(GQA)
    other = Step(dataclasses.replace(step.config, train=dataclasses.replace(step.config.train, seed=1)))
    params = step.init().params
    assert_trees_close(step.init().params, params, atol=0)
    assert (other.init().params["vocabulary"]["embedding"] != params["vocabulary"]["embedding"]).any()
