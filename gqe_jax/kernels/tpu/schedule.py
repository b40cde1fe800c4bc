"""The order in which a kernel's grid visits blocks of scores, and which of them it may leave out.

A grid step (r, c) has a block of queries and a block of keys in memory, and `BlockSchedule.block` says in closed form
which: there is no table of blocks, on the host or in scalar memory. Within a step, loops run over the keys that the
mask lets the queries see, `unit` keys at a time where the mask cuts through, several units at a time elsewhere.

Plain causal attention folds its triangle. Row i of the triangle has `row_length(i)` blocks, and rows i and n − 1 − i
have (nearly) the same number together: grid row r does row r, then row n − 1 − r, and no step is left empty.

    i = 0   ■                         r = 0   ■ ▦ ▦ ▦ ▦
    i = 1   ■ ■             →         r = 1   ■ ■ ▦ ▦ ▦
    i = 2   ▦ ▦ ▦
    i = 3   ▦ ▦ ▦ ▦

Everything else (windows, offsets, lengths, segments) has a rectangle whose row i starts at the first kv block that the
q block sees, from `kv_bounds`: four integers per q block, read from scalar memory.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from gqe_jax.kernels.kv_bounds import kv_bounds
from gqe_jax.kernels.mask import Mask
from gqe_jax.rounding import ceil_div


@dataclasses.dataclass(frozen=True)
class BlockSchedule:
    """Which blocks of a [q_len, kv_len] matrix of scores are computed, in which order.

    Attributes:
      q_len, kv_len: lengths, in tokens.
      block_q, block_kv: tokens of q and keys that a step has in memory; the last block of either may be ragged.
      unit: keys; divides block_kv and block_q. In a folded schedule block_q divides block_kv.
      folded: rows in pairs, for plain causal attention (S = T, no offset).
      bounded: the keys that a row sees come from scalar memory.
      width: steps of a rectangle's row.
    """

    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    unit: int
    folded: bool
    bounded: bool
    width: int

    @property
    def num_q_blocks(self) -> int:
        return ceil_div(self.q_len, self.block_q)

    @property
    def num_kv_blocks(self) -> int:
        return ceil_div(self.kv_len, self.block_kv)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns."""
        if not self.folded:
            return self.num_q_blocks, self.width
        last = self.num_q_blocks - 1
        rows = last // 2 + 1
        lengths = [self.row_length(i) for i in range(last + 1)]
        return rows, max(lengths[r] + (lengths[last - r] if r != last - r else 0) for r in range(rows))

    def row_length(self, i: jax.Array | int) -> jax.Array | int:
        """Blocks of row i of the causal triangle."""
        if self.num_kv_blocks == 1:
            return 1
        last = divide((i + 1) * self.block_q - 1, self.block_kv)
        return min(last + 1, self.num_kv_blocks) if isinstance(i, int) else jnp.minimum(last + 1, self.num_kv_blocks)

    def row(self, r: jax.Array, c: jax.Array) -> jax.Array:
        """Returns the q block of a step."""
        if not self.folded:
            return r
        return jnp.where(c < self.row_length(r), r, self.num_q_blocks - 1 - r)

    def block(self, r: jax.Array, c: jax.Array, bounds) -> jax.Array:
        """Returns the kv block of a step: folded rows end at the diagonal, and all begin at their first block. A step
        with
        nothing to compute has one outside the row."""
        if self.folded:
            length = self.row_length(r)
            return jnp.where((c >= length) & ~self._alone(r), c - length, c)
        return divide(bounds[0] * self.unit, self.block_kv) + c if self.bounded else c

    def fetched(self, r: jax.Array, c: jax.Array, bounds) -> jax.Array:
        """Returns the kv block that a step has in memory: its own, or for a step that computes nothing the row's
        last."""
        j = self.block(r, c, bounds)
        if self.num_kv_blocks == 1:
            return 0 * j
        if self.folded:
            return jnp.minimum(j, self.row_length(self.row(r, c)) - 1)
        if self.bounded:
            return jnp.minimum(j, divide(jnp.maximum(bounds[3] * self.unit, 1) - 1, self.block_kv))
        return j

    def is_first(self, r: jax.Array, c: jax.Array) -> jax.Array:
        """Tells whether this step is the first of a row of blocks."""
        if not self.folded:
            return c == 0
        return (c == 0) | ((c == self.row_length(r)) & ~self._alone(r))

    def is_last(self, r: jax.Array, c: jax.Array) -> jax.Array:
        """Says whether a row of blocks ends with this step."""
        if not self.folded:
            return c == self.width - 1
        length = self.row_length(r)
        second = self.row_length(self.num_q_blocks - 1 - r)
        return (c == length - 1) | ((c == length + second - 1) & ~self._alone(r))

    def units(self, i: jax.Array, j: jax.Array, bounds) -> tuple[jax.Array, ...]:
        """(first, whole_first, whole_end, end) as of `kv_bounds`, in units from the start of kv block j, within it.
        In a folded schedule without the block on the diagonal."""
        per_block = self.block_kv // self.unit
        if self.folded:
            diagonal = i * (self.block_q // self.unit)
            row = [jnp.minimum(x, diagonal) for x in bounds] if self.bounded else (0, 0, diagonal, diagonal)
        elif self.bounded:
            row = bounds
        else:
            row = 0, 0, self.kv_len // self.unit, ceil_div(self.kv_len, self.unit)
        return tuple(jnp.clip(x - j * per_block, 0, per_block) for x in row)

    def _alone(self, r: jax.Array) -> jax.Array:
        return 2 * r == self.num_q_blocks - 1


def divide(x: jax.Array | int, by: int) -> jax.Array | int:
    """floor(x / by) for x >= 0: a shift where it can be one, as the scalar unit has no division."""
    if isinstance(x, int):
        return x // by
    return lax.shift_right_logical(x, by.bit_length() - 1) if by & (by - 1) == 0 else lax.div(x, by)


def is_folded(mask, q_len: int, kv_len: int) -> bool:
    """Says whether the schedule of a `Mask`, or of its static part, a `MaskKind`, is the folded triangle."""
    return mask.causal and mask.aligned and mask.window is None and q_len == kv_len


def is_bounded(mask, q_len: int, kv_len: int) -> bool:
    """Says whether the keys that a row sees come from scalar memory."""
    cut = (mask.causal or mask.window is not None) and not is_folded(mask, q_len, kv_len)
    return cut or mask.has_segments or mask.has_length


def make_schedule(mask, q_len: int, kv_len: int, block_q: int, block_kv: int, unit: int) -> BlockSchedule:
    """Returns the schedule of a `Mask`, or of its static part, a `MaskKind`."""
    width = ceil_div(kv_len, block_kv)
    if mask.window is not None:
        keys = block_q + (mask.window - 1) * (1 if mask.causal else 2)
        width = min(width, ceil_div(keys - 1, block_kv) + 1)
    return BlockSchedule(
        q_len,
        kv_len,
        block_q,
        block_kv,
        unit,
        folded=is_folded(mask, q_len, kv_len),
        bounded=is_bounded(mask, q_len, kv_len),
        width=width,
    )


def row_bounds(mask: Mask, schedule: BlockSchedule) -> jax.Array:
    """int32 [4, B · q blocks]: `kv_bounds` of each q block of each batch row, in units."""
    starts = jnp.arange(schedule.num_q_blocks, dtype=jnp.int32) * schedule.block_q

    def one(row: Mask) -> jax.Array:
        row = jax.tree.map(lambda x: x[None], row)
        return jnp.stack(kv_bounds(row, starts, schedule.block_q, schedule.unit, schedule.kv_len))

    return jnp.moveaxis(jax.vmap(one)(mask), 0, 1).reshape(4, -1)
