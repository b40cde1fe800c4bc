"""Computes attention over a sequence that is split over devices: keys and values are gathered, or go round a ring.

Each of the n devices on `context` holds an early and a late chunk of the sequence (`parallel.zigzag`), so that a causal
mask leaves all of them the same work. Both methods equal attention over the whole sequence, gradients included. The
ring is ring attention (Liu et al. 2023): after each of n − 1 hops every device attends to another device's keys, and
`merge_partials` combines the results.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from gqe_jax.kernels import EMPTY_LSE, attend, merge_partials
from gqe_jax.parallel.on_mesh import Shard
from gqe_jax.parallel.zigzag import natural

GATHERED_BYTES = 1 << 30
"""The largest size in bytes of one layer's gathered keys and values at which "auto" gathers them."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Queries:
    """Holds the queries of one chunk, or of a piece of it, with all that `attend` takes for each query.

    Attributes:
      q: [B, S, G, M, D].
      expert_index: int32 [B, S, G, k], or None.
      kv_head: int32, the KV head of each query run, or None.
      rope: cos and sin, float32 [B or 1, S, D/2] each, or None.
      segment_ids: int32 [B, S], or None.
      offset: int32 scalar, position of the first query in the sequence.
      late: whether the chunk is the device's late one.
    """

    q: jax.Array
    expert_index: jax.Array | None
    kv_head: jax.Array | None = None
    rope: tuple[jax.Array, jax.Array] | None
    segment_ids: jax.Array | None
    offset: jax.Array
    late: bool = dataclasses.field(metadata={"static": True})


def chunk_offsets(shard: Shard, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Returns the positions of the first token of this device's early and of its late chunk of `chunk` tokens."""
    n, r = shard.size("context"), shard.index("context")
    return r * chunk, (2 * n - 1 - r) * chunk


def attend_over_context(
    shard: Shard,
    queries: Sequence[Queries],
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    q_norm: tuple[jax.Array, float] | None,
    method: Literal["auto", "gather", "ring"],
    **options: Any,
) -> list[jax.Array]:
    """Computes causal attention of this device's queries to the keys of all devices on `context`.

    Args:
      shard: this device's place in the mesh.
      queries: this device's chunks of queries, or pieces of them.
      k, v: [B, T / n, G, D], this device's early chunk, then its late one.
      segment_ids: int32 [B, T / n], of the keys, or None.
      q_norm: (scale [D], epsilon) or None, as in `attend`.
      method: "gather" holds the keys and values of the whole sequence on every device. "ring" holds those of one other
        device at a time, and computes attention to each chunk again in the backward pass. "auto" gathers up to
        `GATHERED_BYTES`.
      **options: window, softcap and implementation of `attend`.

    Returns:
      o [B, S, G, k, D] for each of `queries`.
    """
    n = shard.size("context")
    if method == "auto":
        method = "gather" if n * (k.size + v.size) * k.dtype.itemsize <= GATHERED_BYTES else "ring"
    if method == "ring":
        scale, eps = (None, None) if q_norm is None else q_norm
        ring = _Ring(shard, eps, tuple(sorted(options.items())))
        rest = tuple(dataclasses.replace(chunk, q=None) for chunk in queries)
        return _ring_attention(ring, tuple(chunk.q for chunk in queries), k, v, scale, rest, segment_ids)
    k, v = (natural(shard.gather(x, "context", 1), n) for x in (k, v))
    if segment_ids is not None:
        segment_ids = natural(shard.gather(segment_ids, "context", 1), n)
    return [
        attend(
            chunk.q, k, v, chunk.expert_index, q_offset=chunk.offset, q_segment_ids=chunk.segment_ids,
            kv_segment_ids=segment_ids, kv_head=chunk.kv_head, q_rope=chunk.rope, q_norm=q_norm, **options,
        )
        for chunk in queries
    ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Holds what ring attention knows when it is traced: the mesh, the norm's epsilon and the options of `attend`."""

    shard: Shard
    eps: float | None
    options: tuple[tuple[str, Any], ...]

    def pass_on(self, tree: Any) -> Any:
        """Sends a tree of arrays to the next device and returns what came from the one before."""
        n = self.shard.size("context")
        return jax.lax.ppermute(tree, "context", [(r, (r + 1) % n) for r in range(n)])

    def chunks(self, queries: Queries, k, v, segment_ids, hops) -> list[tuple[Any, ...]]:
        """Returns (k, v, segment ids, offset, slice) of the held chunks that the queries can see after `hops` hops."""
        n, chunk = self.shard.size("context"), k.shape[1] // 2
        source = (self.shard.index("context") - hops) % n
        offsets = (source * chunk, (2 * n - 1 - source) * chunk)
        spans = (slice(0, chunk), slice(chunk, None))
        seen = zip(spans, offsets, strict=True) if queries.late else [(spans[0], offsets[0])]
        return [
            (k[:, at], v[:, at], None if segment_ids is None else segment_ids[:, at], offset, at) for at, offset in seen
        ]

    def attend(self, q, k, v, scale, queries: Queries, segment_ids, offset) -> tuple[jax.Array, jax.Array]:
        """Returns (o, lse) of the queries over one chunk of keys."""
        return attend(
            q, k, v, queries.expert_index, q_offset=queries.offset, kv_offset=offset,
            q_segment_ids=queries.segment_ids, kv_segment_ids=segment_ids, kv_head=queries.kv_head, q_rope=queries.rope,
            q_norm=None if scale is None else (scale, self.eps), return_lse=True, **dict(self.options),
        )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring_attention(ring: _Ring, qs, k, v, scale, queries, segment_ids):
    return _ring_forward(ring, qs, k, v, scale, queries, segment_ids)[0]


def _ring_forward(ring: _Ring, qs, k, v, scale, queries, segment_ids):
    def add(results, held, hops):
        merged = []
        for q, chunk, (o, lse) in zip(qs, queries, results, strict=True):
            for k_part, v_part, ids, offset, _ in ring.chunks(chunk, *held, hops):
                part, part_lse = ring.attend(q, k_part, v_part, scale, chunk, ids, offset)
                o, lse = merge_partials(o, lse, part.astype(jnp.float32), part_lse)
            merged.append((o, lse))
        return merged

    def turn(carry, hops):
        results, held = carry
        held = ring.pass_on(held)
        return (add(results, held, hops), held), None

    nothing = []
    for q, chunk in zip(qs, queries, strict=True):
        slots = q.shape[3] if chunk.expert_index is None else chunk.expert_index.shape[3]
        shape = (*q.shape[:3], slots, v.shape[-1])
        nothing.append((jnp.zeros(shape, jnp.float32), jnp.full(shape[:-1], EMPTY_LSE, jnp.float32)))
    held = (k, v, segment_ids)
    all_hops = jnp.arange(1, ring.shard.size("context"))
    (results, _), _ = jax.lax.scan(turn, (add(nothing, held, 0), held), all_hops)
    outputs = [o.astype(q.dtype) for q, (o, _) in zip(qs, results, strict=True)]
    return outputs, (qs, k, v, scale, queries, segment_ids, outputs, [lse for _, lse in results])


def _ring_backward(ring: _Ring, saved, cotangents):
    """Sums the gradients over the chunks of keys, whose dk and dv travel round the ring with them.

    The share of one chunk ("part") in the softmax is w = exp(lse_part − lse): do_part = w·do and
    dlse_part = w·(do·(o_part − o)).
    """
    qs, k, v, scale, queries, segment_ids, outputs, lses = saved

    def add(grads, held, dkv, hops):
        dqs, dscale = grads
        dk, dv = dkv
        updated = []
        for q, chunk, o, lse, do, dq in zip(qs, queries, outputs, lses, cotangents, dqs, strict=True):
            do = do.astype(jnp.float32)
            for k_part, v_part, ids, offset, at in ring.chunks(chunk, *held, hops):
                part = functools.partial(ring.attend, queries=chunk, segment_ids=ids, offset=offset)
                (part_o, part_lse), vjp = jax.vjp(part, q, k_part, v_part, scale)
                weight = jnp.exp(part_lse - lse)
                difference = part_o.astype(jnp.float32) - o.astype(jnp.float32)
                dlse = weight * jnp.sum(do * difference, axis=-1)
                part_dq, part_dk, part_dv, part_dscale = vjp(((weight[..., None] * do).astype(q.dtype), dlse))
                dq += part_dq
                dk, dv = dk.at[:, at].add(part_dk), dv.at[:, at].add(part_dv)
                dscale = None if scale is None else dscale + part_dscale
            updated.append(dq)
        return (updated, dscale), (dk, dv)

    def turn(carry, hops):
        grads, held, dkv = carry
        held, dkv = ring.pass_on((held, dkv))
        grads, dkv = add(grads, held, dkv, hops)
        return (grads, held, dkv), None

    zeros = [jnp.zeros(q.shape, jnp.float32) for q in qs], None if scale is None else jnp.zeros_like(scale)
    held = (k, v, segment_ids)
    dkv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    grads, dkv = add(zeros, held, dkv, 0)
    all_hops = jnp.arange(1, ring.shard.size("context"))
    ((dqs, dscale), _, dkv), _ = jax.lax.scan(turn, (grads, held, dkv), all_hops)
    dk, dv = ring.pass_on(dkv)  # the n-th hop brings them back to the device that owns the keys
    dqs = tuple(dq.astype(q.dtype) for dq, q in zip(dqs, qs, strict=True))
    return dqs, dk.astype(k.dtype), dv.astype(v.dtype), dscale, None, None


_ring_attention.defvjp(_ring_forward, _ring_backward)
