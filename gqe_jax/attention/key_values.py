"""Finished keys and values of a call, and attention of its queries to them, on one device of a mesh or the only one."""

import dataclasses

import jax
import jax.numpy as jnp

from gqe_jax.attention.context_parallel import Queries, attend_over_context, chunk_offsets
from gqe_jax.config import AttentionConfig
from gqe_jax.kernels import attend
from gqe_jax.parallel.on_mesh import Shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyValues:
    """K and V of the groups and tokens of one device, which of them a query sees, and what is done to queries first.

    Attributes:
      shard: this device's part: some of the groups, some of the sequence.
      config: of the layer: window, soft cap, implementation, method of context parallelism.
      k, v: finished keys and values, [B, T, G, D], or a stacked cache's [L, B, T, G, D].
      rope: cos and sin for the queries, [B or 1, S, D/2] each, or None.
      q_norm: scale and epsilon of the queries' RMS norm, or None.
      segment_ids: int32 [B, S], of queries and keys, or None.
      q_offset: position of the first query, scalar or [B].
      kv_length, layer: of a cache; see `attend`.
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

    @property
    def num_groups(self) -> int:
        """KV heads of this device."""
        return self.k.shape[-2]

    @property
    def options(self) -> dict[str, int | float | str | None]:
        """`attend`'s options that the layer's config sets."""
        return {name: getattr(self.config, name) for name in ("window", "softcap", "implementation")}

    def attend(
        self, q: jax.Array, expert_index: jax.Array | None = None, q_shared: jax.Array | None = None
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Queries [B, S, G, M, D], selected experts int32 [B, S, G, k] → [B, S, G, k, D]; without an index all M.

        With queries of the shared head, [B, S, D], its output comes as second: for a device that holds all groups and
        tokens. Over several devices it is `shared_head.attend_shared`'s task.
        """
        if self.shard.size("context") > 1:
            chunks = [self._queries(q, expert_index, *chunk) for chunk in self.chunks(q.shape[1])]
            return jnp.concatenate(self.attend_chunks(chunks, self.k, self.v), axis=1)
        return attend(
            q, self.k, self.v, expert_index, q_shared=q_shared, q_offset=self.q_offset, kv_length=self.kv_length,
            layer=self.layer, q_segment_ids=self.segment_ids, kv_segment_ids=self.segment_ids, q_rope=self.rope,
            q_norm=self.q_norm, **self.options,
        )  # fmt: skip

    def chunks(self, length: int) -> list[tuple[slice, jax.Array | int, bool]]:
        """(rows, position of the first, whether late) of the pieces of the sequence that this device holds."""
        if self.shard.size("context") == 1:
            return [(slice(0, length), self.q_offset, False)]
        half = length // 2
        early, late = chunk_offsets(self.shard, half)
        return [(slice(0, half), early, False), (slice(half, length), late, True)]

    def attend_chunks(self, chunks: list[Queries], k: jax.Array, v: jax.Array) -> list[jax.Array]:
        """Attention of each chunk of queries to keys and values [B, T, G, D] that lie as `k` and `v` do."""
        if self.shard.size("context") > 1:
            return attend_over_context(
                self.shard, chunks, k, v, self.segment_ids, self.q_norm, self.config.context_parallel, **self.options
            )
        return [
            attend(
                chunk.q, k, v, chunk.expert_index, q_offset=chunk.offset, kv_length=self.kv_length,
                q_segment_ids=chunk.segment_ids, kv_segment_ids=self.segment_ids, q_rope=chunk.rope,
                q_norm=self.q_norm, **self.options,
            )
            for chunk in chunks
        ]  # fmt: skip

    def _queries(self, q, expert_index, rows, offset, late) -> Queries:
        return Queries(
            q=q[:, rows],
            expert_index=None if expert_index is None else expert_index[:, rows],
            rope=jax.tree.map(lambda table: table[:, rows], self.rope),
            segment_ids=None if self.segment_ids is None else self.segment_ids[:, rows],
            offset=offset,
            late=late,
        )
