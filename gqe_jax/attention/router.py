"""Defines the router, which chooses the k of M query experts of each KV group that attend for a token."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gqe_jax.attention.report import Buffer, LayerReport
from gqe_jax.config import require, require_fraction, require_known, require_seed
from gqe_jax.linear import Linear
from gqe_jax.parallel.on_mesh import axis_size
from gqe_jax.parallel.zigzag import zigzag


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Configures how each KV group chooses k of its M query experts for a token (docs/algorithm.md, "The router")."""

    kind: Literal["learned", "fixed", "random"] = "learned"  # fixed: experts 0..k-1; random: a uniform draw per token
    init_std: float = 0.02  # 0 makes every token pick expert 0, and the balance loss then moves all of them together
    load_balance_weight: float = 0.01  # of the load-balance loss in the training loss
    z_loss_weight: float = 0.0  # of the mean squared logsumexp of the logits in the training loss
    jitter: float = 0.0  # training only: router input times U(1 - jitter, 1 + jitter)
    bias_update_rate: float = 0.0  # loss-free balancing: how far a step moves the selection's bias; 0 = off
    seed: int = 0  # of the `random` router's draws where no rngs are given (evaluation, generation)

    def __post_init__(self):
        require_known(self)
        require_fraction(self, "jitter")
        require_seed(self, "router")
        for name in ("init_std", "load_balance_weight", "z_loss_weight", "bias_update_rate"):
            value = getattr(self, name)
            require(value >= 0, f"router.{name}={value} must not be negative: use 0 to switch it off")
        require(
            self.kind == "learned" or (self.jitter == 0 and self.bias_update_rate == 0),
            f"router.kind={self.kind!r} has nothing to learn or to balance: set router.jitter and "
            f"router.bias_update_rate to 0, or use router.kind='learned'",
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterStats(LayerReport):
    """Reports how a GQE layer has routed its tokens. Means run over the real tokens (not padding) of the whole batch.

    `metrics` holds load, entropy, load_balance_loss and z_loss; `auxiliary_loss` is the weighted sum of the two losses.

    Attributes:
      expert_index: int32 [B, S, G, k], selected experts by descending probability.
      router_probs: float32 [B, S, G, M], softmax before the selection.
      load: float32 [G, M], share of tokens that selected the expert (sums to k over M).
      mean_prob: float32 [G, M], mean of `router_probs`.
      entropy: float32 scalar, mean entropy of `router_probs`, in nats (at most ln M).
      load_balance_loss: float32 scalar, M Σ_m load · mean_prob, averaged over groups (1 for uniform top-1 routing).
      z_loss: float32 scalar, mean squared logsumexp of the router's logits.
    """

    expert_index: jax.Array
    router_probs: jax.Array
    load: jax.Array
    mean_prob: jax.Array
    entropy: jax.Array
    load_balance_loss: jax.Array
    z_loss: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Holds what the router decides for the tokens of one device, and sums over the real ones of these tokens.

    The sums begin with two axes of size 1: over a mesh they become [devices along batch, devices along sequence].

    Attributes:
      expert_index: int32 [B, S, G, k], selected experts by descending probability.
      selected_probs: float32 [B, S, G, k], their probabilities.
      router_probs: float32 [B, S, G, M], softmax before the selection.
      tokens: float32 [1, 1], number of real tokens.
      chosen, prob: float32 [1, 1, G, M], how often each expert was selected, and the sum of its probabilities.
      entropy, squared_log_z: float32 [1, 1, G], sums of the softmax's entropy (nats) and of logsumexp(logits)².
    """

    expert_index: jax.Array
    selected_probs: jax.Array
    router_probs: jax.Array
    tokens: jax.Array
    chosen: jax.Array
    prob: jax.Array
    entropy: jax.Array
    squared_log_z: jax.Array

    @staticmethod
    def axes() -> Any:
        """Returns the logical axes of the arrays (`parallel.rules`), in a `Routing`."""
        per_token, summed = ("batch", "sequence", "group", None), ("batch", "sequence", "group")
        return Routing(*(per_token,) * 3, ("batch", "sequence"), *(per_token,) * 2, *(summed,) * 2)

    def statistics(self, config: RouterConfig) -> RouterStats:
        """Returns the means over the tokens of all devices, and the losses weighted as `config` says."""
        count = jnp.maximum(self.tokens.sum(), 1.0)
        load, mean_prob, entropy, squared_log_z = (
            x.sum(axis=(0, 1)) / count for x in (self.chosen, self.prob, self.entropy, self.squared_log_z)
        )
        entropy, z_loss = entropy.mean(), squared_log_z.mean()
        load_balance_loss = load.shape[1] * (jax.lax.stop_gradient(load) * mean_prob).sum(-1).mean()
        return RouterStats(
            auxiliary_loss=config.load_balance_weight * load_balance_loss + config.z_loss_weight * z_loss,
            metrics={"load": load, "entropy": entropy, "load_balance_loss": load_balance_loss, "z_loss": z_loss},
            expert_index=self.expert_index,
            router_probs=self.router_probs,
            load=load,
            mean_prob=mean_prob,
            entropy=entropy,
            load_balance_loss=load_balance_loss,
            z_loss=z_loss,
        )


def top_k_experts(scores: jax.Array, k: int) -> jax.Array:
    """Returns the indices of the k largest scores of the last axis, by descending score; of equal ones the lower first.

    It repeats argmax k times: unlike `lax.top_k` this needs no gather where the group axis is sharded, and M is small.

    Args:
      scores: [..., M].

    Returns:
      int32 [..., k].
    """
    expert = jnp.arange(scores.shape[-1])
    picked = []
    for _ in range(k):
        best = jnp.argmax(scores, axis=-1)
        picked.append(best)
        scores = jnp.where(expert == best[..., None], -jnp.inf, scores)
    return jnp.stack(picked, axis=-1).astype(jnp.int32)


class Router(nnx.Module):
    """Takes a softmax over each group's experts in float32, then the top k (docs/algorithm.md, "The router").

    Args:
      d_model: width d of the input.
      num_groups, experts_per_group, top_k: G, M and k.
      config: kind of router, losses, jitter, loss-free balancing.
      rngs: draws the initial weights, from the stream "params".
    """

    def __init__(
        self, d_model: int, num_groups: int, experts_per_group: int, top_k: int, config: RouterConfig, *, rngs: nnx.Rngs
    ):
        self.config = config
        self.shape = (num_groups, experts_per_group)
        self.top_k = top_k
        if config.kind == "learned":
            self.proj = Linear(
                d_model,
                self.shape,
                axes=("embed", "group", None),
                use_bias=False,
                dtype=jnp.float32,
                param_dtype=jnp.float32,
                kernel_init=nnx.initializers.normal(config.init_std),
                precision=jax.lax.Precision.HIGHEST,  # else a TPU multiplies float32 in bfloat16 passes
                exact=True,
                rngs=rngs,
            )
        # Loss-free balancing adds this to the probabilities, for the selection only.
        bias = jnp.zeros(self.shape, jnp.float32)
        self.bias = Buffer(bias) if config.bias_update_rate else None
        self.placement = (("bias", ("group", None)),)

    def draws(
        self, x: jax.Array, positions: jax.Array, rngs: nnx.Rngs | None, layer_index: jax.Array | int
    ) -> tuple[jax.Array | None, tuple[str | None, ...]]:
        """Draws the randomness of a call, before the call is split over devices, so that it does not depend on them.

        Args:
          x: [B, S, d]; only its shape is used.
          positions: int32 [B or 1, S]; the `random` router without rngs draws by seed, layer and position.
          rngs: randomness of training (stream "router"): jitter, and the draws of the `random` router.
          layer_index: index of the layer in a stack.

        Returns:
          (draws, their logical axes). Draws are float32: for the `random` router scores [B, S, G, M], the largest of
          which are selected; for a router with jitter, where rngs are given, factors [B, S, d] on its input; else None.

        Raises:
          ValueError: randomness is needed, and rngs have no stream for it.
        """
        draws, axes = None, ("batch", "sequence", None)
        if self.config.kind == "random":
            draws, axes = self._random_scores(x.shape[:2], positions, rngs, layer_index), (*axes[:2], "group", None)
        elif rngs is not None and self.config.jitter:
            epsilon = self.config.jitter
            draws = jax.random.uniform(stream_key(rngs), x.shape, minval=1 - epsilon, maxval=1 + epsilon)
        if rngs is not None and draws is not None:  # drawn by place in the sequence, on one device or on many
            draws = zigzag(draws, axis_size("context"))
        return draws, axes

    def __call__(
        self, x: jax.Array, *, segment_ids: jax.Array | None, draws: jax.Array | None, num_groups: int
    ) -> Routing:
        """Routes each token.

        Args:
          x: [B, S, d].
          segment_ids: int32 [B, S], 0 = padding, which is left out of all sums.
          draws: this device's part of what `draws` returned.
          num_groups: how many groups this device holds.

        Returns:
          The `Routing` of these tokens.
        """
        x = x.astype(jnp.float32)
        if self.config.kind == "learned":
            logits = self.proj(x if draws is None else x * draws)
        else:
            logits = jnp.zeros((*x.shape[:-1], num_groups, self.shape[1]))
        probs = jax.nn.softmax(logits)

        if self.config.kind == "random":
            selection = draws
        else:
            selection = probs if self.bias is None else probs + self.bias[...]
        index = top_k_experts(jax.lax.stop_gradient(selection), self.top_k)
        chosen = jax.nn.one_hot(index, self.shape[1], dtype=jnp.float32)  # [B, S, G, k, M]
        if selection is not probs:  # another score selects, but slots are ordered by probability
            among = jnp.where(chosen.any(axis=-2), jax.lax.stop_gradient(probs), -jnp.inf)
            index = top_k_experts(among, self.top_k)
            chosen = jax.nn.one_hot(index, self.shape[1], dtype=jnp.float32)
        selected_probs = jnp.sum(chosen * probs[..., None, :], axis=-1)  # no matmul: a TPU would round p to bfloat16

        real = jnp.ones(probs.shape[:2]) if segment_ids is None else (segment_ids != 0).astype(jnp.float32)

        def total(per_token: jax.Array) -> jax.Array:
            summed = jnp.einsum("bs...,bs->...", per_token, real, precision=jax.lax.Precision.HIGHEST)
            return summed[None, None]

        log_z = jax.nn.logsumexp(logits, axis=-1)
        return Routing(
            expert_index=index,
            selected_probs=selected_probs,
            router_probs=probs,
            tokens=real.sum()[None, None],
            chosen=total(chosen.sum(axis=-2)),
            prob=total(probs),
            entropy=total(-(probs * (logits - log_z[..., None])).sum(-1)),
            squared_log_z=total(jnp.square(log_z)),
        )

    def _random_scores(self, tokens, positions, rngs, layer_index) -> jax.Array:
        """Draws scores float32 [B, S, G, M]; `tokens` is (B, S)."""
        if rngs is not None:
            return jax.random.uniform(stream_key(rngs), tokens + self.shape)
        # Without rngs the draw depends on seed, layer and position alone: decoding repeats what a full pass chose.
        groups, experts = self.shape
        column = jnp.arange(groups * experts, dtype=jnp.uint32).reshape(self.shape)
        token = positions.astype(jnp.uint32)[..., None, None]
        layer = _mix(_mix(jnp.uint32(self.config.seed)) + jnp.uint32(layer_index))
        bits = _mix(_mix(layer + token) + column)
        return jnp.broadcast_to((bits >> 8).astype(jnp.float32), tokens + self.shape)


def stream_key(rngs: nnx.Rngs) -> jax.Array:
    """Takes a key from the stream of training randomness, "router". Raises ValueError if rngs have none."""
    if "router" not in rngs and "default" not in rngs:
        raise ValueError(
            f"rngs has the streams {', '.join(rngs) or 'none'}, but jitter and the `random` router draw from `router`: "
            f"pass nnx.Rngs(router=seed), or no rngs outside training"
        )
    return rngs.router()


def _mix(bits: jax.Array) -> jax.Array:
    """Applies MurmurHash3's finalizer, a bijection of uint32 that spreads every input bit over all output bits."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def balanced(bias: jax.Array, load: jax.Array, *, top_k: int, rate: float) -> jax.Array:
    """Returns the selection's bias after a step of loss-free balancing (Wang et al. 2024; docs/algorithm.md).

    Args:
      bias: float32 [..., G, M].
      load: float32 [..., G, M], share of tokens that selected each expert (sums to k over M).
      top_k: k.
      rate: how far each element moves: up where the load is below k / M, down where it is above.
    """
    return bias + rate * jnp.sign(top_k / bias.shape[-1] - load)
