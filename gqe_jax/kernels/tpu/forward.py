"""The forward kernel: attention of the selected query heads, block by block, online softmax in base 2.

A grid step has a block of queries, R = K · block_q rows for each of its one or two KV groups (two where D = 64), and
block_kv keys of these groups in memory: `forward_step.py` says what it does with them.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gqe_jax.kernels.mesh_axes import result
from gqe_jax.kernels.tpu.forward_step import ONES_ROWS, ForwardStep
from gqe_jax.kernels.tpu.plan import KernelPlan


def forward(plan: KernelPlan, operands) -> tuple[jax.Array, jax.Array]:
    """o [B, S, G·K·D] in q's dtype, lse float32 [B, G·K, 1, S].

    operands: arrays in HBM, by name (`pallas_tpu._operands`).
    """
    schedule, blocks = plan.schedule, plan.blocks
    batch, groups, width = plan.batch, plan.groups_per_block, plan.width
    num_heads = plan.num_groups * plan.num_slots

    def at_q(b, g, r, c, *bounds):
        return schedule.row(r, c)

    def at_kv(b, g, r, c, *bounds):
        return schedule.fetched(r, c, plan.read_bounds(bounds, b, schedule.row(r, c)))

    def kv_group(g, *scalars):
        return scalars[int(schedule.bounded)][g] if plan.has_kv_head else g

    def whole(*_):
        return (0, 0)

    q_lanes = groups * plan.num_experts * plan.head_dim
    o_lanes = groups * plan.num_slots * plan.head_dim
    in_specs = {
        "q": pl.BlockSpec((1, blocks.block_q, q_lanes), lambda *at: (at[0], at_q(*at), at[1])),
        "k": pl.BlockSpec((1, blocks.block_kv, width), lambda *at: (at[0], at_kv(*at), kv_group(at[1], *at[4:]))),
        "v": pl.BlockSpec((1, blocks.block_kv, width), lambda *at: (at[0], at_kv(*at), kv_group(at[1], *at[4:]))),
        "expert_index": pl.BlockSpec((1, blocks.block_q, num_heads), lambda *at: (at[0], at_q(*at), 0)),
        "rope": pl.BlockSpec(
            (1, blocks.block_q, 2 * width), lambda *at: (at[0] if plan.rope_batch > 1 else 0, at_q(*at), 0)
        ),
        "norm_scale": pl.BlockSpec((1, width), whole),
        "q_segments": pl.BlockSpec((1, 1, blocks.block_q), lambda *at: (at[0], 0, at_q(*at))),
        "kv_segments": pl.BlockSpec((1, 1, blocks.block_kv), lambda *at: (at[0], 0, at_kv(*at))),
    }
    names = [name for name in in_specs if name in operands]
    rows = groups * plan.num_slots * blocks.block_q
    scratch = {
        "q": pltpu.VMEM((rows, width), plan.dtype),
        "scores": pltpu.VMEM((blocks.tile, rows), jnp.float32),
        "v_transposed": pltpu.VMEM((width, blocks.tile + (blocks.block_q if schedule.folded else 0)), plan.dtype),
        "row_max": pltpu.VMEM((1, rows), jnp.float32),
        "decay": pltpu.VMEM((1, rows), jnp.float32),
        "acc": pltpu.VMEM((plan.head_dim + (ONES_ROWS if blocks.ones_row else 0), rows), jnp.float32),
    }
    if not blocks.ones_row:
        scratch["row_sum"] = pltpu.VMEM((8, rows), jnp.float32)
    scalars = [operands[name] for name in ("bounds", "kv_head", "limits") if name in operands]

    def kernel(*refs):
        scalar_refs, refs = refs[: len(scalars)], refs[len(scalars) :]
        inputs = dict(zip(names, refs, strict=False))
        o_ref, lse_ref, *scratch_refs = refs[len(names) :]
        ForwardStep(plan, scalar_refs, inputs, o_ref, lse_ref, dict(zip(scratch, scratch_refs, strict=True))).run()

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, plan.num_groups // groups, *schedule.grid),
            in_specs=[in_specs[name] for name in names],
            out_specs=[
                pl.BlockSpec((1, blocks.block_q, o_lanes), lambda *at: (at[0], at_q(*at), at[1])),
                pl.BlockSpec((1, groups * plan.num_slots, 1, blocks.block_q), lambda *at: (at[0], at[1], 0, at_q(*at))),
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
