"""What happens to queries in VMEM before the scores: the selection, the norm, the rotary embedding, the scale.

Here it costs a few vector operations per q block. Outside it would be a pass over all experts' queries in HBM.
W is the lanes of a block: D, or 128 for two groups of D = 64, whose queries then have zeros in the other group's half:
scores over all lanes of K are those of one group, and no lane of K or V moves.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

LANES = 128


def lane_index(shape: tuple[int, ...]) -> jax.Array:
    """int32 of `shape`: each element's place on the last axis."""
    return lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)


def column(x: jax.Array, lane: jax.Array) -> jax.Array:
    """[rows, lanes], integers below 2²⁴ → float32 [rows, 1], the column `lane` (traced)."""
    return jnp.sum(jnp.where(lane_index(x.shape) == lane, x.astype(jnp.float32), 0.0), axis=1, keepdims=True)


def expert_queries(q: jax.Array, expert: int, group: int, num_experts: int, head_dim: int) -> jax.Array:
    """The queries of one expert of the block's group `group`, float32 [rows, W], in that group's lanes of W.

    q: [rows, groups of the block · M · D]. Where two groups share the lanes, the other half holds another expert's.
    """
    if head_dim % LANES == 0 or q.shape[1] == head_dim:
        start = expert * head_dim
        return q[:, start : start + head_dim].astype(jnp.float32)
    start = (group * num_experts + expert) * head_dim
    slab = q[:, start // LANES * LANES : start // LANES * LANES + LANES].astype(jnp.float32)
    return slab if start % LANES == group * head_dim else pltpu.roll(slab, head_dim, 1)


def rotate_halves(x: jax.Array, head_dim: int) -> jax.Array:
    """[rows, W] → for each head of `head_dim` lanes (a, b) → (b, a): the other half of the rotary pair."""
    width, half = x.shape[1], head_dim // 2
    if head_dim == width:
        return pltpu.roll(x, half, 1)
    return jnp.where(lane_index(x.shape) % head_dim < half, pltpu.roll(x, width - half, 1), pltpu.roll(x, half, 1))


def finish_queries(
    raw: jax.Array, rope: jax.Array | None, norm_scale: jax.Array | None, *, group: int, head_dim: int, norm_dim: int,
    norm_eps: float, factor: float,
) -> jax.Array:  # fmt: skip
    """RMS norm, rotary embedding, factor: float32 [rows, W], zero in the lanes of the block's other groups.

    Args:
      raw: float32 [rows, W], selected queries.
      rope: float32 [rows, 2 W], cos | −sin, sin: the sine's sign is that of the rotate-half convention. Or None.
      norm_scale: float32 [1, W] or None.
      group: of the block; head_dim: lanes of a head; norm_dim: D without padding lanes.
      factor: on the result.
    """
    width = raw.shape[1]
    if width != head_dim:
        raw = jnp.where(lane_index(raw.shape) // head_dim == group, raw, 0.0)
    if norm_scale is not None:
        mean_square = jnp.sum(jnp.square(raw), axis=1, keepdims=True) * (1.0 / norm_dim)
        raw = raw * (lax.rsqrt(mean_square + norm_eps)) * (norm_scale * factor)
        factor = 1.0
    if rope is not None:
        raw = raw * rope[:, :width] + rotate_halves(raw, head_dim) * rope[:, width:]
    return raw * factor if factor != 1.0 else raw
