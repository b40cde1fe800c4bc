"""The forward kernel: attention of the selected query heads, block by block, online softmax in base 2.

One grid step is one block of scores: R = K · block_q rows, slot-major, by block_kv keys of one KV group (of two groups
where D = 64). All scores of the block come first, then one maximum and one rescale for it, then the values chunk by
chunk: the matrix unit then never waits for a row's reduction. The row sum is kept per lane and reduced once at the end,
or comes out of P·V through a tile of ones beside V, where the matrix unit has columns to spare.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gqe_jax.kernels.mesh_axes import result
from gqe_jax.kernels.partials import EMPTY_LSE
from gqe_jax.kernels.tpu.plan import LN_2, MASKED, Plan
from gqe_jax.kernels.tpu.schedule import divide
from gqe_jax.kernels.tpu.selection import LANES, finish_queries, lane_index, selected_queries

PROLOGUE_ROWS = 512


def forward(plan: Plan, operands) -> tuple[jax.Array, jax.Array]:
    """o [B, S, G·K·D] in q's dtype, lse float32 [B, G·K, 1, S].

    operands: of `plan.operands`, as they lie in HBM.
    """
    schedule, blocks = plan.schedule, plan.blocks
    batch, groups = plan.batch, plan.groups_per_block
    rows, width = plan.num_slots * blocks.block_q, plan.width
    num_heads = plan.num_groups * plan.num_slots

    def at_q(b, g, r, c, *bounds):
        return schedule.row(r, c)

    def at_kv(b, g, r, c, *bounds):
        return schedule.fetched(r, c, plan.read_bounds(bounds, b, schedule.row(r, c)))

    def whole(*_):
        return (0, 0)

    q_lanes = groups * plan.num_experts * plan.head_dim
    o_lanes = groups * plan.num_slots * plan.head_dim
    in_specs = {
        "q": pl.BlockSpec((1, blocks.block_q, q_lanes), lambda *at: (at[0], at_q(*at), at[1])),
        "k": pl.BlockSpec((1, blocks.block_kv, width), lambda *at: (at[0], at_kv(*at), at[1])),
        "v": pl.BlockSpec((1, blocks.block_kv, width), lambda *at: (at[0], at_kv(*at), at[1])),
        "expert_index": pl.BlockSpec(
            (1, blocks.block_q, num_heads), lambda *at: (at[0], at_q(*at), 0)
        ),
        "rope": pl.BlockSpec(
            (1, blocks.block_q, 2 * width), lambda *at: (at[0] if plan.rope_batch > 1 else 0, at_q(*at), 0)
        ),
        "norm_scale": pl.BlockSpec((1, width), whole),
        "q_segments": pl.BlockSpec((1, 1, blocks.block_q), lambda *at: (at[0], 0, at_q(*at))),
        "kv_segments": pl.BlockSpec((1, 1, blocks.block_kv), lambda *at: (at[0], 0, at_kv(*at))),
    }
    names = [name for name in in_specs if name in operands]
    scratch = {
        "q": pltpu.VMEM((groups, rows, width), plan.dtype),
        "row_max": pltpu.VMEM((groups, rows, LANES), jnp.float32),
        "acc": pltpu.VMEM((groups, rows, width + (LANES if blocks.ones_column else 0)), jnp.float32),
    }
    if not blocks.ones_column:
        scratch["row_sum"] = pltpu.VMEM((groups, rows, LANES), jnp.float32)
    if "q_segments" in names:
        scratch["q_segments"] = pltpu.VMEM((blocks.block_q, LANES), jnp.int32)
    scalars = [operands[name] for name in ("bounds", "limits") if name in operands]

    def kernel(*refs):
        scalar_refs, refs = refs[: len(scalars)], refs[len(scalars) :]
        inputs = dict(zip(names, refs, strict=False))
        o_ref, lse_ref, *scratch_refs = refs[len(names) :]
        _kernel(plan, scalar_refs, inputs, o_ref, lse_ref, dict(zip(scratch, scratch_refs, strict=True)))

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, plan.num_groups // groups, *schedule.grid),
            in_specs=[in_specs[name] for name in names],
            out_specs=[
                pl.BlockSpec((1, blocks.block_q, o_lanes), lambda *at: (at[0], at_q(*at), at[1])),
                pl.BlockSpec(
                    (1, groups * plan.num_slots, 1, blocks.block_q), lambda *at: (at[0], at[1], 0, at_q(*at))
                ),
            ],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[
            result((batch, plan.padded_q_len, num_heads * plan.head_dim), plan.dtype, operands["q"]),
            result((batch, num_heads, 1, plan.padded_q_len), jnp.float32, operands["q"]),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=plan.vmem_limit_bytes,
        ),
        cost_estimate=plan.cost_estimate(num_matmuls=2),
        interpret=plan.interpret,
        name="gqe_forward",
    )(*scalars, *(operands[name] for name in names))


def _kernel(plan, scalar_refs, inputs, o_ref, lse_ref, scratch):
    b, g, r, c = (pl.program_id(axis) for axis in range(4))
    schedule, blocks = plan.schedule, plan.blocks
    i = schedule.row(r, c)
    bounds = plan.read_bounds(scalar_refs, b, i)
    j = schedule.block(r, c, bounds)
    tile = functools.partial(_tile, plan, scalar_refs, b, i, j, inputs, scratch)

    @pl.when(schedule.is_first(r, c))
    def _():
        _prologue(plan, g, inputs, scratch)
        if schedule.folded:
            _diagonal(plan, i, j, inputs, scratch)
        else:
            _start_empty(scratch)

    first, whole_first, whole_end, end = schedule.units(i, j, bounds)
    units_per_tile = blocks.tile // blocks.unit
    num_tiles = divide(whole_end - whole_first, units_per_tile)
    in_tiles = num_tiles * units_per_tile

    @pl.loop(0, num_tiles)
    def _(n):
        tile((whole_first + n * units_per_tile) * blocks.unit, blocks.tile, masked=False)

    # What is left: units that the mask cuts, and whole ones that fill no tile.
    if schedule.bounded or not schedule.folded or units_per_tile > 1:
        masked = schedule.bounded or not schedule.folded

        @pl.loop(0, end - first - in_tiles)
        def _(n):
            past_tiles = n >= whole_first - first
            tile((first + n + jnp.where(past_tiles, in_tiles, 0)) * blocks.unit, blocks.unit, masked=masked)

    @pl.when(schedule.is_last(r, c))
    def _():
        _epilogue(plan, o_ref, lse_ref, scratch)


def _prologue(plan, g, inputs, scratch):
    block_q = plan.blocks.block_q
    norm_scale = inputs["norm_scale"][...] if "norm_scale" in inputs else None
    # A few rows at a time: the compiler spreads long straight code thinly over its instructions.
    size = math.gcd(block_q, PROLOGUE_ROWS)

    @pl.loop(0, block_q // size)
    def _(n):
        start = pl.multiple_of(n * size, size)
        rows = pl.ds(start, size)
        rope = inputs["rope"][0, rows] if "rope" in inputs else None
        for p in range(plan.groups_per_block):
            for slot, raw in enumerate(selected_queries(plan, g, p, inputs, rows)):
                q = finish_queries(
                    raw, rope, norm_scale, group=p, head_dim=plan.head_dim, norm_dim=plan.norm_dim,
                    norm_eps=plan.norm_eps, factor=plan.query_factor, exact=plan.exact,
                )  # fmt: skip
                scratch["q"][p, pl.ds(slot * block_q + start, size)] = q.astype(plan.dtype)

    if "q_segments" in inputs:
        ids = jnp.broadcast_to(inputs["q_segments"][0], (LANES, block_q))
        scratch["q_segments"][...] = jnp.transpose(ids)


def _start_empty(scratch):
    scratch["row_max"][...] = jnp.full_like(scratch["row_max"], MASKED)
    for name in ("row_sum", "acc"):
        if name in scratch:
            scratch[name][...] = jnp.zeros_like(scratch[name])


def _tile(plan, scalar_refs, b, i, j, inputs, scratch, start, num_keys, *, masked):
    """Adds the scores of `num_keys` keys from `start` of the block in memory to what the rows have so far.

    The rows go through in a few parts, all of their scores first: while one part's maxima are reduced across lanes, the
    matrix unit has the next part's scores to compute.
    """
    unit = plan.blocks.unit
    starts = [pl.multiple_of(start + offset, unit) for offset in range(0, num_keys, unit)]
    size = scratch["q"].shape[1] // plan.blocks.row_parts
    parts = [
        (p, slice(at, at + size))
        for p in range(plan.groups_per_block)
        for at in range(0, scratch["q"].shape[1], size)
    ]
    if masked:
        kv_start = j * plan.blocks.block_kv + start
        seen = seen_by(plan, scalar_refs, b, i, kv_start, inputs, pl.ds(starts[0], unit), scratch)
        seen = jnp.concatenate([seen] * plan.num_slots)

    def scores_of(p, rows):
        for at in starts:
            s = _scores(plan, scratch["q"][p, rows], inputs["k"][0, pl.ds(at, unit)])
            yield jnp.where(seen[rows], s, MASKED) if masked else s

    def values():
        for at in starts:
            v = inputs["v"][0, pl.ds(at, unit)]
            yield _zero_past_end(plan, v, kv_start) if masked and plan.ragged_kv else v

    for (p, rows), scores in [(part, list(scores_of(*part))) for part in parts]:
        _add(plan, scratch, p, rows, scores, values(), first=False)


def _diagonal(plan, i, j, inputs, scratch):
    """The block of keys at the queries' own positions: what each row begins with.

    Part h of the queries sees the parts of the keys before h whole, and part h up to the diagonal.
    """
    block_q, part = plan.blocks.block_q, plan.blocks.diagonal_part
    start = i * block_q - j * plan.blocks.block_kv
    starts = [pl.multiple_of(start + at, part) for at in range(0, block_q, part)]
    triangle = lane_index((part, part)) <= lax.broadcasted_iota(jnp.int32, (part, part), 0)

    def scores_of(p, h, rows):
        for n, at in enumerate(starts[: h + 1]):
            s = _scores(plan, scratch["q"][p, rows], inputs["k"][0, pl.ds(at, part)])
            conditions = [triangle] if n == h else []
            if plan.mask.has_segments:
                q_ids = scratch["q_segments"][h * part : (h + 1) * part]
                kv_ids = inputs["kv_segments"][0, :, pl.ds(at, part)]
                conditions.append(_same_segment(q_ids, kv_ids, part))
            yield jnp.where(functools.reduce(jnp.logical_and, conditions), s, MASKED) if conditions else s

    def values(h):
        for n, at in enumerate(starts[: h + 1]):
            v = inputs["v"][0, pl.ds(at, part)]
            yield _zero_past_end(plan, v, i * block_q + n * part) if plan.kv_len % block_q else v

    parts = [
        (p, h, slice(slot * block_q + h * part, slot * block_q + (h + 1) * part))
        for p in range(plan.groups_per_block)
        for slot in range(plan.num_slots)
        for h in range(len(starts))
    ]
    for (p, h, rows), scores in [(part, list(scores_of(*part))) for part in parts]:
        _add(plan, scratch, p, rows, scores, values(h), first=True)


def _scores(plan, q, k):
    s = _dot(plan, q, k, contract=(1, 1))
    return s if plan.softcap is None else jnp.tanh(s) * plan.cap_factor


def _add(plan, scratch, p, rows, scores, values, *, first):
    """One step of the online softmax for some rows of group p: scores float32 [rows, keys] and values [keys, W], in
    pieces. `first`: the rows have nothing yet."""
    highest = functools.reduce(jnp.maximum, [piece for s in scores for piece in _lane_tiles(s)])
    row_max = jnp.broadcast_to(jnp.max(highest, axis=1, keepdims=True), highest.shape)
    if not first:
        before = scratch["row_max"][p, rows]
        row_max = jnp.maximum(before, row_max)
        decay = jnp.exp2(before - row_max)
    row_sum, acc = 0.0, 0.0
    for s, v in zip(scores, values, strict=True):
        probs = jnp.exp2(s - _repeat_lanes(row_max, s.shape[1]))
        if plan.blocks.ones_column:
            v = jnp.concatenate([v, jnp.ones((v.shape[0], LANES), v.dtype)], axis=1)
        else:
            row_sum += functools.reduce(jnp.add, _lane_tiles(probs))
        acc += _dot(plan, probs.astype(plan.dtype), v, contract=(1, 0))
    scratch["row_max"][p, rows] = row_max
    scratch["acc"][p, rows] = acc if first else scratch["acc"][p, rows] * _repeat_lanes(decay, acc.shape[1]) + acc
    if not plan.blocks.ones_column:
        scratch["row_sum"][p, rows] = row_sum if first else scratch["row_sum"][p, rows] * decay + row_sum


def _epilogue(plan, o_ref, lse_ref, scratch):
    block_q, width = plan.blocks.block_q, plan.width
    heads = []
    for p in range(plan.groups_per_block):
        acc, row_max = scratch["acc"][p], scratch["row_max"][p]
        if plan.blocks.ones_column:
            row_sum = acc[:, width:]
        else:
            row_sum = jnp.broadcast_to(jnp.sum(scratch["row_sum"][p], axis=1, keepdims=True), row_max.shape)
        seen = row_max > 0.5 * MASKED
        o = jnp.where(_repeat_lanes(seen, width), acc[:, :width] / _repeat_lanes(row_sum, width), 0.0)
        lse = jnp.where(seen, (row_max + jnp.log2(row_sum)) * LN_2, EMPTY_LSE)
        for slot in range(plan.num_slots):
            rows = slice(slot * block_q, (slot + 1) * block_q)
            heads.append(o[rows])
            lse_ref[0, p * plan.num_slots + slot] = jnp.transpose(lse[rows])[:1]
    o_ref[0] = _join_heads(plan, heads).astype(o_ref.dtype)


def _join_heads(plan, heads):
    """[block_q, W] of each (group, slot), each in its group's lanes → [block_q, groups · K · D]."""
    if plan.head_dim == plan.width:
        return heads[0] if len(heads) == 1 else jnp.concatenate(heads, axis=1)
    half = lax.broadcasted_iota(jnp.int32, heads[0].shape, 1) < plan.head_dim
    in_place = []
    for position, head in enumerate(heads):
        group = position // plan.num_slots
        in_place.append(head if position % 2 == group else pltpu.roll(head, plan.head_dim, 1))
    pairs = [jnp.where(half, a, b) for a, b in zip(in_place[::2], in_place[1::2], strict=True)]
    return pairs[0] if len(pairs) == 1 else jnp.concatenate(pairs, axis=1)


def seen_by(plan, scalar_refs, b, i, kv_start, inputs, keys, scratch):
    """bool [block_q, unit]: which of the unit's keys each query of the block sees."""
    mask = plan.mask
    shape = plan.blocks.block_q, plan.blocks.unit
    shift, kv_end = plan.read_limits(scalar_refs, b)
    row, key = lax.broadcasted_iota(jnp.int32, shape, 0), lane_index(shape)
    conditions = []
    # The key on the diagonal of a row, counted from kv_start.
    diagonal = row + (i * plan.blocks.block_q + shift - kv_start)
    if mask.causal:
        conditions.append(key <= diagonal)
    if mask.window is not None:
        conditions.append(key > diagonal - mask.window)
        if not mask.causal:
            conditions.append(key < diagonal + mask.window)
    if plan.ends_within_unit or mask.has_length:
        conditions.append(key < kv_end - kv_start)
    if mask.has_segments:
        conditions.append(_same_segment(scratch["q_segments"][...], inputs["kv_segments"][0, :, keys], shape[1]))
    return functools.reduce(jnp.logical_and, conditions) if conditions else jnp.ones(shape, bool)


def _same_segment(q_ids, kv_ids, num_keys):
    q_ids = _repeat_lanes(q_ids, num_keys)
    return (q_ids == kv_ids) & (q_ids != 0)


def _zero_past_end(plan, v, kv_start):
    """A ragged block's rows past the array's end hold anything, NaN included, and 0 · NaN is NaN."""
    return jnp.where(lax.broadcasted_iota(jnp.int32, v.shape, 0) < plan.kv_len - kv_start, v, jnp.zeros_like(v))


def _dot(plan, a, b, *, contract):
    precision = lax.Precision.HIGHEST if plan.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _lane_tiles(x):
    return [x[:, start : start + LANES] for start in range(0, x.shape[1], LANES)]


def _repeat_lanes(x, width):
    """[rows, 128], the same in every lane → [rows, width]."""
    return x[:, :width] if width <= LANES else jnp.tile(x, (1, width // LANES))
