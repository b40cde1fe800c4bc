"""Defines one layer of the decoder: attention and SwiGLU, each behind a norm and added to the residual stream."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from gqe_jax.attention import Cache, LayerReport, make_attention
from gqe_jax.config import ModelConfig
from gqe_jax.linear import make_norm
from gqe_jax.models.layers import SwiGLU


class Block(nnx.Module):
    """Computes x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        # Each block adds two terms to the residual stream, whose variance must not grow with depth (as in GPT-2).
        init = {
            "kernel_init": nnx.initializers.normal(config.init_std),
            "out_kernel_init": nnx.initializers.normal(config.init_std / math.sqrt(2 * config.num_layers)),
            "rngs": rngs,
        }
        norm = {"epsilon": config.norm_eps, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attention_norm = make_norm(config.d_model, **norm)
        self.attention = make_attention(config.attention, config.d_model, dtype=dtype, param_dtype=param_dtype, **init)
        self.mlp_norm = make_norm(config.d_model, **norm)
        self.mlp = SwiGLU(config, **init)

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None,
        positions: jax.Array | None,
        cache: Cache | None,
        rngs: nnx.Rngs | None,
        layer_index: jax.Array,
    ) -> tuple[jax.Array, LayerReport, Cache | None]:
        """Maps x [B, S, d] to (the new x [B, S, d], the attention's reduced report, the grown cache or None).

        The other arguments are those of `Attention`'s call.
        """
        y, report, *cache = self.attention(
            self.attention_norm(x),
            segment_ids=segment_ids,
            positions=positions,
            cache=cache,
            rngs=rngs,
            layer_index=layer_index,
        )
        x += y
        x += self.mlp(self.mlp_norm(x))
        return x, report.reduced(), cache[0] if cache else None
