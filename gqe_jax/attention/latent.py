"""Defines what kinds with latent keys and values share: the latent, its cache, and attention in two equal forms.

    c = x W_down [r]    k_r = RoPE(x W_kr) [R], one for all heads    K_g = (c W_kup,g, k_r)    V_g = c W_vup,g

A query is (q, RoPE(q_r)), of width D + R. *Expanded*, K and V [T, G, ...] are formed from the latent, and attention is
that of G KV heads: training and prefill. *Absorbed*, W_kup multiplies the query and W_vup what comes out of attention,
which reads one KV head (c, k_r) of width r + R as it lies in the cache: decoding.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gqe_jax.attention.base import Attention, Config, Report
from gqe_jax.attention.caches import LatentCache
from gqe_jax.attention.key_values import KeyValues
from gqe_jax.config import AttentionConfig, require, require_positive
from gqe_jax.kernels import attend, prepare_queries, rms_norm, rotate

LATENT_NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig(AttentionConfig):
    """Holds the settings of a latent, and counts what follows from it.

    `num_kv_heads` is G, the KV heads that the latent expands to.
    """

    latent_dim: int  # r, numbers of the latent that keys and values are formed from
    rope_dim: int = 64  # R, dimensions of the rotated key that all heads share
    rope_repeats: int = 1  # neighbouring pairs of R that turn with the same frequency; a conversion may set it
    latent_norm: bool = False  # RMS norm of the latent

    @property
    def dim(self) -> int:
        """D, of a config that is resolved."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def query_dim(self):
        return self.dim + self.rope_dim

    @property
    def rotary_dim(self):
        return "rope_dim / rope_repeats", self.rope_dim // self.rope_repeats

    @property
    def spread_sizes(self):
        return {"attention.latent_dim": self.latent_dim}

    def __post_init__(self):
        require_positive(self, "latent_dim", "rope_dim", "rope_repeats")
        require(
            self.rope_dim % (2 * self.rope_repeats) == 0,
            f"rope_dim={self.rope_dim} is no multiple of 2 · rope_repeats={2 * self.rope_repeats}: rotary embedding "
            f"turns pairs, each frequency rope_repeats of them; change either",
        )
        require(
            self.head_dim is None or self.head_dim % 2 == 0,
            f"head_dim={self.head_dim} is odd, and halves of a key's own part stand beside halves of its rotated part: "
            f"make head_dim even",
        )
        require(
            not self.qk_norm,
            f"qk_norm=True is not for kind {self.kind!r}, whose keys are formed from a latent: set latent_norm=True "
            f"for a norm of the latent, or qk_norm=False",
        )
        super().__post_init__()

    def absorbs(self, q_len: int) -> bool:
        """Says whether `q_len` new tokens attend to a cache in the absorbed form: always one, more where it has fewer
        FLOPs.

        Expanding costs r · 2D for each cached token and KV head, and saves each of its S · M queries 2 (r − D).
        """
        queries = q_len * (self.query_heads[1] // self.num_kv_heads)
        return q_len == 1 or queries * (self.latent_dim - self.dim) <= self.latent_dim * self.dim

    def latent_settings(self) -> dict[str, Any]:
        """Returns the latent's part of `modelling_settings`."""
        return {
            "kv_lora_rank": self.latent_dim,
            "qk_rope_head_dim": self.rope_dim,
            "rope_repeats": self.rope_repeats,
            "latent_norm": self.latent_norm,
        }

    @classmethod
    def from_latent_settings(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the latent's part of `from_modelling_settings`; raises KeyError if a setting is missing."""
        return {
            "latent_dim": config["kv_lora_rank"],
            "rope_dim": config["qk_rope_head_dim"],
            "rope_repeats": config.get("rope_repeats", 1),
            "latent_norm": config.get("latent_norm", False),
        }

    def cached_numbers(self, expert: int = 1) -> int:
        return self.latent_dim + self.rope_dim

    def attended_numbers(self, expert: int = 1) -> int:
        return self.num_kv_heads // expert * (self.query_dim + self.dim)


class LatentAttention(Attention[Config, Report]):
    """The base class of kinds with latent keys and values: their parameters, their cache, and both forms of attention.

    Queries are of width D + R, and brought into the order of `halves_together`.
    """

    config: LatentConfig

    def _make_key_values(self, linear, norm):
        config = self.config
        heads, axes = (config.num_kv_heads, config.dim), ("embed", "group", None)
        self.kv_down = linear(self.d_model, config.latent_dim, axes=("embed", None))
        self.k_rope = linear(self.d_model, config.rope_dim, axes=("embed", None))
        self.k_up = linear(config.latent_dim, heads, axes=axes, use_bias=False)
        self.v_up = linear(config.latent_dim, heads, axes=axes, use_bias=False)
        if config.latent_norm:
            self.latent_norm = norm(config.latent_dim, epsilon=LATENT_NORM_EPS)

    @property
    def cached_shape(self):
        return self.config.latent_dim, self.config.rope_dim

    def init_cache(self, batch, capacity, dtype=None):
        dtype = dtype or self.o_proj.dtype or self.o_proj.kernel[...].dtype
        return LatentCache.empty(batch, capacity, self.cached_shape, dtype)

    def _key_values(self, shard, tokens):
        config, rope = self.config, None
        c, k_rope = self.kv_down(tokens.x), self.k_rope(tokens.x)
        dtype = c.dtype
        if config.latent_norm:
            c = rms_norm(c, self.latent_norm.scale[...], LATENT_NORM_EPS)
        if tokens.rope is not None:
            cos, sin = (jnp.repeat(table, config.rope_repeats, axis=-1) for table in tokens.rope)
            k_rope = rotate(k_rope, cos, sin)
            still = (*cos.shape[:-1], config.dim // 2)  # a head's own dimensions turn by no angle
            rope = tuple(jnp.concatenate(x, axis=-1) for x in ((jnp.ones(still), cos), (jnp.zeros(still), sin)))
        options = {"shard": shard, "config": config, "rope": rope, "q_norm": None, "scale": config.query_dim**-0.5}
        if tokens.cache is None:
            k, v = self._expanded(c, k_rope)
            return KeyValues(
                k=k, v=v, segment_ids=tokens.segment_ids, q_offset=0, kv_length=None, layer=None, **options
            ), None

        cache = tokens.cache.append(c, k_rope, tokens.segment_ids)
        options |= {"segment_ids": None, "q_offset": tokens.cache.lengths, "kv_length": cache.lengths}
        if config.absorbs(tokens.x.shape[1]):
            k_up, v_up = (up.kernel[...].astype(dtype) for up in (self.k_up, self.v_up))
            latent = cache.latent.astype(dtype)[..., None, :]
            return AbsorbedKeyValues(k=latent, v=latent, layer=cache.layer, k_up=k_up, v_up=v_up, **options), cache
        held = cache.latent if cache.layer is None else cache.latent[cache.layer]
        k, v = self._expanded(*jnp.split(held.astype(dtype), [config.latent_dim], axis=-1))
        return KeyValues(k=k, v=v, layer=None, **options), cache

    def _queries(self, project, x):
        return halves_together(*jnp.split(project(x), [self.config.dim], axis=-1))

    def _expanded(self, c, k_rope):
        """[B, T, r] and [B, T, R] → keys [B, T, G, D + R] and values [B, T, G, D]."""
        k, v = self.k_up(c), self.v_up(c)
        return halves_together(k, jnp.broadcast_to(k_rope[..., None, :], (*k.shape[:-1], k_rope.shape[-1]))), v


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbsorbedKeyValues(KeyValues):
    """Holds latents (c, k_r) as the keys and as the values of one head that all queries read.

    The values are not cut down to c: a slice would copy the cache.

    Attributes:
      k_up, v_up: W_kup and W_vup, [r, G, D].
    """

    k_up: jax.Array
    v_up: jax.Array

    @property
    def num_groups(self) -> int:
        return self.k_up.shape[1]

    @property
    def shares_itself(self) -> bool:
        return True

    def attend(self, q, expert_index=None, q_shared=None):
        """Computes attention of finished queries q · W_kup to the latents, and multiplies what comes out by W_vup.

        The shared head does so with the means of both over the groups of all devices: its output is this device's
        summand.
        """
        q = prepare_queries(q, expert_index, None, self.rope)
        rank, groups, dim = self.k_up.shape
        own, rotated = halves_apart(q, dim)
        rows = jnp.concatenate([jnp.einsum("bsgkd,rgd->bsgkr", own, self.k_up), rotated], axis=-1)
        shape, rows = rows.shape, rows.reshape(*rows.shape[:2], 1, -1, rows.shape[-1])
        if q_shared is not None:
            groups *= self.shard.size("expert")
            mean_up = (self.shard.sum(self.k_up.sum(1), "expert") / groups).astype(q.dtype)
            own, rotated = halves_apart(rotate(q_shared, *self.rope) if self.rope else q_shared, dim)
            row = jnp.concatenate([jnp.einsum("bsd,rd->bsr", own, mean_up), rotated], axis=-1)
            rows = jnp.concatenate([rows, row[:, :, None, None]], axis=3)
        o = attend(
            rows, self.k, self.v, q_offset=self.q_offset, kv_length=self.kv_length, layer=self.layer, **self.options
        )[:, :, 0, :, :rank]
        if q_shared is None:
            return jnp.einsum("bsgkr,rgd->bsgkd", o.reshape(*shape[:-1], rank), self.v_up)
        routed = jnp.einsum("bsgkr,rgd->bsgkd", o[:, :, :-1].reshape(*shape[:-1], rank), self.v_up)
        return routed, jnp.einsum("bsr,rgd->bsd", o[:, :, -1], self.v_up) / groups


def halves_together(own: jax.Array, rotated: jax.Array) -> jax.Array:
    """[..., D] and [..., R] → [..., D + R]: both first halves, then both second ones.

    In this order one rotary table, whose first D/2 angles are 0, turns the R dimensions alone.
    """
    (a, b), (c, d) = jnp.split(own, 2, axis=-1), jnp.split(rotated, 2, axis=-1)
    return jnp.concatenate([a, c, b, d], axis=-1)


def halves_apart(x: jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
    """Returns the reverse of `halves_together`, with D = `dim`."""
    first, second = jnp.split(x, 2, axis=-1)
    (a, c), (b, d) = jnp.split(first, [dim // 2], axis=-1), jnp.split(second, [dim // 2], axis=-1)
    return jnp.concatenate([a, b], axis=-1), jnp.concatenate([c, d], axis=-1)
