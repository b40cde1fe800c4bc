"""Computes attention in a few lines of jnp, float32 throughout; faster implementations are tested against it."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gqe_jax.kernels.mask import Mask, visible
from gqe_jax.kernels.partials import EMPTY_LSE
from gqe_jax.kernels.queries import prepare_queries
from gqe_jax.remat import ATTENTION_LSE, ATTENTION_OUT


def reference(
    q, k, v, expert_index, mask: Mask, *, kv_head=None, q_rope, q_norm, softcap, scale
) -> tuple[jax.Array, jax.Array]:
    """Computes softmax(scale · q kᵀ) v over the visible keys, with [S, T] arrays; arguments as in `IMPLEMENTATIONS`.

    Returns:
      o [B, S, R, K, Dv] in q's dtype, lse float32 [B, S, R, K].
    """
    dtype = q.dtype
    seen = visible(mask, q.shape[1], k.shape[1])[:, :, None, None, :]
    any_seen = jnp.any(seen, axis=-1)
    q = prepare_queries(jnp.where(any_seen[..., None], q, 0), expert_index, q_norm, q_rope)
    # A key that no query sees is 0: products with float32's maximum overflow, and 0 · infinity is NaN.
    k, v = (jnp.where(jnp.any(seen, axis=1)[:, 0, 0, :, None, None], x, 0) for x in (k, v))
    if kv_head is not None:
        k, v = (x[:, :, kv_head] for x in (k, v))
    (q, q_nan), (k, k_nan), (v, v_nan) = (_nan_apart(x.astype(jnp.float32)) for x in (q, k, v))
    # Hidden scores are 0 before anything is computed from them: their derivatives are then 0, and not 0 · infinity.
    scores = jnp.where(seen, scale * jnp.einsum("bsgkd,btgd->bsgkt", q, k, precision="highest"), 0.0)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores += q_nan[..., None] + jnp.moveaxis(k_nan + v_nan, 1, 2)[:, None, :, None, :]
    # Rows that see nothing are softmaxed unmasked and discarded, so that their gradient is 0 and not 0/0.
    scores = jnp.where(seen, scores, jnp.where(any_seen[..., None], -jnp.inf, 0.0))
    o = jnp.einsum("bsgkt,btgd->bsgkd", jax.nn.softmax(scores), v, precision="highest")
    o = jnp.where(any_seen[..., None], o, 0.0)
    lse = jnp.where(any_seen, jax.nn.logsumexp(scores, axis=-1), EMPTY_LSE)
    return checkpoint_name(o.astype(dtype), ATTENTION_OUT), checkpoint_name(lse, ATTENTION_LSE)


def _nan_apart(x):
    """Returns x with zeros in place of what is not finite, and [...] NaN for a vector that had such an element, else 0.

    As 0 · NaN is NaN, a hidden key of NaN would reach every query through a matmul; a NaN in a score can be hidden.
    """
    finite = jnp.isfinite(x)
    return jnp.where(finite, x, 0.0), jnp.where(jnp.all(finite, axis=-1), 0.0, jnp.nan)
