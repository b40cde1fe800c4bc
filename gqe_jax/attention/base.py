"""What every kind of attention shares: dense keys and values, rotary tables, QK norm, the cache."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gqe_jax.attention.cache import LANES, KVCache
from gqe_jax.attention.context import Context
from gqe_jax.attention.rotary import rotary_tables
from gqe_jax.attention.router import RouterStats, Routing
from gqe_jax.config import AttentionConfig
from gqe_jax.kernels import rms_norm, rotate
from gqe_jax.kernels.mesh_axes import check_not_explicit
from gqe_jax.linear import PRODUCT, Linear
from gqe_jax.parallel.on_mesh import Shard, axis_size, on_mesh, total
from gqe_jax.parallel.zigzag import zigzag

default_kernel_init = nnx.initializers.normal(0.02)


def require(name: str, value: Any, kind: type, remedy: str) -> None:
    """Raises ValueError unless the argument called `name` is a `kind`."""
    if not isinstance(value, kind):
        shown = " ".join(repr(value).split())  # of a key in several lines
        raise ValueError(f"{name}={shown} is no {kind.__name__}: {remedy}")


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
        require("rngs", rngs, nnx.Rngs, "pass nnx.Rngs(seed)")
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
        """An empty cache for `batch` sequences of at most `capacity` tokens, in the layer's dtype unless given one.

        Raises:
          ValueError: no rows, or no tokens.
        """
        dtype = dtype or self.k_proj.dtype or self.k_proj.kernel[...].dtype
        return KVCache.empty(
            batch, capacity, self.config.num_kv_heads, self.config.head_dim, dtype, parts=axis_size("expert")
        )

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: KVCache | None = None,
        rngs: nnx.Rngs | None = None,
        layer_index: jax.Array | int = 0,
    ) -> tuple[jax.Array, RouterStats | None] | tuple[jax.Array, RouterStats | None, KVCache]:
        """Causal self-attention.

        Under `jax.set_mesh` of a mesh of `gqe_jax.make_mesh` it is computed device by device: groups on `expert`, rows
        on `data` and `fsdp`, tokens on `context`. With n > 1 devices on `context` tokens come in the order of
        `gqe_jax.zigzag(x, n)`, segment_ids and positions with them, and y and the statistics go out in it.

        Reverse-mode derivatives alone are defined on every platform: for forward mode (`jax.jvp`) and second
        derivatives construct the layer with implementation="reference".

        Args:
          x: [B, S, d].
          segment_ids: int32 [B, S]; tokens see their own segment only, 0 = padding. With a cache: 1 = token and 0 =
            padding behind the tokens, which takes no place in the cache.
          positions: int32 [B or 1, S], for the rotary embedding; None counts from the start (from the cache's length).
          cache: from `init_cache`; the S tokens continue it. Under `jit` its lengths are not known: tokens beyond its
            capacity overwrite the last ones, which `checkify.checkify` reports, except under a mesh.
          rngs: randomness of training, stream "router": the router's jitter, and the draws of the `random` router.
          layer_index: of this layer in a stack; without rngs the `random` router draws differently in each.

        Returns:
          (y [B, S, d], statistics of the routing, or None of dense attention), and the grown cache if one was given.

        Raises:
          ValueError: shapes or dtypes that do not fit, rngs without the stream, sizes that the mesh does not divide,
            or more tokens than the cache holds.
        """
        self._check(x, segment_ids, positions, cache, rngs)
        config = self.config
        if positions is None:
            start = 0 if cache is None else cache.lengths
            positions = jnp.reshape(start, (-1, 1)) + jnp.arange(x.shape[1], dtype=jnp.int32)
            positions = zigzag(positions, axis_size("context"))
        rope = None
        if config.rope_theta is not None:
            rope = rotary_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        draws = self._draws(x, positions, rngs, layer_index)
        if rngs is not None and draws is not None:  # drawn by place in the sequence, on one device or on many
            draws = zigzag(draws, axis_size("context"))

        tokens = ("batch", "sequence")
        rope_axes = ("batch" if positions.shape[0] == x.shape[0] else None, "sequence", None)
        cache_axes = None if cache is None else cache.axes
        y, routing, cache = on_mesh(
            self,
            type(self)._forward,
            (x, segment_ids, rope, draws, cache),
            ((*tokens, None), tokens, rope_axes, self._draws_axes, cache_axes),
            (("partial", *tokens, None), self._routing_axes, cache_axes),
            dtype=self.k_proj.dtype,
        )
        y = self.o_proj.add_bias(checkpoint_name(total(y), PRODUCT))
        stats = None if routing is None else routing.statistics()
        return (y, stats) if cache is None else (y, stats, cache)

    _draws_axes: ClassVar[Any] = None
    _routing_axes: ClassVar[Any] = None

    def _draws(
        self, x: jax.Array, positions: jax.Array, rngs: nnx.Rngs | None, layer_index: jax.Array | int
    ) -> jax.Array | None:
        """The randomness of a call, drawn for the tokens of all devices at a time."""
        del x, positions, rngs, layer_index
        return None

    def _forward(
        self,
        shard: Shard,
        x: jax.Array,
        segment_ids: jax.Array | None,
        rope: tuple[jax.Array, jax.Array] | None,
        draws: jax.Array | None,
        cache: KVCache | None,
    ) -> tuple[jax.Array, Routing | None, KVCache | None]:
        """What one device adds to y, [1, B, S, d], without the bias; its routing; its part of the grown cache."""
        raise TypeError(f"{type(self).__name__} states no forward pass: use a kind of attention from ATTENTION")

    def _context(
        self,
        shard: Shard,
        x: jax.Array,
        segment_ids: jax.Array | None,
        rope: tuple[jax.Array, jax.Array] | None,
        cache: KVCache | None,
    ) -> tuple[Context, KVCache | None]:
        config = self.config
        k, v = self.k_proj(x), self.v_proj(x)
        dtype = v.dtype
        q_norm = None
        if config.qk_norm:
            k = rms_norm(k, self.k_norm.scale[...], config.qk_norm_eps)
            q_norm = (self.q_norm.scale[...], config.qk_norm_eps)
        if rope is not None:
            k = rotate(k, *rope)
        cached = {"q_offset": 0, "kv_length": None, "layer": None}
        if cache is not None:
            start = cache.lengths
            cache = cache.append(k, v, segment_ids)
            k, v = (x.reshape(*x.shape[:-2], *k.shape[2:]) for x in (cache.k, cache.v))
            cached = {"q_offset": start, "kv_length": cache.lengths, "layer": cache.layer}
        context = Context(
            shard=shard,
            k=k.astype(dtype),
            v=v.astype(dtype),
            rope=rope,
            q_norm=q_norm,
            segment_ids=segment_ids if cache is None else None,
            method=config.context_parallel,
            options={"window": config.window, "softcap": config.softcap, "implementation": config.implementation},
            **cached,
        )
        return context, cache

    def _check(
        self,
        x: jax.Array,
        segment_ids: jax.Array | None,
        positions: jax.Array | None,
        cache: KVCache | None,
        rngs: nnx.Rngs | None,
    ) -> None:
        check_not_explicit(x=x)
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            raise ValueError(f"x has shape {x.shape}, but must be [B, S, d_model={self.d_model}]")
        if segment_ids is not None and segment_ids.shape != x.shape[:2]:
            raise ValueError(f"segment_ids has shape {segment_ids.shape}, but must be [B, S] = {x.shape[:2]} like x")
        if positions is not None and (positions.shape[0] not in (1, x.shape[0]) or positions.shape[1:] != x.shape[1:2]):
            raise ValueError(
                f"positions has shape {positions.shape}, but must be [B or 1, S] with B, S = {x.shape[:2]} of x"
            )
        for name, ids in (("segment_ids", segment_ids), ("positions", positions)):
            if ids is not None and not jnp.issubdtype(ids.dtype, jnp.integer):
                raise ValueError(f"{name} has dtype {ids.dtype}, but must be integers: pass {name}.astype('int32')")
        kernel_dtype = self.k_proj.kernel[...].dtype
        dtype = jax.dtypes.canonicalize_dtype(self.k_proj.dtype or jnp.promote_types(x.dtype, kernel_dtype))
        if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 4:
            raise ValueError(
                f"x has dtype {x.dtype} and the parameters {kernel_dtype}: this layer would compute in {dtype}, but "
                f"attention takes float32, bfloat16 or float16: cast x, or construct the layer with dtype=jnp.float32"
            )
        if rngs is not None:
            require("rngs", rngs, nnx.Rngs, "pass nnx.Rngs(router=key_or_seed), or None outside training")
        groups, expert, context = self.config.num_kv_heads, axis_size("expert"), axis_size("context")
        if groups % expert:
            fits = ", ".join(str(size) for size in range(1, groups + 1) if groups % size == 0)
            raise ValueError(
                f"num_kv_heads={groups} groups cannot be shared out over the {expert} devices of the mesh's `expert` "
                f"axis: sizes that work are {fits}"
            )
        rows = axis_size("data") * axis_size("fsdp")
        if x.shape[0] % rows:
            raise ValueError(
                f"B={x.shape[0]} rows cannot be shared out over the {rows} devices on `data` and `fsdp` of the mesh: "
                f"make B a multiple of {rows}, or give the devices to `expert`"
            )
        if cache is not None:
            self._check_cache(cache, x.shape[0], expert)
        if context > 1 and cache is not None:
            raise ValueError(
                f"a cache is not split along the sequence, as the mesh's `context` axis of {context} devices would "
                f"have it: generate on a mesh with context=1, and give its devices to `expert` or `data`"
            )
        if x.shape[1] % (2 * context) and context > 1:
            raise ValueError(
                f"S={x.shape[1]} tokens do not divide into the {2 * context} chunks that the mesh's `context` axis of "
                f"{context} devices holds: pad the sequence to a multiple of {2 * context}"
            )

    def _check_cache(self, cache: KVCache, batch: int, expert: int) -> None:
        groups, dim = self.config.num_kv_heads, self.config.head_dim
        *rows, held, width = cache.k.shape
        fits = (
            len(rows) == (2 if cache.layer is None else 3)
            and rows[-2] == batch
            and held * width == groups * dim
            and width in (dim, dim if LANES % dim else LANES)
            and held % expert == 0
        )
        if not fits:
            raise ValueError(
                f"cache has keys of shape {cache.k.shape}, which are not those of B={batch} rows in num_kv_heads="
                f"{groups} heads of head_dim={dim}: make it by this layer's init_cache({batch}, capacity), under the "
                f"same mesh"
            )
