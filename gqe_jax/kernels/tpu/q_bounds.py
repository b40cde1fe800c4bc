"""Finds which blocks of queries see a block of keys, for one batch row: the inverse of `kv_bounds`."""

import jax
import jax.numpy as jnp

from gqe_jax.kernels.kv_bounds import segment_bounds
from gqe_jax.kernels.mask import Mask
from gqe_jax.rounding import ceil_div


def q_bounds(mask: Mask, q_len: int, kv_len: int, block_q: int, block_kv: int) -> jax.Array:
    """int32 [4, B, kv blocks]: first, whole_first, whole_end, end of the range of q blocks, in blocks of queries.

    Outside first..end no query sees a key of the kv block; within whole_first..whole_end every query sees every key.
    """
    num_q_blocks, num_kv_blocks = ceil_div(q_len, block_q), ceil_div(kv_len, block_kv)
    first_key = jnp.arange(num_kv_blocks, dtype=jnp.int32) * block_kv
    last_key = first_key + block_kv - 1

    def one_row(mask: Mask) -> jax.Array:
        shift = mask.q_offset - mask.kv_offset
        # The query on the diagonal of a block's first and last key.
        least, greatest = first_key - shift, last_key - shift
        first, end = jnp.zeros_like(first_key), jnp.full_like(first_key, q_len)
        whole_first, whole_end = first, jnp.full_like(first_key, num_q_blocks * block_q)
        if mask.causal:
            first, whole_first = jnp.maximum(first, least), jnp.maximum(whole_first, greatest)
        if mask.window is not None:
            end, whole_end = jnp.minimum(end, greatest + mask.window), jnp.minimum(whole_end, least + mask.window)
            first = jnp.maximum(first, least - mask.window + 1)
            whole_first = jnp.maximum(whole_first, greatest - mask.window + 1)
        kv_end = kv_len if mask.kv_length is None else jnp.minimum(mask.kv_length, kv_len)
        end = jnp.where(first_key < kv_end, end, 0)
        whole_end = jnp.where(last_key < kv_end, whole_end, 0)
        first, end = first // block_q, ceil_div(end, block_q)
        whole_first, whole_end = ceil_div(whole_first, block_q), whole_end // block_q
        if mask.q_segment_ids is not None:
            rows = jax.tree.map(lambda x: x[None], mask)
            mirrored = Mask(
                q_offset=rows.kv_offset,
                kv_offset=rows.q_offset,
                q_segment_ids=rows.kv_segment_ids,
                kv_segment_ids=rows.q_segment_ids,
                causal=False,
            )
            segment = segment_bounds(mirrored, first_key, block_kv, num_q_blocks, block_q)
            first, whole_first = jnp.maximum(first, segment[0]), jnp.maximum(whole_first, segment[1])
            whole_end, end = jnp.minimum(whole_end, segment[2]), jnp.minimum(end, segment[3])
        first = jnp.clip(first, 0, num_q_blocks)
        end = jnp.clip(end, first, num_q_blocks)
        whole_first = jnp.clip(whole_first, first, end)
        return jnp.stack([first, whole_first, jnp.clip(whole_end, whole_first, end), end])

    return jnp.moveaxis(jax.vmap(one_row)(mask), 0, 1).astype(jnp.int32)
