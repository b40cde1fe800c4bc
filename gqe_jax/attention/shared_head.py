"""GQE's shared head: one head for all groups, s = Attention(q_s, mean_g K_g, mean_g V_g), and its split over a mesh.

To compute it whole on every device of `expert` would cost as much as a routed slot, so its queries are shared out.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gqe_jax.attention.context_parallel import Queries
from gqe_jax.attention.key_values import KeyValues
from gqe_jax.kernels import make_mask, mean_head, prepare_queries, visible


def attend_with_shared(
    heads: KeyValues, q: jax.Array, expert_index: jax.Array, x: jax.Array, project: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Attention of the selected experts, and of the shared head.

    Args:
      heads: this device's keys and values.
      q, expert_index: as `attend`'s, of this device's groups.
      x: [B, S, d], what the shared head's queries are projected from.
      project: x → queries [B, S, D].

    Returns:
      [B, S, G, k, D], and what this device adds to the shared head's output [B, S, D]: the sum over `expert` is the
      whole.
    """
    if heads.shard.size("expert") == heads.shard.size("context") == 1:
        return heads.attend(q, expert_index, project(x))  # in one call: decoding then reads the cache once
    return heads.attend(q, expert_index), _attend_shared(heads, x, project)


def _attend_shared(heads: KeyValues, x: jax.Array, project: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The summand of one device.

    The n devices on `expert` share out each chunk of the sequence in zigzag, an early and a late piece to each, so
    that all see equally many keys; each adds the rows of its pieces. Fewer than 2n tokens (decoding) cannot be
    shared out: then each adds what the values of its groups do.
    """
    n, place = heads.shard.size("expert"), heads.shard.index("expert")
    if x.shape[1] < 2 * n and n > 1 and heads.shard.size("context") == 1:
        return _attend_few(heads, project(x))
    k, v = _mean_over_devices(heads, heads.k), _mean_over_devices(heads, heads.v)
    results = []
    for rows, offset, late in heads.chunks(x.shape[1]):
        length = rows.stop - rows.start
        piece = length if n == 1 else -(-length // (2 * n))
        padded = length if n == 1 else 2 * n * piece
        places = [0] if n == 1 else [place * piece, (2 * n - 1 - place) * piece]

        def cut(array, start, rows=rows, piece=piece, padded=padded):
            array = array[:, rows]
            tail = padded - array.shape[1]
            array = jnp.pad(array, [(0, 0), (0, tail)] + [(0, 0)] * (array.ndim - 2)) if tail else array
            return jax.lax.dynamic_slice_in_dim(array, start, piece, axis=1)

        chunks = [
            Queries(
                q=project(cut(x, start))[:, :, None, None, :],
                expert_index=None,
                rope=jax.tree.map(lambda table, start=start, cut=cut: cut(table, start), heads.rope),
                segment_ids=None if heads.segment_ids is None else cut(heads.segment_ids, start),
                offset=offset + start,
                late=late,
            )
            for start in places
        ]
        result = jnp.zeros((x.shape[0], padded, v.shape[-1]), v.dtype)
        for start, o in zip(places, heads.attend_chunks(chunks, k, v), strict=True):
            result = jax.lax.dynamic_update_slice_in_dim(result, o[:, :, 0, 0], start, axis=1)
        results.append(result[:, :length])
    return jnp.concatenate(results, axis=1)


def _attend_few(heads: KeyValues, q: jax.Array) -> jax.Array:
    """Queries [B, S, D] of a few tokens → this device's summand of their output.

    A score against the mean key is the mean of the groups' scores: [B, S, T] numbers are summed over `expert`, and not
    the keys and values.
    """
    q = prepare_queries(q[:, :, None, None, :], None, heads.q_norm, heads.rope)[:, :, 0, 0]
    k, v = (mean_head(_own_layer(heads, x))[:, :, 0] / heads.shard.size("expert") for x in (heads.k, heads.v))
    scores = jnp.einsum("bsd,btd->bst", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    scores = heads.shard.sum(scores, "expert")
    if heads.config.softcap is not None:
        scores = heads.config.softcap * jnp.tanh(scores / heads.config.softcap)
    batch, kv_len = k.shape[:2]
    mask = make_mask(
        q.shape[1],
        kv_len,
        q_offset=jnp.broadcast_to(jnp.asarray(heads.q_offset), (batch,)),
        kv_offset=jnp.zeros(batch, jnp.int32),
        kv_length=heads.kv_length,
        q_segment_ids=heads.segment_ids,
        kv_segment_ids=heads.segment_ids,
        window=heads.config.window,
    )
    weights = jax.nn.softmax(scores, where=visible(mask, q.shape[1], kv_len))  # 0 for a row that sees nothing
    return jnp.einsum("bst,btd->bsd", weights.astype(v.dtype), v)


def _mean_over_devices(heads: KeyValues, x: jax.Array) -> jax.Array:
    """Mean of k or v over the groups of all devices, [B, T, 1, D]."""
    return heads.shard.sum(mean_head(_own_layer(heads, x)) / heads.shard.size("expert"), "expert")


def _own_layer(heads: KeyValues, x: jax.Array) -> jax.Array:
    """k or v without the axis of layers of a stacked cache."""
    return x if heads.layer is None else jax.lax.dynamic_index_in_dim(x, heads.layer, keepdims=False)
