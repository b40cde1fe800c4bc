"""Makes the optimizer: AdamW with a learning-rate schedule, gradient clipping (ZClip) and masked weight decay."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gqe_jax.config import OptimizerConfig

NOT_DECAYED = frozenset({"scale", "bias"})


class ClipState(NamedTuple):
    """Holds what clipping did in the last step, and running statistics of the gradient's norm; float32 scalars."""

    norm: jax.Array  # global norm of the gradient before clipping
    factor: jax.Array  # in (0, 1]: what the gradient was multiplied by
    observed: jax.Array  # norms that entered the statistics
    mean: jax.Array  # running mean of the clipped norms
    variance: jax.Array  # and their running variance


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the schedule of a run of `steps` steps, a function of the steps taken that gives a float32 learning rate.

    The rate rises linearly from 0 at step 0 to its peak at `warmup_steps`. Then "wsd" (warm-up, stable, decay) keeps it
    and, over the last `decay_steps`, lowers it linearly to `min_learning_rate`; "cosine" lowers it along half a cosine.
    The floor is reached at step `steps`, the first that is not taken, and kept. "wsd" with `decay_steps` = 0 stays at
    the peak.
    """
    start = steps - config.decay_steps if config.schedule == "wsd" else config.warmup_steps

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        warm = jnp.minimum(count / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
        decayed = jnp.clip((count - start) / (steps - start), 0.0, 1.0) if start < steps else 0.0
        if config.schedule == "cosine":
            decayed = 0.5 - 0.5 * jnp.cos(jnp.pi * decayed)
        # A weighted mean is exact at both ends in float32; peak - decayed * (peak - floor) is not.
        decaying = (1.0 - decayed) * config.learning_rate + decayed * config.min_learning_rate
        return jnp.asarray(warm * decaying, jnp.float32)

    return schedule


def clip_gradients(config: OptimizerConfig) -> optax.GradientTransformation:
    """Makes a transformation that scales the gradient by one factor and keeps the norm's statistics (`ClipState`).

    With "zclip" (Kumar et al. 2025, arXiv 2504.02507, reciprocal clipping), z = (norm - mean) / std says how unusual a
    norm is; above the threshold it becomes mean + std * threshold² / z: the larger the spike, the more is cut. The
    first `zclip_warmup_steps` norms are only observed, and their mean and (population) variance start the exponential
    averages, which then take in the clipped norm: a spike hardly moves them. With "norm" the norm becomes at most
    `clip_norm`. The statistics are kept in every mode, so that a run can be resumed with another one.

    A norm that is not finite leaves the statistics and the gradient as they are and shows in `ClipState.norm`: whether
    to stop is the training loop's decision, and hiding the step would take it away.
    """

    def init(params: Any) -> ClipState:
        del params
        # An array for each field: a training step that donates its state must not donate one buffer twice.
        return ClipState(*(jnp.asarray(value, jnp.float32) for value in (0.0, 1.0, 0.0, 0.0, 0.0)))

    def update(grads: Any, state: ClipState, params: Any = None) -> tuple[Any, ClipState]:
        del params
        norm = optax.tree.norm(grads)
        clipped = norm
        if config.clip == "norm":
            clipped = jnp.minimum(norm, config.clip_norm)
        elif config.clip == "zclip":
            std = jnp.sqrt(state.variance)
            # 1e-6 of the mean: norms that do not vary at all must not turn rounding into spikes.
            z = (norm - state.mean) / (std + 1e-6 * state.mean + jnp.finfo(jnp.float32).tiny)
            spike = (state.observed >= config.zclip_warmup_steps) & (z > config.zclip_threshold)
            # Where it is not a spike z may be 0 or negative; the value is not used, but must stay a number.
            limit = state.mean + std * config.zclip_threshold**2 / jnp.where(spike, z, 1.0)
            clipped = jnp.where(spike, limit, norm)
        finite = jnp.isfinite(norm)
        factor = jnp.where(finite & (clipped < norm), clipped / norm, 1.0)

        # While warming up the averages run over all norms so far (Welford); then they are exponential, and as in the
        # paper the new mean enters the variance.
        observed = state.observed + 1.0
        warming = observed <= config.zclip_warmup_steps
        keep = jnp.where(warming, 1.0 - 1.0 / observed, config.zclip_decay)
        mean = keep * state.mean + (1.0 - keep) * clipped
        deviation = jnp.where(warming, (clipped - state.mean) * (clipped - mean), jnp.square(clipped - mean))
        variance = keep * state.variance + (1.0 - keep) * deviation
        updated = ClipState(norm, factor, observed, mean, variance)
        held = ClipState(norm, factor, state.observed, state.mean, state.variance)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, held)
        return jax.tree.map(lambda g: factor * g, grads), state

    return optax.GradientTransformation(init, update)


def decay_mask(params: Any) -> Any:
    """Returns a tree of bools, True where weight decay applies: not to leaves named "scale" or "bias".

    Names decide, because layers are stacked on a leading axis and the number of dimensions says nothing.
    """
    return jax.tree.map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Makes the optimizer: clipping, Adam, decoupled weight decay (`decay_mask`), learning rate.

    Arithmetic, state and updates are float32 whatever the parameters' dtype; `optax.apply_updates` rounds once to that
    dtype. The state is a dictionary with the keys clip, adam, decay and schedule.

    Args:
      config: hyperparameters.
      steps: length of the run, at which the schedule ends.
    """
    chain = optax.named_chain(
        ("clip", clip_gradients(config)),
        ("adam", optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)),
        ("decay", optax.add_decayed_weights(config.weight_decay, mask=decay_mask)),
        ("schedule", optax.scale_by_learning_rate(learning_rate(config, steps))),
    )

    def init(params: Any) -> Any:
        return chain.init(_float32(params))

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return chain.update(_float32(grads), state, _float32(params))

    return optax.GradientTransformation(init, update)


def clip_state(opt_state: Any) -> ClipState:
    """Returns the part of the optimizer's state that says what clipping did in the last step."""
    return opt_state["clip"]


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)
