"""The router: which k of the M query experts of each KV group attend for a token, and how evenly they are used."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from gqe_jax.config import RouterConfig
from gqe_jax.linear import Linear


class RouterBias(nnx.Variable):
    """Bias of the selection for loss-free balancing, float32 [G, M]: no parameter, the training step nudges it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStats:
    """What a GQE layer reports about its routing. Means run over the real tokens of the whole batch.

    Attributes:
      expert_index: int32 [B, S, G, k], selected experts by descending probability; None inside a model's stack.
      router_probs: float32 [B, S, G, M], softmax before the selection; None inside a model's stack.
      load: float32 [G, M], share of tokens that selected the expert (sums to k over M).
      mean_prob: float32 [G, M], mean of `router_probs`.
      entropy: float32 scalar, mean entropy of `router_probs`, in nats (at most ln M).
      load_balance_loss: float32 scalar, M Σ_m load · mean_prob, averaged over groups (1 for uniform top-1 routing).
      z_loss: float32 scalar, mean squared logsumexp of the router's logits.
    """

    expert_index: jax.Array | None
    router_probs: jax.Array | None
    load: jax.Array
    mean_prob: jax.Array
    entropy: jax.Array
    load_balance_loss: jax.Array
    z_loss: jax.Array

    def reduced(self) -> "RouterStats":
        """Without the per-token arrays."""
        return dataclasses.replace(self, expert_index=None, router_probs=None)


def top_k_experts(scores: jax.Array, k: int) -> jax.Array:
    """Indices of the k largest of the last axis, by descending score; equal scores resolve to the lower index.

    An iterated argmax: unlike `lax.top_k` it needs no gather where the group axis is sharded, and M is small.

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
    """Softmax over each group's experts in float32, then top-k (spec, layer steps 3 and 7)."""

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
                use_bias=False,
                dtype=jnp.float32,
                param_dtype=jnp.float32,
                kernel_init=nnx.initializers.normal(config.init_std),
                precision=jax.lax.Precision.HIGHEST,  # else a TPU multiplies float32 in bfloat16 passes
                rngs=rngs,
            )
        self.bias = RouterBias(jnp.zeros(self.shape, jnp.float32)) if config.bias_update_rate else None

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None,
        positions: jax.Array,
        rngs: nnx.Rngs | None,
        layer_index: jax.Array | int,
    ) -> tuple[jax.Array, jax.Array, RouterStats]:
        """Routes each token.

        Args:
          x: [B, S, d].
          segment_ids: int32 [B, S], 0 = padding, which is left out of all statistics.
          positions: int32 [B or 1, S]; the `random` router without rngs draws by seed, layer and position.
          rngs: randomness of training (stream "router"): jitter, and the draws of the `random` router.
          layer_index: of the layer in a stack.

        Returns:
          expert_index int32 [B, S, G, k], its probabilities float32 [B, S, G, k], and the statistics.
        """
        x = x.astype(jnp.float32)
        if self.config.kind == "learned":
            if rngs is not None and self.config.jitter:
                epsilon = self.config.jitter
                x = x * jax.random.uniform(rngs.router(), x.shape, minval=1 - epsilon, maxval=1 + epsilon)
            logits = self.proj(x)
        else:
            logits = jnp.zeros(x.shape[:-1] + self.shape)
        probs = jax.nn.softmax(logits)

        if self.config.kind == "random":
            selection = self._random_scores(x.shape[:2], positions, rngs, layer_index)
        else:
            selection = probs if self.bias is None else probs + self.bias[...]
        index = top_k_experts(jax.lax.stop_gradient(selection), self.top_k)
        chosen = jax.nn.one_hot(index, self.shape[1], dtype=jnp.float32)  # [B, S, G, k, M]
        if selection is not probs:  # selected by another score, but ordered by probability
            among = jnp.where(chosen.any(axis=-2), jax.lax.stop_gradient(probs), -jnp.inf)
            index = top_k_experts(among, self.top_k)
            chosen = jax.nn.one_hot(index, self.shape[1], dtype=jnp.float32)
        selected_probs = jnp.sum(chosen * probs[..., None, :], axis=-1)  # no matmul: a TPU would round p to bfloat16
        return index, selected_probs, self._statistics(index, chosen, logits, probs, segment_ids)

    def _random_scores(self, tokens, positions, rngs, layer_index) -> jax.Array:
        """[B, S, G, M], whose order is the draw."""
        if rngs is not None:
            return jax.random.uniform(rngs.router(), tokens + self.shape)
        # Without rngs the draw depends on seed, layer and position alone: decoding repeats what a full pass chose.
        groups, experts = self.shape
        column = jnp.arange(groups * experts, dtype=jnp.uint32).reshape(self.shape)
        token = positions.astype(jnp.uint32)[..., None, None]
        layer = _mix(_mix(jnp.uint32(self.config.seed)) + jnp.uint32(layer_index))
        bits = _mix(_mix(layer + token) + column)
        return jnp.broadcast_to((bits >> 8).astype(jnp.float32), tokens + self.shape)

    def _statistics(self, index, chosen, logits, probs, segment_ids) -> RouterStats:
        real = jnp.ones(probs.shape[:2]) if segment_ids is None else (segment_ids != 0).astype(jnp.float32)
        count = jnp.maximum(real.sum(), 1.0)

        def mean(per_token, equation):
            return jnp.einsum(equation, per_token, real, precision=jax.lax.Precision.HIGHEST) / count

        load = mean(chosen.sum(axis=-2), "bsgm,bs->gm")
        mean_prob = mean(probs, "bsgm,bs->gm")
        log_z = jax.nn.logsumexp(logits, axis=-1)
        log_probs = logits - log_z[..., None]
        return RouterStats(
            expert_index=index,
            router_probs=probs,
            load=load,
            mean_prob=mean_prob,
            entropy=mean(-(probs * log_probs).sum(-1), "bsg,bs->g").mean(),
            load_balance_loss=self.shape[1] * (jax.lax.stop_gradient(load) * mean_prob).sum(-1).mean(),
            z_loss=mean(jnp.square(log_z), "bsg,bs->g").mean(),
        )


def _mix(bits: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3: a bijection of uint32 that spreads every input bit over all output bits."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
