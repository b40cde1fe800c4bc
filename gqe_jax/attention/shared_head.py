"""Computes GQE's shared head, s = Attention(q_s, mean_g K_g, mean_g V_g), and splits it over a mesh.

It is one head for all groups. To compute it whole on every device of `expert` would cost each device as much as a
routed slot, so the devices share out its queries.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gqe_jax.attention.context_parallel import Queries
from gqe_jax.attention.key_values import KeyValues
from gqe_jax.kernels import make_mask, mean_head, prepare_queries, visible


def attend_with_shared(
    kv: KeyValues, q: jax.Array, expert_index: jax.Array, x: jax.Array, project: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Computes attention of the selected experts and of the shared head.

    Args:
      kv: this device's keys and values.
      q: [B, S, G, M, D], queries of all experts of this device's groups.
      expert_index: int32 [B, S, G, k], the selected ones.
      x: [B, S, d], the input that the shared head's queries are projected from.
      project: x → queries [B, S, D].

    Returns:
      o [B, S, G, k, D], and this device's summand of the shared head's output s [B, S, D]: their sum over the devices
      on `expert` is s.
    """
    if kv.shares_itself:
        return kv.attend(q, expert_index, project(x))  # in one call: decoding then reads the cache once
    return kv.attend(q, expert_index), _attend_shared(kv, x, project)


def _attend_shared(kv: KeyValues, x: jax.Array, project: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Computes this device's summand of the shared head's output, [B, S, D].

    The n devices on `expert` share out each chunk of the sequence in zigzag order, an early and a late piece to each,
    so that all have equally many keys to see; a device's summand is zero outside its pieces. Fewer than 2n tokens
    (decoding) cannot be shared out like this: `_attend_few` splits them by groups.
    """
    n, place = kv.shard.size("expert"), kv.shard.index("expert")
    if x.shape[1] < 2 * n and n > 1 and kv.shard.size("context") == 1:
        return _attend_few(kv, project(x))
    k, v = _mean_over_devices(kv, kv.k), _mean_over_devices(kv, kv.v)
    results = []
    for span, offset, late in kv.chunks(x.shape[1]):
        length = span.stop - span.start
        piece = length if n == 1 else -(-length // (2 * n))
        padded = length if n == 1 else 2 * n * piece
        places = [0] if n == 1 else [place * piece, (2 * n - 1 - place) * piece]

        def cut(array, start, span=span, piece=piece, padded=padded):
            array = array[:, span]
            tail = padded - array.shape[1]
            array = jnp.pad(array, [(0, 0), (0, tail)] + [(0, 0)] * (array.ndim - 2)) if tail else array
            return jax.lax.dynamic_slice_in_dim(array, start, piece, axis=1)

        chunks = [
            Queries(
                q=project(cut(x, start))[:, :, None, None, :],
                expert_index=None,
                rope=jax.tree.map(lambda table, start=start, cut=cut: cut(table, start), kv.rope),
                segment_ids=None if kv.segment_ids is None else cut(kv.segment_ids, start),
                offset=offset + start,
                late=late,
            )
            for start in places
        ]
        result = jnp.zeros((x.shape[0], padded, v.shape[-1]), v.dtype)
        for start, o in zip(places, kv.attend_chunks(chunks, k, v), strict=True):
            result = jax.lax.dynamic_update_slice_in_dim(result, o[:, :, 0, 0], start, axis=1)
        results.append(result[:, :length])
    return jnp.concatenate(results, axis=1)


def _attend_few(kv: KeyValues, q: jax.Array) -> jax.Array:
    """Computes this device's summand of the output [B, S, D] from queries [B, S, D] of a few tokens.

    A score against the mean key is the mean of the scores against the groups' keys. So the devices on `expert` sum
    [B, S, T] scores, which are fewer numbers than keys and values.
    """
    q = prepare_queries(q[:, :, None, None, :], None, kv.q_norm, kv.rope)[:, :, 0, 0]
    k, v = (mean_head(_own_layer(kv, x))[:, :, 0] / kv.shard.size("expert") for x in (kv.k, kv.v))
    scores = jnp.einsum("bsd,btd->bst", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    scores = kv.shard.sum(scores, "expert")
    if kv.config.softcap is not None:
        scores = kv.config.softcap * jnp.tanh(scores / kv.config.softcap)
    batch, kv_len = k.shape[:2]
    mask = make_mask(
        q.shape[1],
        kv_len,
        q_offset=jnp.broadcast_to(jnp.asarray(kv.q_offset), (batch,)),
        kv_offset=jnp.zeros(batch, jnp.int32),
        kv_length=kv.kv_length,
        q_segment_ids=kv.segment_ids,
        kv_segment_ids=kv.segment_ids,
        window=kv.config.window,
    )
    weights = jax.nn.softmax(scores, where=visible(mask, q.shape[1], kv_len))  # 0 for a row that sees nothing
    return jnp.einsum("bst,btd->bsd", weights.astype(v.dtype), v)


def _mean_over_devices(kv: KeyValues, x: jax.Array) -> jax.Array:
    """Returns the mean of k or v over the groups of all devices, [B, T, 1, D]."""
    return kv.shard.sum(mean_head(_own_layer(kv, x)) / kv.shard.size("expert"), "expert")


def _own_layer(kv: KeyValues, x: jax.Array) -> jax.Array:
    """Returns the current layer's part of k or v where they are a stacked cache's, else k or v itself."""
    return x if kv.layer is None else jax.lax.dynamic_index_in_dim(x, kv.layer, keepdims=False)
