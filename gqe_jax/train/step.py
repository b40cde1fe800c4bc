"""Defines one training step and one evaluation step, pure functions of the state."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from gqe_jax.attention import Buffer
from gqe_jax.config import RunConfig
from gqe_jax.evaluate.heldout import batch_loss
from gqe_jax.models.transformer import Transformer, abstract_model
from gqe_jax.parallel.rules import replicated, state_shardings
from gqe_jax.runs.state import TrainState, initial_keys
from gqe_jax.train.optimizer import clip_state, learning_rate, make_optimizer

STEP_METRICS = ("loss", "tokens", "learning_rate", "gradient_norm", "clip_factor")
"""Names of the metrics that every step has, whatever its layers report."""

Batch = dict[str, jax.Array]
"""A batch has tokens, targets, segment_ids, positions: int32 [B, S], and mask: bool [B, S], where targets are real."""


class Step:
    """Holds the jitted functions of a run: `initial_state`, `train` (one step) and `evaluate` (one batch).

    The model's structure is fixed here; its arrays are arguments and results of the functions:

        initial_state() → TrainState
        train(TrainState, Batch) → (TrainState, metrics); the state given is donated
        evaluate(params, buffers, Batch) → sums over the batch (`heldout.batch_loss`)

    Args:
      config: the run's.
      mesh: the state is split over it as `parallel.rules` says; None: everything is on one device.
    """

    def __init__(self, config: RunConfig, mesh: Mesh | None = None):
        self.config = config
        self.mesh = mesh
        self.optimizer = make_optimizer(config.optimizer, config.train.steps)
        self.learning_rate = learning_rate(config.optimizer, config.train.steps)
        model = abstract_model(config.model)
        self.abstract_model = model
        self.graphdef = nnx.split(model, nnx.Param, Buffer)[0]
        self.abstract_state = jax.eval_shape(self.init)
        self.shardings = None if mesh is None else state_shardings(mesh, self.abstract_state, model)
        self.initial_state = jax.jit(self.init, out_shardings=self.shardings)
        everywhere = None if mesh is None else replicated(mesh)  # metrics, for every process to read
        self.train = jax.jit(self._train, donate_argnums=0, out_shardings=(self.shardings, everywhere))
        self.evaluate = jax.jit(self._evaluate, out_shardings=everywhere)

    def init(self) -> TrainState:
        """Computes the state before the first step, a function of the configuration and its `train.seed` alone."""
        init_key, key = initial_keys(self.config.train.seed)
        model = Transformer(self.config.model, rngs=nnx.Rngs(init_key))
        _, params, buffers = nnx.split(model, nnx.Param, Buffer)
        params = nnx.to_pure_dict(params)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.optimizer.init(params),
            buffers=nnx.to_pure_dict(buffers),
            key=key,
        )

    def with_fresh_optimizer(self, state: TrainState) -> TrainState:
        """Returns `state`, whose `opt_state` is None, with the optimizer's state before the first step."""
        shardings = None if self.shardings is None else self.shardings.opt_state
        return dataclasses.replace(state, opt_state=jax.jit(self.optimizer.init, out_shardings=shardings)(state.params))

    def model(self, params: dict[str, Any], buffers: dict[str, Any]) -> Transformer:
        """Makes the model of these arrays."""
        return nnx.merge(self.graphdef, params, buffers)

    def _train(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        microbatches = self.config.train.accumulate
        tokens = jnp.maximum(batch["mask"].sum(), 1)
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), microbatches)
        gradient = jax.value_and_grad(self._loss, has_aux=True)

        if microbatches == 1:
            (_, metrics), grads = gradient(state.params, state.buffers, batch, keys[0], tokens)
        else:
            def accumulate(grads, microbatch):
                (_, metrics), new = gradient(state.params, state.buffers, *microbatch, tokens)
                return jax.tree.map(jnp.add, grads, new), metrics

            zeros = self._like_params(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params))
            grads, metrics = jax.lax.scan(accumulate, zeros, (_split(batch, microbatches), keys))
            loss = metrics.pop("loss").sum(axis=0)  # each is a microbatch's share of the whole batch's mean
            metrics = {"loss": loss} | jax.tree.map(lambda m: m.mean(axis=0), metrics)

        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        clip = clip_state(opt_state)
        metrics |= {
            "tokens": tokens,
            "learning_rate": self.learning_rate(state.step),
            "gradient_norm": clip.norm,
            "clip_factor": clip.factor,
        }
        return dataclasses.replace(
            state,
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            buffers=self._updated(state.buffers, metrics),
        ), metrics

    def _like_params(self, tree: Any) -> Any:
        """Returns `tree`, whose structure is that of the parameters, split over the mesh as they are."""
        return tree if self.shardings is None else jax.lax.with_sharding_constraint(tree, self.shardings.params)

    def _loss(self, params, buffers, batch: Batch, key: jax.Array, tokens: jax.Array):
        """Computes the share of one microbatch in the step's loss, which is the sum of the shares.

        `tokens` is the number of real targets of the whole batch. Auxiliary losses are averaged over microbatches.
        """
        model = self.model(params, buffers)
        x, report = model(
            batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"], key=key
        )
        losses = model.losses(x, batch["targets"], self.config.train.loss_chunk)
        loss = total = jnp.sum(losses * batch["mask"]) / tokens
        total += report.auxiliary_loss.sum() / self.config.train.accumulate
        metrics = {"loss": loss} | report.metrics
        return total, metrics

    def _updated(self, buffers: dict[str, Any], metrics: dict[str, jax.Array]) -> dict[str, Any]:
        """Returns the buffers after a step: their kind computes them from the metrics of the whole step."""
        if not buffers:
            return buffers
        update = self.config.model.attention.updated_buffers
        return {"layers": {"attention": update(buffers["layers"]["attention"], metrics)}}

    def _evaluate(self, params, buffers, batch: Batch) -> dict[str, jax.Array]:
        return batch_loss(self.model(params, buffers), batch)


def _split(batch: Batch, count: int) -> Batch:
    """Splits arrays [B, S] into microbatches [count, B / count, S], each with rows of every device."""
    return {name: rows.reshape(-1, count, rows.shape[1]).swapaxes(0, 1) for name, rows in batch.items()}


