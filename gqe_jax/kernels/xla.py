"""Blockwise attention in plain XLA operations, for any platform; the fast path on CPUs.

Scores exist one block of queries × one block of keys at a time, forward and backward (the backward recomputes them from
q, k and the saved log-sum-exp). Loop bounds follow the mask (`kv_bounds.py`): a block above the diagonal, outside the
window, past `kv_length` or without a common segment is not visited, and only blocks that the mask cuts pay for a mask.

Axes beyond the usual alphabet: R is the rows of a q block, slot-major (row = slot · block_q + position), so that the
slots of a group share each block of K and V. "..." is B, G, or nothing where one head is computed at a time.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from gqe_jax.kernels.kv_bounds import kv_bounds, seen_keys
from gqe_jax.kernels.mask import Mask
from gqe_jax.kernels.partials import EMPTY_LSE
from gqe_jax.kernels.queries import prepare_queries

LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static about one call."""

    scale: float
    softcap: float | None
    block_q: int  # positions; a block's rows are num_slots times as many
    block_k: int
    few_rows: bool  # decode: K and V are read once, where they lie
    on_cpu: bool

    @property
    def head_by_head(self) -> bool:
        """On CPUs, so that a head's blocks stay in the cores' caches and its loops are as long as its own mask asks."""
        return self.on_cpu and not self.few_rows

    @property
    def score_factor(self) -> float:
        """From q·k to what `_cap` takes."""
        return self.scale * LOG2_E if self.softcap is None else self.scale / self.softcap


@functools.partial(jax.jit, static_argnames=("softcap", "scale", "block_q", "block_k"))
def xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    expert_index: jax.Array | None,
    mask: Mask,
    *,
    q_rope: tuple[jax.Array, jax.Array] | None,
    q_norm: tuple[jax.Array, float] | None,
    softcap: float | None,
    scale: float,
    block_q: int = 1024,
    block_k: int = 1024,
) -> tuple[jax.Array, jax.Array]:
    """Blockwise attention; arguments as in `attend`. Block sizes are upper bounds: rows of q (slots included), keys."""
    q = prepare_queries(q, expert_index, q_norm, q_rope)
    _, q_len, _, num_slots, _ = q.shape
    num_q_blocks = -(-q_len // max(1, block_q // num_slots))
    plan = _Plan(
        scale=scale,
        softcap=softcap,
        block_q=-(-q_len // num_q_blocks),
        block_k=min(block_k, k.shape[1]),
        few_rows=q_len * num_slots <= 16,
        on_cpu=jax.default_backend() == "cpu",
    )
    o, lse2 = _attend(plan, mask, q, k, v)
    return o, jnp.maximum(lse2 / LOG2_E, EMPTY_LSE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, mask: Mask, q, k, v):
    """o [B, S, G, K, D] in q's dtype and lse2 float32 [B, S, G, K]: base 2, as the backward wants it unrounded, and
    2 · EMPTY_LSE where nothing is seen."""

    def some_heads(heads, outputs):
        k_block = _block_reader(plan, heads, k, transposed=True)
        v_block = _block_reader(plan, heads, v)

        def one_q_block(i, q_start, bounds, outputs):
            del i
            o, lse2 = outputs
            q_i, factor = _scaled_queries(plan, heads.rows(q, q_start, plan.block_q))

            def step(carry, start, seen):
                row_max, row_sum, acc = carry
                s, _ = _cap(plan, _dot(plan, "...rd,...dt->...rt", q_i, k_block(start)), factor)
                if seen is not None:
                    s = jnp.where(seen, s, -jnp.inf)
                new_max = jnp.maximum(row_max, jnp.max(s, axis=-1))
                p = _exp2(plan, s - new_max[..., None])
                if seen is not None:
                    p = jnp.where(seen, p, 0.0)
                decay = jnp.exp2(row_max - new_max)
                pv = _dot(plan, "...rt,...td->...rd", p, v_block(start))
                return new_max, row_sum * decay + jnp.sum(p, axis=-1), acc * decay[..., None] + pv

            carry = jnp.full(q_i.shape[:-1], EMPTY_LSE), jnp.zeros(q_i.shape[:-1]), jnp.zeros(q_i.shape)
            row_max, row_sum, acc = _over_kv_blocks(plan, heads, mask, q, k, q_start, bounds, step, carry)
            any_seen = row_sum > 0
            row_sum = jnp.where(any_seen, row_sum, 1.0)
            lse2_i = jnp.where(any_seen, row_max + jnp.log2(row_sum), 2 * EMPTY_LSE)
            return heads.put_rows(o, q_start, acc / row_sum[..., None]), heads.put_rows(lse2, q_start, lse2_i)

        return _over_q_blocks(plan, heads.mask(mask), q, k, one_q_block, outputs)

    return _over_heads(plan, q, some_heads, (jnp.zeros_like(q), jnp.zeros(q.shape[:-1])))


def _attend_fwd(plan, mask, q, k, v):
    o, lse2 = _attend(plan, mask, q, k, v)
    o, lse2 = checkpoint_name(o, "attention_out"), checkpoint_name(lse2, "attention_lse")  # for remat policies
    return (o, lse2), (mask, q, k, v, o, lse2)


def _attend_bwd(plan, residuals, cotangents):
    """Scores are formed transposed, [T, R]: all five matmuls then contract the last axis of a block of scores or its
    first from the right, and none needs a transposed copy of one."""
    mask, q, k, v, o, lse2 = residuals
    do, dlse2 = cotangents

    def some_heads(heads, outputs):
        k_block, v_block = _block_reader(plan, heads, k), _block_reader(plan, heads, v)
        k_block_transposed = _block_reader(plan, heads, k, transposed=True)

        def one_q_block(i, q_start, bounds, outputs):
            dq, dk, dv = outputs
            q_i, do_i, o_i, lse2_i, dlse2_i = (heads.rows(x, q_start, plan.block_q) for x in (q, do, o, lse2, dlse2))
            # The last block ends at S. Rows that it shares with the one before have had their part.
            fresh = jnp.tile(q_start + jnp.arange(plan.block_q) >= i * plan.block_q, q.shape[3])
            do_i = jnp.where(fresh[:, None], do_i, 0).astype(jnp.float32)
            delta_i = jnp.sum(o_i * do_i, axis=-1) - jnp.where(fresh, LOG2_E * dlse2_i, 0.0)
            q_i, factor = _scaled_queries(plan, q_i)
            q_i_transposed, do_i_transposed = jnp.swapaxes(q_i, -1, -2), jnp.swapaxes(do_i, -1, -2)
            lse2_i, delta_i = lse2_i[..., None, :], delta_i[..., None, :]

            def step(carry, start, seen):
                dq_i, dk, dv = carry
                s, slope = _cap(plan, _dot(plan, "...td,...dr->...tr", k_block(start), q_i_transposed), factor)
                p = _exp2(plan, s - lse2_i)
                if seen is not None:
                    p = jnp.where(jnp.swapaxes(seen, -1, -2), p, 0.0)
                ds = p * (_dot(plan, "...td,...dr->...tr", v_block(start), do_i_transposed) - delta_i)
                if slope is not None:
                    ds = ds * slope
                dv = _add_at(dv, start, _dot(plan, "...tr,...rd->...td", p, do_i))
                dk = _add_at(dk, start, _dot(plan, "...tr,...rd->...td", ds, q_i))
                return dq_i + _dot(plan, "...dt,...tr->...dr", k_block_transposed(start), ds), dk, dv

            carry = jnp.zeros(q_i_transposed.shape), dk, dv
            dq_i, dk, dv = _over_kv_blocks(plan, heads, mask, q, k, q_start, bounds, step, carry)
            dq_i = plan.scale * jnp.swapaxes(dq_i, -1, -2) + heads.rows(dq, q_start, plan.block_q)
            return heads.put_rows(dq, q_start, dq_i), dk, dv

        dq, *dkv_all = outputs
        dkv = [jnp.zeros_like(heads.keys(x), jnp.float32) for x in (k, v)]
        dq, dk, dv = _over_q_blocks(plan, heads.mask(mask), q, k, one_q_block, (dq, *dkv))
        dk *= plan.scale / _query_factor(plan, q.dtype)
        return dq, *(heads.put_keys(x, dx) for x, dx in zip(dkv_all, (dk, dv), strict=True))

    return None, *_over_heads(plan, q, some_heads, tuple(jnp.zeros_like(x) for x in (q, k, v)))


_attend.defvjp(_attend_fwd, _attend_bwd)


@dataclasses.dataclass(frozen=True)
class _Heads:
    """All (batch row, group) pairs, or one of them, and where their data lie in the arguments' layout."""

    b: jax.Array | int
    g: jax.Array | int
    batch: int
    num_groups: int
    leading: tuple[int, ...]  # (B, G), or () for one pair

    def rows(self, x: jax.Array, start: jax.Array, length: int) -> jax.Array:
        """[B, S, G, K, ...] → [..., R, ...], the block of `length` positions from `start`."""
        num_slots, *rest = x.shape[3:]
        sizes = (self.batch, length, self.num_groups, num_slots, *rest)
        block = lax.dynamic_slice(x, (self.b, start, self.g, 0, *(0 for _ in rest)), sizes)
        return jnp.moveaxis(block, 1, 3).reshape(*self.leading, num_slots * length, *rest)

    def put_rows(self, x: jax.Array, start: jax.Array, rows: jax.Array) -> jax.Array:
        """Writes what `rows` reads."""
        num_slots, *rest = x.shape[3:]
        block = jnp.moveaxis(rows.reshape(self.batch, self.num_groups, num_slots, -1, *rest), 3, 1)
        return lax.dynamic_update_slice(x, block.astype(x.dtype), (self.b, start, self.g, 0, *(0 for _ in rest)))

    def keys(self, x: jax.Array) -> jax.Array:
        """[B, T, G, D] → [..., T, D]."""
        _, length, _, head_dim = x.shape
        x = lax.dynamic_slice(x, (self.b, 0, self.g, 0), (self.batch, length, self.num_groups, head_dim))
        return x.transpose(0, 2, 1, 3).reshape(*self.leading, length, head_dim)

    def put_keys(self, x: jax.Array, keys: jax.Array) -> jax.Array:
        """Writes what `keys` reads."""
        keys = keys.reshape(self.batch, self.num_groups, *keys.shape[-2:]).transpose(0, 2, 1, 3)
        return lax.dynamic_update_slice(x, keys.astype(x.dtype), (self.b, 0, self.g, 0))

    def mask(self, mask: Mask) -> Mask:
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, self.b, self.batch), mask)


def _over_heads(plan, q, some_heads, outputs):
    """some_heads(heads, outputs) → outputs, for all heads together or for one after the other."""
    batch, _, num_groups, _, _ = q.shape
    if not plan.head_by_head:
        return some_heads(_Heads(0, 0, batch, num_groups, (batch, num_groups)), outputs)

    def one_head(n, outputs):
        return some_heads(_Heads(n // num_groups, n % num_groups, 1, 1, ()), outputs)

    return lax.fori_loop(0, batch * num_groups, one_head, outputs)


def _over_q_blocks(plan, mask, q, k, one_q_block, outputs):
    """one_q_block(i, q_start, kv bounds, outputs) → outputs, for each block of queries; the last one ends at S."""
    q_len = q.shape[1]
    num_blocks = -(-q_len // plan.block_q)
    q_starts = jnp.minimum(jnp.arange(num_blocks) * plan.block_q, q_len - plan.block_q)
    bounds = kv_bounds(mask, q_starts, plan.block_q, plan.block_k, k.shape[1])

    def body(i, outputs):
        return one_q_block(i, q_starts[i], [bound[i] for bound in bounds], outputs)

    return lax.fori_loop(0, num_blocks, body, outputs)


def _over_kv_blocks(plan, heads, mask, q, k, q_start, bounds, step, carry):
    """step(carry, start, seen) → carry, for each block of keys that the q block sees: seen is bool [..., R, T], or None
    where all of the block is seen."""
    first, whole_first, whole_end, end = bounds
    mask, num_slots, kv_len = heads.mask(mask), q.shape[3], k.shape[1]

    def whole_step(j, carry):
        return step(carry, j * plan.block_k, None)

    def cut_step(j, carry):
        j = jnp.where(j < whole_first, j, j - whole_first + whole_end)
        start = jnp.minimum(j * plan.block_k, kv_len - plan.block_k)  # the last block ends at T
        seen = seen_keys(mask, q_start, plan.block_q, start, plan.block_k)
        seen &= start + jnp.arange(plan.block_k) >= j * plan.block_k  # and shares keys with the one before
        seen = jnp.tile(seen, (1, num_slots, 1))
        return step(carry, start, seen[:, None] if heads.leading else seen[0])

    carry = lax.fori_loop(whole_first, whole_end, whole_step, carry)
    return lax.fori_loop(first, end - (whole_end - whole_first), cut_step, carry)


def _block_reader(plan, heads, x, *, transposed=False):
    """A function start → that block of K or V, [..., T, D] or transposed."""

    def arrange(x):
        keys = heads.keys(x).astype(jnp.float32) if plan.on_cpu else heads.keys(x)
        return jnp.swapaxes(keys, -1, -2) if transposed else keys

    if plan.few_rows:
        return lambda start: arrange(lax.dynamic_slice_in_dim(x, start, plan.block_k, axis=1))
    arranged = arrange(x)
    return lambda start: lax.dynamic_slice_in_dim(arranged, start, plan.block_k, axis=-1 if transposed else -2)


def _query_factor(plan, dtype):
    """The part of `score_factor` that goes into the queries: all of it in float32; low precision would round it."""
    return plan.score_factor if plan.on_cpu or dtype == jnp.float32 else 1.0


def _scaled_queries(plan, q_i):
    """The queries with their part of `score_factor`, and the part that is left for the scores."""
    factor = _query_factor(plan, q_i.dtype)
    if factor == 1.0:
        return q_i, plan.score_factor
    return q_i.astype(jnp.float32) * factor, 1.0


def _cap(plan, s, factor):
    """Scores times log2(e), so that exp2 serves as exp, and the soft cap's slope (None without a cap)."""
    s = s if factor == 1.0 else s * factor
    if plan.softcap is None:
        return s, None
    tanh = jnp.tanh(s)
    return tanh * (plan.softcap * LOG2_E), 1.0 - jnp.square(tanh)


def _dot(plan, spec, a, b):
    """einsum with float32 results, from float32 on CPUs and from the narrower of the operands' types elsewhere."""
    dtype = jnp.float32 if plan.on_cpu else min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    precision = "highest" if dtype == jnp.float32 else None
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=jnp.float32)


def _add_at(x, start, update):
    old = lax.dynamic_slice_in_dim(x, start, update.shape[-2], axis=-2)
    return lax.dynamic_update_slice_in_dim(x, old + update, start, axis=-2)


ROUNDING_SHIFT = np.float32(1.5 * 2**23)
# 2^f on [-1/2, 1/2], degree 6 (Chebyshev interpolation), relative error 1e-8 before rounding.
EXP2_COEFFICIENTS = (
    np.polynomial.Chebyshev.interpolate(np.exp2, 6, domain=[-0.5, 0.5]).convert(kind=np.polynomial.Polynomial).coef
)


def _exp2(plan, x):
    """2^x for x <= 0, relative error 1e-7; at most 2^-126 where the true value is less.

    On CPUs the exponential is half of the time outside the matmuls, and XLA's is general: range checks, a conversion to
    int that saturates. Here n = round(x) is read from the low bits of x + 1.5·2²³ and enters as the exponent.
    """
    if not plan.on_cpu:
        return jnp.exp2(x)
    x = jnp.maximum(x, -126.0)
    n = lax.bitcast_convert_type(x + ROUNDING_SHIFT, jnp.int32) - ROUNDING_SHIFT.view(np.int32)
    f = x - n.astype(jnp.float32)
    *rest, leading = EXP2_COEFFICIENTS.astype(np.float32)
    power = jnp.full_like(f, leading)
    for coefficient in reversed(rest):
        power = power * f + coefficient
    return lax.bitcast_convert_type(lax.bitcast_convert_type(power, jnp.int32) + (n << 23), jnp.float32)
