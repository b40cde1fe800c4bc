"""One training step, and one evaluation step, as pure functions of the state."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from gqe_jax.attention import RouterBias
from gqe_jax.config import GQEConfig, RunConfig
from gqe_jax.evaluate.heldout import batch_loss
from gqe_jax.models.transformer import Transformer
from gqe_jax.parallel.rules import replicated, state_shardings
from gqe_jax.train.optimizer import clip_state, learning_rate, make_optimizer

Batch = dict[str, jax.Array]
"""tokens, targets, segment_ids, positions: int32 [B, S]; mask: bool [B, S], where the target is real."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes.

    Attributes:
      step: int32 scalar, steps taken.
      params: nested dict of the model's parameters.
      opt_state: of the optimizer.
      router_bias: nested dict of loss-free balancing's biases, empty where it is off.
      key: random key of the run; step s draws from fold_in(key, s).
    """

    step: jax.Array
    params: dict[str, Any]
    opt_state: optax.OptState
    router_bias: dict[str, Any]
    key: jax.Array


class Step:
    """The compiled functions of a run. The model's structure is fixed here; its arrays come and go as arguments.

    Args:
      config: of the run.
      mesh: over which the state is split as `parallel.rules` says; None: it is on one device.
    """

    def __init__(self, config: RunConfig, mesh: Mesh | None = None):
        self.config = config
        self.mesh = mesh
        self.optimizer = make_optimizer(config.optimizer, config.train.steps)
        self.learning_rate = learning_rate(config.optimizer, config.train.steps)
        model = nnx.eval_shape(lambda: Transformer(config.model, rngs=nnx.Rngs(0)))
        self.graphdef = nnx.split(model, nnx.Param, RouterBias)[0]
        self.abstract_state = jax.eval_shape(self.init)
        self.shardings = None if mesh is None else state_shardings(mesh, self.abstract_state)
        self.initial_state = jax.jit(self.init, out_shardings=self.shardings)
        everywhere = None if mesh is None else replicated(mesh)  # metrics, for every process to read
        self.train = jax.jit(self._train, donate_argnums=0, out_shardings=(self.shardings, everywhere))
        self.evaluate = jax.jit(self._evaluate, out_shardings=everywhere)

    def init(self) -> TrainState:
        """The state before the first step, as a function of `config.train.seed` alone."""
        init_key, key = jax.random.split(jax.random.key(self.config.train.seed))
        model = Transformer(self.config.model, rngs=nnx.Rngs(init_key))
        _, params, router_bias = nnx.split(model, nnx.Param, RouterBias)
        params = nnx.to_pure_dict(params)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.optimizer.init(params),
            router_bias=nnx.to_pure_dict(router_bias),
            key=key,
        )

    def model(self, params: dict[str, Any], router_bias: dict[str, Any]) -> Transformer:
        return nnx.merge(self.graphdef, params, router_bias)

    def _train(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        parts = self.config.train.accumulate
        tokens = jnp.maximum(batch["mask"].sum(), 1)
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), parts)
        gradient = jax.value_and_grad(self._loss, has_aux=True)

        if parts == 1:
            (_, metrics), grads = gradient(state.params, state.router_bias, batch, keys[0], tokens)
        else:
            def accumulate(grads, part):
                (_, metrics), new = gradient(state.params, state.router_bias, *part, tokens)
                return jax.tree.map(jnp.add, grads, new), metrics

            zeros = self._like_params(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params))
            grads, metrics = jax.lax.scan(accumulate, zeros, (_split(batch, parts), keys))
            loss = metrics.pop("loss").sum(axis=0)  # each part is already a share of the whole batch's mean
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
            router_bias=self._balance(state.router_bias, metrics),
        ), metrics

    def _like_params(self, tree: Any) -> Any:
        """Split over the mesh as the parameters are."""
        return tree if self.shardings is None else jax.lax.with_sharding_constraint(tree, self.shardings.params)

    def _loss(self, params, router_bias, batch: Batch, key: jax.Array, tokens: jax.Array):
        """The share of `batch` in the step's loss: LM loss per token of the whole batch, router losses per part."""
        model = self.model(params, router_bias)
        x, stats = model(
            batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"], key=key
        )
        losses = model.losses(x, batch["targets"], self.config.train.loss_chunk)
        loss = total = jnp.sum(losses * batch["mask"]) / tokens
        metrics = {"loss": loss}
        if stats is not None:
            router = self.config.model.attention.router
            auxiliary = router.load_balance_weight * stats.load_balance_loss + router.z_loss_weight * stats.z_loss
            total += auxiliary.sum() / self.config.train.accumulate
            metrics |= {"load": stats.load, "entropy": stats.entropy, "load_balance_loss": stats.load_balance_loss}
        return total, metrics

    def _balance(self, router_bias: dict[str, Any], metrics: dict[str, jax.Array]) -> dict[str, Any]:
        """Loss-free balancing (Wang et al. 2024): nudges each expert's bias against the sign of its load error."""
        attention = self.config.model.attention
        if not isinstance(attention, GQEConfig) or not attention.router.bias_update_rate:
            return router_bias
        error = attention.top_k / attention.experts_per_group - metrics["load"]
        return jax.tree.map(lambda bias: bias + attention.router.bias_update_rate * jnp.sign(error), router_bias)

    def _evaluate(self, params, router_bias, batch: Batch) -> dict[str, jax.Array]:
        return batch_loss(self.model(params, router_bias), batch)


def _split(batch: Batch, parts: int) -> Batch:
    """[B, S] → [parts, B / parts, S], each part with rows of every device."""
    return {name: rows.reshape(-1, parts, rows.shape[1]).swapaxes(0, 1) for name, rows in batch.items()}


