"""Holds the finished keys and values of a layer's call, and computes attention of its queries to them.

All of it happens on one device: the only one, or one of a mesh, which then has some of the groups and tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gqe_jax.attention.context_parallel import Queries, attend_over_context, chunk_offsets
from gqe_jax.config import AttentionConfig
from gqe_jax.kernels import attend
from gqe_jax.parallel.on_mesh import Shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyValues:
    """Holds one device's keys and values, says which of them a query sees, and how queries are finished.

    Attributes:
      shard: this device's place in the mesh.
      config: the layer's: window, soft cap, implementation, method of context parallelism.
      k, v: finished keys (normed and rotated) and values, [B, T, G, D], or a stacked cache's [L, B, T, G, D].
      rope: cos and sin for the queries, float32 [B or 1, S, D/2] each, or None.
      q_norm: scale [D] and epsilon of the queries' RMS norm, or None.
      segment_ids: int32 [B, S], of queries and keys, or None.
      q_offset: position of the first query, int32 scalar or [B].
      kv_length, layer: the cache's lengths, int32 [B], and its current layer, as `attend` takes them; None without one.
      scale: factor on the scores; None: 1/√D.
    """

    shard: Shard
    config: AttentionConfig
    k: jax.Array
    v: jax.Array
    rope: tuple[jax.Array, jax.Array] | None
    q_norm: tuple[jax.Array, float] | None
    segment_ids: jax.Array | None
    q_offset: jax.Array | int
    kv_length: jax.Array | None
    layer: jax.Array | None
    scale: float | None = None

    @property
    def num_groups(self) -> int:
        """The number of KV heads of this device."""
        return self.k.shape[-2]

    @property
    def shares_itself(self) -> bool:
        """Whether `attend` computes the shared head on this device's part of the mesh."""
        return self.shard.size("expert") == self.shard.size("context") == 1

    @property
    def options(self) -> dict[str, int | float | str | None]:
        """The options of `attend` that the layer's config sets, and the scale."""
        of_config = {name: getattr(self.config, name) for name in ("window", "softcap", "implementation")}
        return of_config | {"scale": self.scale}

    def attend(
        self,
        q: jax.Array,
        expert_index: jax.Array | None = None,
        q_shared: jax.Array | None = None,
        kv_head: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Computes attention of the selected experts' queries.

        Args:
          q: [B, S, G, M, D], the unfinished queries of all experts.
          expert_index: int32 [B, S, G, k], the selected experts; None: all M of each group.
          q_shared: [B, S, D], queries of the shared head; only where `shares_itself`
            (`shared_head.attend_with_shared` sees to the others).
          kv_head: int32 [R], the KV head of each query run, and q is [B, S, R, M, D]; None: run g reads head g.

        Returns:
          o [B, S, G, k, D] (k = M without an index), and with `q_shared` also the shared head's output [B, S, D].
        """
        if self.shard.size("context") > 1:
            chunks = [self._queries(q, expert_index, kv_head, *chunk) for chunk in self.chunks(q.shape[1])]
            return jnp.concatenate(self.attend_chunks(chunks, self.k, self.v), axis=1)
        return attend(
            q, self.k, self.v, expert_index, q_shared=q_shared, kv_head=kv_head, q_offset=self.q_offset,
            kv_length=self.kv_length, layer=self.layer, q_segment_ids=self.segment_ids,
            kv_segment_ids=self.segment_ids, q_rope=self.rope, q_norm=self.q_norm, **self.options,
        )  # fmt: skip

    def chunks(self, length: int) -> list[tuple[slice, jax.Array | int, bool]]:
        """Returns (span, position of its first token, whether it is the late one) of each chunk of the S queries.

        `length` is S. A device holds one chunk, or an early and a late one where `context` splits the sequence.
        """
        if self.shard.size("context") == 1:
            return [(slice(0, length), self.q_offset, False)]
        half = length // 2
        early, late = chunk_offsets(self.shard, half)
        return [(slice(0, half), early, False), (slice(half, length), late, True)]

    def attend_chunks(self, chunks: list[Queries], k: jax.Array, v: jax.Array) -> list[jax.Array]:
        """Computes attention of each chunk of queries to k and v [B, T, G, D], tokens in the order of `self.k`."""
        if self.shard.size("context") > 1:
            return attend_over_context(
                self.shard, chunks, k, v, self.segment_ids, self.q_norm, self.config.context_parallel, **self.options
            )
        return [
            attend(
                chunk.q, k, v, chunk.expert_index, kv_head=chunk.kv_head, q_offset=chunk.offset,
                kv_length=self.kv_length, q_segment_ids=chunk.segment_ids, kv_segment_ids=self.segment_ids,
                q_rope=chunk.rope, q_norm=self.q_norm, **self.options,
            )
            for chunk in chunks
        ]  # fmt: skip

    def _queries(self, q, expert_index, kv_head, span, offset, late) -> Queries:
        return Queries(
            q=q[:, span],
            expert_index=None if expert_index is None else expert_index[:, span],
            kv_head=kv_head,
            rope=jax.tree.map(lambda table: table[:, span], self.rope),
            segment_ids=None if self.segment_ids is None else self.segment_ids[:, span],
            offset=offset,
            late=late,
        )
