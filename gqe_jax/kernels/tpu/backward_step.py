"""What one step of the backward kernel's grid does: see `backward.py` for the whole."""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from gqe_jax.kernels.partials import EMPTY_LSE
from gqe_jax.kernels.tpu.plan import LOG2_E, MASKED
from gqe_jax.kernels.tpu.selection import column, finish_queries, selected_queries
from gqe_jax.kernels.tpu.selection_gradient import scatter_heads, unfinish_queries
from gqe_jax.kernels.tpu.tiles import dot, finite, lane_index
from gqe_jax.tpu import LANES

NEVER = -MASKED
"""A log-sum-exp of rows whose probabilities are to be 0 whatever their scores."""
PART = 512
"""Queries that go through the prologue or epilogue at one time: their values stay in registers, latencies overlap."""


class BackwardStep:
    """One step of the grid of a `backward.BackwardCall`, by the references to its windows and its scratch."""

    def __init__(self, call, scalars, inputs, outputs, scratch):
        self.call, self.plan, self.blocks = call, call.plan, call.blocks
        self.chunk_ref, self.bounds_ref, *self.limits_ref = scalars
        self.inputs, self.outputs, self.scratch = inputs, outputs, scratch
        self.b, self.g, self.t = (pl.program_id(axis) for axis in range(3))
        self.first_q_block = self.chunk_ref[0] * self.blocks.chunk_q
        plan = self.plan
        self.heads = [(p, slot) for slot in range(plan.num_slots) for p in range(plan.groups_per_block)]
        self.lanes = [slice(p * plan.head_dim, (p + 1) * plan.head_dim) for p in range(plan.groups_per_block)]

    def run(self):
        t, chunk_q, last_steps = self.t, self.blocks.chunk_q, self.blocks.chunk_q + self.call.num_kv_blocks
        # The last chunk may have fewer q blocks than the others.
        in_chunk = jnp.minimum(chunk_q, self.call.num_q_blocks - self.first_q_block)

        @pl.when(t < in_chunk)
        def _():
            self.prologue(t)

        @pl.when((chunk_q <= t) & (t < last_steps))
        def _():
            self.kv_block(t - chunk_q, in_chunk)

        @pl.when((last_steps <= t) & (t < last_steps + in_chunk))
        def _():
            self.epilogue(t - last_steps)

        if self.call.has_norm:

            @pl.when(t == 0)
            def _():
                self.outputs[3][...] = jnp.zeros_like(self.outputs[3])

    # --- q blocks: before ---------------------------------------------------------------------------------------------

    def prologue(self, i):
        plan, scratch = self.plan, self.scratch
        self.over_parts(functools.partial(self.prologue_part, i))
        scratch["dq"][i] = jnp.zeros_like(scratch["dq"][i])
        if plan.mask.has_segments:
            scratch["q_segments"][i] = self.inputs["q_segments"][0]

    def over_parts(self, function):
        size = math.gcd(self.blocks.block_q, PART)

        @pl.loop(0, self.blocks.block_q // size)
        def _(n):
            function(pl.ds(pl.multiple_of(n * size, size), size))

    def prologue_part(self, i, part):
        plan, scratch = self.plan, self.scratch
        finished = [
            [
                finish_queries(raw, **self.selection_inputs(part), group=p, factor=plan.query_factor, exact=plan.exact)
                for raw in selected_queries(plan, self.g, p, self.inputs, part)
            ]
            for p in range(plan.groups_per_block)
        ]
        sees = self.sees(i, part)

        def of_those(x):
            return x if sees is None else jnp.where(sees, x, 0.0)

        for slot in range(plan.num_slots):
            q = functools.reduce(jnp.add, [of_group[slot] for of_group in finished])
            scratch["q"][i, slot, :, part] = of_those(q.T).astype(plan.dtype)
        o_transposed, do_transposed = (self.inputs[name][0, part].astype(jnp.float32).T for name in ("o", "do"))
        for n, (p, slot) in enumerate(self.heads):
            head = p * plan.num_slots + slot
            rows = slice(head * plan.head_dim, (head + 1) * plan.head_dim)
            do = of_those(do_transposed[rows])
            scratch["do"][i, slot, self.lanes[p], part] = do.astype(plan.dtype)
            lse, dlse = (of_those(self.inputs[name][0, head, :, part]) for name in ("lse", "dlse"))
            scratch["rows"][i, n : n + 1, part] = lse * LOG2_E if sees is None else jnp.where(sees, lse * LOG2_E, NEVER)
            delta = jnp.sum(of_those(o_transposed[rows]) * do, axis=0, keepdims=True) - dlse
            scratch["rows"][i, len(self.heads) + n : len(self.heads) + n + 1, part] = delta

    def sees(self, i, part):
        """bool [1, queries]: which queries of a part of q block i exist and see a key; None where all do. Of the others
        memory may hold anything."""
        if not self.call.blind_queries:
            return None
        lse = self.inputs["lse"][0, 0, :, part]
        query = (self.first_q_block + i) * self.blocks.block_q + part.start + lane_index(lse.shape)
        return (query < self.plan.q_len) & jnp.logical_not(lse <= 0.5 * EMPTY_LSE)  # a NaN is not to be hidden

    def selection_inputs(self, part):
        plan, inputs = self.plan, self.inputs
        return dict(
            rope=inputs["rope"][0, part] if "rope" in inputs else None,
            norm_scale=inputs["norm_scale"][...] if "norm_scale" in inputs else None,
            head_dim=plan.head_dim,
            norm_dim=plan.norm_dim,
            norm_eps=plan.norm_eps,
        )

    # --- kv blocks ----------------------------------------------------------------------------------------------------

    def kv_block(self, j, in_chunk):
        plan, blocks, scratch = self.plan, self.blocks, self.scratch
        k = self.inputs["k"][0]
        scratch["k_transposed"][...] = (finite(k) if self.call.hidden_keys else k).T
        scratch["dk"][...] = jnp.zeros_like(scratch["dk"])
        scratch["dv"][...] = jnp.zeros_like(scratch["dv"])
        if plan.mask.has_segments:
            ids = jnp.broadcast_to(self.inputs["kv_segments"][0], (LANES, blocks.block_kv))
            scratch["kv_segments"][...] = ids.T

        at, stride = self.b * self.call.num_kv_blocks + j, plan.batch * self.call.num_kv_blocks
        first, whole_first, whole_end, end = (
            jnp.clip(self.bounds_ref[n * stride + at] - self.first_q_block, 0, in_chunk) for n in range(4)
        )
        shift, _ = plan.read_limits(self.limits_ref, self.b)
        whole, cut, diagonal = self.pieces()

        def block(i, carry):
            is_whole = (whole_first <= i) & (i < whole_end)
            # The query on the diagonal of the block's first key, from the block's first query.
            on_diagonal = (self.first_q_block + i) * blocks.block_q + shift == j * blocks.block_kv
            on_diagonal &= bool(diagonal)

            @pl.when(is_whole)
            def _():
                self.block(i, j, shift, whole)

            if diagonal:

                @pl.when(on_diagonal)
                def _():
                    self.block(i, j, shift, diagonal)

            @pl.when(jnp.logical_not(is_whole | on_diagonal))
            def _():
                self.block(i, j, shift, cut)

            return carry

        lax.fori_loop(first, end, block, 0)
        # dk comes from queries that have the score's factor in them.
        dk_factor = plan.scale / plan.query_factor
        for n, (name, factor) in enumerate((("dk", dk_factor), ("dv", 1.0))):
            total = scratch[name][...].T * factor
            if self.call.num_chunks > 1:
                total += self.inputs[f"{name}_sum"][0]
            out = self.outputs[1 + n]
            out[0] = total.astype(out.dtype)

    def pieces(self):
        """(keys, queries, masked) of each part of a block: of one without a mask, with it, and on the diagonal."""
        blocks, mask = self.blocks, self.plan.mask
        keys = _split(blocks.block_kv, blocks.piece_kv)
        pairs = [(key, query) for query in _split(blocks.block_q, blocks.piece_q) for key in keys]
        whole, cut = [(*pair, False) for pair in pairs], [(*pair, True) for pair in pairs]
        if not mask.causal:
            return whole, cut, []
        cut_elsewhere = mask.window is not None or mask.has_segments or mask.has_length or self.call.cuts_kv
        cut_elsewhere |= self.call.cuts_q
        diagonal = [
            (key, query, cut_elsewhere or key.stop > query.start + 1) for key, query in pairs if key.start < query.stop
        ]
        return whole, cut, diagonal

    def block(self, i, j, shift, pieces):
        plan, scratch = self.plan, self.scratch
        product = functools.partial(dot, exact=plan.exact)
        for keys, queries, masked in pieces:
            seen = self.seen(i, j, shift, keys, queries) if masked else None
            k, v = self.inputs["k"][0, keys], self.inputs["v"][0, keys]
            for n, (p, slot) in enumerate(self.heads):
                own = self.lanes[p]
                q, do = scratch["q"][i, slot, own, queries], scratch["do"][i, slot, own, queries]
                lse2, delta = (scratch["rows"][i, m : m + 1, queries] for m in (n, len(self.heads) + n))
                s = product(k, self.in_lanes(q, p), contract=(1, 0))
                slope = None
                if plan.softcap is not None:
                    tanh = jnp.tanh(s)
                    s, slope = tanh * plan.cap_factor, 1.0 - tanh * tanh
                if seen is not None:
                    s = jnp.where(seen, s, MASKED)
                probs = jnp.exp2(s - lse2)
                ds = probs * (product(v, self.in_lanes(do, p), contract=(1, 0)) - delta)
                ds = ds if slope is None else ds * slope
                if seen is not None and self.call.hidden_keys:  # v · do may be NaN
                    ds = jnp.where(seen, ds, 0.0)
                ds = ds.astype(plan.dtype)
                probs = probs.astype(plan.dtype)
                scratch["dv"][own, keys] += product(do, probs, contract=(1, 1))
                scratch["dk"][own, keys] += product(q, ds, contract=(1, 1))
                scratch["dq"][i, slot, own, queries] += product(scratch["k_transposed"][own, keys], ds, contract=(1, 0))

    def in_lanes(self, x, p):
        """[D, R] → [W, R], zeros for the block's other group: its lanes of K and V then count for nothing."""
        if self.plan.groups_per_block == 1:
            return x
        zeros = jnp.zeros_like(x)
        return jnp.concatenate([zeros] * p + [x] + [zeros] * (self.plan.groups_per_block - 1 - p), axis=0)

    def seen(self, i, j, shift, keys, queries):
        """bool [keys, queries]: which keys of a piece each of its queries sees."""
        plan, mask = self.plan, self.plan.mask
        shape = keys.stop - keys.start, queries.stop - queries.start
        kv_start = j * self.blocks.block_kv + keys.start
        key, query = lax.broadcasted_iota(jnp.int32, shape, 0), lax.broadcasted_iota(jnp.int32, shape, 1)
        conditions = []
        # query position − key position = query − key + origin
        origin = (self.first_q_block + i) * self.blocks.block_q + queries.start + shift - kv_start
        if mask.causal:
            conditions.append(query - key >= -origin)
        if mask.window is not None:
            conditions.append(query - key < mask.window - origin)
            if not mask.causal:
                conditions.append(query - key > -mask.window - origin)
        if self.call.cuts_q:
            # Past the last query the mask would show keys that no query sees.
            conditions.append(query < plan.q_len - (self.first_q_block + i) * self.blocks.block_q - queries.start)
        if self.call.cuts_kv or mask.has_length:
            _, kv_end = plan.read_limits(self.limits_ref, self.b)
            conditions.append(key < kv_end - kv_start)
        if mask.has_segments:
            q_ids = self.scratch["q_segments"][i, :, queries]
            kv_ids = self.scratch["kv_segments"][keys]
            kv_ids = jnp.tile(kv_ids, (1, shape[1] // LANES))
            conditions.append((kv_ids == q_ids) & (kv_ids != 0))
        return functools.reduce(jnp.logical_and, conditions) if conditions else None

    # --- q blocks: after ----------------------------------------------------------------------------------------------

    def epilogue(self, i):
        self.over_parts(functools.partial(self.epilogue_part, i))

    def epilogue_part(self, i, part):
        plan = self.plan
        finished = [self.scratch["dq"][i, slot, :, part].T * plan.scale for slot in range(plan.num_slots)]
        inputs, heads = self.selection_inputs(part), []
        if self.call.blind_queries and inputs["rope"] is not None:
            inputs["rope"] = finite(inputs["rope"])
        for p in range(plan.groups_per_block):
            raw = [None] * plan.num_slots
            if self.call.has_norm:
                raw = selected_queries(plan, self.g, p, self.inputs, part)
                raw = [finite(x) for x in raw] if self.call.blind_queries else raw
            selected = []
            for x, grad in zip(raw, finished, strict=True):
                grad, d_scale = unfinish_queries(grad, x, **inputs, group=p)
                if d_scale is not None:
                    self.outputs[3][0] += d_scale
                selected.append(grad)
            heads.append(self.experts(p, selected, part))
        out = self.outputs[0]
        out[0, part] = scatter_heads(heads, plan.head_dim).astype(out.dtype)

    def experts(self, p, selected, part):
        """Returns the gradients of each expert's queries, zero where no slot selected it."""
        plan = self.plan
        if "expert_index" not in self.inputs:
            return selected
        index = self.inputs["expert_index"][0, part]
        experts = [jnp.zeros_like(selected[0]) for _ in range(plan.num_experts)]
        for slot, grad in enumerate(selected):
            chosen = column(index, (self.g * plan.groups_per_block + p) * plan.num_slots + slot, exact=True)
            experts = [total + jnp.where(chosen == m, grad, 0.0) for m, total in enumerate(experts)]
        return experts


def _split(length, most):
    return [slice(start, min(start + most, length)) for start in range(0, length, most)]
