"""Sizes of the backward kernel's blocks, and how many queries it holds in VMEM at one time."""

import dataclasses

from gqe_jax.kernels.tpu.blocks import even_blocks
from gqe_jax.kernels.tpu.vmem import backward_bytes, too_large
from gqe_jax.rounding import ceil_div
from gqe_jax.tpu import GENERATIONS, LANES


@dataclasses.dataclass(frozen=True)
class BackwardBlocks:
    """Block sizes of the backward kernel.

    Attributes:
      block_q, block_kv: tokens per block of scores, multiples of 128.
      piece_q, piece_kv: a block is computed in pieces of at most this size, unrolled, so that the matrix unit works on
        one while the vector unit works on another; multiples of 128.
      chunk_q: blocks of queries that one call of the kernel holds in VMEM, with their gradient.
    """

    block_q: int
    block_kv: int
    piece_q: int
    piece_kv: int
    chunk_q: int


def backward_blocks(plan) -> BackwardBlocks:
    """Returns the blocks given, or tuned ones that fit; no larger than the lengths need, with the longest chunk that
    fits.

    Raises:
      ValueError: given blocks exceed VMEM, or the smallest do.
    """
    given = plan.block_sizes
    is_given = bool(given.backward_block_q or given.backward_block_kv or given.backward_chunk_q)
    for shrink in (1,) if is_given else (1, 2, 4):
        block_q, block_kv, piece_q, piece_kv = _sizes(plan, shrink)
        fixed, per_block = backward_bytes(plan, block_q, block_kv, piece_q, piece_kv)
        num_q_blocks = ceil_div(plan.q_len, block_q)
        most = min((plan.vmem_limit_bytes - fixed) // per_block, num_q_blocks)
        if most >= min(given.backward_chunk_q or 1, num_q_blocks):
            num_chunks = ceil_div(num_q_blocks, min(given.backward_chunk_q or most, num_q_blocks))
            return BackwardBlocks(block_q, block_kv, piece_q, piece_kv, ceil_div(num_q_blocks, num_chunks))

    def need(sizes: dict[str, int]) -> int:
        block_q, block_kv = sizes["backward_block_q"], sizes["backward_block_kv"]
        fixed, per_block = backward_bytes(plan, block_q, block_kv, min(piece_q, block_q), min(piece_kv, block_kv))
        return fixed + sizes.get("backward_chunk_q", 1) * per_block

    sizes = {"backward_block_q": block_q, "backward_block_kv": block_kv}
    if given.backward_chunk_q:
        sizes["backward_chunk_q"] = min(given.backward_chunk_q, num_q_blocks)
    raise too_large(plan, "backward", sizes, need)


def _sizes(plan, shrink: int) -> tuple[int, int, int, int]:
    """block_q, block_kv, piece_q, piece_kv: given, or tuned and divided by `shrink`."""
    given = plan.block_sizes
    if plan.dtype.itemsize == 4:
        shrink *= 2
    tuned = GENERATIONS[plan.generation].blocks
    block, piece = (max(LANES, size // shrink) for size in (tuned.backward_block, tuned.backward_piece))
    # A block is unrolled over its pieces and heads: four keep the matrix unit busy, more are only longer code.
    heads = plan.num_slots * plan.groups_per_block
    block_q, block_kv = piece if heads > 1 else block, piece if heads > 2 else block
    block_q = even_blocks(plan.q_len, given.backward_block_q or block_q)
    block_kv = even_blocks(plan.kv_len, given.backward_block_kv or block_kv)
    piece_q, piece_kv = given.backward_piece_q or piece, given.backward_piece_kv or piece
    return block_q, block_kv, min(piece_q, block_q), min(piece_kv, block_kv)
