"""Defines the mask that every implementation of `attend` takes: which keys a query may see."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

INT32 = jnp.iinfo(jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """Describes by structure, never as an [S, T] array, which keys a query sees.

    Query s of batch row b sees key t where each of these rules that applies holds, with i = q_offset[b] + s and
    j = kv_offset[b] + t:

    - `causal`: j <= i;
    - `window` = w: i - w < j, and without `causal` also j < i + w;
    - `kv_length`: t < kv_length[b] (an index into the buffer, not a position);
    - segment ids: q_segment_ids[b, s] == kv_segment_ids[b, t] != 0.

    `sees` is this definition in code. No sum of positions may exceed int32: `make_mask` sees to that.

    Attributes:
      q_offset, kv_offset: int32 [B].
      kv_length: int32 [B] or None.
      q_segment_ids, kv_segment_ids: int32 [B, S] and [B, T], or both None.
      aligned: both offsets are known, when tracing, to be the same number.
    """

    q_offset: jax.Array
    kv_offset: jax.Array
    kv_length: jax.Array | None = None
    q_segment_ids: jax.Array | None = None
    kv_segment_ids: jax.Array | None = None
    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    aligned: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def has_length(self) -> bool:
        return self.kv_length is not None

    @property
    def has_segments(self) -> bool:
        return self.q_segment_ids is not None


def make_mask(q_len: int, kv_len: int, *, q_offset, kv_offset, kv_length=None, window=None, **rest) -> Mask:
    """Makes a `Mask` of small numbers that hides the same pairs as the arguments: any int32 offsets, any window.

    Only the distance between query 0 and key 0 matters, and only as far as the arrays reach: the offsets become
    (distance, 0), a window of more than S + T becomes S + T, with the distance moved by the difference where the window
    ends within the arrays, and one that covers the arrays whatever the distance becomes None.

    Args:
      q_len, kv_len: S and T.
      q_offset, kv_offset, kv_length: int32 [B], or kv_length None. Where there is a window the offsets must differ by
        less than 2³¹.
      rest: the other fields of `Mask`.
    """
    difference = q_offset - kv_offset
    overflows = ((q_offset ^ kv_offset) & (q_offset ^ difference)) < 0
    distance = jnp.where(overflows, jnp.where(q_offset < 0, INT32.min, INT32.max), difference)
    furthest = 0 if rest.get("aligned") else INT32.max
    if window is not None and window > furthest + max(q_len, kv_len):
        window = None
    reach = 0
    if window is not None:
        reach = min(window, q_len + kv_len)
        # A query that is further away than its window's end sees keys only where that end lies within them.
        nearer = jnp.sign(distance) * jnp.maximum(jnp.abs(jnp.maximum(distance, -INT32.max)) - (window - reach), 0)
        beyond_kv, beyond_q = distance >= kv_len, distance <= -q_len
        distance = jnp.where(beyond_kv, jnp.maximum(nearer, kv_len), distance)
        distance = jnp.where(beyond_q, jnp.minimum(nearer, -q_len), distance)
        window = reach
    distance = jnp.clip(distance, -(q_len + reach), kv_len + reach)
    if kv_length is not None:
        kv_length = jnp.clip(kv_length, 0, kv_len)
    return Mask(q_offset=distance, kv_offset=jnp.zeros_like(distance), kv_length=kv_length, window=window, **rest)


def sees(mask: Mask, q_start: jax.Array, num_queries: int, kv_start: jax.Array, num_keys: int) -> jax.Array:
    """Tells which of num_keys keys from kv_start each of num_queries queries from q_start sees.

    Returns:
      bool [B, num_queries, num_keys].
    """
    q_index = q_start + jnp.arange(num_queries)[:, None]
    kv_index = kv_start + jnp.arange(num_keys)
    distance = (mask.q_offset - mask.kv_offset)[:, None, None] + (q_index - kv_index)
    seen = jnp.ones(distance.shape, bool)
    if mask.causal:
        seen &= distance >= 0
    if mask.window is not None:
        seen &= (distance < mask.window) & (distance > -mask.window)
    if mask.kv_length is not None:
        seen &= kv_index < mask.kv_length[:, None, None]
    if mask.q_segment_ids is not None:
        q_segment = lax.dynamic_slice_in_dim(mask.q_segment_ids, q_start, num_queries, axis=1)[:, :, None]
        kv_segment = lax.dynamic_slice_in_dim(mask.kv_segment_ids, kv_start, num_keys, axis=1)[:, None, :]
        seen &= (q_segment == kv_segment) & (q_segment != 0)
    return seen


def visible(mask: Mask, q_len: int, kv_len: int) -> jax.Array:
    """Returns the mask as a bool array [B, S, T]."""
    return sees(mask, 0, q_len, 0, kv_len)
