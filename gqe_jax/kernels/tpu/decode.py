"""Decode on TPUs: a few new tokens against a long cache, every byte of the filled cache read once.

Reading the cache is all the cost of decoding, so the kernel reads each block of it once, as it lies in memory, for all
heads: the routed ones and the shared one.

- K and V are taken as [B, T · G, D], row t · G + g. One matmul multiplies the queries of all heads with the keys of all
  KV heads, and a mask keeps each query's own (`kv_head`). Where a KV head has few queries this costs no more than a
  matmul for each, whose rows would be padded to eight, and no head has to be picked out of the tiles of the cache.
- Heads that do not fill whole rows of 128 lanes lie side by side (`heads_side_by_side`), the queries of each with zeros
  in the lanes of the others.
- The shared head attends to the mean of the groups' keys and values. Both are linear: q · mean_g K_g = mean_g q · K_g,
  so its scores are means over the neighbouring columns of a token, and its output sums over all columns. The mean is
  exact in float32; nothing is read or stored for it.
- Blocks before the window and beyond the filled part are neither fetched nor computed: the grid is as long as the
  longest row of the batch needs, and a shorter row's index map stays on its last block.

Axes beyond the usual alphabet: N is rows of queries (position, run, slot), then those of the shared head; L is
columns of a block, token-major (token · rows of a token + row); W and Wv are lanes of such a row of K and of V.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gqe_jax.kernels.mask import Mask
from gqe_jax.kernels.mesh_axes import result
from gqe_jax.kernels.partials import EMPTY_LSE
from gqe_jax.kernels.queries import prepare_queries
from gqe_jax.kernels.tpu.plan import LOG2_E
from gqe_jax.kernels.tpu.tiles import dot, finite, mark_not_finite
from gqe_jax.rounding import ceil_div, round_up
from gqe_jax.tpu import LANES, SUBLANES

if typing.TYPE_CHECKING:
    from gqe_jax.kernels.choose import Call

MAX_ROWS = 64  # of all KV heads together: above it the columns of other heads, computed in vain, begin to cost
MAX_ROWS_OF_ONE = 256  # where there is one KV head, and nothing is computed in vain
MAX_MEAN_WIDTH = 1024  # of the matrix that takes the means over groups
BLOCK_BYTES = 2**20  # of K and of V each
SCORE_BYTES = 2**20  # of all rows against a block
VMEM_LIMIT_BYTES = 40 * 2**20


@dataclasses.dataclass(frozen=True)
class _DecodePlan:
    """Holds what is static about one call."""

    scale: float
    softcap: float | None
    causal: bool
    window: int | None
    q_len: int
    kv_len: int
    num_runs: int
    num_slots: int
    num_kv_heads: int
    side_by_side: int  # KV heads in one row of the cache
    width: int  # of a row of K, in lanes
    value_width: int
    has_shared: bool
    has_unread: bool  # there may be KV heads that no run reads
    block_kv: int

    @property
    def token_rows(self) -> int:
        """Rows of K, and of V, that one token has."""
        return self.num_kv_heads // self.side_by_side

    @property
    def routed_rows(self) -> int:
        return round_up(self.q_len * self.num_runs * self.num_slots, SUBLANES)

    @property
    def rows(self) -> int:
        return self.routed_rows + (round_up(self.q_len, SUBLANES) if self.has_shared else 0)

    @property
    def columns(self) -> int:
        return self.block_kv * self.token_rows


def heads_side_by_side(num_kv_heads: int, head_dim: int, value_dim: int | None = None) -> int:
    """Says how many KV heads lie side by side in a row of the cache: as few as fill 128 lanes, or else all of them.

    Where a row has whole vectors of 128 lanes, XLA lays the cache out as the kernel reads it; any other is copied at
    every step.
    """
    widths = (head_dim, head_dim if value_dim is None else value_dim)
    if all(width % LANES == 0 for width in widths):
        return 1
    heads = max(LANES // head_dim, 1)
    fills = num_kv_heads % heads == 0 and all(heads * width == LANES for width in widths)
    return heads if fills else num_kv_heads


def obstacle(call: Call) -> str | None:
    """Why this kernel cannot compute a call on a TPU; None where it can."""
    rows, most = call.q_len * call.num_runs * call.num_slots, MAX_ROWS if call.num_kv_heads > 1 else MAX_ROWS_OF_ONE
    if not call.kv_length:
        return "pallas_tpu_decode reads a cache: it needs kv_length"
    if rows > most:
        return f"pallas_tpu_decode takes few new tokens: S · R · K = {rows} exceeds {most}"
    token_rows = call.num_kv_heads // heads_side_by_side(call.num_kv_heads, call.head_dim, call.value_dim)
    if math.lcm(LANES, token_rows) > MAX_MEAN_WIDTH:
        return f"pallas_tpu_decode takes a power of two of rows for a token, or up to 7 times one, not {token_rows}"
    if call.segments:
        return "pallas_tpu_decode has no segment ids"
    if call.dtype not in ("float32", "bfloat16"):
        return f"pallas_tpu_decode takes float32 and bfloat16, not {call.dtype}"
    if call.partitioned:
        return "XLA cannot split pallas_tpu_decode over devices: call it within jax.shard_map"
    return None


@functools.partial(jax.jit, static_argnames=("softcap", "scale", "block_kv"))
def decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    expert_index: jax.Array | None,
    mask: Mask,
    *,
    kv_head: jax.Array | None = None,
    q_rope: tuple[jax.Array, jax.Array] | None,
    q_norm: tuple[jax.Array, float] | None,
    softcap: float | None,
    scale: float,
    q_shared: jax.Array | None = None,
    layer: jax.Array | None = None,
    block_kv: int | None = None,
) -> tuple[jax.Array, ...]:
    """A few queries against a cache, routed heads and shared head in one pass over it. Has no gradient.

    Args:
      q, k, v, expert_index, q_shared, layer and the other keywords: as in `attend`; there must be no `obstacle`.
      block_kv: tokens per block; by default as many as make 1 MiB of K.

    Returns:
      o [B, S, G, K, D], lse float32 [B, S, G, K], and with `q_shared` the shared head's output [B, S, D].
    """
    q = prepare_queries(q, expert_index, q_norm, q_rope)
    batch, q_len, num_runs, num_slots, head_dim = q.shape
    num_kv_heads, value_dim = k.shape[-2], v.shape[-1]
    if q_shared is not None:
        q_shared = prepare_queries(q_shared[:, :, None, None, :], None, q_norm, q_rope)[:, :, 0, 0]
    side_by_side = heads_side_by_side(num_kv_heads, head_dim, value_dim)
    plan = _DecodePlan(
        scale=scale,
        softcap=softcap,
        causal=mask.causal,
        window=mask.window,
        q_len=q_len,
        kv_len=k.shape[-3],
        num_runs=num_runs,
        num_slots=num_slots,
        num_kv_heads=num_kv_heads,
        side_by_side=side_by_side,
        width=side_by_side * head_dim,
        value_width=side_by_side * value_dim,
        has_shared=q_shared is not None,
        has_unread=q_shared is None and kv_head is not None,
        block_kv=block_kv or 0,
    )
    if not block_kv:
        plan = dataclasses.replace(plan, block_kv=_block_kv(plan, k.dtype))
    kv_head = jnp.arange(num_runs) if kv_head is None else jnp.clip(kv_head, 0, num_kv_heads - 1)
    own_lanes = (kv_head[:, None] % side_by_side == np.arange(side_by_side))[:, None, :, None]  # [R, 1, P, 1]
    rows = jnp.where(own_lanes, q[..., None, :], 0).reshape(batch, -1, plan.width)
    rows = jnp.pad(rows, ((0, 0), (0, plan.routed_rows - rows.shape[1]), (0, 0)))
    if q_shared is not None:
        rows = jnp.concatenate([rows, jnp.tile(q_shared, (1, 1, side_by_side))], axis=1)
        rows = jnp.pad(rows, ((0, 0), (0, plan.rows - rows.shape[1]), (0, 0)))
    first_row = 0 if layer is None else layer * batch
    k = k.reshape(-1, plan.kv_len * plan.token_rows, plan.width)
    v = v.reshape(-1, plan.kv_len * plan.token_rows, plan.value_width)
    read = _lanes_read(plan, kv_head, k.dtype) if plan.has_unread else ()
    o, lse = _attend(plan, mask, kv_head, read, rows, k, v, first_row)

    count = q_len * num_runs * num_slots
    o_routed = o[:, :count].reshape(*q.shape[:-1], side_by_side, value_dim)
    o_routed = jnp.sum(jnp.where(own_lanes, o_routed, 0), axis=-2)
    lse = lse[:, :count, 0].reshape(q.shape[:-1])
    if q_shared is None:
        return o_routed, lse
    shared = o[:, plan.routed_rows : plan.routed_rows + q_len].reshape(batch, q_len, side_by_side, value_dim)
    return o_routed, lse, jnp.mean(shared, axis=-2, dtype=jnp.float32).astype(q.dtype)


def _block_kv(plan: _DecodePlan, dtype) -> int:
    """Tokens per block: a multiple of 128, 1 MiB at most of K, of V and of the scores of all rows."""
    row_bytes = dtype.itemsize * round_up(max(plan.width, plan.value_width), LANES)
    token_bytes = plan.token_rows * max(row_bytes, 4 * plan.rows * BLOCK_BYTES // SCORE_BYTES)
    return min(max(BLOCK_BYTES // token_bytes // LANES, 1) * LANES, round_up(plan.kv_len, LANES))


def _lanes_read(plan: _DecodePlan, kv_head, dtype):
    """Returns (for K [L, W], for V [L, Wv]) of `dtype`: 1 in the lanes of KV heads that some run reads, else 0."""
    read = jnp.zeros(plan.num_kv_heads, dtype).at[kv_head].set(1.0).reshape(plan.token_rows, -1)
    widths = plan.width // plan.side_by_side, plan.value_width // plan.side_by_side
    return tuple(jnp.tile(jnp.repeat(read, width, axis=1), (plan.block_kv, 1)) for width in widths)


def _attend(plan: _DecodePlan, mask: Mask, kv_head, read, rows, k, v, first_row):
    """o [B, N, Wv] in the dtype of rows, lse float32 [B, N, 128]; batch row b reads row first_row + b of K and V."""
    batch, token_rows = rows.shape[0], plan.token_rows
    num_blocks = ceil_div(plan.kv_len, plan.block_kv)
    shift = mask.q_offset - mask.kv_offset
    length = jnp.full((batch,), plan.kv_len, jnp.int32) if mask.kv_length is None else mask.kv_length
    first_key, end_key = jnp.zeros_like(length), length
    if plan.causal:
        end_key = jnp.minimum(end_key, shift + plan.q_len)
    if plan.window is not None:
        first_key = jnp.maximum(first_key, shift - plan.window + 1)
        end_key = jnp.minimum(end_key, shift + plan.q_len - 1 + plan.window)
    first = jnp.minimum(first_key // plan.block_kv, num_blocks)
    end = jnp.clip(ceil_div(end_key, plan.block_kv), first, num_blocks)
    steps = jnp.maximum(jnp.max(end - first), 1)

    row = np.arange(plan.rows)
    routed = row < plan.q_len * plan.num_runs * plan.num_slots
    shared = row >= plan.routed_rows
    position = np.where(shared, row - plan.routed_rows, row // (plan.num_runs * plan.num_slots))
    position = np.where(routed | (shared & (position < plan.q_len)), position, -(2**30))  # padding sees nothing
    own = jnp.where(shared, -1, kv_head[row // plan.num_slots % plan.num_runs] // plan.side_by_side)
    row_data = jnp.stack([position, own]).astype(jnp.int32)[:, :, None]
    column = np.arange(plan.columns)
    column_data = np.stack([column // token_rows, column % token_rows]).astype(np.int32)[:, None, :]
    token = np.arange(math.lcm(LANES, token_rows)) // token_rows
    mean = np.equal.outer(token, token) / plan.num_kv_heads

    def kv_block(b, j, shift, length, first, end, first_row):
        return first_row[0] + b, jnp.clip(first[b] + j, 0, jnp.maximum(end[b] - 1, 0)), 0

    def whole(*shape):
        return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))

    def per_row(*shape):
        return pl.BlockSpec((1, *shape), lambda b, *_: (b, *(0 for _ in shape)))

    return pl.pallas_call(
        functools.partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(batch, steps),
            in_specs=[
                per_row(plan.rows, plan.width),
                pl.BlockSpec((1, plan.columns, plan.width), kv_block),
                pl.BlockSpec((1, plan.columns, plan.value_width), kv_block),
                whole(*row_data.shape),
                whole(*column_data.shape),
                whole(*mean.shape),
                tuple(whole(*x.shape) for x in read),
            ],
            out_specs=[per_row(plan.rows, plan.value_width), per_row(plan.rows, LANES)],
            scratch_shapes=[
                pltpu.VMEM((plan.rows, 1), jnp.float32),
                pltpu.VMEM((plan.rows, 1), jnp.float32),
                pltpu.VMEM((plan.rows, plan.value_width), jnp.float32),
            ],
        ),
        out_shape=[
            result((batch, plan.rows, plan.value_width), rows.dtype, rows),
            result((batch, plan.rows, LANES), jnp.float32, rows),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * plan.rows * plan.kv_len * token_rows * (plan.width + plan.value_width),
            transcendentals=batch * plan.rows * plan.kv_len * token_rows,
            bytes_accessed=batch * plan.kv_len * token_rows * (plan.width + plan.value_width) * k.dtype.itemsize,
        ),
        name="gqe_decode",
    )(
        shift,
        length,
        first,
        end,
        jnp.reshape(jnp.asarray(first_row, jnp.int32), (1,)),
        rows,
        k,
        v,
        row_data,
        jnp.asarray(column_data),
        jnp.asarray(mean, jnp.float32),
        read,
    )


def _kernel(
    plan: _DecodePlan,
    # Prefetched scalars, one per batch row
    shift_ref,
    length_ref,
    first_ref,  # block of keys
    end_ref,
    first_row_ref,  # [1], of K and V: read by the index maps
    # Inputs
    q_ref,  # [1, N, W]
    k_ref,  # [1, L, W]
    v_ref,  # [1, L, Wv]
    row_ref,  # [2, N, 1], position of a query, and which row of a token it reads (-1: all)
    column_ref,  # [2, 1, L], token of a column, and which row of the token
    mean_ref,  # [n, n], 1/G where two of n columns are of one token
    read_refs,  # `_lanes_read`, or none
    # Outputs
    o_ref,  # [1, N, Wv]
    lse_ref,  # [1, N, 128]
    # Scratch
    max_ref,  # [N, 1]
    sum_ref,  # [N, 1]
    acc_ref,  # [N, Wv]
):
    del first_row_ref
    b, j = pl.program_id(0), pl.program_id(1)
    exact = q_ref.dtype == jnp.float32

    @pl.when(j == 0)
    def _():
        max_ref[...] = jnp.full_like(max_ref, EMPTY_LSE)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    block = first_ref[b] + j

    @pl.when(block < end_ref[b])
    def _():
        first_token = block * plan.block_kv
        tokens_left = length_ref[b] - first_token  # below block_kv, what lies behind is not data
        token, row_of_token = column_ref[0], column_ref[1]

        # Where every row sees every token, nothing is to be hidden from anyone.
        is_whole = tokens_left >= plan.block_kv
        first_position = shift_ref[b] - first_token
        if plan.causal:
            is_whole &= first_position >= plan.block_kv - 1
        if plan.window is not None:
            is_whole &= first_position + plan.q_len - 1 < plan.window
            is_whole &= first_position > plan.block_kv - 1 - plan.window

        position = row_ref[0] + first_position  # on the block's own count of tokens
        limit = jnp.full_like(position, tokens_left)
        seen = (row_ref[1] == row_of_token) | (row_ref[1] < 0)
        if plan.causal:
            limit = jnp.minimum(limit, position + 1)
        if plan.window is not None:
            limit = jnp.minimum(limit, position + plan.window)
            seen &= token > position - plan.window
        seen &= token < limit

        def add(k, v):
            s = dot(q_ref[0], k, contract=(1, 1), exact=exact)
            if plan.has_shared:
                # A column that the row does not see must not enter its neighbours' mean.
                shared = jnp.where(seen[plan.routed_rows :], s[plan.routed_rows :], 0.0)
                s = jnp.concatenate([s[: plan.routed_rows], _mean_over_groups(shared, mean_ref[...])], axis=0)
            s = jnp.where(seen, _capped(plan, s), -jnp.inf)
            new_max = jnp.maximum(max_ref[...], jnp.max(s, axis=1, keepdims=True))
            decay = jnp.exp2(max_ref[...] - new_max)
            p = jnp.exp2(s - new_max)
            max_ref[...] = new_max
            sum_ref[...] = sum_ref[...] * decay + jnp.sum(p, axis=1, keepdims=True)
            acc_ref[...] = acc_ref[...] * decay + dot(p.astype(v.dtype), v, contract=(1, 0), exact=exact)

        def block_of_k_and_v():
            if not plan.has_unread:
                return k_ref[0], v_ref[0]
            # A KV head that nobody reads may hold anything, and 0 · NaN is NaN.
            return tuple(_where_read(ref[0], read[...]) for ref, read in zip((k_ref, v_ref), read_refs, strict=True))

        pl.when(is_whole)(lambda: add(*block_of_k_and_v()))

        @pl.when(~is_whole)
        def _():
            k, v = block_of_k_and_v()
            add(mark_not_finite(k, v), finite(v))

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        row_sum = sum_ref[...]
        none_seen = row_sum == 0.0
        o = jnp.where(none_seen, 0.0, acc_ref[...] / jnp.where(none_seen, 1.0, row_sum))
        o_ref[0] = o.astype(o_ref.dtype)
        lse = jnp.where(none_seen, EMPTY_LSE, (max_ref[...] + jnp.log2(row_sum)) / LOG2_E)
        lse_ref[0] = jnp.broadcast_to(lse, lse_ref.shape[1:])


def _where_read(x, read):
    x32, read32 = x.astype(jnp.float32), read.astype(jnp.float32)  # not every vector unit knows bfloat16
    return jnp.where(read32 > 0, x32, 0.0).astype(x.dtype)


def _capped(plan, s):
    """Scores in base 2: exp2 then serves as exp."""
    if plan.softcap is None:
        return s * (plan.scale * LOG2_E)
    return jnp.tanh(s * (plan.scale / plan.softcap)) * (plan.softcap * LOG2_E)


def _mean_over_groups(s, mean):
    """[N, L] → [N, L]: each column becomes the mean over the KV heads of its token."""
    num_rows, width = s.shape[0], mean.shape[0]
    starts = range(0, s.shape[1], width)
    stacked = jnp.concatenate([s[:, start : start + width] for start in starts], axis=0)
    means = dot(stacked, mean, contract=(1, 0), exact=True)
    return jnp.concatenate([means[i * num_rows : (i + 1) * num_rows] for i in range(len(starts))], axis=1)
