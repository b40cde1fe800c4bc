"""Sizes of the kernels' blocks: a small table from compiled schedules, by TPU generation, D and dtype, clipped to S."""

import dataclasses

from jax.experimental.pallas import tpu as pltpu

LANES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """Block sizes of the `pallas_tpu` kernels in place of the tuned ones. None, the default, keeps the tuned size.

    Tokens, multiples of 128, but for row_parts, backward_chunk_q and the flag. Sizes are cut to the call's lengths.

    Attributes:
      block_q: queries in memory; a tile's rows are K times as many.
      block_kv: keys in memory, a multiple of block_q and of tile.
      tile: keys whose scores are computed at one time where no query needs a mask.
      unit: the same where one does, and what values are multiplied by; divides tile and block_q.
      diagonal_part: queries and keys of a step on the diagonal; divides block_q.
      row_parts: a tile's rows go through in so many parts: 1, 2, 4 or 8.
      ones_column: the row sum comes from a tile of ones beside V (matrix unit), not from adding lanes (vector unit);
        without effect where K and V have fewer than 128 lanes.
      backward_block_q, backward_block_kv: of the backward kernel: tokens per block of scores.
      backward_piece_q, backward_piece_kv: a block is computed in pieces of at most this size, unrolled.
      backward_chunk_q: blocks of queries that one call of the backward kernel holds in memory; by default as many as
        fit.

    Raises:
      ValueError: a size that is not of these, or sizes that do not divide each other.
    """

    block_q: int | None = None
    block_kv: int | None = None
    tile: int | None = None
    unit: int | None = None
    diagonal_part: int | None = None
    row_parts: int | None = None
    ones_column: bool | None = None
    backward_block_q: int | None = None
    backward_block_kv: int | None = None
    backward_piece_q: int | None = None
    backward_piece_kv: int | None = None
    backward_chunk_q: int | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if value is None or name == "ones_column":
                continue
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"block_sizes: {name}={value!r} must be a positive int, or None for the tuned size")
            if name == "row_parts" and value not in (1, 2, 4, 8):
                raise ValueError(f"block_sizes: row_parts={value} must be 1, 2, 4 or 8")
            if name not in ("row_parts", "backward_chunk_q") and value % LANES:
                raise ValueError(f"block_sizes: {name}={value} must be a multiple of {LANES}, the lanes of a register")
        self.check_divisors(vars(self))

    def check_divisors(self, sizes: dict[str, int | None]) -> None:
        """Raises where one of `sizes`, by name, must divide another and does not."""
        for small, large in _DIVIDES:
            if sizes[small] and sizes[large] and sizes[large] % sizes[small]:
                tuned = [name for name in (small, large) if getattr(self, name) is None]
                raise ValueError(
                    f"block_sizes: {small}={sizes[small]} must divide {large}={sizes[large]}"
                    + "".join(f" ({name} is the tuned size: give it too)" for name in tuned)
                )


_DIVIDES = (
    ("block_q", "block_kv"), ("tile", "block_kv"), ("unit", "tile"), ("unit", "block_q"), ("diagonal_part", "block_q"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block sizes of the forward kernel, all of them decided: see `BlockSizes`."""

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


def forward_blocks(
    generation: str,
    width: int,
    itemsize: int,
    num_slots: int,
    q_len: int,
    kv_len: int,
    given: BlockSizes = BlockSizes(),
    shrink: int = 1,
) -> Blocks:
    """The blocks of the forward kernel, given or tuned (divided by `shrink`), no larger than the lengths need.

    Raises:
      ValueError: given and tuned sizes do not divide each other.
    """
    tuned = _FORWARD.get((generation, width), _FORWARD.get((generation, 128), _FORWARD["v5e", 128]))
    rows, tuned_kv, tuned_tile, row_parts, ones_column = tuned
    most_q = given.block_q or max(LANES, rows // (num_slots * shrink) // LANES * LANES)
    most_kv, most_tile = given.block_kv or tuned_kv // shrink, given.tile or tuned_tile // shrink

    def sizes(block_q: int, most_kv: int) -> dict[str, int]:
        block_kv = round_up(most_kv, block_q)
        unit = _largest_divisor(block_q, given.unit or 512)
        return {
            "block_q": block_q,
            "block_kv": block_kv,
            "tile": max(x for x in range(unit, max(most_tile, unit) + 1, unit) if block_kv % x == 0),
            "unit": unit,
            "diagonal_part": _largest_divisor(block_q, given.diagonal_part or 256),
        }

    uncut = sizes(most_q, most_kv)
    given.check_divisors({name: getattr(given, name) or size for name, size in uncut.items()})
    return Blocks(
        **sizes(even_blocks(q_len, most_q), min(most_kv, kv_len)),
        row_parts=given.row_parts or row_parts,
        ones_column=(ones_column if given.ones_column is None else given.ones_column) and width % LANES == 0,
    )


def _largest_divisor(size: int, most: int) -> int:
    """The largest multiple of 128 up to `most` that divides `size`."""
    return max(x for x in range(LANES, max(most, LANES) + 1, LANES) if size % x == 0)


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def even_blocks(length: int, most: int) -> int:
    """The size of the fewest equal blocks of at most `most` that cover `length`, a multiple of 128."""
    tiles = -(-length // LANES)
    count = -(-tiles // (most // LANES))
    return -(-tiles // count) * LANES


def tpu_generation() -> str:
    """ "v4", "v5e", "v5p", "v6e" or "7x": of the devices that the computation is lowered for."""
    return str(pltpu.get_tpu_info().chip_version)
