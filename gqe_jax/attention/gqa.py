"""Dense attention by head counts: MHA, MQA, GQA, and SQA (fewer query heads than d_model / head_dim)."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gqe_jax.attention.base import Attention, default_kernel_init, require
from gqe_jax.config import GQAConfig, RopeScaling
from gqe_jax.linear import Linear


class GQAttention(Attention):
    """Grouped-query attention: H query heads in G groups, each group with one KV head.

    H = G is multi-head attention, G = 1 multi-query attention, H · D < d_model sparse-query attention (SQA).

    Args:
      d_model: width d of the input and the output.
      num_query_heads: H, a multiple of G. Head h belongs to group h // (H / G).
      num_kv_heads: G.
      head_dim: D; None means d_model / H.
      rope_theta: base of the rotary embedding; None for none.
      rope_scaling: stretches it to longer contexts.
      qk_norm: RMS norm of each query and key head, before the rotary embedding.
      qk_norm_eps: added to the mean square under that norm's root.
      bias: on the four projections.
      out_bias: on the output projection, where it differs from the other three; None: as `bias`.
      softcap: scores become softcap · tanh(scores / softcap).
      window: a token sees itself and the window - 1 tokens before it.
      implementation: of `attend`; None picks by platform. Forward-mode and second derivatives need "reference": the
        others define their gradient by hand, for reverse mode alone.
      context_parallel: over a mesh's `context` axis: "gather" the keys and values of the whole sequence, or pass them
        round in a "ring"; "auto" decides by memory.
      dtype: of the computation; None is the wider of input and parameters.
      param_dtype: of the parameters.
      kernel_init, out_kernel_init: of the projections, and of the last one.
      rngs: draws the initial values of the parameters, from the stream "params".

    Raises:
      ConfigError: head counts that do not divide, odd head_dim with rotary embedding.
      ValueError: an argument of another type.
    """

    def __init__(
        self,
        d_model: int,
        num_query_heads: int,
        num_kv_heads: int,
        head_dim: int | None = None,
        *,
        rope_theta: float | None = 10_000.0,
        rope_scaling: RopeScaling = RopeScaling(),
        qk_norm: bool = False,
        qk_norm_eps: float = 1e-6,
        bias: bool = False,
        out_bias: bool | None = None,
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
        require("rope_scaling", rope_scaling, RopeScaling, "write gqe_jax.RopeScaling(kind=..., factor=...)")
        config = GQAConfig(
            num_query_heads=num_query_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            qk_norm=qk_norm,
            qk_norm_eps=qk_norm_eps,
            bias=bias,
            out_bias=out_bias,
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
        heads = (num_kv_heads, num_query_heads // num_kv_heads, config.head_dim)
        self.q_proj = linear(d_model, heads)
        self.o_proj = linear(
            heads, d_model, use_bias=config.has_out_bias, kernel_init=out_kernel_init or kernel_init
        )

    def _forward(self, shard, x, segment_ids, rope, draws, cache):
        del draws  # no randomness in dense attention
        context, cache = self._context(shard, x, segment_ids, rope, cache)
        y = self.o_proj.product(context.attend(self.q_proj(x)))
        return y[None], None, cache
