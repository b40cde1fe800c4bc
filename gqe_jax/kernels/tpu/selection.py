"""What happens to queries in VMEM before the scores: the selection, the norm, the rotary embedding, the scale.

Here it costs a few vector operations per q block. Outside it would be a pass over all experts' queries in HBM.
W is the lanes of a block: D, or 128 for two groups of D = 64, whose queries then have zeros in the other group's half:
scores over all lanes of K are those of one group, and no lane of K or V moves.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from gqe_jax.kernels.tpu.tiles import lane_index
from gqe_jax.tpu import LANES


def column(x: jax.Array, lane: jax.Array, *, exact: bool) -> jax.Array:
    """Returns the column `lane` (traced) of float32 [rows, lanes]: [rows, 1], or not `exact` and of integers up to 256
    [rows, 128]: the cross-lane unit is the busiest here, and the matrix unit is idle."""
    if exact:
        return jnp.sum(jnp.where(lane_index(x.shape) == lane, x, 0.0), axis=1, keepdims=True)
    pick = lax.broadcasted_iota(jnp.int32, (x.shape[1], LANES), 0) == lane
    pick = jnp.where(pick, 1.0, 0.0).astype(jnp.bfloat16)
    return jnp.dot(x.astype(jnp.bfloat16), pick, preferred_element_type=jnp.float32)


def expert_queries(q: jax.Array, expert: int, group: int, num_experts: int, head_dim: int) -> jax.Array:
    """Returns the queries of one expert of the block's group `group`, float32 [rows, W], in that group's lanes of W.

    q: [rows, groups of the block · M · D]. Where two groups share the lanes, the other half holds another expert's.
    """
    if head_dim % LANES == 0 or q.shape[1] == head_dim:
        start = expert * head_dim
        return q[:, start : start + head_dim].astype(jnp.float32)
    start = (group * num_experts + expert) * head_dim
    slab = q[:, start // LANES * LANES : start // LANES * LANES + LANES].astype(jnp.float32)
    return slab if start % LANES == group * head_dim else pltpu.roll(slab, head_dim, 1)


def selected_queries(plan, g, p, inputs, rows: slice = slice(None)) -> list[jax.Array]:
    """Returns, for each slot of group p of the group block g, the selected expert's queries: float32 [rows, W].

    inputs: references to blocks, "q" [1, block_q, groups · M · D] and (not if dense) "expert_index" [1, block_q, G·K].
    """
    q = inputs["q"][0, rows]
    experts = [expert_queries(q, m, p, plan.num_experts, plan.head_dim) for m in range(plan.num_experts)]
    if "expert_index" not in inputs:
        return experts
    index = inputs["expert_index"][0, rows]
    selected = []
    for slot in range(plan.num_slots):
        lane = (g * plan.groups_per_block + p) * plan.num_slots + slot
        chosen = column(index, lane, exact=plan.exact)
        if chosen.shape[1] > 1:
            chosen = chosen[:, : plan.width] if plan.width <= LANES else jnp.tile(chosen, (1, plan.width // LANES))
        raw = experts[0]
        for m in range(1, plan.num_experts):
            raw = jnp.where(chosen == m, experts[m], raw)
        selected.append(raw)
    return selected


def rotate_halves(x: jax.Array, head_dim: int) -> jax.Array:
    """[rows, W] → for each head of `head_dim` lanes (a, b) → (b, a): the other half of the rotary pair."""
    width, half = x.shape[1], head_dim // 2
    if head_dim == width:
        return pltpu.roll(x, half, 1)
    return jnp.where(lane_index(x.shape) % head_dim < half, pltpu.roll(x, width - half, 1), pltpu.roll(x, half, 1))


def finish_queries(
    raw: jax.Array, rope: jax.Array | None, norm_scale: jax.Array | None, *, group: int, head_dim: int, norm_dim: int,
    norm_eps: float, factor: float, exact: bool,
) -> jax.Array:  # fmt: skip
    """RMS norm, rotary embedding, factor: float32 [rows, W], zero in the lanes of the block's other groups.

    Args:
      raw: float32 [rows, W], selected queries.
      rope: float32 [rows, 2 W], cos | −sin, sin: the sine's sign is that of the rotate-half convention. Or None.
      norm_scale: float32 [1, W] or None.
      group: of the block; head_dim: lanes of a head; norm_dim: D without padding lanes.
      factor: on the result.
      exact: to float32, not only to well below what bfloat16 resolves.
    """
    width = raw.shape[1]
    if width != head_dim:
        raw = jnp.where(lane_index(raw.shape) // head_dim == group, raw, 0.0)
    if norm_scale is not None:
        square_sum = jnp.sum(jnp.square(raw), axis=1, keepdims=True) + norm_dim * norm_eps
        # The hardware's logarithm and power take one instruction each, a rounded inverse root takes ten.
        inverse_root = lax.rsqrt(square_sum) if exact else jnp.exp2(-0.5 * jnp.log2(square_sum))
        raw = raw * inverse_root * (norm_scale * (math.sqrt(norm_dim) * factor))
        factor = 1.0
    if rope is not None:
        raw = raw * rope[:, :width] + rotate_halves(raw, head_dim) * rope[:, width:]
    return raw * factor if factor != 1.0 else raw
