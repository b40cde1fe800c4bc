"""Attention in a few lines of jnp, float32 throughout: the oracle that faster implementations are tested against."""

import jax
import jax.numpy as jnp

from gqe_jax.kernels.mask import Mask
from gqe_jax.kernels.partials import EMPTY_LSE
from gqe_jax.kernels.queries import prepare_queries


def visible(mask: Mask, q_len: int, kv_len: int) -> jax.Array:
    """The mask as a bool array [B, S, T]."""
    q_position = mask.q_offset[:, None, None] + jnp.arange(q_len)[None, :, None]
    kv_position = mask.kv_offset[:, None, None] + jnp.arange(kv_len)[None, None, :]
    seen = jnp.ones((mask.q_offset.shape[0], q_len, kv_len), bool)
    if mask.causal:
        seen &= kv_position <= q_position
    if mask.window is not None:
        seen &= kv_position > q_position - mask.window
        seen &= kv_position < q_position + mask.window
    if mask.kv_length is not None:
        seen &= jnp.arange(kv_len) < mask.kv_length[:, None, None]
    if mask.q_segment_ids is not None:
        q_segment, kv_segment = mask.q_segment_ids[:, :, None], mask.kv_segment_ids[:, None, :]
        seen &= (q_segment == kv_segment) & (q_segment != 0)
    return seen


def reference(
    q, k, v, expert_index, mask: Mask, *, kv_head=None, q_rope, q_norm, softcap, scale
) -> tuple[jax.Array, jax.Array]:
    """softmax(scale · q kᵀ) v over the visible keys; holds [S, T] arrays. Arguments as in `attend`."""
    dtype = q.dtype
    if kv_head is not None:
        k, v = (x[:, :, kv_head] for x in (k, v))
    q = prepare_queries(q, expert_index, q_norm, q_rope)
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    scores = scale * jnp.einsum("bsgkd,btgd->bsgkt", q, k, precision="highest")
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    seen = visible(mask, q.shape[1], k.shape[1])[:, :, None, None, :]
    any_seen = jnp.any(seen, axis=-1)
    # Rows that see nothing are softmaxed unmasked and discarded, so that their gradient is 0 and not 0/0.
    scores = jnp.where(seen | ~any_seen[..., None], scores, -jnp.inf)
    o = jnp.einsum("bsgkt,btgd->bsgkd", jax.nn.softmax(scores), v, precision="highest")
    o = jnp.where(any_seen[..., None], o, 0.0)
    lse = jnp.where(any_seen, jax.nn.logsumexp(scores, axis=-1), EMPTY_LSE)
    return o.astype(dtype), lse
