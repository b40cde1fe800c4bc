"""Combines attention over parts of the keys (ring attention, split caches) by their log-sum-exps."""

import jax
import jax.numpy as jnp

EMPTY_LSE = -1e30
"""Log-sum-exp of a query that sees no key: finite, so that merging and differentiating it gives no NaN."""


def merge_partials(
    o: jax.Array, lse: jax.Array, o2: jax.Array, lse2: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes attention over the union of two disjoint sets of keys from the attention over each.

    lse' = log(e^lse + e^lse2), o' = o·e^(lse − lse') + o2·e^(lse2 − lse'), in float32. The merge is associative, and
    a part in which a query saw nothing (o = 0, lse = `EMPTY_LSE`) leaves the other unchanged.

    Args:
      o, o2: [..., D].
      lse, lse2: float32 [...], natural logarithm, as `attend(..., return_lse=True)` returns them.

    Returns:
      o' in o's dtype and lse' float32.
    """
    merged_lse = jnp.logaddexp(lse, lse2)
    weight, weight2 = jnp.exp(lse - merged_lse)[..., None], jnp.exp(lse2 - merged_lse)[..., None]
    merged = o.astype(jnp.float32) * weight + o2.astype(jnp.float32) * weight2
    return merged.astype(o.dtype), merged_lse
