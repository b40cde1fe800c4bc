"""How much VMEM the kernels' blocks need, how much there is, and what to say where blocks exceed it.

Needs are estimated from above: windows onto HBM, of two buffers each, scratch, and scores in flight, which do not fit
the registers. The forward's is within a tenth of what the compiler takes, the backward's within a third.
"""

import dataclasses
from collections.abc import Callable

from gqe_jax.kernels.tpu.blocks import Blocks, forward_blocks
from gqe_jax.kernels.tpu.schedule import is_bounded
from gqe_jax.rounding import round_up
from gqe_jax.tpu import LANES

SMALL_BYTES = 64 << 10
"""Room that is left for what is not counted one by one."""


def fitting_blocks(plan) -> Blocks:
    """Returns the forward kernel's blocks: given ones, or tuned ones made to fit.

    Raises:
      ValueError: given blocks exceed VMEM, or the smallest do; sizes that do not divide each other.
    """
    given = plan.block_sizes

    def blocks_of(given, halvings):
        lengths = plan.q_len, plan.kv_len
        bounded = is_bounded(plan.mask, *lengths)
        return forward_blocks(plan.generation, plan.num_slots, *lengths, given, bounded=bounded, halvings=halvings)

    is_given = bool(given.block_q or given.block_kv or given.tile)
    for halvings in (0,) if is_given else range(7):
        blocks = blocks_of(given, halvings)
        if forward_bytes(plan, blocks) <= plan.vmem_limit_bytes:
            return blocks
    sizes = {name: getattr(blocks, name) for name in ("block_q", "block_kv", "tile")}
    raise too_large(
        plan,
        "forward",
        sizes,
        lambda sizes: forward_bytes(plan, blocks_of(dataclasses.replace(given, **sizes), halvings)),
    )


def forward_bytes(plan, blocks: Blocks) -> int:
    """VMEM of the forward kernel."""
    groups, slots, size, width = plan.groups_per_block, plan.num_slots, plan.dtype.itemsize, max(plan.width, LANES)
    block_q, rows = blocks.block_q, groups * slots * blocks.block_q
    q_lanes = round_up(groups * plan.num_experts * plan.head_dim, LANES)
    windows = block_q * (_q_side_bytes(plan) + size * q_lanes) + blocks.block_kv * 2 * width * size
    acc = plan.head_dim + 16
    scratch = rows * (width * size + 4 * (blocks.tile + acc + 2 * 8)) + width * size * blocks.tile
    scratch += width * size * block_q  # what stands on the diagonal
    if plan.mask.has_segments:
        windows += 4 * 8 * (block_q + blocks.block_kv)
    # Scores of a unit, or of the block on the diagonal; float32 is split into several of bfloat16.
    keys = max(blocks.unit, (block_q + blocks.diagonal_part) // 2)
    scores = (rows * keys + 2 * 256 * blocks.row_part) * (10 if plan.exact else 4)
    selection = _selection_bytes(block_q, q_lanes) // 2  # no gradients
    return 2 * windows + scratch + max(scores, selection) + selection // 8 + SMALL_BYTES


def backward_bytes(plan, block_q: int, block_kv: int, piece_q: int, piece_kv: int) -> tuple[int, int]:
    """VMEM of the backward kernel: whatever the queries, and for each block of queries that one call holds."""
    groups, slots, size, width = plan.groups_per_block, plan.num_slots, plan.dtype.itemsize, max(plan.width, LANES)
    heads, segments = groups * slots, plan.mask.has_segments
    q_lanes = round_up(groups * plan.num_experts * plan.head_dim, LANES)
    o_lanes = round_up(groups * slots * plan.head_dim, LANES)
    windows = block_q * (_q_side_bytes(plan) + size * (2 * q_lanes + o_lanes) + 4 * 8 * heads)
    windows += block_kv * width * (2 * size + 4 * 4)
    scratch = block_kv * (width * (8 + 3 * size) + 4 * LANES * segments)
    # Scores of the pieces that the compiler overlaps; what masks them; the slope of the cap.
    in_flight = 8 * piece_q * piece_kv * min((heads + 1) // 2, 4)
    in_flight += 4 * piece_q * piece_kv * (2 * segments + (plan.softcap is not None) + (not plan.mask.aligned))
    if plan.exact:
        in_flight = 2 * in_flight + 4 * width * (piece_q + piece_kv)
    in_flight = max(in_flight, _epilogue_bytes(plan, block_q))
    per_block = block_q * (slots * width * (2 * size + 4) + 4 * (round_up(2 * heads, 8) + 8 * segments))
    return 2 * windows + scratch + in_flight + SMALL_BYTES, per_block


def _selection_bytes(block_q: int, q_lanes: int) -> int:
    """All experts' queries of the 512 tokens that are in flight at one time."""
    return 8 * min(block_q, 512) * q_lanes


def _epilogue_bytes(plan, block_q: int) -> int:
    """Gradients of the queries of 512 tokens: of all groups' slots together, of each group's slots and experts, and
    for the norm one group's queries. A head has all lanes of its block."""
    groups, experts, slots = plan.groups_per_block, plan.num_experts, plan.num_slots
    heads = slots + groups * (slots + experts) + (plan.norm_eps > 0) * (slots + experts)
    return 4 * min(block_q, 512) * max(plan.width, LANES) * heads


def _q_side_bytes(plan) -> int:
    """Counts, for the tokens of a block of queries: expert index, rotary tables, output, log-sum-exp."""
    heads = plan.groups_per_block * plan.num_slots
    index, rope = round_up(plan.num_groups * plan.num_slots, LANES), round_up(2 * plan.width, LANES)
    return 4 * (index + rope + 8 * heads) + plan.dtype.itemsize * round_up(heads * plan.head_dim, LANES)


def too_large(plan, kernel: str, sizes: dict[str, int], need: Callable[[dict[str, int]], int]) -> ValueError:
    """Returns the error for blocks that exceed VMEM: what they need, what there is, and the largest size of each that
    fits.

    Args:
      plan: of the call; kernel: "forward" or "backward".
      sizes: by the names of `BlockSizes`.
      need: bytes for other such sizes; a ValueError where they do not divide each other.
    """

    def fits(name: str, size: int) -> bool:
        try:
            return need(sizes | {name: size}) <= plan.vmem_limit_bytes
        except ValueError:
            return False

    largest = []
    for name, size in sizes.items():
        step = 1 if name == "backward_chunk_q" else LANES
        smaller = next((x for x in range(size - step, 0, -step) if fits(name, x)), None)
        largest += [] if smaller is None else [f"{name}={smaller}"]
    given = any(getattr(plan.block_sizes, name) for name in sizes)
    remedy = " or ".join(largest) + " fits" if largest else "no one of them can be made small enough"
    remedy += "; the tuned sizes (None) are chosen to fit" if given else "; implementation='xla' needs no VMEM"
    return ValueError(
        f"block_sizes: {', '.join(f'{name}={size}' for name, size in sizes.items())} need {need(sizes):,} bytes of "
        f"VMEM in the {kernel} kernel (K={plan.num_slots}, M={plan.num_experts}, D={plan.norm_dim}, {plan.dtype.name})"
        f", and {plan.vmem_limit_bytes:,} are there on {plan.generation}: {remedy}"
    )
