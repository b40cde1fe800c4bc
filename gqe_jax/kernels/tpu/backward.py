"""The backward kernel: dq, dk, dv of attention with selected query heads in one pass over the blocks of scores.

Everything of the queries that the blocks need is in VMEM, transposed: q̂ᵀ, doᵀ, the log-sum-exps and rowsum(o·do) as row
vectors, and dqᵀ in float32. Scores are formed transposed too, sᵀ = k·q̂ᵀ. Then all five matmuls take their operands as
they lie, the rows of statistics broadcast along sublanes, and the three that make gradients stream only D rows through
the matrix unit: on units of 256 columns, or with D = 64, half of what the usual orientation streams.

The grid of a (batch row, group) is one row of steps:

    I steps, a q block each: select, norm, rotate, scale; transpose q̂ and do; rowsum(o·do)
    J steps, a kv block each: a loop over the q blocks that see it; dk and dv leave for HBM
    I steps, a q block each: dqᵀ is transposed, turned back, and goes to its expert's place

No step is empty but for kv blocks that nobody sees, and the loops over q blocks wait for no copy. q, o, do are read
once, dq is written once and never added to in HBM, and sums are in one order: the result is deterministic. Where the
queries do not fit VMEM the kernel runs for one chunk of them after the other and adds to dk and dv, in float32.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gqe_jax.kernels.mask import Mask
from gqe_jax.kernels.mesh_axes import result, vary, varying_axes
from gqe_jax.kernels.tpu.backward_blocks import BackwardBlocks
from gqe_jax.kernels.tpu.backward_step import BackwardStep
from gqe_jax.kernels.tpu.plan import KernelPlan
from gqe_jax.kernels.tpu.q_bounds import q_bounds
from gqe_jax.rounding import ceil_div
from gqe_jax.tpu import LANES


def backward(
    plan: KernelPlan, mask: Mask, operands, o: jax.Array, do: jax.Array, lse: jax.Array, dlse: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """dq [B, S, G·M·D], dk and dv [B, T, G·D] in q's dtype, and the gradient of the norm's scale, float32 [D].

    Args:
      operands: q, k, v, expert_index, rope, norm_scale, segments as the forward takes them.
      o, do: [B, S, G·K·D]; lse, dlse: float32 [B, G·K, 1, S].
    """
    blocks = plan.backward_blocks
    call = BackwardCall(plan, blocks, operands)
    bounds = q_bounds(mask, plan.q_len, plan.kv_len, blocks.block_q, blocks.block_kv).reshape(-1)
    limits = [operands["limits"]] if "limits" in operands else []
    inputs = dict(operands, o=o, do=do, lse=lse, dlse=dlse)
    arrays = [inputs[name] for name in call.inputs]
    dq, dk, dv = (result(operands[name].shape, plan.dtype, operands["q"]) for name in "qkv")
    if plan.has_kv_head:  # to be summed over the groups that read a KV head
        limits = [operands["kv_head"], *limits]
        dk = dv = result((*dk.shape[:2], plan.num_groups * plan.head_dim), jnp.float32, operands["q"])

    if call.num_chunks == 1:
        chunk = jnp.zeros((1,), jnp.int32)
        dq, dk, dv, *d_scale = call.kernel((dq, dk, dv))(chunk, bounds, *limits, *arrays)
    else:
        whole_q, whole_kv = call.num_q_blocks * blocks.block_q, call.num_kv_blocks * blocks.block_kv
        gradients = (
            jnp.zeros((plan.batch, whole_q, dq.shape[2]), plan.dtype),
            *(jnp.zeros((plan.batch, whole_kv, dk.shape[2]), jnp.float32) for _ in range(2)),
        )
        gradients = vary(gradients, call.varying)
        kernel = call.kernel(gradients)

        def one_chunk(chunk, carry):
            gradients, d_scale = carry
            dq, dk, dv, *added = kernel(chunk[None], bounds, *limits, *arrays, *gradients)
            return (dq, dk, dv), [x + y for x, y in zip(d_scale, added, strict=True)]

        d_scale = vary([jnp.zeros(x.shape, x.dtype) for x in call.d_scale_shape], call.varying)
        gradients, d_scale = lax.fori_loop(0, call.num_chunks, one_chunk, (gradients, d_scale))
        dq, dk, dv = (x[:, : like.shape[1]].astype(like.dtype) for x, like in zip(gradients, (dq, dk, dv), strict=True))
    if not d_scale:
        return dq, dk, dv, None
    return dq, dk, dv, jnp.sum(d_scale[0].reshape(-1, plan.head_dim), axis=0)


class BackwardCall:
    """Describes the Pallas call: its windows onto HBM, its scratch, and its three kinds of grid steps."""

    def __init__(self, plan: KernelPlan, blocks: BackwardBlocks, operands):
        self.plan, self.blocks = plan, blocks
        self.num_q_blocks = ceil_div(plan.q_len, blocks.block_q)
        self.num_kv_blocks = ceil_div(plan.kv_len, blocks.block_kv)
        self.num_chunks = ceil_div(self.num_q_blocks, blocks.chunk_q)
        self.has_norm = "norm_scale" in operands
        # Whether there may be queries that see no key, or lie past the end of their array.
        self.blind_queries = plan.padded_q_len % blocks.block_q != 0 or not plan.all_see(plan.q_len, plan.kv_len)
        self.hidden_keys = plan.has_hidden_keys(blocks.block_kv)
        self.cuts_q = self.hidden_keys and plan.q_len % blocks.block_q != 0
        self.cuts_kv = plan.kv_len % blocks.block_kv != 0
        self.inputs = self._input_specs(operands)
        count = plan.batch * plan.num_groups // plan.groups_per_block
        self.d_scale_shape = [result((count, 1, plan.width), jnp.float32, operands["q"])] * self.has_norm
        self.varying = varying_axes(operands["q"])

    def _q_block(self, t, chunk, *, again):
        """Returns the q block of a step from the prologue and, if it is needed `again`, in the epilogue."""
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
        """Returns the BlockSpec of an array of which each group has its own part."""
        return pl.BlockSpec((1, self.blocks.block_kv, self.plan.width), lambda b, g, t, *_: (b, self._kv_block(t), g))

    def _kv_input_spec(self):
        if not self.plan.has_kv_head:
            return self._kv_spec()
        return pl.BlockSpec(
            (1, self.blocks.block_kv, self.plan.width),
            lambda b, g, t, chunk, bounds, kv_head, *_: (b, self._kv_block(t), kv_head[g]),
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
            "k": self._kv_input_spec(),
            "v": self._kv_input_spec(),
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
        if plan.mask.has_segments:
            scratch["q_segments"] = pltpu.VMEM((blocks.chunk_q, 1, blocks.block_q), jnp.int32)
            scratch["kv_segments"] = pltpu.VMEM((blocks.block_kv, LANES), jnp.int32)
        return scratch

    def kernel(self, gradients):
        """Returns the Pallas call, with results like `gradients`; if these are of several chunks they are arguments
        too."""
        plan, blocks = self.plan, self.blocks
        groups, names, scratch = plan.groups_per_block, list(self.inputs), self._scratch()
        num_scalars = 2 + (not plan.mask.aligned or plan.mask.has_length) + plan.has_kv_head
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
            BackwardStep(self, scalars, ins, outs, dict(zip(scratch, refs, strict=True))).run()

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
            out_shape=[*(result(x.shape, x.dtype, x) for x in gradients), *self.d_scale_shape],
            input_output_aliases={first_alias + n: n for n in range(3)} if adds else {},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=plan.vmem_limit_bytes
            ),
            cost_estimate=plan.cost_estimate(num_matmuls=5),
            interpret=plan.interpret,
            name="gqe_backward",
        )
