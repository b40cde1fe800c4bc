"""The backward kernel: dq, dk, dv of attention with selected query heads in one pass over the blocks of scores.

Everything of the queries that the blocks need is in VMEM, transposed: q̂ᵀ, doᵀ, the log-sum-exps and rowsum(o·do) as row
vectors, and dqᵀ in float32. Scores are formed transposed too, sᵀ = k·q̂ᵀ. Then all five matmuls take their operands as
they lie, the rows of statistics broadcast along sublanes, and the three that make gradients stream only D rows through
the matrix unit: on units of 256 columns, or with D = 64, half of what the usual orientation streams.

The grid of a (batch row, group) is one row of steps:

    I steps, a q block each: select, norm, rotate, scale; transpose q̂ and do; rowsum(o·do)
    J steps, a kv block each: a loop over the q blocks that see it; dk and dv leave for HBM
    I steps, a q block each: dqᵀ is transposed, turned back, and goes to its expert's place

No step is empty but for kv blocks that nobody sees, and the loops over q blocks wait for no copy. q, o, do are read once,
dq is written once and never added to in HBM, and sums are in one order: the result is deterministic. Where the queries
do not fit VMEM the kernel runs for one chunk of them after the other and adds to dk and dv, in float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gqe_jax.kernels.mask import Mask
from gqe_jax.kernels.partials import EMPTY_LSE
from gqe_jax.kernels.tpu.backward_blocks import BackwardBlocks
from gqe_jax.kernels.tpu.forward import selected_queries
from gqe_jax.kernels.tpu.plan import LOG2_E, MASKED, Plan
from gqe_jax.kernels.tpu.q_bounds import q_bounds
from gqe_jax.kernels.tpu.selection import LANES, column, finish_queries
from gqe_jax.kernels.tpu.selection_gradient import scatter_heads, unfinish_queries

NEVER = -MASKED
"""A log-sum-exp of rows whose probabilities are to be 0 whatever their scores."""


def backward(
    plan: Plan, blocks: BackwardBlocks, mask: Mask, operands, o: jax.Array, do: jax.Array, lse: jax.Array, dlse: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """dq [B, S, G·M·D], dk and dv [B, T, G·D] in q's dtype, and the gradient of the norm's scale, float32 [D].

    Args:
      operands: q, k, v, expert_index, rope, norm_scale, segments as the forward takes them.
      o, do: [B, S, G·K·D]; lse, dlse: float32 [B, G·K, 1, S].
    """
    call = _Call(plan, blocks, operands)
    bounds = q_bounds(mask, plan.q_len, plan.kv_len, blocks.block_q, blocks.block_kv).reshape(-1)
    limits = [operands["limits"]] if "limits" in operands else []
    inputs = dict(operands, o=o, do=do, lse=lse, dlse=dlse)
    arrays = [inputs[name] for name in call.inputs]
    dq, dk, dv = (jax.ShapeDtypeStruct(operands[name].shape, plan.dtype) for name in "qkv")

    if call.num_chunks == 1:
        chunk = jnp.zeros((1,), jnp.int32)
        dq, dk, dv, *d_scale = call.kernel((dq, dk, dv))(chunk, bounds, *limits, *arrays)
    else:
        sums = [jnp.zeros(x.shape, jnp.float32) for x in (dk, dv)]
        d_scale = [jnp.zeros(x.shape, x.dtype) for x in call.d_scale_shape]

        kernel = call.kernel((dq, *sums))

        def one_chunk(chunk, carry):
            gradients, d_scale = carry
            dq, dk, dv = gradients
            dq, dk, dv, *added = kernel(chunk[None], bounds, *limits, *arrays, dq, dk, dv)
            return (dq, dk, dv), [x + y for x, y in zip(d_scale, added, strict=True)]

        gradients = jnp.zeros(dq.shape, dq.dtype), *sums
        (dq, dk, dv), d_scale = lax.fori_loop(0, call.num_chunks, one_chunk, (gradients, d_scale))
        dk, dv = dk.astype(plan.dtype), dv.astype(plan.dtype)
    if not d_scale:
        return dq, dk, dv, None
    return dq, dk, dv, jnp.sum(d_scale[0].reshape(-1, plan.head_dim), axis=0)


class _Call:
    """The kernel's windows onto HBM, its scratch, and the three kinds of grid steps."""

    def __init__(self, plan: Plan, blocks: BackwardBlocks, operands):
        self.plan, self.blocks = plan, blocks
        self.num_q_blocks = -(-plan.q_len // blocks.block_q)
        self.num_kv_blocks = -(-plan.kv_len // blocks.block_kv)
        self.num_chunks = -(-self.num_q_blocks // blocks.chunk_q)
        self.has_norm = "norm_scale" in operands
        self.ragged_q = plan.padded_q_len % blocks.block_q != 0
        self.ragged_kv = operands["k"].shape[1] % blocks.block_kv != 0
        self.cuts_kv = plan.kv_len % blocks.block_kv != 0
        self.inputs = self._input_specs(operands)
        count = plan.batch * plan.num_groups // plan.groups_per_block
        self.d_scale_shape = [jax.ShapeDtypeStruct((count, 1, plan.width), jnp.float32)] * self.has_norm

    def _q_block(self, t, chunk, *, again):
        """The q block of a step, from the prologue and, if it is wanted `again`, in the epilogue."""
        count = self.blocks.chunk_q
        i = jnp.minimum(t, count - 1)
        if again:
            last_steps = count + self.num_kv_blocks
            i = jnp.where(t < last_steps, i, t - last_steps)
        return jnp.minimum(chunk[0] * count + i, self.num_q_blocks - 1)

    def _kv_block(self, t):
        return jnp.clip(t - self.blocks.chunk_q, 0, self.num_kv_blocks - 1)

    def _q_spec(self, lanes, *, again):
        return pl.BlockSpec(
            (1, self.blocks.block_q, lanes), lambda b, g, t, chunk, *_: (b, self._q_block(t, chunk, again=again), g)
        )

    def _kv_spec(self):
        return pl.BlockSpec(
            (1, self.blocks.block_kv, self.plan.width), lambda b, g, t, *_: (b, self._kv_block(t), g)
        )

    def _input_specs(self, operands):
        plan, blocks = self.plan, self.blocks
        groups = plan.groups_per_block
        o_spec = self._q_spec(groups * plan.num_slots * plan.head_dim, again=False)
        row_spec = pl.BlockSpec(
            (1, groups * plan.num_slots, 1, blocks.block_q),
            lambda b, g, t, chunk, *_: (b, g, 0, self._q_block(t, chunk, again=False)),
        )
        specs = {
            "q": self._q_spec(groups * plan.num_experts * plan.head_dim, again=self.has_norm),
            "expert_index": pl.BlockSpec(
                (1, blocks.block_q, plan.num_groups * plan.num_slots),
                lambda b, g, t, chunk, *_: (b, self._q_block(t, chunk, again=True), 0),
            ),
            "rope": pl.BlockSpec(
                (1, blocks.block_q, 2 * plan.width),
                lambda b, g, t, chunk, *_: (b if plan.rope_batch > 1 else 0, self._q_block(t, chunk, again=True), 0),
            ),
            "norm_scale": pl.BlockSpec((1, plan.width), lambda *_: (0, 0)),
            "q_segments": pl.BlockSpec(
                (1, 1, blocks.block_q), lambda b, g, t, chunk, *_: (b, 0, self._q_block(t, chunk, again=False))
            ),
            "kv_segments": pl.BlockSpec((1, 1, blocks.block_kv), lambda b, g, t, *_: (b, 0, self._kv_block(t))),
            "k": self._kv_spec(),
            "v": self._kv_spec(),
        }
        specs = {name: spec for name, spec in specs.items() if name in operands}
        return specs | {"o": o_spec, "do": o_spec, "lse": row_spec, "dlse": row_spec}

    def _scratch(self):
        plan, blocks = self.plan, self.blocks
        per_q_block = (blocks.chunk_q, plan.num_slots, plan.width, blocks.block_q)
        heads = plan.num_slots * plan.groups_per_block
        scratch = {
            "q": pltpu.VMEM(per_q_block, plan.dtype),
            "do": pltpu.VMEM(per_q_block, plan.dtype),
            "dq": pltpu.VMEM(per_q_block, jnp.float32),
            "rows": pltpu.VMEM((blocks.chunk_q, 2 * heads, blocks.block_q), jnp.float32),
            "k_transposed": pltpu.VMEM((plan.width, blocks.block_kv), plan.dtype),
            "dk": pltpu.VMEM((plan.width, blocks.block_kv), jnp.float32),
            "dv": pltpu.VMEM((plan.width, blocks.block_kv), jnp.float32),
        }
        if self.ragged_kv:
            scratch |= {name: pltpu.VMEM((blocks.block_kv, plan.width), plan.dtype) for name in ("k", "v")}
        if plan.mask.has_segments:
            scratch["q_segments"] = pltpu.VMEM((blocks.chunk_q, 1, blocks.block_q), jnp.int32)
            scratch["kv_segments"] = pltpu.VMEM((blocks.block_kv, LANES), jnp.int32)
        return scratch

    def kernel(self, gradients):
        """The Pallas call, with results like `gradients`; if these are of several chunks they are arguments too."""
        plan, blocks = self.plan, self.blocks
        groups, names, scratch = plan.groups_per_block, list(self.inputs), self._scratch()
        num_scalars = 3 if not plan.mask.aligned or plan.mask.has_length else 2
        last_steps = blocks.chunk_q + self.num_kv_blocks

        def at_dq(b, g, t, chunk, *_):
            i = jnp.clip(t - last_steps, 0, blocks.chunk_q - 1)
            return b, jnp.minimum(chunk[0] * blocks.chunk_q + i, self.num_q_blocks - 1), g

        out_specs = [
            pl.BlockSpec((1, blocks.block_q, groups * plan.num_experts * plan.head_dim), at_dq),
            self._kv_spec(),
            self._kv_spec(),
            pl.BlockSpec((1, 1, plan.width), lambda b, g, *_: (b * (plan.num_groups // groups) + g, 0, 0)),
        ][: 3 + self.has_norm]
        adds = self.num_chunks > 1
        first_alias = num_scalars + len(names)
        sums = ["dq_sum", "dk_sum", "dv_sum"] if adds else []

        def body(*refs):
            scalars, refs = refs[:num_scalars], refs[num_scalars:]
            ins, refs = dict(zip(names + sums, refs, strict=False)), refs[len(names + sums) :]
            outs, refs = refs[: len(out_specs)], refs[len(out_specs) :]
            _Step(self, scalars, ins, outs, dict(zip(scratch, refs, strict=True))).run()

        return pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=num_scalars,
                grid=(plan.batch, plan.num_groups // groups, 2 * blocks.chunk_q + self.num_kv_blocks),
                in_specs=[
                    *self.inputs.values(),
                    *([pl.BlockSpec(memory_space=pl.ANY), self._kv_spec(), self._kv_spec()] if adds else []),
                ],
                out_specs=out_specs,
                scratch_shapes=list(scratch.values()),
            ),
            out_shape=[*gradients, *self.d_scale_shape],
            input_output_aliases={first_alias + n: n for n in range(3)} if adds else {},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=plan.vmem_limit_bytes
            ),
            cost_estimate=plan.cost_estimate(num_matmuls=5),
            interpret=plan.interpret,
            name="gqe_backward",
        )


class _Step:
    """One step of the grid."""

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
        finished = [self.finished_queries(p) for p in range(plan.groups_per_block)]
        for slot in range(plan.num_slots):
            q = functools.reduce(jnp.add, [of_group[slot] for of_group in finished])
            scratch["q"][i, slot] = self.existing(i, q).astype(plan.dtype).T
        o, do = (self.existing(i, self.inputs[name][0]) for name in ("o", "do"))
        do_transposed = do.T
        products = (o.astype(jnp.float32) * do.astype(jnp.float32)).T
        for n, (p, slot) in enumerate(self.heads):
            head = p * plan.num_slots + slot
            rows = slice(head * plan.head_dim, (head + 1) * plan.head_dim)
            scratch["do"][i, slot, self.lanes[p]] = do_transposed[rows]
            lse, dlse = (self.existing(i, self.inputs[name][0, head], axis=1) for name in ("lse", "dlse"))
            lse2 = jnp.where(lse > 0.5 * EMPTY_LSE, lse * LOG2_E, NEVER)
            scratch["rows"][i, n : n + 1] = lse2
            delta = jnp.sum(products[rows], axis=0, keepdims=True) - dlse
            scratch["rows"][i, len(self.heads) + n : len(self.heads) + n + 1] = delta
        scratch["dq"][i] = jnp.zeros_like(scratch["dq"][i])
        if plan.mask.has_segments:
            scratch["q_segments"][i] = self.inputs["q_segments"][0]

    def existing(self, i, x, axis=0):
        """x of q block i, zero where the block reaches past the array's end, where memory holds anything."""
        if not self.call.ragged_q:
            return x
        start = (self.first_q_block + i) * self.blocks.block_q
        query = start + lax.broadcasted_iota(jnp.int32, x.shape, axis)
        return jnp.where(query < self.plan.q_len, x, jnp.zeros_like(x))

    def finished_queries(self, p):
        """float32 [block_q, W] of each slot."""
        return [
            finish_queries(raw, **self.selection_inputs(), group=p, factor=self.plan.query_factor)
            for raw in selected_queries(self.plan, self.g, p, self.inputs)
        ]

    def selection_inputs(self):
        plan, inputs = self.plan, self.inputs
        return dict(
            rope=inputs["rope"][0] if "rope" in inputs else None,
            norm_scale=inputs["norm_scale"][...] if "norm_scale" in inputs else None,
            head_dim=plan.head_dim,
            norm_dim=plan.norm_dim,
            norm_eps=plan.norm_eps,
        )

    # --- kv blocks ----------------------------------------------------------------------------------------------------

    def kv_block(self, j, in_chunk):
        plan, blocks, scratch = self.plan, self.blocks, self.scratch
        if self.call.ragged_kv:
            key = j * blocks.block_kv + lax.broadcasted_iota(jnp.int32, (blocks.block_kv, 1), 0)
            for name in ("k", "v"):
                x = self.inputs[name][0]
                scratch[name][...] = jnp.where(key < plan.kv_len, x, jnp.zeros_like(x))
        k = self.keys("k", slice(None))
        scratch["k_transposed"][...] = k.T
        scratch["dk"][...] = jnp.zeros_like(scratch["dk"])
        scratch["dv"][...] = jnp.zeros_like(scratch["dv"])
        if plan.mask.has_segments:
            ids = jnp.broadcast_to(self.inputs["kv_segments"][0], (LANES, blocks.block_kv))
            scratch["kv_segments"][...] = ids.T

        stride = plan.batch * self.call.num_kv_blocks
        first, whole_first, whole_end, end = (
            jnp.clip(self.bounds_ref[n * stride + self.b * self.call.num_kv_blocks + j] - self.first_q_block, 0, in_chunk)
            for n in range(4)
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

    def keys(self, name, rows):
        return self.scratch[name][rows] if self.call.ragged_kv else self.inputs[name][0, rows]

    def pieces(self):
        """(rows of keys, lanes of queries, masked) of the parts of a block: without a mask, with it, on the diagonal."""
        blocks, mask = self.blocks, self.plan.mask
        keys = [slice(start, min(start + blocks.piece_kv, blocks.block_kv)) for start in range(0, blocks.block_kv, blocks.piece_kv)]
        queries = [slice(start, min(start + blocks.piece_q, blocks.block_q)) for start in range(0, blocks.block_q, blocks.piece_q)]
        pairs = [(key, query) for query in queries for key in keys]
        whole, cut = [(*pair, False) for pair in pairs], [(*pair, True) for pair in pairs]
        if not mask.causal:
            return whole, cut, []
        cut_elsewhere = mask.window is not None or mask.has_segments or mask.has_length or self.call.cuts_kv
        diagonal = [
            (key, query, cut_elsewhere or key.stop > query.start + 1)
            for key, query in pairs
            if key.start < query.stop
        ]
        return whole, cut, diagonal

    def block(self, i, j, shift, pieces):
        plan, scratch = self.plan, self.scratch
        for keys, queries, masked in pieces:
            seen = self.seen(i, j, shift, keys, queries) if masked else None
            k, v = self.keys("k", keys), self.keys("v", keys)
            for n, (p, slot) in enumerate(self.heads):
                own = self.lanes[p]
                q, do = scratch["q"][i, slot, own, queries], scratch["do"][i, slot, own, queries]
                lse2, delta = (
                    scratch["rows"][i, m : m + 1, queries] for m in (n, len(self.heads) + n)
                )
                s = self.dot(k, self.in_lanes(q, p), contract=(1, 0))
                slope = None
                if plan.softcap is not None:
                    tanh = jnp.tanh(s)
                    s, slope = tanh * plan.cap_factor, 1.0 - tanh * tanh
                if seen is not None:
                    s = jnp.where(seen, s, MASKED)
                probs = jnp.exp2(s - lse2)
                ds = probs * (self.dot(v, self.in_lanes(do, p), contract=(1, 0)) - delta)
                ds = (ds if slope is None else ds * slope).astype(plan.dtype)
                probs = probs.astype(plan.dtype)
                scratch["dv"][own, keys] += self.dot(do, probs, contract=(1, 1))
                scratch["dk"][own, keys] += self.dot(q, ds, contract=(1, 1))
                scratch["dq"][i, slot, own, queries] += self.dot(
                    scratch["k_transposed"][own, keys], ds, contract=(1, 0)
                )

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
        if self.call.cuts_kv or mask.has_length:
            _, kv_end = plan.read_limits(self.limits_ref, self.b)
            conditions.append(key < kv_end - kv_start)
        if mask.has_segments:
            q_ids = self.scratch["q_segments"][i, :, queries]
            kv_ids = self.scratch["kv_segments"][keys]
            kv_ids = jnp.tile(kv_ids, (1, shape[1] // LANES))
            conditions.append((kv_ids == q_ids) & (kv_ids != 0))
        return functools.reduce(jnp.logical_and, conditions) if conditions else None

    def dot(self, a, b, *, contract):
        precision = lax.Precision.HIGHEST if self.plan.dtype == jnp.float32 else None
        dimensions = (((contract[0],), (contract[1],)), ((), ()))
        return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)

    # --- q blocks: after ----------------------------------------------------------------------------------------------

    def epilogue(self, i):
        plan, scratch = self.plan, self.scratch
        finished = [scratch["dq"][i, slot].T * plan.scale for slot in range(plan.num_slots)]
        heads = []
        for p in range(plan.groups_per_block):
            raw = selected_queries(plan, self.g, p, self.inputs) if self.call.has_norm else [None] * plan.num_slots
            selected = []
            for slot in range(plan.num_slots):
                x = raw[slot] if raw[slot] is None else self.existing(i, raw[slot])
                grad, d_scale = unfinish_queries(finished[slot], x, **self.selection_inputs(), group=p)
                if d_scale is not None:
                    self.outputs[3][0] += d_scale
                selected.append(grad)
            heads.append(self.experts(p, selected))
        out = self.outputs[0]
        out[0] = scatter_heads(heads, plan.head_dim).astype(out.dtype)

    def experts(self, p, selected):
        """The gradients of each expert's queries, zero where no slot selected it."""
        plan = self.plan
        if "expert_index" not in self.inputs:
            return selected
        index = self.inputs["expert_index"][0]
        experts = [jnp.zeros_like(selected[0]) for _ in range(plan.num_experts)]
        for slot, grad in enumerate(selected):
            chosen = column(index, (self.g * plan.groups_per_block + p) * plan.num_slots + slot)
            experts = [total + jnp.where(chosen == m, grad, 0.0) for m, total in enumerate(experts)]
        return experts
