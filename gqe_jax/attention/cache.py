"""The key/value cache of generation: the same for dense attention and for GQE, whose keys and values are dense."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Finished keys (normed and rotated) and values of one layer.

    Attributes:
      k, v: [B, T_max, G, D].
      length: int32 [B], tokens held by each row; what lies beyond is ignored and overwritten.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array

    @classmethod
    def empty(
        cls, batch: int, capacity: int, num_kv_heads: int, head_dim: int, dtype: jax.typing.DTypeLike
    ) -> "KVCache":
        """A cache that holds nothing yet."""
        shape = (batch, capacity, num_kv_heads, head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))

    def append(self, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None) -> "KVCache":
        """Writes S new tokens behind those held; a row's padding (segment id 0, at its end) is not counted.

        The caller sees to it that length + S stays within the capacity: the lengths are data, and under `jit` no error
        can be raised for them.

        Args:
          k, v: [B, S, G, D].
          segment_ids: int32 [B, S], 1 = token, 0 = padding.

        Raises:
          ValueError: S exceeds the capacity, or (outside `jit`) length + S does.
        """
        capacity, new = self.k.shape[1], k.shape[1]
        held = 0 if isinstance(self.length, jax.core.Tracer) else int(self.length.max())
        if held + new > capacity:
            raise ValueError(
                f"{new} new tokens behind the {held} held exceed the cache's capacity of {capacity} tokens: "
                f"make the cache longer, or the input shorter"
            )
        write = jax.vmap(lambda buffer, rows, at: jax.lax.dynamic_update_slice_in_dim(buffer, rows, at, axis=0))
        count = new if segment_ids is None else jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32)
        return KVCache(
            write(self.k, k.astype(self.k.dtype), self.length),
            write(self.v, v.astype(self.v.dtype), self.length),
            self.length + count,
        )
