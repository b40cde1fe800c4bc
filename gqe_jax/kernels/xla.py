"""Computes attention block by block in plain XLA operations, for any platform; on CPUs it is the fastest.

Scores exist one block of queries × one block of keys at a time, forward and backward (the backward recomputes them from
q, k and the saved log-sum-exp). Loop bounds follow the mask (`kv_bounds.py`): a block above the diagonal, outside the
window, past `kv_length` or without a common segment is not visited, and only blocks that the mask cuts pay for a mask.

Besides the usual alphabet, Q ("q" in einsums) is the rows of a block of queries, position-major (row = position · K +
slot): the slots of a run share each block of K and V, and the later half of a block's positions is a slice of its rows.
"..." is B, R (query runs), or nothing where one head is computed at a time.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from gqe_jax.kernels.choose import target_platform
from gqe_jax.kernels.derivatives import ONCE, refuse_derivatives
from gqe_jax.kernels.kv_bounds import kv_bounds
from gqe_jax.kernels.mask import Mask, sees
from gqe_jax.kernels.mesh_axes import vary, varying_axes
from gqe_jax.kernels.partials import EMPTY_LSE
from gqe_jax.kernels.queries import prepare_queries
from gqe_jax.remat import ATTENTION_LSE, ATTENTION_OUT
from gqe_jax.rounding import ceil_div

LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class _XlaPlan:
    """Holds what is static about one call."""

    scale: float
    softcap: float | None
    block_q: int  # positions; a block's rows are num_slots times as many
    block_k: int
    halves: bool  # head by head, a block of keys on the diagonal is computed in two halves
    few_rows: bool  # decode: K and V are read once, where they lie
    long: bool  # worth a second form of the forward loop
    on_cpu: bool
    varying: tuple[str, ...]  # axes of a mesh, inside `jax.shard_map`
    norm_eps: float | None  # of the queries' norm

    @property
    def head_by_head(self) -> bool:
        """Whether heads are computed one by one.

        On CPUs a head's blocks then stay in the cores' caches, and its loops are as long as its own mask asks.
        """
        return self.on_cpu and not self.few_rows

    @property
    def try_bound(self) -> bool:
        """Whether scores with a small bound are computed without a running maximum.

        This saves a pass over each block of scores, and one over the results so far.
        """
        return self.head_by_head and self.long

    @property
    def score_factor(self) -> float:
        """The factor between q·k and what `_cap` takes."""
        return self.scale * LOG2_E if self.softcap is None else self.scale / self.softcap


def xla(
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
    block_q: int = 1024,
    block_k: int = 1024,
) -> tuple[jax.Array, jax.Array]:
    """Computes attention block by block; arguments as in `attend.IMPLEMENTATIONS`.

    Args:
      block_q, block_k: upper bounds on the size of a block: its rows (positions · slots), and its keys.

    Returns:
      o [B, S, R, K, Dv] in q's dtype, lse float32 [B, S, R, K].
    """
    on_cpu = target_platform(q) == "cpu"
    norm_scale, norm_eps = (None, None) if q_norm is None else q_norm
    return _xla(
        q, k, v, expert_index, mask, kv_head, q_rope, norm_scale, norm_eps, softcap, scale, block_q, block_k, on_cpu
    )


@functools.partial(jax.jit, static_argnames=("norm_eps", "softcap", "scale", "block_q", "block_k", "on_cpu"))
def _xla(q, k, v, expert_index, mask, kv_head, q_rope, norm_scale, norm_eps, softcap, scale, block_q, block_k, on_cpu):
    q_len, num_slots = q.shape[1], q.shape[3] if expert_index is None else expert_index.shape[3]
    num_q_blocks = ceil_div(q_len, max(1, block_q // num_slots))
    plan = _XlaPlan(
        scale=scale,
        softcap=softcap,
        block_q=ceil_div(q_len, num_q_blocks),
        block_k=min(block_k, k.shape[1]),
        # Half of a block that T cuts short would take nearly as long as all of it.
        halves=mask.causal and 1 < block_k <= k.shape[1],
        few_rows=q_len * num_slots <= 16,
        long=k.shape[1] >= 1024,
        on_cpu=on_cpu,
        varying=varying_axes(q),
        norm_eps=norm_eps,
    )
    o, lse2 = _attend(plan, mask, expert_index, kv_head, q, k, v, q_rope, norm_scale)
    return o, jnp.maximum(lse2 / LOG2_E, EMPTY_LSE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _XlaPlan, mask: Mask, expert_index, kv_head, q, k, v, q_rope, norm_scale):
    """Returns o [B, S, R, K, Dv] in q's dtype and lse2 float32 [B, S, R, K].

    lse2 is in base 2, as the backward pass wants it unrounded, and 2 · EMPTY_LSE where nothing is seen.
    """
    return _forward(plan, mask, kv_head, _prepare(plan, expert_index, q, q_rope, norm_scale), k, v)


def _prepare(plan, expert_index, q, q_rope, norm_scale):
    return prepare_queries(q, expert_index, None if norm_scale is None else (norm_scale, plan.norm_eps), q_rope)


def _attend_fwd(plan, mask, expert_index, kv_head, q, k, v, q_rope, norm_scale):
    o, lse2 = _attend(plan, mask, expert_index, kv_head, q, k, v, q_rope, norm_scale)
    o, lse2 = checkpoint_name(o, ATTENTION_OUT), checkpoint_name(lse2, ATTENTION_LSE)  # for remat policies
    return (o, lse2), (mask, expert_index, kv_head, q, k, v, q_rope, norm_scale, o, lse2)


def _attend_bwd(plan, residuals, cotangents):
    mask, expert_index, kv_head, *arrays = residuals
    (q, k, v, q_rope, norm_scale, o, lse2), cotangents = refuse_derivatives((arrays, cotangents), ONCE)
    # A query that sees nothing has no gradient and no part in one, not even as 0 · NaN.
    live = _sees_something(lse2)
    prepare = functools.partial(_prepare, plan, expert_index)
    q_finished, unprepare = jax.vjp(prepare, jnp.where(live[:, :, :1, :1, None], q, 0), q_rope, norm_scale)
    dq, dk, dv = _backward(plan, mask, kv_head, q_finished, k, v, o, lse2, live, cotangents)
    dq, dq_rope, dnorm_scale = unprepare(dq)
    return None, None, None, dq, dk, dv, dq_rope, dnorm_scale


_attend.defvjp(_attend_fwd, _attend_bwd)


def _sees_something(lse2):
    return ~(lse2 <= EMPTY_LSE)  # true of a NaN, which goes on


def _forward(plan: _XlaPlan, mask: Mask, kv_head, q, k, v):
    def some_heads(bounded, heads, outputs):
        k_block = _block_reader(plan, heads, k, transposed=True)
        v_block = _block_reader(plan, heads, v)

        def one_q_block(i, q_start, bounds, outputs):
            del i
            o, lse2 = outputs
            q_i, factor = _scaled_queries(plan, heads.rows(q, q_start, plan.block_q))

            def step(carry, first_row, start, num_keys, seen):
                q_r, row_max, row_sum, acc = (_from(x, first_row, axis=-2) for x in (q_i, *carry))
                s, _ = _cap(plan, _dot(plan, "...qd,...dt->...qt", q_r, k_block(start, num_keys)), factor)
                v_r = v_block(start, num_keys)
                if not bounded:
                    s = s if seen is None else jnp.where(seen, s, -jnp.inf)
                    new_max = jnp.maximum(row_max, jnp.max(s, axis=-1, keepdims=True))
                    decay = jnp.exp2(row_max - new_max)
                    s, row_max, row_sum, acc = s - new_max, new_max, row_sum * decay, acc * decay
                p = _exp2(plan, s, bounded=bounded)
                if seen is not None:
                    # 0 · NaN is NaN: what is not finite leaves the values, and is NaN in the weights of who sees it.
                    p = jnp.where(seen, p + _nan_of(v_r, axis=-1)[..., None, :], 0.0)
                    v_r = _finite(v_r)
                pv = _dot(plan, "...qt,...td->...qd", p, v_r)
                new = row_max, row_sum + jnp.sum(p, axis=-1, keepdims=True), acc + pv
                put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=first_row, axis=-2)
                return tuple(put(x, x_r) for x, x_r in zip(carry, new, strict=True))

            per_row = (*q_i.shape[:-1], 1)
            zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
            carry = jnp.full(per_row, 0.0 if bounded else EMPTY_LSE, jnp.float32), zeros(per_row)
            carry = *carry, zeros((*q_i.shape[:-1], v.shape[-1]))
            row_max, row_sum, acc = _over_kv_blocks(plan, heads, mask, q, k, q_start, bounds, step, carry)
            none_seen = row_sum == 0.0
            o_i = jnp.where(none_seen, 0.0, acc / row_sum)
            lse2_i = jnp.where(none_seen, 2 * EMPTY_LSE, row_max + jnp.log2(row_sum))[..., 0]
            return heads.put_rows(o, q_start, o_i), heads.put_rows(lse2, q_start, lse2_i)

        return _over_q_blocks(plan, heads.mask(mask), q, k, one_q_block, outputs)

    def all_heads(bounded):
        outputs = jnp.zeros((*q.shape[:-1], v.shape[-1]), q.dtype), jnp.zeros(q.shape[:-1], jnp.float32)
        return _over_heads(plan, q, k, kv_head, functools.partial(some_heads, bounded), outputs)

    if not plan.try_bound:
        return all_heads(False)
    return lax.cond(_score_bound(plan, q, k) <= SAFE_SCORE, lambda: all_heads(True), lambda: all_heads(False))


def _backward(plan, mask, kv_head, q, k, v, o, lse2, live, cotangents):
    """Computes dq, dk and dv.

    Scores are formed transposed, [T, Q]: all five matmuls then contract the last axis of a block of scores, or its
    first from the right, and none needs a transposed copy of one.
    """
    do, dlse2 = cotangents

    def some_heads(heads, outputs):
        k_block, v_block = _block_reader(plan, heads, k), _block_reader(plan, heads, v)
        k_block_transposed = _block_reader(plan, heads, k, transposed=True)

        def one_q_block(i, q_start, bounds, outputs):
            dq, dk, dv = outputs
            q_i, do_i, o_i, lse2_i, dlse2_i, live_i = (
                heads.rows(x, q_start, plan.block_q) for x in (q, do, o, lse2, dlse2, live)
            )
            # The last block ends at S. Rows that it shares with the one before have had their part.
            fresh = jnp.repeat(q_start + jnp.arange(plan.block_q) >= i * plan.block_q, q.shape[3])
            fresh &= live_i
            do_i = jnp.where(fresh[..., None], do_i, 0).astype(jnp.float32)
            delta_i = jnp.sum(o_i * do_i, axis=-1) - jnp.where(fresh, LOG2_E * dlse2_i, 0.0)
            q_i, factor = _scaled_queries(plan, q_i)
            q_i_transposed, do_i_transposed = jnp.swapaxes(q_i, -1, -2), jnp.swapaxes(do_i, -1, -2)
            q_i = _finite(q_i)  # with what is not, p and ds are NaN for the keys that are seen
            lse2_i, delta_i = lse2_i[..., None, :], delta_i[..., None, :]

            def step(carry, first_row, start, num_keys, seen):
                dq_i, dk, dv = carry
                q_r, do_r = (_from(x, first_row, axis=-2) for x in (q_i, do_i))
                q_r_transposed, do_r_transposed, lse2_r, delta_r = (
                    _from(x, first_row, axis=-1) for x in (q_i_transposed, do_i_transposed, lse2_i, delta_i)
                )
                s = _dot(plan, "...td,...dq->...tq", k_block(start, num_keys), q_r_transposed)
                s, slope = _cap(plan, s, factor)
                p = _exp2(plan, s - lse2_r)
                if seen is not None:
                    seen = jnp.swapaxes(seen, -1, -2)
                    p = jnp.where(seen, p, 0.0)
                ds = p * (_dot(plan, "...td,...dq->...tq", v_block(start, num_keys), do_r_transposed) - delta_r)
                if slope is not None:
                    ds = ds * slope
                k_r = k_block_transposed(start, num_keys)
                if seen is not None:
                    ds, k_r = jnp.where(seen, ds, 0.0), _finite(k_r)
                dv = _add_at(dv, start, heads.per_kv_head(_dot(plan, "...tq,...qd->...td", p, do_r)), axis=-2)
                dk = _add_at(dk, start, heads.per_kv_head(_dot(plan, "...tq,...qd->...td", ds, q_r)), axis=-2)
                dq_r = _dot(plan, "...dt,...tq->...dq", k_r, ds)
                return _add_at(dq_i, first_row, dq_r, axis=-1), dk, dv

            carry = jnp.zeros(q_i_transposed.shape, jnp.float32), dk, dv
            dq_i, dk, dv = _over_kv_blocks(plan, heads, mask, q, k, q_start, bounds, step, carry)
            dq_i = plan.scale * jnp.swapaxes(dq_i, -1, -2) + heads.rows(dq, q_start, plan.block_q)
            return heads.put_rows(dq, q_start, dq_i), dk, dv

        dq, *dkv_all = outputs
        dkv = [jnp.zeros_like(heads.keys(x), jnp.float32) for x in (k, v)]
        dq, dk, dv = _over_q_blocks(plan, heads.mask(mask), q, k, one_q_block, (dq, *dkv))
        dk *= plan.scale / _query_factor(plan, q.dtype)
        return dq, *(heads.put_keys(x, dx) for x, dx in zip(dkv_all, (dk, dv), strict=True))

    # Several query runs add to one KV head: in float32.
    dkv = [jnp.zeros(x.shape, x.dtype if kv_head is None else jnp.float32) for x in (k, v)]
    dq, dk, dv = _over_heads(plan, q, k, kv_head, some_heads, (jnp.zeros_like(q), *dkv))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


@dataclasses.dataclass(frozen=True)
class _Heads:
    """Selects the data of all (batch row, query run) pairs, or of one, from arrays in the layout of the arguments."""

    b: jax.Array | int
    run: jax.Array | int
    batch: int
    num_runs: int
    leading: tuple[int, ...]  # (B, R), or () for one pair
    kv: jax.Array | int  # the first of their KV heads
    num_kv_heads: int
    kv_head: jax.Array | None  # the KV head of each run, where not run r reads head r

    def rows(self, x: jax.Array, start: jax.Array, length: int) -> jax.Array:
        """Reads from x [B, S, R, K, ...] the block of `length` positions from `start`, [..., Q, ...]."""
        num_slots, *rest = x.shape[3:]
        sizes = (self.batch, length, self.num_runs, num_slots, *rest)
        block = lax.dynamic_slice(x, (self.b, start, self.run, 0, *(0 for _ in rest)), sizes)
        return jnp.swapaxes(block, 1, 2).reshape(*self.leading, length * num_slots, *rest)

    def put_rows(self, x: jax.Array, start: jax.Array, rows: jax.Array) -> jax.Array:
        """Writes what `rows` reads."""
        num_slots, *rest = x.shape[3:]
        block = jnp.swapaxes(rows.reshape(self.batch, self.num_runs, -1, num_slots, *rest), 1, 2)
        return lax.dynamic_update_slice(x, block.astype(x.dtype), (self.b, start, self.run, 0, *(0 for _ in rest)))

    def keys(self, x: jax.Array) -> jax.Array:
        """Reads from x [B, T, G, D] the keys of each KV head, [..., T, D]."""
        _, length, _, width = x.shape
        x = lax.dynamic_slice(x, (self.b, 0, self.kv, 0), (self.batch, length, self.num_kv_heads, width))
        leading = self.leading and (self.batch, self.num_kv_heads)
        return x.transpose(0, 2, 1, 3).reshape(*leading, length, width)

    def put_keys(self, x: jax.Array, keys: jax.Array) -> jax.Array:
        """Adds where `keys` reads: several runs may read one KV head."""
        keys = keys.reshape(self.batch, self.num_kv_heads, *keys.shape[-2:]).transpose(0, 2, 1, 3)
        at = self.b, 0, self.kv, 0
        keys = keys + lax.dynamic_slice(x, at, keys.shape)
        return lax.dynamic_update_slice(x, keys.astype(x.dtype), at)

    def per_run(self, keys: jax.Array) -> jax.Array:
        """Returns a block [..., T, D] for each query run, from the blocks of the KV heads."""
        return keys if self.kv_head is None else keys[:, self.kv_head]

    def per_kv_head(self, keys: jax.Array) -> jax.Array:
        """Sums blocks [..., T, D] of the query runs for each KV head: the transpose of `per_run`."""
        if self.kv_head is None:
            return keys
        zeros = jnp.zeros((self.batch, self.num_kv_heads, *keys.shape[2:]), keys.dtype)
        return zeros.at[:, self.kv_head].add(keys)

    def mask(self, mask: Mask) -> Mask:
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, self.b, self.batch), mask)


def _over_heads(plan, q, k, kv_head, some_heads, outputs):
    """Calls some_heads(heads, outputs) → outputs for all heads together, or for one after the other."""
    batch, _, num_runs, _, _ = q.shape
    num_kv_heads = k.shape[2]
    if not plan.head_by_head:
        return some_heads(_Heads(0, 0, batch, num_runs, (batch, num_runs), 0, num_kv_heads, kv_head), outputs)

    def one_head(n, outputs):
        run = n % num_runs
        kv = run if kv_head is None else jnp.clip(kv_head[run], 0, num_kv_heads - 1)
        return some_heads(_Heads(n // num_runs, run, 1, 1, (), kv, 1, None), outputs)

    return _loop(plan, 0, batch * num_runs, one_head, outputs)


def _over_q_blocks(plan, mask, q, k, one_q_block, outputs):
    """Calls one_q_block(i, q_start, kv bounds, outputs) → outputs for each block of queries; the last one ends at S."""
    q_len = q.shape[1]
    num_blocks = ceil_div(q_len, plan.block_q)
    q_starts = jnp.minimum(jnp.arange(num_blocks) * plan.block_q, q_len - plan.block_q)
    bounds = kv_bounds(mask, q_starts, plan.block_q, plan.block_k, k.shape[1])

    def body(i, outputs):
        return one_q_block(i, q_starts[i], [bound[i] for bound in bounds], outputs)

    return _loop(plan, 0, num_blocks, body, outputs)


def _loop(plan, first, end, body, carry):
    return lax.fori_loop(first, end, body, vary(carry, plan.varying))


def _over_kv_blocks(plan, heads, mask, q, k, q_start, bounds, step, carry):
    """Calls step(carry, first_row, start, num_keys, seen) → carry for each block of keys that the q block sees.

    A call is for the rows of the q block from first_row on and num_keys keys from start. `seen` is bool [..., Q, T], or
    None where these rows see all of these keys.
    """
    first, whole_first, whole_end, end = bounds
    mask, num_slots, kv_len = heads.mask(mask), q.shape[3], k.shape[1]
    half_q, half_k = plan.block_q // 2, plan.block_k // 2
    cut_end = end - (whole_end - whole_first)

    def cut_block(n):
        """Returns where block n begins, and its first key that is new: the last block ends at T, so it may overlap."""
        j = jnp.where(n < whole_first, n, n - whole_first + whole_end)
        return jnp.minimum(j * plan.block_k, kv_len - plan.block_k), j * plan.block_k

    def masked_step(carry, first_query, start, num_keys, fresh_start):
        seen = sees(mask, q_start + first_query, plan.block_q - first_query, start, num_keys)
        seen &= start + jnp.arange(num_keys) >= fresh_start
        seen = jnp.repeat(seen, num_slots, axis=1)
        return step(carry, first_query * num_slots, start, num_keys, seen[:, None] if heads.leading else seen[0])

    def whole_step(j, carry):
        return step(carry, 0, j * plan.block_k, plan.block_k, None)

    def cut_step(n, carry):
        start, fresh_start = cut_block(n)
        return masked_step(carry, 0, start, plan.block_k, fresh_start)

    def halved_step(n, carry):
        start, fresh_start = cut_block(n)
        carry = masked_step(carry, 0, start, half_k, fresh_start)
        return masked_step(carry, half_q, start + half_k, plan.block_k - half_k, fresh_start)

    carry = _loop(plan, whole_first, whole_end, whole_step, carry)
    if not (plan.halves and plan.head_by_head):
        return _loop(plan, first, cut_end, cut_step, carry)
    # Where the last block lies on the diagonal, the first half of the queries sees none of its second half.
    start, _ = cut_block(cut_end - 1)
    halved = mask.q_offset[0] + q_start + half_q <= mask.kv_offset[0] + start + half_k
    halved_first = jnp.where(halved, jnp.maximum(first, cut_end - 1), cut_end)
    carry = _loop(plan, first, halved_first, cut_step, carry)
    return _loop(plan, halved_first, cut_end, halved_step, carry)


def _block_reader(plan, heads, x, *, transposed=False):
    """Returns a function (start, length) → that block of K or V for each query run, [..., T, D] or transposed."""

    def arrange(x):
        keys = heads.keys(x).astype(jnp.float32) if plan.on_cpu else heads.keys(x)
        return jnp.swapaxes(keys, -1, -2) if transposed else keys

    if plan.few_rows:
        return lambda start, length: heads.per_run(arrange(lax.dynamic_slice_in_dim(x, start, length, axis=1)))
    arranged, axis = arrange(x), -1 if transposed else -2
    return lambda start, length: heads.per_run(lax.dynamic_slice_in_dim(arranged, start, length, axis=axis))


def _query_factor(plan, dtype):
    """Returns the part of `score_factor` that goes into the queries: all in float32; low precision would round it."""
    return plan.score_factor if plan.on_cpu or dtype == jnp.float32 else 1.0


def _scaled_queries(plan, q_i):
    """Returns the queries times their part of `score_factor`, and the part that is left for the scores."""
    factor = _query_factor(plan, q_i.dtype)
    if factor == 1.0:
        return q_i, plan.score_factor
    return q_i.astype(jnp.float32) * factor, 1.0


SAFE_SCORE = 40.0  # sums of 2^s with |s| <= 40 do not overflow in float32, and are far above those of masked scores
LEAST_EXPONENT = -126.0


def _score_bound(plan, q, k):
    """Bounds all scores in base 2: |s| <= |q|·|k| (Cauchy-Schwarz), and no more than the soft cap."""

    def longest(x):
        return jnp.sqrt(jnp.max(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1)))

    bound = LOG2_E * plan.scale * longest(q) * longest(k)
    return bound if plan.softcap is None else jnp.minimum(bound, LOG2_E * plan.softcap)


def _cap(plan, s, factor):
    """Returns the scores times log2(e), so that exp2 serves as exp, and the soft cap's slope (None without a cap)."""
    s = s if factor == 1.0 else s * factor
    if plan.softcap is None:
        return s, None
    tanh = jnp.tanh(s)
    return tanh * (plan.softcap * LOG2_E), 1.0 - jnp.square(tanh)


def _dot(plan, spec, a, b):
    """Computes an einsum in float32, from float32 on CPUs and from the narrower of the operands' types elsewhere."""
    dtype = jnp.float32 if plan.on_cpu else min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    precision = "highest" if dtype == jnp.float32 else None
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=jnp.float32)


def _finite(x):
    """Returns x with zeros in place of NaN and infinity."""
    return jnp.where(jnp.isfinite(x), x, 0)


def _nan_of(x, *, axis):
    """Returns float32 NaN where an element along the axis is not finite, else 0."""
    return jnp.where(jnp.all(jnp.isfinite(x), axis=axis), 0.0, jnp.nan).astype(jnp.float32)


def _from(x, start, *, axis):
    return lax.slice_in_dim(x, start, None, axis=axis)


def _add_at(x, start, update, *, axis):
    old = lax.dynamic_slice_in_dim(x, start, update.shape[axis], axis=axis)
    return lax.dynamic_update_slice_in_dim(x, old + update, start, axis=axis)


ROUNDING_SHIFT = np.float32(1.5 * 2**23)
# 2^f on [-1/2, 1/2], degree 6 (Chebyshev interpolation), relative error 1e-8 before rounding.
EXP2_COEFFICIENTS = (
    np.polynomial.Chebyshev.interpolate(np.exp2, 6, domain=[-0.5, 0.5]).convert(kind=np.polynomial.Polynomial).coef
)


def _exp2(plan, x, *, bounded=False):
    """Computes 2^x for x <= 0, or for `bounded` x in -126..126; relative error 1e-7, and at least 2^-126.

    On CPUs the exponential is half of the time outside the matmuls, and XLA's is general: range checks, a conversion to
    int that saturates. Here n = round(x) is read from the low bits of x + 1.5·2²³ and enters as the exponent.
    """
    if not plan.on_cpu:
        return jnp.exp2(x)
    if not bounded:
        x = jnp.maximum(x, LEAST_EXPONENT)
    n = lax.bitcast_convert_type(x + ROUNDING_SHIFT, jnp.int32) - ROUNDING_SHIFT.view(np.int32)
    f = x - n.astype(jnp.float32)
    *rest, leading = EXP2_COEFFICIENTS.astype(np.float32)
    power = jnp.full_like(f, leading)
    for coefficient in reversed(rest):
        power = power * f + coefficient
    return lax.bitcast_convert_type(lax.bitcast_convert_type(power, jnp.int32) + (n << 23), jnp.float32)
