"""What the query heads of one call attend to, on one device of a mesh or on the only one."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gqe_jax.attention.context_parallel import Queries, attend_over_context, chunk_offsets
from gqe_jax.kernels import attend, make_mask, mean_head, prepare_queries, visible
from gqe_jax.parallel.manual import Shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """Keys, values and masks of a call, and what becomes of its queries on the way.

    Attributes:
      shard: this device's part: some of the groups, some of the sequence.
      k, v: finished keys and values, [B, T, G, D], or a stacked cache's [L, B, T, G, D].
      rope: cos and sin of the queries, [B or 1, S, D/2] each, or None.
      q_norm: scale and epsilon of the queries' RMS norm, or None.
      segment_ids: int32 [B, S], of queries and keys, or None.
      q_offset: position of the first query, scalar or [B].
      kv_length, layer: of a cache; see `attend`.
      method: of context parallelism.
      options: `attend`'s window, softcap and implementation.
    """

    shard: Shard
    k: jax.Array
    v: jax.Array
    rope: tuple[jax.Array, jax.Array] | None
    q_norm: tuple[jax.Array, float] | None
    segment_ids: jax.Array | None
    q_offset: jax.Array | int
    kv_length: jax.Array | None
    layer: jax.Array | None
    method: str
    options: dict[str, Any]

    @property
    def num_groups(self) -> int:
        """KV heads of this device."""
        return self.k.shape[-2]

    @property
    def is_split(self) -> bool:
        """Whether other devices hold other groups or other tokens."""
        return self.shard.size("expert") > 1 or self.shard.size("context") > 1

    def attend(
        self, q: jax.Array, expert_index: jax.Array | None = None, q_shared: jax.Array | None = None
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Queries [B, S, G, M, D], selected experts int32 [B, S, G, k] → [B, S, G, k, D]; without an index all M.

        With queries of the shared head, [B, S, D], its output comes as second: for a device that holds all groups and
        tokens. Else that is the task of `attend_shared`.
        """
        if self.shard.size("context") > 1:
            chunks = [self._queries(q, expert_index, *chunk) for chunk in self._chunks(q.shape[1])]
            return jnp.concatenate(self._attend(chunks, self.k, self.v), axis=1)
        return attend(
            q, self.k, self.v, expert_index, q_shared=q_shared, q_offset=self.q_offset, kv_length=self.kv_length,
            layer=self.layer, q_segment_ids=self.segment_ids, kv_segment_ids=self.segment_ids, q_rope=self.rope,
            q_norm=self.q_norm, **self.options,
        )  # fmt: skip

    def attend_shared(self, x: jax.Array, project: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """What this device adds to the shared head's output [B, S, D]; the sum over `expert` is the whole.

        The n devices on `expert` share out each chunk of the sequence in zigzag, an early and a late piece to each, so
        that all see equally many keys; each adds the rows of its pieces. Fewer than 2n tokens (decoding) cannot be
        shared out: then each adds what the values of its groups do.

        Args:
          x: [B, S, d].
          project: x → queries [B, S, D].
        """
        n, place = self.shard.size("expert"), self.shard.index("expert")
        if x.shape[1] < 2 * n and n > 1 and self.shard.size("context") == 1:
            return self._attend_shared_few(project(x))
        k, v = self._shared_head(self.k), self._shared_head(self.v)
        results = []
        for rows, offset, late in self._chunks(x.shape[1]):
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
                    rope=jax.tree.map(lambda table, start=start, cut=cut: cut(table, start), self.rope),
                    segment_ids=None if self.segment_ids is None else cut(self.segment_ids, start),
                    offset=offset + start,
                    late=late,
                )
                for start in places
            ]
            result = jnp.zeros((x.shape[0], padded, v.shape[-1]), v.dtype)
            for start, o in zip(places, self._attend(chunks, k, v), strict=True):
                result = jax.lax.dynamic_update_slice_in_dim(result, o[:, :, 0, 0], start, axis=1)
            results.append(result[:, :length])
        return jnp.concatenate(results, axis=1)

    def _attend_shared_few(self, q: jax.Array) -> jax.Array:
        """Queries [B, S, D] of a few tokens → this device's summand of their output.

        A score against the mean key is the mean of the groups' scores: [B, S, T] numbers are summed over `expert`,
        and not the keys and values.
        """
        q = prepare_queries(q[:, :, None, None, :], None, self.q_norm, self.rope)[:, :, 0, 0]
        k, v = (mean_head(self._own_layer(x))[:, :, 0] / self.shard.size("expert") for x in (self.k, self.v))
        scores = jnp.einsum("bsd,btd->bst", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
        scores = self.shard.sum(scores, "expert")
        if self.options["softcap"] is not None:
            scores = self.options["softcap"] * jnp.tanh(scores / self.options["softcap"])
        batch, kv_len = k.shape[:2]
        mask = make_mask(
            q.shape[1],
            kv_len,
            q_offset=jnp.broadcast_to(jnp.asarray(self.q_offset), (batch,)),
            kv_offset=jnp.zeros(batch, jnp.int32),
            kv_length=self.kv_length,
            q_segment_ids=self.segment_ids,
            kv_segment_ids=self.segment_ids,
            window=self.options["window"],
        )
        weights = jax.nn.softmax(scores, where=visible(mask, q.shape[1], kv_len))  # 0 for a row that sees nothing
        return jnp.einsum("bst,btd->bsd", weights.astype(v.dtype), v)

    def _shared_head(self, x: jax.Array) -> jax.Array:
        """Mean over the groups of all devices, [B, T, 1, D]."""
        return self.shard.sum(mean_head(self._own_layer(x)) / self.shard.size("expert"), "expert")

    def _own_layer(self, x: jax.Array) -> jax.Array:
        """k or v without the axis of layers of a stacked cache."""
        return x if self.layer is None else jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False)

    def _chunks(self, length: int) -> list[tuple[slice, jax.Array | int, bool]]:
        """(rows, position of the first, whether late) of the pieces of the sequence that this device holds."""
        if self.shard.size("context") == 1:
            return [(slice(0, length), self.q_offset, False)]
        half = length // 2
        early, late = chunk_offsets(self.shard, half)
        return [(slice(0, half), early, False), (slice(half, length), late, True)]

    def _queries(self, q, expert_index, rows, offset, late) -> Queries:
        return Queries(
            q=q[:, rows],
            expert_index=None if expert_index is None else expert_index[:, rows],
            rope=jax.tree.map(lambda table: table[:, rows], self.rope),
            segment_ids=None if self.segment_ids is None else self.segment_ids[:, rows],
            offset=offset,
            late=late,
        )

    def _attend(self, chunks: list[Queries], k: jax.Array, v: jax.Array) -> list[jax.Array]:
        if self.shard.size("context") > 1:
            return attend_over_context(
                self.shard, chunks, k, v, self.segment_ids, self.q_norm, self.method, **self.options
            )
        return [
            attend(
                chunk.q, k, v, chunk.expert_index, q_offset=chunk.offset, kv_length=self.kv_length,
                q_segment_ids=chunk.segment_ids, kv_segment_ids=self.segment_ids, q_rope=chunk.rope,
                q_norm=self.q_norm, **self.options,
            )
            for chunk in chunks
        ]  # fmt: skip
