"""Attention over a sequence that is spread over devices: keys and values gathered, or passed round a ring.

Each of n devices holds an early and a late chunk of the sequence (`parallel.zigzag`), so that a causal mask leaves all
of them the same work. Both forms equal attention over the whole sequence, gradients included.
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
"""Above this size of one layer's gathered keys and values "auto" takes the ring."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Queries:
    """Consecutive queries of one chunk.

    Attributes:
      q: [B, S, G, M, D].
      expert_index: int32 [B, S, G, k], or None.
      rope: cos and sin, [B or 1, S, D/2] each, or None.
      segment_ids: int32 [B, S], or None.
      offset: int32 scalar, position of the first of them in the sequence.
      late: whether they belong to the device's late chunk.
    """

    q: jax.Array
    expert_index: jax.Array | None
    rope: tuple[jax.Array, jax.Array] | None
    segment_ids: jax.Array | None
    offset: jax.Array
    late: bool = dataclasses.field(metadata={"static": True})


def chunk_offsets(shard: Shard, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Positions of the first token of this device's early and late chunk of `chunk` tokens."""
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
    """Causal attention of this device's queries to the keys of all devices on `context`.

    Args:
      k, v: [B, T / n, G, D], this device's early and late chunk.
      segment_ids: int32 [B, T / n], of the keys.
      q_norm: as `attend`'s.
      method: "gather" holds the keys and values of the whole sequence on every device; "ring" those of one device at a
        time, and computes the parts' attention once more in the backward pass. "auto" gathers up to `GATHERED_BYTES`.
      **options: window, softcap and implementation of `attend`.

    Returns:
      o [B, S, G, k, D] for each of `queries`.
    """
    n = shard.size("context")
    if method == "auto":
        method = "gather" if 2 * n * k.size * k.dtype.itemsize <= GATHERED_BYTES else "ring"
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
            kv_segment_ids=segment_ids, q_rope=chunk.rope, q_norm=q_norm, **options,
        )
        for chunk in queries
    ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Ring:
    """What is known when tracing: the mesh, epsilon of the queries' norm, and options of `attend`."""

    shard: Shard
    eps: float | None
    options: tuple[tuple[str, Any], ...]

    def pass_on(self, tree: Any) -> Any:
        """Sends a tree of arrays to the next device and returns what came from the one before."""
        n = self.shard.size("context")
        return jax.lax.ppermute(tree, "context", [(r, (r + 1) % n) for r in range(n)])

    def parts(self, queries: Queries, k, v, segment_ids, step) -> list[tuple[Any, ...]]:
        """(k, v, segment ids, offset, slice) of the held chunks that these queries can see, `step` passes on."""
        n, chunk = self.shard.size("context"), k.shape[1] // 2
        source = (self.shard.index("context") - step) % n
        offsets = (source * chunk, (2 * n - 1 - source) * chunk)
        rows = (slice(0, chunk), slice(chunk, None))
        seen = zip(rows, offsets, strict=True) if queries.late else [(rows[0], offsets[0])]
        return [
            (k[:, at], v[:, at], None if segment_ids is None else segment_ids[:, at], offset, at) for at, offset in seen
        ]

    def attend(self, q, k, v, scale, queries: Queries, segment_ids, offset) -> tuple[jax.Array, jax.Array]:
        """(o, lse) over one chunk of keys."""
        return attend(
            q, k, v, queries.expert_index, q_offset=queries.offset, kv_offset=offset,
            q_segment_ids=queries.segment_ids, kv_segment_ids=segment_ids, q_rope=queries.rope,
            q_norm=None if scale is None else (scale, self.eps), return_lse=True, **dict(self.options),
        )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring_attention(ring: _Ring, qs, k, v, scale, queries, segment_ids):
    return _ring_forward(ring, qs, k, v, scale, queries, segment_ids)[0]


def _ring_forward(ring: _Ring, qs, k, v, scale, queries, segment_ids):
    def add(results, held, step):
        merged = []
        for q, chunk, (o, lse) in zip(qs, queries, results, strict=True):
            for k_part, v_part, ids, offset, _ in ring.parts(chunk, *held, step):
                part, part_lse = ring.attend(q, k_part, v_part, scale, chunk, ids, offset)
                o, lse = merge_partials(o, lse, part.astype(jnp.float32), part_lse)
            merged.append((o, lse))
        return merged

    def turn(carry, step):
        results, held = carry
        held = ring.pass_on(held)
        return (add(results, held, step), held), None

    nothing = []
    for q, chunk in zip(qs, queries, strict=True):
        slots = q.shape[3] if chunk.expert_index is None else chunk.expert_index.shape[3]
        shape = (*q.shape[:3], slots, q.shape[4])
        nothing.append((jnp.zeros(shape, jnp.float32), jnp.full(shape[:-1], EMPTY_LSE, jnp.float32)))
    held = (k, v, segment_ids)
    steps = jnp.arange(1, ring.shard.size("context"))
    (results, _), _ = jax.lax.scan(turn, (add(nothing, held, 0), held), steps)
    outputs = [o.astype(q.dtype) for q, (o, _) in zip(qs, results, strict=True)]
    return outputs, (qs, k, v, scale, queries, segment_ids, outputs, [lse for _, lse in results])


def _ring_backward(ring: _Ring, saved, cotangents):
    """Each part's share of the softmax is w = exp(lse_part − lse): do_part = w·do, dlse_part = w·(do·(o_part − o))."""
    qs, k, v, scale, queries, segment_ids, outputs, lses = saved

    def add(grads, held, dkv, step):
        dqs, dscale = grads
        dk, dv = dkv
        updated = []
        for q, chunk, o, lse, do, dq in zip(qs, queries, outputs, lses, cotangents, dqs, strict=True):
            do = do.astype(jnp.float32)
            for k_part, v_part, ids, offset, at in ring.parts(chunk, *held, step):
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

    def turn(carry, step):
        grads, held, dkv = carry
        held, dkv = ring.pass_on((held, dkv))
        grads, dkv = add(grads, held, dkv, step)
        return (grads, held, dkv), None

    zeros = [jnp.zeros(q.shape, jnp.float32) for q in qs], None if scale is None else jnp.zeros_like(scale)
    held = (k, v, segment_ids)
    dkv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    grads, dkv = add(zeros, held, dkv, 0)
    steps = jnp.arange(1, ring.shard.size("context"))
    ((dqs, dscale), _, dkv), _ = jax.lax.scan(turn, (grads, held, dkv), steps)
    dk, dv = ring.pass_on(dkv)  # once more, and they are home
    dqs = tuple(dq.astype(q.dtype) for dq, q in zip(dqs, qs, strict=True))
    return dqs, dk.astype(k.dtype), dv.astype(v.dtype), dscale, None, None


_ring_attention.defvjp(_ring_forward, _ring_backward)
