"""What one step of the forward kernel's grid does: see `forward.py` for the whole.

Scores are transposed, [keys, rows]: a row's maximum and sum are then taken over whole registers and lie along the
lanes, and probabilities are the stationary side of the matmul with the values, for which the matrix unit needs
D columns of V instead of all rows (half as many cycles as the other way round, where it is 256 wide).

Tiles without a mask are software pipelined by parts of the rows: while one part's probabilities are formed and
multiplied with the values, the matrix unit has the scores of the part after the next to compute.
"""

import functools
import itertools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from gqe_jax.kernels.partials import EMPTY_LSE
from gqe_jax.kernels.tpu.plan import LN_2, MASKED, NO_MAX
from gqe_jax.kernels.tpu.schedule import divide
from gqe_jax.kernels.tpu.selection import finish_queries, selected_queries
from gqe_jax.kernels.tpu.tiles import dot, finite, lane_index, mark_not_finite
from gqe_jax.tpu import LANES, SUBLANES

PROLOGUE_ROWS = 512
"""Queries that are selected, normed and rotated at one time: the compiler spreads longer code thinly."""
ONES_ROWS = 16
"""Rows of ones below the transposed values, for sums of probabilities in the matrix unit: one tile of bfloat16."""
CHUNK = 256
"""Keys of a tile whose scores are computed, or probabilities multiplied, at one time."""
PARTS_AHEAD = 3
"""Where scores stay in registers: parts of the rows that have theirs before the first is added."""


class ForwardStep:
    """One step of the forward kernel's grid, by the references to its scalars, windows and scratch.

    Rows are those of all groups of the block, slot-major: row (p · K + slot) · block_q + query.
    """

    def __init__(self, plan, scalars, inputs, o_ref, lse_ref, scratch):
        self.plan, self.blocks, self.schedule = plan, plan.blocks, plan.schedule
        self.scalars, self.inputs, self.scratch = scalars, inputs, scratch
        self.o_ref, self.lse_ref = o_ref, lse_ref
        self.b, self.g, r, c = (pl.program_id(axis) for axis in range(4))
        self.is_first, self.is_last = self.schedule.is_first(r, c), self.schedule.is_last(r, c)
        self.i = self.schedule.row(r, c)
        self.bounds = plan.read_bounds(scalars, self.b, self.i)
        self.j = self.schedule.block(r, c, self.bounds)
        rows = plan.num_slots * self.blocks.block_q
        size = self.blocks.row_part
        # (group, rows) of each part.
        self.parts = [
            (p, slice(p * rows + at, p * rows + at + size))
            for p in range(plan.groups_per_block)
            for at in range(0, rows, size)
        ]

    def run(self):
        schedule, unit = self.schedule, self.blocks.unit

        @pl.when(self.is_first)
        def _():
            self.prologue()
            self.start_empty()

        first, whole_first, whole_end, end = schedule.units(self.i, self.j, self.bounds)
        units_per_tile = self.blocks.tile // unit
        num_tiles = divide(whole_end - whole_first, units_per_tile) if len(self.parts) > 1 else 0
        in_tiles = num_tiles * units_per_tile

        # What fills no tile: units that the mask cuts, and whole ones.
        masked = schedule.bounded or not schedule.folded
        if masked or self.blocks.block_q % self.blocks.tile or len(self.parts) == 1:

            @pl.loop(0, end - first - in_tiles)
            def _(n):
                past_tiles = n >= whole_first - first
                self.one_unit((first + n + jnp.where(past_tiles, in_tiles, 0)) * unit, masked)

        if len(self.parts) > 1:
            self.tiles(whole_first * unit, num_tiles)
        elif schedule.folded:
            pl.when(self.is_last)(lambda: self.diagonal(None))

        @pl.when(self.is_last)
        def _():
            self.epilogue()

    # --- queries ------------------------------------------------------------------------------------------------------

    def prologue(self):
        plan, inputs, block_q = self.plan, self.inputs, self.blocks.block_q
        norm_scale = inputs["norm_scale"][...] if "norm_scale" in inputs else None
        size = math.gcd(block_q, PROLOGUE_ROWS)

        @pl.loop(0, block_q // size)
        def _(n):
            start = pl.multiple_of(n * size, size)
            rows = pl.ds(start, size)
            rope = inputs["rope"][0, rows] if "rope" in inputs else None
            for p in range(plan.groups_per_block):
                for slot, raw in enumerate(selected_queries(plan, self.g, p, inputs, rows)):
                    q = finish_queries(
                        raw, rope, norm_scale, group=p, head_dim=plan.head_dim, norm_dim=plan.norm_dim,
                        norm_eps=plan.norm_eps, factor=plan.query_factor, exact=plan.exact,
                    )  # fmt: skip
                    self.scratch["q"][pl.ds((p * plan.num_slots + slot) * block_q + start, size)] = q.astype(plan.dtype)

    def start_empty(self):
        for name, value in (("row_max", NO_MAX), ("row_sum", 0.0), ("acc", 0.0)):
            if name in self.scratch:
                self.scratch[name][...] = jnp.full_like(self.scratch[name], value)

    def epilogue(self):
        plan, scratch, block_q = self.plan, self.scratch, self.blocks.block_q
        if self.blocks.ones_row:
            row_sum = scratch["acc"][plan.head_dim : plan.head_dim + 1]
        else:
            row_sum = jnp.sum(scratch["row_sum"][...], axis=0, keepdims=True)
        row_max = scratch["row_max"][...]
        saw_none = row_max <= NO_MAX  # false for NaN, which is not to be hidden
        inverse = jnp.where(saw_none, 0.0, 1.0 / row_sum)
        lse = jnp.where(saw_none, EMPTY_LSE, (row_max + jnp.log2(row_sum)) * LN_2)
        heads = []
        for n in range(plan.groups_per_block * plan.num_slots):
            rows = slice(n * block_q, (n + 1) * block_q)
            heads.append((scratch["acc"][: plan.head_dim, rows] * inverse[:, rows]).astype(plan.dtype))
            self.lse_ref[0, n] = lse[:, rows]
        self.o_ref[0] = jnp.concatenate(heads, axis=0).T

    # --- tiles without a mask -----------------------------------------------------------------------------------------

    def tiles(self, start, num_tiles):
        """Adds `num_tiles` tiles of keys from `start` of the block in memory, and the block on the diagonal."""
        tile = self.blocks.tile

        def at(n):
            return pl.multiple_of(start + n * tile, self.blocks.unit)

        @pl.when(num_tiles > 0)
        def _():
            for part in self.parts[:2]:
                for chunk in self.chunks:
                    self.form_scores(part, at(0), chunk)
            first = self.parts[0]
            self.raise_max(first, functools.reduce(jnp.maximum, [self.highest(first, chunk) for chunk in self.chunks]))

            @pl.loop(0, num_tiles - 1)
            def _(n):
                self.tile(at(n), at(n + 1))

        last = at(num_tiles - 1)
        if not self.schedule.folded:
            pl.when(num_tiles > 0)(lambda: self.tile(last, None))
            return
        pl.when((num_tiles > 0) & self.is_last)(lambda: self.diagonal(last))
        pl.when((num_tiles == 0) & self.is_last)(lambda: self.diagonal(None))
        if self.schedule.num_kv_blocks > 1:
            pl.when((num_tiles > 0) & jnp.logical_not(self.is_last))(lambda: self.tile(last, None))

    @property
    def chunks(self):
        size = math.gcd(self.blocks.tile, CHUNK)
        return [slice(start, start + size) for start in range(0, self.blocks.tile, size)]

    def tile(self, at, next_at, beside=()):
        """Adds the tile at `at`, where the first two parts have their scores and the first has its maxima, and gives
        the next tile the same. `beside`: work for the matrix unit where there is none."""
        count, beside = len(self.parts), list(beside)
        for n, part in enumerate(self.parts):
            after, second = self.parts[(n + 1) % count], self.parts[(n + 2) % count]
            scored_at = at if n + 2 < count else next_at
            if scored_at is None:
                ahead, beside = beside[: len(beside) // (count - n)], beside[len(beside) // (count - n) :]
            else:
                ahead = [functools.partial(self.form_scores, second, scored_at, chunk) for chunk in self.chunks]
            has_after = n + 1 < count or next_at is not None
            self.part(part, at, load_values=n == 0, ahead=ahead, after=after if has_after else None)

    def part(self, part, at, *, load_values, ahead, after):
        """Adds the tile to one part of the rows; `ahead`: work to spread over it; `after`: the part that needs its
        maxima next, if any; `load_values`: transpose the tile's values first."""
        scratch, (p, rows) = self.scratch, part
        chunks = self.chunks
        row_max, decay = scratch["row_max"][:, rows], scratch["decay"][:, rows]
        row_sum, acc, highest = 0.0, 0.0, []

        def transpose_values(chunk):
            v = self.inputs["v"][0, pl.ds(pl.multiple_of(at + chunk.start, LANES), chunk.stop - chunk.start)]
            scratch["v_transposed"][:, chunk] = v.T

        def probabilities(chunk):
            return jnp.exp2(scratch["scores"][chunk, rows] - row_max)

        if load_values:
            for chunk in chunks[:2]:
                transpose_values(chunk)
        probs = probabilities(chunks[0])
        for n, chunk in enumerate(chunks):
            next_probs = probabilities(chunks[n + 1]) if n + 1 < len(chunks) else None
            _run(ahead[len(ahead) * n // len(chunks) : len(ahead) * (n + 1) // len(chunks)])
            if after is not None:
                highest.append(self.highest(after, chunk))
            if load_values and n + 2 < len(chunks):
                transpose_values(chunks[n + 2])
            if not self.blocks.ones_row:
                row_sum += _over_sublanes(jnp.add, probs)
            acc += self.times_values(p, scratch["v_transposed"][self.own(p), chunk], probs)
            probs = next_probs
        if after is not None:
            self.raise_max(after, functools.reduce(jnp.maximum, highest))
        self.accumulate(rows, decay, acc, row_sum)

    def form_scores(self, part, at, chunk):
        _, rows = part
        k = self.inputs["k"][0, pl.ds(pl.multiple_of(at + chunk.start, LANES), chunk.stop - chunk.start)]
        self.scratch["scores"][chunk, rows] = self.scores(k, rows)

    def highest(self, part, chunk):
        return _over_sublanes(jnp.maximum, self.scratch["scores"][chunk, part[1]])

    def raise_max(self, part, highest):
        """Returns the rows' maxima with `highest` [8, rows], and what everything that they have so far is to be
        multiplied
        with."""
        _, rows = part
        before = self.scratch["row_max"][:, rows]
        row_max = jnp.maximum(before, jnp.max(highest, axis=0, keepdims=True))
        self.scratch["row_max"][:, rows] = row_max
        self.scratch["decay"][:, rows] = jnp.exp2(before - row_max)

    # --- units that the mask cuts, and the block on the diagonal ------------------------------------------------------

    def one_unit(self, start, masked):
        plan, unit = self.plan, self.blocks.unit
        start = pl.multiple_of(start, unit)
        kv_start = self.j * self.blocks.block_kv + start
        k, v = (self.inputs[name][0, pl.ds(start, unit)] for name in "kv")
        if masked:
            seen = self.seen(kv_start, pl.ds(start, unit))
            seen = jnp.concatenate([seen] * (plan.groups_per_block * plan.num_slots), axis=1)
            if plan.has_hidden_keys(unit):
                k, v = mark_not_finite(k, v), finite(v)
        self.scratch["v_transposed"][:, :unit] = v.T

        def scores(rows):
            s = self.scores(k, rows)
            return jnp.where(seen[:, rows], s, MASKED) if masked else s

        waiting = [(part, scores(part[1])) for part in self.parts[:PARTS_AHEAD]]
        for n in range(len(self.parts)):
            waiting += [(part, scores(part[1])) for part in self.parts[n + PARTS_AHEAD : n + PARTS_AHEAD + 1]]
            part, s = waiting.pop(0)
            self.add(part, [s], [self.scratch["v_transposed"][:, :unit]])

    def diagonal(self, last_tile):
        """Returns the block of keys at the queries' own positions, beside the tile at `last_tile` (None: there is
        none).

        Part h of the queries sees the parts of the keys before h whole, and part h up to the diagonal.
        """
        plan, block_q, size = self.plan, self.blocks.block_q, self.blocks.diagonal_part
        start = self.i * block_q - self.j * self.blocks.block_kv
        hidden_keys = plan.has_hidden_keys(block_q)
        keys = [pl.ds(pl.multiple_of(start + at, size), size) for at in range(0, block_q, size)]
        triangle = lax.broadcasted_iota(jnp.int32, (size, size), 0) <= lane_index((size, size))
        parts = [
            (h, (head // plan.num_slots, slice(head * block_q + h * size, head * block_q + (h + 1) * size)))
            for head in range(plan.groups_per_block * plan.num_slots)
            for h in range(len(keys))
        ]
        scores, values = [[] for _ in parts], []

        def transpose_values(n):
            at = slice(self.blocks.tile + n * size, self.blocks.tile + (n + 1) * size)
            v = self.inputs["v"][0, keys[n]]
            self.scratch["v_transposed"][:, at] = (finite(v) if hidden_keys else v).T
            values.append(at)

        def form_scores(place, n):
            h, (_, rows) = parts[place]
            conditions = [triangle] if n == h else []
            if plan.mask.has_length:
                _, kv_end = plan.read_limits(self.scalars, self.b)
                key = lax.broadcasted_iota(jnp.int32, (size, size), 0)
                conditions.append(key < kv_end - (self.i * block_q + n * size))
            if plan.mask.has_segments:
                conditions.append(self.same_segment(slice(h * size, (h + 1) * size), keys[n]))
            k = self.inputs["k"][0, keys[n]]
            s = self.scores(mark_not_finite(k, self.inputs["v"][0, keys[n]]) if hidden_keys else k, rows)
            scores[place].append(
                jnp.where(functools.reduce(jnp.logical_and, conditions), s, MASKED) if conditions else s
            )

        def add(place):
            h, part = parts[place]
            self.add(part, scores[place], [self.scratch["v_transposed"][:, at] for at in values[: h + 1]])

        transposes = [functools.partial(transpose_values, n) for n in range(len(keys))]
        work = [[functools.partial(form_scores, place, n) for n in range(h + 1)] for place, (h, _) in enumerate(parts)]
        before = [*transposes, *itertools.chain.from_iterable(work[:PARTS_AHEAD])]
        if last_tile is None:
            _run(before)
        else:
            self.tile(last_tile, None, beside=before)
        for place in range(len(parts)):
            _run(itertools.chain.from_iterable(work[place + PARTS_AHEAD : place + PARTS_AHEAD + 1]))
            add(place)

    def add(self, part, scores, values):
        """Returns one step of the online softmax for some rows of a group: scores float32 [keys, rows] and values [W,
        keys], in
        pieces."""
        scratch, (p, rows) = self.scratch, part
        self.raise_max(part, functools.reduce(jnp.maximum, [_over_sublanes(jnp.maximum, s) for s in scores]))
        row_max, decay = scratch["row_max"][:, rows], scratch["decay"][:, rows]
        row_sum, acc = 0.0, 0.0
        for s, v in zip(scores, values, strict=True):
            probs = jnp.exp2(s - row_max)
            if not self.blocks.ones_row:
                row_sum += _over_sublanes(jnp.add, probs)
            acc += self.times_values(p, v[self.own(p)], probs)
        self.accumulate(rows, decay, acc, row_sum)

    def accumulate(self, rows, decay, acc, row_sum):
        scratch = self.scratch
        scratch["acc"][:, rows] = scratch["acc"][:, rows] * decay + acc
        if not self.blocks.ones_row:
            scratch["row_sum"][:, rows] = scratch["row_sum"][:, rows] * decay + row_sum

    # --- matmuls and masks --------------------------------------------------------------------------------------------

    def scores(self, k, rows):
        """[keys, rows], capped, in base 2."""
        s = dot(k, self.scratch["q"][rows], contract=(1, 1), exact=self.plan.exact)
        return s if self.plan.softcap is None else jnp.tanh(s) * self.plan.cap_factor

    def times_values(self, p, values, probs):
        """[D, keys] times [keys, rows], and the sums of probabilities below."""
        if self.blocks.ones_row:
            values = jnp.concatenate([values, jnp.ones((ONES_ROWS, values.shape[1]), values.dtype)], axis=0)
        return dot(values, probs.astype(self.plan.dtype), contract=(1, 0), exact=self.plan.exact)

    def own(self, p):
        """Returns the rows of transposed values that belong to group p."""
        return slice(p * self.plan.head_dim, (p + 1) * self.plan.head_dim)

    def seen(self, kv_start, keys):
        """bool [unit, block_q]: which queries of the block see each of the unit's keys."""
        plan, mask = self.plan, self.plan.mask
        shape = self.blocks.unit, self.blocks.block_q
        shift, kv_end = plan.read_limits(self.scalars, self.b)
        key, query = lax.broadcasted_iota(jnp.int32, shape, 0), lane_index(shape)
        conditions = []
        # Query position − key position, and its range: one comparison, as unsigned numbers, says both ends.
        distance = query - key + (self.i * self.blocks.block_q + shift - kv_start)
        if mask.window is not None:
            lowest = 0 if mask.causal else 1 - mask.window
            conditions.append(
                lax.bitcast_convert_type(distance - lowest, jnp.uint32) < jnp.uint32(mask.window - lowest)
            )
        elif mask.causal:
            conditions.append(distance >= 0)
        if plan.ends_within_unit or mask.has_length:
            conditions.append(key < kv_end - kv_start)
        if mask.has_segments:
            conditions.append(self.same_segment(slice(None), keys))
        return functools.reduce(jnp.logical_and, conditions) if conditions else jnp.ones(shape, bool)

    def same_segment(self, queries, keys):
        """bool [keys, queries]."""
        q_ids, kv_ids = self.inputs["q_segments"][0, :, queries], self.inputs["kv_segments"][0, :, keys]
        kv_ids = jnp.broadcast_to(kv_ids, (q_ids.shape[1], kv_ids.shape[1])).T
        return (kv_ids == q_ids) & (kv_ids != 0)


def _run(pieces):
    for piece in pieces:
        piece()


def _over_sublanes(function, x):
    """Reduces [keys, rows] to [8, rows]; the rest of the reduction is within registers."""
    pieces = [x[start : start + SUBLANES] for start in range(0, x.shape[0], SUBLANES)]
    return functools.reduce(function, pieces)
