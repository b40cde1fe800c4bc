"""Sizes of the kernels' blocks: tuned ones of the TPU generation from compiled schedules, clipped to S."""

import dataclasses

from jax.experimental.pallas import tpu as pltpu

from gqe_jax.rounding import ceil_div, round_up
from gqe_jax.tpu import GENERATIONS, LANES, find_generation


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """Block sizes of the `pallas_tpu` kernels in place of the tuned ones. None, the default, keeps the tuned size.

    Tokens, multiples of 128, but for backward_chunk_q and the flag. Sizes are cut to the call's lengths.

    Attributes:
      block_q: queries in memory; a tile's rows are K times as many.
      block_kv: keys in memory, a multiple of block_q and of tile.
      tile: keys whose scores are computed at one time where no query needs a mask.
      unit: the same where one does, and what values are multiplied by; divides tile and block_q.
      diagonal_part: queries and keys of a step on the diagonal; divides block_q.
      row_part: rows, K for each query, that go through a tile at one time, one part's exponentials beside another's
        scores; divides K · block_q.
      ones_row: the row sums come from rows of ones below the transposed values (matrix unit), not from adding
        probabilities (vector unit).
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
    row_part: int | None = None
    ones_row: bool | None = None
    backward_block_q: int | None = None
    backward_block_kv: int | None = None
    backward_piece_q: int | None = None
    backward_piece_kv: int | None = None
    backward_chunk_q: int | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if value is None or name == "ones_row":
                continue
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"block_sizes: {name}={value!r} must be a positive int, or None for the tuned size")
            if name != "backward_chunk_q" and value % LANES:
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
    """Holds the forward kernel's block sizes, none of them None; see `BlockSizes`."""

    block_q: int
    block_kv: int
    tile: int
    unit: int
    diagonal_part: int
    row_part: int
    ones_row: bool = False


def forward_blocks(
    generation: str,
    num_slots: int,
    q_len: int,
    kv_len: int,
    given: BlockSizes = BlockSizes(),
    *,
    bounded: bool = False,
    halvings: int = 0,
) -> Blocks:
    """Returns the blocks of the forward kernel, given or tuned, no larger than the lengths need.

    Args:
      bounded: the mask cuts blocks elsewhere than on the diagonal, so that large ones are computed, and fetched, in
        vain.
      halvings: of tuned sizes, for want of memory: of the keys in memory first, as that costs least.

    Raises:
      ValueError: given and tuned sizes do not divide each other.
    """
    tuned = GENERATIONS[generation].blocks
    rows, tuned_kv, tuned_tile, tuned_unit = tuned.rows, tuned.block_kv, tuned.tile, 512
    if bounded:
        rows, tuned_kv, tuned_tile = rows // 2, min(tuned_kv, 8192), tuned_tile // 2
        tuned_unit = tuned_tile
    shrink = 2 ** max(0, halvings - 2)
    most_q = given.block_q or max(LANES, rows // (num_slots * shrink) // LANES * LANES)
    most_kv, most_tile = given.block_kv or tuned_kv // 2**halvings, given.tile or tuned_tile // shrink
    if given.row_part and most_q * num_slots % given.row_part:
        raise ValueError(
            f"block_sizes: row_part={given.row_part} must divide the rows of a block: K={num_slots} times "
            f"block_q={most_q}" + ("" if given.block_q else " (block_q is the tuned size: give it too)")
        )

    def sizes(block_q: int, most_kv: int) -> dict[str, int]:
        block_kv = round_up(most_kv, block_q)
        unit = _largest_divisor(block_q, given.unit or tuned_unit)
        return {
            "block_q": block_q,
            "block_kv": block_kv,
            "tile": max(x for x in range(unit, max(most_tile, unit) + 1, unit) if block_kv % x == 0),
            "unit": unit,
            "diagonal_part": _largest_divisor(block_q, given.diagonal_part or tuned.diagonal_part),
            "row_part": _largest_divisor(block_q * num_slots, given.row_part or 256),
        }

    uncut = sizes(most_q, most_kv)
    given.check_divisors({name: getattr(given, name) or size for name, size in uncut.items()})
    return Blocks(
        **sizes(even_blocks(q_len, most_q), min(most_kv, kv_len)),
        ones_row=tuned.ones_row if given.ones_row is None else given.ones_row,
    )


def _largest_divisor(size: int, most: int) -> int:
    """Returns the largest multiple of 128 up to `most` that divides `size`."""
    return max(x for x in range(LANES, max(most, LANES) + 1, LANES) if size % x == 0)


def even_blocks(length: int, most: int) -> int:
    """Returns the size of the fewest equal blocks of at most `most` that cover `length`, a multiple of 128."""
    tiles = ceil_div(length, LANES)
    count = ceil_div(tiles, most // LANES)
    return ceil_div(tiles, count) * LANES


def tpu_generation() -> str:
    """Returns the name of the generation that the computation is lowered for.

    Raises:
      ValueError: it is lowered for no TPU.
      UnknownGeneration: it is lowered for one that `gqe_jax.tpu` does not know.
    """
    return find_generation(str(pltpu.get_tpu_info().chip_version)).name
