"""Grouped Query Experts: in each KV group a router picks k of M query heads per token (arXiv 2606.20945, section 3)."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gqe_jax.attention.base import Attention, default_kernel_init, require
from gqe_jax.attention.router import ROUTING_AXES, Router
from gqe_jax.config import GQEConfig, RopeScaling, RouterConfig
from gqe_jax.linear import Linear


class GQEAttention(Attention):
    """Mixture of query-head experts on grouped-query attention.

    With p = softmax over the M experts of each group g, e_1 … e_k the k largest of them, and one shared head beside
    the experts:

        o[g, j] = Attention(q[g, e_j], K_g, V_g)                    the slots, k per group
        ō       = Σ_{g,j} w[g, j] · o[g, j],   w = p[g, e_j] / Σ of all selected p
        s       = Attention(q_s, mean_g K_g, mean_g V_g)            the shared head
        y       = concat(o[1,1], …, o[G,k], ō, s) · W_o

    Keys and values are dense: the cache is that of grouped-query attention. Unselected experts cost no attention.

    Args:
      d_model: width d of the input and the output.
      num_query_experts: N = G · M query heads in all.
      num_kv_heads: G.
      top_k: k, experts selected per token and group.
      head_dim: D; None means d_model / N.
      variant: "gqe" (as above); "hard_concat" (the k · G slots alone); "weighted_concat" (those, each scaled by its p).
      router: kind, initialisation, losses and balancing of the router.
      rope_theta: base of the rotary embedding; None for none.
      rope_scaling: stretches it to longer contexts.
      qk_norm: RMS norm of each query and key head, before the rotary embedding; one scale [D] serves all queries.
      qk_norm_eps: added to the mean square under that norm's root.
      bias: on the projections of q, k, v, o and the shared query; never on the router.
      softcap: scores become softcap · tanh(scores / softcap).
      window: a token sees itself and the window - 1 tokens before it.
      implementation: of `attend`; None picks by platform. Forward-mode and second derivatives need "reference": the
        others define their gradient by hand, for reverse mode alone.
      context_parallel: over a mesh's `context` axis: "gather" the keys and values of the whole sequence, or pass them
        round in a "ring"; "auto" decides by memory.
      dtype: of the computation; None is the wider of input and parameters. The router computes in float32 always.
      param_dtype: of the parameters; the router's are float32 always.
      kernel_init, out_kernel_init: of the projections, and of the last one.
      rngs: draws the initial values of the parameters, from the stream "params".

    Raises:
      ConfigError: top_k > M, head counts that do not divide, odd head_dim with rotary embedding.
      ValueError: an argument of another type.
    """

    def __init__(
        self,
        d_model: int,
        num_query_experts: int,
        num_kv_heads: int,
        top_k: int,
        head_dim: int | None = None,
        *,
        variant: Literal["gqe", "hard_concat", "weighted_concat"] = "gqe",
        router: RouterConfig = RouterConfig(),
        rope_theta: float | None = 10_000.0,
        rope_scaling: RopeScaling = RopeScaling(),
        qk_norm: bool = False,
        qk_norm_eps: float = 1e-6,
        bias: bool = False,
        softcap: float | None = None,
        window: int | None = None,
        implementation: str | None = None,
        context_parallel: Literal["auto", "gather", "ring"] = "auto",
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer = default_kernel_init,
        out_kernel_init: nnx.Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        require("router", router, RouterConfig, "write gqe_jax.RouterConfig(kind=...)")
        require("rope_scaling", rope_scaling, RopeScaling, "write gqe_jax.RopeScaling(kind=..., factor=...)")
        config = GQEConfig(
            num_query_experts=num_query_experts,
            num_kv_heads=num_kv_heads,
            top_k=top_k,
            head_dim=head_dim,
            variant=variant,
            router=router,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            qk_norm=qk_norm,
            qk_norm_eps=qk_norm_eps,
            bias=bias,
            softcap=softcap,
            window=window,
            implementation=implementation,
            context_parallel=context_parallel,
        ).resolve(d_model)
        linear = functools.partial(
            Linear,
            use_bias=bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            rngs=rngs,
        )
        super().__init__(d_model, config, linear, param_dtype=param_dtype, rngs=rngs)
        groups, experts, dim = num_kv_heads, config.experts_per_group, config.head_dim
        out = functools.partial(linear, kernel_init=out_kernel_init or kernel_init)
        self.q_proj = linear(d_model, (groups, experts, dim))
        self.router = Router(d_model, groups, experts, top_k, router, rngs=rngs)
        # W_o as two parameters: the routed slots' rows are sharded with their groups, those of ō and s are replicated.
        self.o_proj = out((groups, top_k, dim), d_model)
        if variant == "gqe":
            self.q_shared = linear(d_model, dim)
            self.o_extra = out((2, dim), d_model, use_bias=False)

    _routing_axes = ROUTING_AXES

    @property
    def _draws_axes(self):
        return self.router.draws_axes

    def _draws(self, x, positions, rngs, layer_index):
        return self.router.draws(x.shape[:2], self.d_model, positions, rngs, layer_index)

    def _forward(self, shard, x, segment_ids, rope, draws, cache):
        context, cache = self._context(shard, x, segment_ids, rope, cache)
        routing = self.router(x, segment_ids=segment_ids, draws=draws, num_groups=context.num_groups)
        probs = routing.selected_probs
        q = self.q_proj(x)
        if self.config.variant != "gqe":
            o = context.attend(q, routing.expert_index)
            if self.config.variant == "weighted_concat":
                o = (o * probs[..., None]).astype(o.dtype)
            return self.o_proj.product(o)[None], routing, cache

        if context.is_split:
            o = context.attend(q, routing.expert_index)
            shared = context.attend_shared(x, self.q_shared)
        else:  # in one call: decoding then reads the cache once for all heads
            o, shared = context.attend(q, routing.expert_index, self.q_shared(x))
        # ō of this device's groups and s of its tokens: through W_o they join the one sum over devices that y takes.
        selected = shard.sum(probs.sum(axis=(-2, -1), keepdims=True), "expert")
        mixed = _weighted_sum(o, probs / jnp.maximum(selected, 1e-9))
        y = self.o_proj.product(o) + self.o_extra.product(jnp.stack([mixed.astype(o.dtype), shared], axis=-2))
        return y[None], routing, cache


def _weighted_sum(o: jax.Array, weights: jax.Array) -> jax.Array:
    """Σ over groups and slots of weights [B, S, G, k] · o [B, S, G, k, D], float32 [B, S, D]."""
    # Slot by slot, as columns of the kernel's output: to reduce over two axes a TPU would transpose it.
    num_slots = weights.shape[2] * weights.shape[3]
    slots = jnp.split(o.reshape(*o.shape[:2], -1), num_slots, axis=-1)
    columns = jnp.split(weights.reshape(*weights.shape[:2], -1), num_slots, axis=-1)
    return functools.reduce(jnp.add, [slot * weight for slot, weight in zip(slots, columns, strict=True)])
