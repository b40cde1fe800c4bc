"""Which keys a query may see: the structural mask that every implementation of `attend` takes."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """A mask by structure, never an [S, T] array. Query s of batch row b sees key t where all of these hold.

    With i = q_offset[b] + s and j = kv_offset[b] + t:

    - `causal`: j <= i;
    - `window` = w: i - w < j, and without `causal` also j < i + w;
    - `kv_length`: t < kv_length[b] (an index into the buffer, not a position);
    - segment ids: q_segment_ids[b, s] == kv_segment_ids[b, t] != 0.

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
