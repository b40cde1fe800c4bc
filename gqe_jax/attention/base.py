"""What every kind of attention shares: dense keys and values, rotary tables, QK norm, the cache."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gqe_jax.attention.cache import KVCache
from gqe_jax.attention.rotary import rotary_tables
from gqe_jax.config import AttentionConfig
from gqe_jax.kernels import attend, rms_norm, rotate
from gqe_jax.linear import Linear

default_kernel_init = nnx.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class Context:
    """What the query heads of one call attend to, and what becomes of the queries on the way.

    Attributes:
      k, v: finished keys and values, [B, T, G, D], or a stacked cache's [L, B, T, G, D].
      options: keyword arguments of `attend`: masks, rotary tables and QK norm of the queries, layer of a stacked cache.
      positions: int32 [B or 1, S].
    """

    k: jax.Array
    v: jax.Array
    options: dict[str, Any]
    positions: jax.Array

    def attend(
        self, q: jax.Array, expert_index: jax.Array | None = None, q_shared: jax.Array | None = None
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Queries [B, S, G, M, D], selected experts int32 [B, S, G, k] → [B, S, G, k, D]; without an index all M.

        With queries of a shared head, [B, S, D], its output [B, S, D] comes as second.
        """
        return attend(q, self.k, self.v, expert_index, q_shared=q_shared, **self.options)


class Attention(nnx.Module):
    """Base of the kinds of attention. A subclass adds its query heads and its output projection.

    `linear(in_features, out_features, **options)` makes the projections: all alike in dtype, bias and initialisation.
    """

    def __init__(
        self,
        d_model: int,
        config: AttentionConfig,
        linear: Callable[..., Linear],
        *,
        param_dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.d_model = d_model
        self.config = config
        kv_shape = (config.num_kv_heads, config.head_dim)
        self.k_proj = linear(d_model, kv_shape)
        self.v_proj = linear(d_model, kv_shape)
        if config.qk_norm:
            norm = {"epsilon": config.qk_norm_eps, "param_dtype": param_dtype, "rngs": rngs}
            self.q_norm = nnx.RMSNorm(config.head_dim, **norm)
            self.k_norm = nnx.RMSNorm(config.head_dim, **norm)

    def init_cache(self, batch: int, capacity: int, dtype: jax.typing.DTypeLike | None = None) -> KVCache:
        """An empty cache for `batch` sequences of at most `capacity` tokens, in the layer's dtype unless given one."""
        dtype = dtype or self.k_proj.dtype or self.k_proj.kernel[...].dtype
        return KVCache.empty(batch, capacity, self.config.num_kv_heads, self.config.head_dim, dtype)

    def _context(
        self, x: jax.Array, segment_ids: jax.Array | None, positions: jax.Array | None, cache: KVCache | None
    ) -> tuple[Context, KVCache | None]:
        self._check(x, segment_ids, positions)
        config = self.config
        start = 0 if cache is None else cache.lengths
        if positions is None:
            positions = jnp.reshape(start, (-1, 1)) + jnp.arange(x.shape[1], dtype=jnp.int32)
        k, v = self.k_proj(x), self.v_proj(x)
        dtype = v.dtype
        options = {
            "window": config.window,
            "softcap": config.softcap,
            "implementation": config.implementation,
        }
        if config.qk_norm:
            k = rms_norm(k, self.k_norm.scale[...], config.qk_norm_eps)
            options["q_norm"] = (self.q_norm.scale[...], config.qk_norm_eps)
        if config.rope_theta is not None:
            tables = rotary_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling)
            k = rotate(k, *tables)
            options["q_rope"] = tables
        if cache is None:
            options |= {"q_segment_ids": segment_ids, "kv_segment_ids": segment_ids}
        else:
            cache = cache.append(k, v, segment_ids)
            k, v = (x.reshape(*x.shape[:-2], *k.shape[2:]) for x in (cache.k, cache.v))
            options |= {"q_offset": start, "kv_length": cache.lengths, "layer": cache.layer}
        return Context(k.astype(dtype), v.astype(dtype), options, positions), cache

    def _check(self, x: jax.Array, segment_ids: jax.Array | None, positions: jax.Array | None) -> None:
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            raise ValueError(f"x has shape {x.shape}, but must be [B, S, d_model={self.d_model}]")
        if segment_ids is not None and segment_ids.shape != x.shape[:2]:
            raise ValueError(f"segment_ids has shape {segment_ids.shape}, but must be [B, S] = {x.shape[:2]} like x")
        if positions is not None and (positions.shape[0] not in (1, x.shape[0]) or positions.shape[1:] != x.shape[1:2]):
            raise ValueError(
                f"positions has shape {positions.shape}, but must be [B or 1, S] with B, S = {x.shape[:2]} of x"
            )
