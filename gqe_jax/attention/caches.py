"""Caches of generation: the protocol that generation, planning and the model touch, and the cache of dense keys."""

import dataclasses
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp

from gqe_jax.kernels.mesh_axes import debug_check, vary, varying_axes
from gqe_jax.tpu import LANES


class Cache(Protocol):
    """What a layer keeps of the tokens it has seen; a pytree, which a model stacks over its layers."""

    @property
    def lengths(self) -> jax.Array:
        """int32 [B], tokens held by each row: of the one layer, or of the one whose turn it is."""
        ...

    def append(self, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None) -> Self:
        """The cache with S tokens more: what the layer keeps of each; segment id 0 is padding behind the tokens."""
        ...

    def at(self, layer: jax.Array | None) -> Self:
        """The same stacked cache, for the layer of that index; None: for the loop over layers again."""
        ...

    @property
    def axes(self) -> Any:
        """Logical axes of its arrays (`parallel.rules`): a tree like this one."""
        ...

    def check(self, batch: int, heads: tuple[int, int], parts: int = 1) -> None:
        """Raises ValueError unless it was made for `batch` rows and (G, D) heads that `parts` devices share out."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Finished keys (normed and rotated) and values of one layer, or of all layers, one after the other.

    A loop over layers carries the stacked cache and gives each layer `at(index)` of it: what the layer appends is then
    written in place, and no layer's part is cut out or put back.

    Attributes:
      k, v: [B, T_max, G, D], or [L, B, T_max, G, D] stacked over layers. Heads narrower than 128 that fill rows of 128
        lie side by side in them, G and D then being G · D / 128 and 128: a TPU reads those without a copy.
      length: int32 [B] or [L, B], tokens held by each row; what lies beyond is ignored and overwritten.
      layer: int32 scalar, of a stacked cache the layer whose turn it is; None outside the loop, and where not stacked.
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
        """A cache that holds nothing yet; its heads can be split over `parts` devices, a divisor of their number.

        Raises:
          ValueError: no rows, or no tokens.
        """
        if batch < 1 or capacity < 1:
            raise ValueError(
                f"batch={batch}, capacity={capacity}: a cache holds at least one row of at least one token; make both "
                f"positive"
            )
        rows = (num_kv_heads, head_dim)
        if head_dim < LANES and LANES % head_dim == 0 and num_kv_heads // parts * head_dim % LANES == 0:
            rows = (num_kv_heads * head_dim // LANES, LANES)
        shape = (batch, capacity, *rows)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))

    def at(self, layer: jax.Array | None) -> "KVCache":
        """The same stacked cache, for the layer of that index; None: for the loop again."""
        return dataclasses.replace(self, layer=layer)

    @property
    def axes(self) -> Any:
        """Logical axes of the arrays (`parallel.rules`): a tree like this one."""
        layers = (None,) * (self.length.ndim - 1)
        buffer = (*layers, "batch", None, "group", None)
        layer = None if self.layer is None else ()
        return dataclasses.replace(self, k=buffer, v=buffer, length=(*layers, "batch"), layer=layer)

    def check(self, batch: int, heads: tuple[int, int], parts: int = 1) -> None:
        """Raises ValueError unless it holds `batch` rows of (G, D) heads that `parts` devices can share out."""
        groups, dim = heads
        *rows, held, width = self.k.shape
        fits = (
            len(rows) == (2 if self.layer is None else 3)
            and rows[-2] == batch
            and held * width == groups * dim
            and width in (dim, dim if LANES % dim else LANES)
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
        """int32 [B], of the one layer or of that whose turn it is."""
        return self.length if self.layer is None else self.length[self.layer]

    def append(self, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None) -> "KVCache":
        """Writes S new tokens behind those held; a row's padding (segment id 0, at its end) is not counted.

        The caller sees to it that length + S stays within the capacity: the lengths are data, and under `jit` no error
        can be raised for them. There tokens too many overwrite the last ones held; `checkify.checkify` reports it,
        except under a mesh of several devices.

        Args:
          k, v: [B, S, G, D].
          segment_ids: int32 [B, S], 1 = token, 0 = padding.

        Raises:
          ValueError: S exceeds the capacity, or (outside `jit`) length + S does.
        """
        capacity, new = self.k.shape[-3], k.shape[1]
        lengths = self.lengths
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
        count = new if segment_ids is None else jnp.sum(segment_ids != 0, axis=1, dtype=jnp.int32)
        layer = () if self.layer is None else (self.layer,)

        def write(buffer, rows):
            shape = buffer.shape
            if shape[-2] == 1:  # with that axis, a TPU would lay out the whole buffer anew to write, and back to read
                buffer = buffer.squeeze(-2)
            token = buffer.shape[len(shape) - 2 :]
            rows = rows.astype(buffer.dtype).reshape(*rows.shape[:2], *token)

            def write_row(b, buffer):
                row = jax.lax.dynamic_slice_in_dim(rows, b, 1).reshape(*(1 for _ in layer), 1, *rows.shape[1:])
                return jax.lax.dynamic_update_slice(buffer, row, (*layer, b, lengths[b], *(0 for _ in token)))

            buffer = vary(buffer, varying_axes((buffer, rows, lengths, layer)))
            return jax.lax.fori_loop(0, rows.shape[0], write_row, buffer).reshape(shape)

        length = lengths + count
        if layer:
            length = jax.lax.dynamic_update_index_in_dim(self.length, length, self.layer, 0)
        return dataclasses.replace(self, k=write(self.k, k), v=write(self.v, v), length=length)
