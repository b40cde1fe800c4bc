"""Sizes of the backward kernel's blocks, and how many queries it holds in VMEM at one time."""

import dataclasses

from gqe_jax.kernels.tpu.blocks import LANES, even_blocks


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


# (block_q, block_kv, piece_q, piece_kv) by generation: bfloat16, D = 128.
_BACKWARD = {
    "v4": (512, 512, 512, 512),
    "v5e": (1024, 1024, 512, 512),
    "v5p": (1024, 1024, 512, 512),
    "v6e": (1024, 1024, 512, 512),
    "7x": (1024, 1024, 512, 512),
}


def backward_blocks(plan) -> BackwardBlocks:
    """The tuned blocks, no larger than the lengths need, and the longest chunk of queries that VMEM holds."""
    block_q, block_kv, piece_q, piece_kv = _BACKWARD.get(plan.generation, _BACKWARD["v5e"])
    if plan.dtype.itemsize == 4:
        block_q, block_kv, piece_q, piece_kv = block_q // 2, block_kv // 2, piece_q // 2, piece_kv // 2
    # A block is unrolled over its pieces and heads: four keep the matrix unit busy, more are only longer code.
    if plan.num_slots * plan.groups_per_block > 1:
        block_q = piece_q
    if plan.num_slots * plan.groups_per_block > 2:
        block_kv = piece_kv
    block_q, block_kv = even_blocks(plan.q_len, block_q), even_blocks(plan.kv_len, block_kv)
    num_q_blocks = -(-plan.q_len // block_q)
    resident = plan.vmem_limit_bytes - fixed_bytes(plan, block_q, block_kv)
    most = resident // bytes_per_q_block(plan, block_q)
    if most < 1:
        raise ValueError(
            f"the backward kernel's blocks of {block_q} queries and {block_kv} keys need "
            f"{fixed_bytes(plan, block_q, block_kv) + bytes_per_q_block(plan, block_q):,} bytes of VMEM, and "
            f"{plan.vmem_limit_bytes:,} are there: pass smaller blocks"
        )
    num_chunks = -(-num_q_blocks // most)
    return BackwardBlocks(block_q, block_kv, piece_q, piece_kv, -(-num_q_blocks // num_chunks))


def bytes_per_q_block(plan, block_q: int) -> int:
    """VMEM that a block of queries holds from its prologue to its epilogue."""
    heads = plan.num_slots * plan.groups_per_block
    sublanes = -(-2 * heads // 8) * 8 + (8 if plan.mask.has_segments else 0)
    return block_q * (plan.num_slots * plan.width * (2 * plan.dtype.itemsize + 4) + 4 * sublanes)


def fixed_bytes(plan, block_q: int, block_kv: int) -> int:
    """VMEM for the windows onto HBM (two buffers each), the accumulators and the values of a block in flight."""
    size, width = plan.dtype.itemsize, max(plan.width, LANES)
    heads = plan.groups_per_block * (2 * plan.num_experts + 2 * plan.num_slots) * plan.head_dim
    q_windows = 2 * block_q * (size * heads + 4 * (LANES + 2 * width))
    kv_windows = 2 * block_kv * width * (2 * size + 4 * 4)
    scratch = block_kv * (width * (8 + 3 * size) + 4 * LANES)
    in_flight = 6 * block_q * block_kv + 8 * block_q * width
    return q_windows + kv_windows + scratch + in_flight
