"""Which blocks of keys a block of queries has to visit, and which keys of a block it sees."""

import jax
import jax.numpy as jnp
from jax import lax

from gqe_jax.kernels.mask import Mask


def kv_bounds(
    mask: Mask, num_q_blocks: int, block_q: int, block_k: int, kv_len: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The range of key blocks to visit for each q block, and the part of it that needs no mask.

    Args:
      mask: with any number of batch rows; the range covers all of them.
      num_q_blocks, block_q: q block i holds positions i·block_q to (i + 1)·block_q − 1; the last may exceed S.
      block_k: keys per block; the last block may exceed T = kv_len.

    Returns:
      first, whole_first, whole_end, end: int32 [num_q_blocks] each, in blocks, first <= whole_first <= whole_end <= end.
      Outside first..end no query of the block sees a key; within whole_first..whole_end every query of every batch row
      sees every key.
    """
    num_kv_blocks = -(-kv_len // block_k)
    top = jnp.arange(num_q_blocks) * block_q
    shift = mask.q_offset - mask.kv_offset
    # The key index on the diagonal, for the top and bottom row of each q block: the least and greatest of any batch row.
    least, greatest = jnp.min(shift) + top, jnp.max(shift) + top + block_q - 1

    first, end = jnp.zeros_like(top), jnp.full_like(top, kv_len)
    whole_first, whole_end = jnp.zeros_like(top), jnp.full_like(top, kv_len)
    if mask.causal:
        end = jnp.minimum(end, greatest + 1)
        whole_end = jnp.minimum(whole_end, least + 1)
    if mask.window is not None:
        first = jnp.maximum(first, least - mask.window + 1)
        whole_first = jnp.maximum(whole_first, greatest - mask.window + 1)
        end = jnp.minimum(end, greatest + mask.window)
        whole_end = jnp.minimum(whole_end, least + mask.window)
    if mask.kv_length is not None:
        end = jnp.minimum(end, jnp.max(mask.kv_length))
        whole_end = jnp.minimum(whole_end, jnp.min(mask.kv_length))

    first, end = first // block_k, -(-end // block_k)
    whole_first, whole_end = -(-whole_first // block_k), whole_end // block_k
    if mask.q_segment_ids is not None:
        segment_bounds = _segment_bounds(mask, num_q_blocks, block_q, num_kv_blocks, block_k)
        first, whole_first = jnp.maximum(first, segment_bounds[0]), jnp.maximum(whole_first, segment_bounds[1])
        whole_end, end = jnp.minimum(whole_end, segment_bounds[2]), jnp.minimum(end, segment_bounds[3])
    first = jnp.clip(first, 0, num_kv_blocks)
    end = jnp.clip(end, first, num_kv_blocks)
    whole_first = jnp.clip(whole_first, first, end)
    return first, whole_first, jnp.clip(whole_end, whole_first, end), end


def _segment_bounds(mask, num_q_blocks, block_q, num_kv_blocks, block_k):
    """The bounds by segments alone: blocks whose ranges of ids overlap, and blocks inside the q block's only segment.

    Exact for packed rows, whose ids grow along the row; safe for any ids.
    """

    def extremes(ids, block, num_blocks):
        ids = jnp.pad(ids, ((0, 0), (0, block * num_blocks - ids.shape[1]))).reshape(-1, num_blocks, block)
        least_segment = jnp.min(jnp.where(ids == 0, jnp.iinfo(jnp.int32).max, ids), axis=-1)
        return jnp.min(ids, axis=-1), least_segment, jnp.max(ids, axis=-1)

    q_least, q_least_segment, q_greatest = (
        x[:, :, None] for x in extremes(mask.q_segment_ids, block_q, num_q_blocks)
    )
    kv_least, kv_least_segment, kv_greatest = (
        x[:, None, :] for x in extremes(mask.kv_segment_ids, block_k, num_kv_blocks)
    )
    shared = jnp.any((kv_least_segment <= q_greatest) & (kv_greatest >= q_least_segment), axis=0)
    one_segment = (q_least == q_greatest) & (q_least != 0)
    whole = jnp.all(one_segment & (kv_least == q_least) & (kv_greatest == q_least), axis=0)

    def span(hits):
        any_hit = jnp.any(hits, axis=-1)
        first = jnp.where(any_hit, jnp.argmax(hits, axis=-1), 0)
        return first, jnp.where(any_hit, num_kv_blocks - jnp.argmax(hits[:, ::-1], axis=-1), 0)

    first, end = span(shared)
    whole_first, whole_end = span(whole)
    one_run = jnp.sum(whole, axis=-1) == whole_end - whole_first
    return first, whole_first, jnp.where(one_run, whole_end, whole_first), end


def seen_keys(mask: Mask, q_index: jax.Array, kv_start: jax.Array, num_keys: int) -> jax.Array:
    """Which of the keys kv_start..kv_start + num_keys − 1 each query sees.

    Args:
      mask: of B batch rows.
      q_index: int32 [R], indices of queries; indices past S see nothing that matters.

    Returns:
      bool [B, R, num_keys].
    """
    kv_index = kv_start + jnp.arange(num_keys)
    distance = (mask.q_offset - mask.kv_offset)[:, None, None] + (q_index[:, None] - kv_index)
    seen = jnp.ones(distance.shape, bool)
    if mask.causal:
        seen &= distance >= 0
    if mask.window is not None:
        seen &= (distance < mask.window) & (distance > -mask.window)
    if mask.kv_length is not None:
        seen &= kv_index < mask.kv_length[:, None, None]
    if mask.q_segment_ids is not None:
        q_segment = jnp.take(mask.q_segment_ids, q_index, axis=1, mode="fill", fill_value=0)[:, :, None]
        kv_segment = lax.dynamic_slice_in_dim(mask.kv_segment_ids, kv_start, num_keys, axis=1)[:, None, :]
        seen &= (q_segment == kv_segment) & (q_segment != 0)
    return seen
