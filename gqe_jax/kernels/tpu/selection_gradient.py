"""The transpose of `selection.py`: from the gradient of finished queries to that of all experts' queries, in VMEM."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from gqe_jax.kernels.tpu.selection import rotate_halves
from gqe_jax.kernels.tpu.tiles import lane_index
from gqe_jax.tpu import LANES


def unfinish_queries(
    grad: jax.Array, raw: jax.Array | None, rope: jax.Array | None, norm_scale: jax.Array | None, *, group: int,
    head_dim: int, norm_dim: int, norm_eps: float,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """Returns the gradients of `finish_queries` (with factor 1) in its queries [rows, W] and its norm_scale [1, W].

    Args:
      grad: float32 [rows, W], of the finished queries; what lies in the lanes of other groups is ignored.
      raw: float32 [rows, W], the selected queries; needed for the norm.
      rope, norm_scale, group, head_dim, norm_dim, norm_eps: as `finish_queries` takes them.
    """
    width = grad.shape[1]
    own = None if width == head_dim else lane_index(grad.shape) // head_dim == group
    if own is not None:
        grad = jnp.where(own, grad, 0.0)
    if rope is not None:
        grad = grad * rope[:, :width] + rotate_halves(grad * rope[:, width:], head_dim)
    if norm_scale is None:
        return grad, None
    raw = raw if own is None else jnp.where(own, raw, 0.0)
    inverse_rms = lax.rsqrt(jnp.sum(jnp.square(raw), axis=1, keepdims=True) * (1.0 / norm_dim) + norm_eps)
    normed = raw * inverse_rms
    d_scale = jnp.sum(grad * normed, axis=0, keepdims=True)
    grad = grad * norm_scale
    along = jnp.sum(grad * normed, axis=1, keepdims=True) * (1.0 / norm_dim)
    return (grad - normed * along) * inverse_rms, d_scale


def scatter_heads(heads: list[list[jax.Array]], head_dim: int) -> jax.Array:
    """Joins [rows, W] of each head of each group of a block, in its group's lanes → [rows, groups · heads · D]."""
    flat = [(group, head) for group, of_group in enumerate(heads) for head in of_group]
    if head_dim == heads[0][0].shape[1]:
        in_place = [head for _, head in flat]
    else:
        in_place = []
        for position in range(0, len(flat), 2):
            (group, low), (next_group, high) = flat[position : position + 2]
            low = low if group == 0 else pltpu.roll(low, head_dim, 1)
            high = high if next_group == 1 else pltpu.roll(high, head_dim, 1)
            in_place.append(jnp.where(lane_index(low.shape) % LANES < head_dim, low, high))
    return in_place[0] if len(in_place) == 1 else jnp.concatenate(in_place, axis=1)
