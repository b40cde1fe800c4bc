"""Finds which blocks of keys a block of queries has to visit, by the rules of `mask.py`."""

import jax
import jax.numpy as jnp

from gqe_jax.kernels.mask import Mask
from gqe_jax.rounding import ceil_div


def kv_bounds(
    mask: Mask, q_starts: jax.Array, block_q: int, block_k: int, kv_len: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the range of key blocks to visit for each q block, and the part of that range that needs no mask.

    Args:
      mask: with any number of batch rows; the range covers all of them.
      q_starts: int32 [q blocks], index of the first query of each block.
      block_q: queries per block.
      block_k: keys per block; the last block may exceed T.
      kv_len: T.

    Returns:
      first, whole_first, whole_end, end: int32 [q blocks] each, in blocks of keys, none less than the one before it.
      Outside first..end no query of the block sees a key; within whole_first..whole_end every query of every batch row
      sees every key.
    """
    num_kv_blocks = ceil_div(kv_len, block_k)
    shift = mask.q_offset - mask.kv_offset
    # The key on the diagonal of a block's first and last query: the least and the greatest of any batch row.
    least, greatest = jnp.min(shift) + q_starts, jnp.max(shift) + q_starts + block_q - 1

    first, end = jnp.zeros_like(q_starts), jnp.full_like(q_starts, kv_len)
    whole_first, whole_end = jnp.zeros_like(q_starts), jnp.full_like(q_starts, kv_len)
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

    first, end = first // block_k, ceil_div(end, block_k)
    whole_first, whole_end = ceil_div(whole_first, block_k), whole_end // block_k
    if mask.q_segment_ids is not None:
        by_segment = segment_bounds(mask, q_starts, block_q, num_kv_blocks, block_k)
        first, whole_first = jnp.maximum(first, by_segment[0]), jnp.maximum(whole_first, by_segment[1])
        whole_end, end = jnp.minimum(whole_end, by_segment[2]), jnp.minimum(end, by_segment[3])
    first = jnp.clip(first, 0, num_kv_blocks)
    end = jnp.clip(end, first, num_kv_blocks)
    whole_first = jnp.clip(whole_first, first, end)
    return first, whole_first, jnp.clip(whole_end, whole_first, end), end


def segment_bounds(mask, q_starts, block_q, num_kv_blocks, block_k):
    """Returns the bounds by segments alone: blocks whose ids' ranges overlap, and blocks in the q block's only segment.

    Exact for packed rows, whose ids grow along the row; safe for any ids.
    """

    def extremes(ids):
        least_segment = jnp.min(jnp.where(ids == 0, jnp.iinfo(jnp.int32).max, ids), axis=-1)
        return jnp.min(ids, axis=-1), least_segment, jnp.max(ids, axis=-1)

    q_blocks = mask.q_segment_ids[:, q_starts[:, None] + jnp.arange(block_q)]
    padding = num_kv_blocks * block_k - mask.kv_segment_ids.shape[1]
    kv_blocks = jnp.pad(mask.kv_segment_ids, ((0, 0), (0, padding))).reshape(-1, num_kv_blocks, block_k)
    q_least, q_least_segment, q_greatest = (x[:, :, None] for x in extremes(q_blocks))
    kv_least, kv_least_segment, kv_greatest = (x[:, None, :] for x in extremes(kv_blocks))
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
