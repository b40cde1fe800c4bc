"""Defines the caches of generation: the protocol that generation, planning and the model use, and two that hold to it.

`KVCache` holds keys and values, `LatentCache` what both are formed from.
"""

import dataclasses
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp

from gqe_jax.kernels.mesh_axes import debug_check, vary, varying_axes
from gqe_jax.kernels.tpu.decode import heads_side_by_side


class Cache(Protocol):
    """A cache holds what a layer keeps of the tokens it has seen. It is a pytree, which a model stacks over layers.

    The loop over layers carries the stacked cache and gives each layer `at(index)` of it, the same arrays with that
    layer marked as the current one.
    """

    @property
    def lengths(self) -> jax.Array:
        """How many tokens each row of the batch holds in the current layer: int32 [B]."""
        ...

    def append(self, k: jax.Array, v: jax.Array, /, segment_ids: jax.Array | None = None) -> Self:
        """Returns the cache with S more tokens in each row; tokens of segment id 0 are padding and are not counted."""
        ...

    def at(self, layer: jax.Array | None) -> Self:
        """Returns the same stacked cache with `layer` as the current one; None: with none, as the loop carries it."""
        ...

    @property
    def axes(self) -> Any:
        """The logical axes of the cache's arrays (`parallel.rules`), in a tree of the cache's structure."""
        ...

    def check(self, batch: int, shape: tuple[int, int], /, parts: int = 1) -> None:
        """Raises ValueError unless the cache was made for `batch` rows and the layer's `cached_shape`.

        `parts` is the number of devices that share the layer's KV heads.
        """
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Holds the finished keys (normed and rotated) and the values of one layer, or of all layers stacked.

    A layer that appends to `at(index)` of a stacked cache writes in place: no layer's part is cut out or put back.

    Attributes:
      k, v: [B, T_max, G, D], or [L, B, T_max, G, D] stacked over layers. Where P heads lie side by side
        (`heads_side_by_side`), G and D are G / P and P · D: a TPU reads those without a copy.
      length: int32 [B] or [L, B], tokens held by each row; what lies beyond is ignored and overwritten.
      layer: int32 scalar, the current layer of a stacked cache; None outside the loop, and where not stacked.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array
    layer: jax.Array | None = None

    @classmethod
    def empty(
        cls,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: jax.typing.DTypeLike,
        parts: int = 1,
    ) -> "KVCache":
        """Makes a cache without tokens.

        Args:
          batch: number of rows, B.
          capacity: most tokens of a row, T_max.
          num_kv_heads, head_dim: G and D.
          dtype: of keys and values.
          parts: number of devices that the heads can be split over, a divisor of G.

        Raises:
          ValueError: batch or capacity is below 1.
        """
        _check_sizes(batch, capacity)
        side_by_side = heads_side_by_side(num_kv_heads // parts, head_dim)
        shape = (batch, capacity, num_kv_heads // side_by_side, side_by_side * head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))

    def at(self, layer: jax.Array | None) -> "KVCache":
        """Returns the same stacked cache with `layer` as the current one; None: with none, as the loop carries it."""
        return dataclasses.replace(self, layer=layer)

    @property
    def axes(self) -> Any:
        """The logical axes of the arrays (`parallel.rules`), in a `KVCache`."""
        layers = (None,) * (self.length.ndim - 1)
        buffer = (*layers, "batch", None, "group", None)
        layer = None if self.layer is None else ()
        return dataclasses.replace(self, k=buffer, v=buffer, length=(*layers, "batch"), layer=layer)

    def check(self, batch: int, heads: tuple[int, int], parts: int = 1) -> None:
        """Raises ValueError unless the cache holds `batch` rows of `heads` = (G, D) that `parts` devices can share."""
        groups, dim = heads
        *leading, held, width = self.k.shape
        side_by_side = heads_side_by_side(groups // parts, dim)
        fits = (
            len(leading) == (2 if self.layer is None else 3)
            and leading[-2] == batch
            and (held, width) == (groups // side_by_side, side_by_side * dim)
            and held % parts == 0
        )
        if not fits:
            raise ValueError(
                f"cache has keys of shape {self.k.shape}, which are not those of B={batch} rows in num_kv_heads="
                f"{groups} heads of head_dim={dim}: make it by this layer's init_cache({batch}, capacity), under the "
                f"same mesh"
            )

    @property
    def lengths(self) -> jax.Array:
        """How many tokens each row holds in the current layer: int32 [B]."""
        return self.length if self.layer is None else self.length[self.layer]

    def append(self, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None) -> "KVCache":
        """Returns the cache with S new tokens behind those held; a row's padding (at its end) is not counted.

        The caller makes sure that length + S stays within the capacity: under `jit` the lengths are not known and no
        error can be raised. Tokens beyond the capacity then overwrite the last ones held; `checkify.checkify` reports
        this, except under a mesh of several devices.

        Args:
          k, v: [B, S, G, D].
          segment_ids: int32 [B, S], 1 = token, 0 = padding; None: all are tokens.

        Raises:
          ValueError: S exceeds the capacity, or (outside `jit`) length + S does.
        """
        length = _grown(self, self.k.shape[-3], k.shape[1], segment_ids)
        return dataclasses.replace(self, k=_written(self, self.k, k), v=_written(self, self.v, v), length=length)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache:
    """Holds what multi-head latent attention keeps of its tokens, for one layer or for all layers stacked.

    Attributes:
      latent: [B, T_max, r + R], or [L, B, T_max, r + R] stacked over layers: the latent, then the finished (rotated)
        key that all heads share.
      rank: r.
      length, layer: as in `KVCache`.
    """

    latent: jax.Array
    length: jax.Array
    rank: int = dataclasses.field(metadata={"static": True})
    layer: jax.Array | None = None

    @classmethod
    def empty(cls, batch: int, capacity: int, shape: tuple[int, int], dtype: jax.typing.DTypeLike) -> "LatentCache":
        """Makes a cache without tokens for `batch` rows of at most `capacity` tokens, `shape` = (r, R).

        Raises:
          ValueError: batch or capacity is below 1.
        """
        _check_sizes(batch, capacity)
        return cls(jnp.zeros((batch, capacity, sum(shape)), dtype), jnp.zeros(batch, jnp.int32), shape[0])

    def at(self, layer: jax.Array | None) -> "LatentCache":
        """Returns the same stacked cache with `layer` as the current one; None: with none, as the loop carries it."""
        return dataclasses.replace(self, layer=layer)

    @property
    def axes(self) -> Any:
        """The logical axes of the arrays (`parallel.rules`): devices that share the heads hold all of the latents."""
        layers = (None,) * (self.length.ndim - 1)
        layer = None if self.layer is None else ()
        buffer = (*layers, "batch", None, None)
        return dataclasses.replace(self, latent=buffer, length=(*layers, "batch"), layer=layer)

    def check(self, batch: int, shape: tuple[int, int], parts: int = 1) -> None:
        """Raises ValueError unless the cache holds `batch` rows of `shape` = (r, R)."""
        *leading, width = self.latent.shape
        fits = len(leading) == (2 if self.layer is None else 3) and leading[-2] == batch
        if not fits or (self.rank, width) != (shape[0], sum(shape)):
            raise ValueError(
                f"cache has latents of shape {self.latent.shape} and rank {self.rank}, which are not those of B="
                f"{batch} rows of {shape[0]} + {shape[1]} numbers: make it by this layer's init_cache({batch}, "
                f"capacity)"
            )

    @property
    def lengths(self) -> jax.Array:
        """How many tokens each row holds in the current layer: int32 [B]."""
        return self.length if self.layer is None else self.length[self.layer]

    def append(self, c: jax.Array, k_rope: jax.Array, segment_ids: jax.Array | None = None) -> "LatentCache":
        """Returns the cache with S new tokens behind those held, as `KVCache.append` does.

        Args:
          c, k_rope: [B, S, r] and [B, S, R].
          segment_ids: int32 [B, S], 1 = token, 0 = padding; None: all are tokens.

        Raises:
          ValueError: S exceeds the capacity, or (outside `jit`) length + S does.
        """
        length = _grown(self, self.latent.shape[-2], c.shape[1], segment_ids)
        latent = _written(self, self.latent[..., None, :], jnp.concatenate([c, k_rope], axis=-1)[..., None, :])
        return dataclasses.replace(self, latent=latent[..., 0, :], length=length)


def _check_sizes(batch: int, capacity: int) -> None:
    if batch < 1 or capacity < 1:
        raise ValueError(
            f"batch={batch}, capacity={capacity}: a cache holds at least one row of at least one token; make both "
            f"positive"
        )


def _grown(cache: KVCache | LatentCache, capacity: int, new: int, segment_ids: jax.Array | None) -> jax.Array:
    """Returns `cache.length` after `new` tokens more in the current layer; raises as `KVCache.append`."""
    lengths = cache.lengths
    message = (
        f"{new} new tokens behind the {{held}} held exceed the cache's capacity of {capacity} tokens: make the "
        f"cache longer, or the input shorter"
    )
    if isinstance(lengths, jax.core.Tracer):
        held = 0
        debug_check(lengths.max() + new <= capacity, message, held=lengths.max())
    else:
        with jax.ensure_compile_time_eval():  # known here, even where a jit around this call closes over it
            held = int(lengths.max())
    if held + new > capacity:
        raise ValueError(message.format(held=held))
    length = lengths + (new if segment_ids is None else jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32))
    if cache.layer is not None:
        length = jax.lax.dynamic_update_index_in_dim(cache.length, length, cache.layer, 0)
    return length


def _written(cache: KVCache | LatentCache, buffer: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns `buffer` [(L,) B, T_max, rows, width] with `tokens` [B, S, ...] behind those of the current layer."""
    shape, lengths = buffer.shape, cache.lengths
    layer = () if cache.layer is None else (cache.layer,)
    if shape[-2] == 1:  # with that axis, a TPU would lay out the whole buffer anew to write, and back to read
        buffer = buffer.squeeze(-2)
    token = buffer.shape[len(shape) - 2 :]
    tokens = tokens.astype(buffer.dtype).reshape(*tokens.shape[:2], *token)

    def write_row(b, buffer):
        row = jax.lax.dynamic_slice_in_dim(tokens, b, 1).reshape(*(1 for _ in layer), 1, *tokens.shape[1:])
        return jax.lax.dynamic_update_slice(buffer, row, (*layer, b, lengths[b], *(0 for _ in token)))

    buffer = vary(buffer, varying_axes((buffer, tokens, lengths, layer)))
    return jax.lax.fori_loop(0, tokens.shape[0], write_row, buffer).reshape(shape)
