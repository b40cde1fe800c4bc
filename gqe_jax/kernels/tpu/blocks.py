"""Sizes of the kernels' blocks: a small table from compiled schedules, by TPU generation, D and dtype, clipped to S."""

import dataclasses

from jax.experimental.pallas import tpu as pltpu

LANES = 128


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes of one kernel.

    Attributes:
      block_q: tokens in memory; a tile's rows are K times as many.
      block_kv: keys in memory, a multiple of block_q and of tile.
      tile: keys whose scores are computed at one time where no query needs a mask.
      unit: the same where one does, and what values are multiplied by; divides tile and block_q.
      diagonal_part: queries and keys of a step on the diagonal; divides block_q.
      row_parts: a tile's rows go through in so many parts.
      ones_column: the row sum comes from a tile of ones beside V (matrix unit), not from adding lanes (vector unit).
    """

    block_q: int
    block_kv: int
    tile: int
    unit: int
    diagonal_part: int
    row_parts: int = 1
    ones_column: bool = False


# (rows of q, keys in memory, tile, row parts, ones_column) by generation and lanes W: bfloat16.
_FORWARD = {
    ("v4", 128): (512, 2048, 1024, 1, False),
    ("v5e", 128): (1024, 4096, 1024, 1, False),
    ("v5p", 128): (1024, 4096, 1024, 1, False),
    ("v6e", 128): (2048, 4096, 2048, 4, True),
    ("7x", 128): (1024, 4096, 2048, 1, False),
}


def forward_blocks(generation: str, width: int, itemsize: int, num_slots: int, q_len: int, kv_len: int) -> Blocks:
    """The tuned blocks of the forward kernel, no larger than the lengths need."""
    rows, block_kv, tile, parts, ones = _FORWARD.get(
        (generation, width), _FORWARD.get((generation, 128), _FORWARD["v5e", 128])
    )
    block_q = even_blocks(q_len, max(LANES, rows // num_slots))
    unit, diagonal_part = (max(x for x in range(LANES, most + 1, LANES) if block_q % x == 0) for most in (512, 256))
    block_kv = -(-min(block_kv, kv_len) // block_q) * block_q
    tile = max(size for size in range(unit, max(tile, unit) + 1, unit) if block_kv % size == 0)
    return Blocks(block_q, block_kv, tile, unit, diagonal_part, parts, ones and width % LANES == 0)


def even_blocks(length: int, most: int) -> int:
    """The size of the fewest equal blocks of at most `most` that cover `length`, a multiple of 128."""
    tiles = -(-length // LANES)
    count = -(-tiles // (most // LANES))
    return -(-tiles // count) * LANES


def tpu_generation() -> str:
    """ "v4", "v5e", "v5p", "v6e" or "7x": of the devices that the computation is lowered for."""
    return str(pltpu.get_tpu_info().chip_version)
