"""Prepares queries between their projection and the scores: selection, then norm, then rotary embedding.

The order matters for cost, not for the result: norm and rotation act per head, so applying them to the k selected
of M experts is k/M of the work (docs/algorithm.md, "The layer", steps 2 and 4).
"""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Computes x / sqrt(mean(x², last axis) + eps) · scale in float32, returned in x's dtype.

    Args:
      x: [..., D].
      scale: [D].
      eps: added to the mean square.
    """
    x_f32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + eps)
    return (x_f32 * inverse_rms * scale.astype(jnp.float32)).astype(x.dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Applies rotary position embedding, rotate-half convention, in float32, returned in x's dtype.

    The pair of dimensions (i, i + D/2) turns by the table's angle: (a, b) → (a cos − b sin, b cos + a sin).

    Args:
      x: [B, S, ..., D] with any number of head axes.
      cos, sin: float32 [B or 1, S, D/2], one angle per position and pair.
    """
    head_axes = tuple(range(2, x.ndim - 1))
    cos, sin = jnp.expand_dims(cos, head_axes), jnp.expand_dims(sin, head_axes)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def select_experts(q_BxSxGxMxD: jax.Array, expert_index_BxSxGxK: jax.Array) -> jax.Array:
    """Returns the selected experts' queries [B, S, G, K, D], in slot order.

    It is a chain of M − 1 selects, not a gather: XLA fuses it with what follows, and its gradient is selects and a sum
    over slots (no scatter), exactly zero for experts that no slot selected. An index outside 0..M−1 selects expert 0.
    """
    num_experts = q_BxSxGxMxD.shape[3]
    slot_expert = expert_index_BxSxGxK[..., None]
    selected = jnp.broadcast_to(q_BxSxGxMxD[..., :1, :], expert_index_BxSxGxK.shape + q_BxSxGxMxD.shape[-1:])
    for m in range(1, num_experts):
        selected = jnp.where(slot_expert == m, q_BxSxGxMxD[..., m : m + 1, :], selected)
    return selected


def prepare_queries(
    q: jax.Array,
    expert_index: jax.Array | None,
    q_norm: tuple[jax.Array, float] | None,
    q_rope: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    """Selects, then norms, then rotates: [B, S, G, M, D] → [B, S, G, K, D] (K = M without an index)."""
    if expert_index is not None:
        q = select_experts(q, expert_index)
    if q_norm is not None:
        q = rms_norm(q, *q_norm)
    if q_rope is not None:
        q = rotate(q, *q_rope)
    return q
