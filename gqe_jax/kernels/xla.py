"""Blockwise attention in plain XLA operations, for any platform; the fast path on CPUs.

Scores exist one block of queries × one block of keys at a time, forward and backward (the backward recomputes them from
q, k and the saved log-sum-exp). Loop bounds follow the mask (`kv_bounds.py`): a block above the diagonal, outside the
window, past `kv_length` or without a common segment is not visited, and only blocks that the mask cuts pay for a mask.

Axes beyond the usual alphabet: R is the rows of a q block, slot-major (row = slot · block_q + position), so that the
slots of a group share each block of K and V; a trailing T is the keys of one block.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gqe_jax.kernels.kv_bounds import kv_bounds, seen_keys
from gqe_jax.kernels.mask import Mask
from gqe_jax.kernels.partials import EMPTY_LSE
from gqe_jax.kernels.queries import prepare_queries

LOG2_E = math.log2(math.e)
ROUNDING_SHIFT = 1.5 * 2.0**23


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static about one call."""

    scale: float
    softcap: float | None
    num_slots: int
    block_q: int  # positions; rows are num_slots times as many
    block_k: int
    on_cpu: bool

    @property
    def operand_dtype(self):
        """CPUs have their fast matmul in float32."""
        return jnp.dtype(jnp.float32) if self.on_cpu else None

    @property
    def few_rows(self) -> bool:
        """Decode: K and V are then read once, where they lie, and all heads go together."""
        return self.num_slots * self.block_q <= 16

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
    block_q: int = 512,
    block_k: int = 512,
) -> tuple[jax.Array, jax.Array]:
    """Blockwise attention; arguments as in `attend`. Block sizes are upper bounds: rows of q (slots included), keys."""
    q = prepare_queries(q, expert_index, q_norm, q_rope)
    _, q_len, _, num_slots, _ = q.shape
    num_q_blocks = -(-q_len // max(1, block_q // num_slots))
    plan = _Plan(
        scale=scale,
        softcap=softcap,
        num_slots=num_slots,
        block_q=-(-q_len // num_q_blocks),
        block_k=min(block_k, k.shape[1]),
        on_cpu=jax.default_backend() == "cpu",
    )
    return _attend(plan, mask, q, k, v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, mask: Mask, q, k, v):
    q_blocks = _to_q_blocks(plan, q)
    if plan.few_rows:
        o, lse = _forward(plan, mask, q_blocks, k, v)
    else:
        kv = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
        o, lse = _over_heads(plan, functools.partial(_forward, plan), mask, q_blocks, *kv)
    return _from_q_blocks(plan, o, q.shape[1]).astype(q.dtype), _from_q_blocks(plan, lse, q.shape[1])


def _attend_fwd(plan, mask, q, k, v):
    o, lse = _attend(plan, mask, q, k, v)
    return (o, lse), (mask, q, k, v, o, lse)


def _attend_bwd(plan, residuals, cotangents):
    mask, q, k, v, o, lse = residuals
    do, dlse = cotangents
    delta = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1) - dlse
    rows = [_to_q_blocks(plan, x) for x in (q, do, lse, delta)]
    kv = [x.transpose(0, 2, 1, 3) for x in (k, v)]
    dq, dk, dv = _over_heads(plan, functools.partial(_backward, plan), mask, *rows, *kv)
    dk, dv = dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3)
    return None, _from_q_blocks(plan, dq, q.shape[1]).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _to_q_blocks(plan, x):
    """[B, S, G, K, ...] → [B, G, q blocks, R, ...]; a last partial block is filled up with zeros."""
    batch, q_len, num_groups, num_slots, *rest = x.shape
    num_blocks = -(-q_len // plan.block_q)
    x = jnp.pad(x, [(0, 0), (0, num_blocks * plan.block_q - q_len)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(batch, num_blocks, plan.block_q, num_groups, num_slots, *rest)
    x = jnp.moveaxis(x, (3, 1, 4, 2), (1, 2, 3, 4))
    return x.reshape(batch, num_groups, num_blocks, num_slots * plan.block_q, *rest)


def _from_q_blocks(plan, x, q_len):
    """The inverse of `_to_q_blocks`."""
    batch, num_groups, num_blocks, _, *rest = x.shape
    x = x.reshape(batch, num_groups, num_blocks, plan.num_slots, plan.block_q, *rest)
    x = jnp.moveaxis(x, (2, 4, 1, 3), (1, 2, 3, 4))
    return x.reshape(batch, num_blocks * plan.block_q, num_groups, plan.num_slots, *rest)[:, :q_len]


def _over_heads(plan, function, mask, *arrays_BxGx):
    """function(mask, *arrays) for all (batch row, group) pairs: together, or on a CPU one after the other without the
    leading axes. A pair's blocks then stay in the cores' caches, and its loops are as long as its own mask asks."""
    if not plan.on_cpu:
        return function(mask, *arrays_BxGx)
    batch, num_groups = arrays_BxGx[0].shape[:2]
    mask = jax.tree.map(lambda x: jnp.repeat(x, num_groups, axis=0)[:, None], mask)
    arrays = [x.reshape(batch * num_groups, *x.shape[2:]) for x in arrays_BxGx]
    results = lax.map(lambda xs: function(*xs), (mask, *arrays))
    return jax.tree.map(lambda x: x.reshape(batch, num_groups, *x.shape[1:]), results)


def _forward(plan, mask, q_blocks, k, v):
    """o [..., q blocks, R, D] and lse [..., q blocks, R], float32, where ... is B, G or nothing. k is [..., D, T] and v
    [..., T, D], the order in which a CPU's matmul wants them; with few rows both are [B, T, G, D]."""
    *heads, num_q_blocks, num_rows, head_dim = q_blocks.shape
    kv_len = k.shape[1] if plan.few_rows else k.shape[-1]

    def key_block(start):
        if plan.few_rows:
            return lax.dynamic_slice_in_dim(k, start, plan.block_k, axis=1).transpose(0, 2, 3, 1)
        return lax.dynamic_slice_in_dim(k, start, plan.block_k, axis=-1)

    def value_block(start):
        if plan.few_rows:
            return lax.dynamic_slice_in_dim(v, start, plan.block_k, axis=1).transpose(0, 2, 1, 3)
        return lax.dynamic_slice_in_dim(v, start, plan.block_k, axis=-2)

    def one_q_block(xs):
        i, q_i, bounds = xs
        q_i, factor = _scaled_queries(plan, q_i)

        def step(carry, start, seen):
            row_max, row_sum, acc = carry
            s, _ = _cap(plan, _dot(plan, "...rd,...dt->...rt", q_i, key_block(start)), factor)
            if seen is not None:
                s = jnp.where(seen, s, -jnp.inf)
            new_max = jnp.maximum(row_max, jnp.max(s, axis=-1))
            p = _exp2(plan, s - new_max[..., None])
            if seen is not None:
                p = jnp.where(seen, p, 0.0)
            decay = jnp.exp2(row_max - new_max)
            pv = _dot(plan, "...rt,...td->...rd", p, value_block(start))
            return new_max, row_sum * decay + jnp.sum(p, axis=-1), acc * decay[..., None] + pv

        rows = (*heads, num_rows)
        carry = jnp.full(rows, EMPTY_LSE), jnp.zeros(rows), jnp.zeros((*rows, head_dim))
        row_max, row_sum, acc = _over_kv_blocks(plan, mask, i, bounds, kv_len, step, carry, heads, rows_first=True)
        any_seen = row_sum > 0
        row_sum = jnp.where(any_seen, row_sum, 1.0)
        lse = jnp.where(any_seen, (row_max + jnp.log2(row_sum)) / LOG2_E, EMPTY_LSE)
        return acc / row_sum[..., None], lse

    bounds = kv_bounds(mask, num_q_blocks, plan.block_q, plan.block_k, kv_len)
    o, lse = lax.map(one_q_block, (jnp.arange(num_q_blocks), jnp.moveaxis(q_blocks, -3, 0), bounds))
    return jnp.moveaxis(o, 0, -3), jnp.moveaxis(lse, 0, -2)


def _backward(plan, mask, q_blocks, do_blocks, lse_blocks, delta_blocks, k, v):
    """dq [..., q blocks, R, D], dk and dv [..., T, D], float32; k and v are [..., T, D]; ... is B, G or nothing.

    Scores are formed transposed, [T, R]: all five matmuls then contract the last axis of a block of scores or its first
    from the right, and none needs a transposed copy of one.
    """
    *heads, num_q_blocks, _, _ = q_blocks.shape
    kv_len = k.shape[-2]
    k_transposed = jnp.swapaxes(k, -1, -2)

    def one_q_block(carry, xs):
        i, q_i, do_i, lse_i, delta_i, bounds = xs
        q_i, factor = _scaled_queries(plan, q_i)
        q_i_transposed, do_i_transposed = jnp.swapaxes(q_i, -1, -2), jnp.swapaxes(do_i, -1, -2)
        lse2_i, delta_i = LOG2_E * lse_i[..., None, :], delta_i[..., None, :]

        def step(carry, start, seen):
            dq_i, dk, dv = carry
            k_j, v_j = (lax.dynamic_slice_in_dim(x, start, plan.block_k, axis=-2) for x in (k, v))
            s, slope = _cap(plan, _dot(plan, "...td,...dr->...tr", k_j, q_i_transposed), factor)
            p = _exp2(plan, s - lse2_i)
            if seen is not None:
                p = jnp.where(seen, p, 0.0)
            ds = p * (_dot(plan, "...td,...dr->...tr", v_j, do_i_transposed) - delta_i)
            if slope is not None:
                ds = ds * slope
            dv = _add_at(dv, start, _dot(plan, "...tr,...rd->...td", p, do_i))
            dk = _add_at(dk, start, _dot(plan, "...tr,...rd->...td", ds, q_i))
            k_j_transposed = lax.dynamic_slice_in_dim(k_transposed, start, plan.block_k, axis=-1)
            return dq_i + _dot(plan, "...dt,...tr->...dr", k_j_transposed, ds), dk, dv

        carry = (jnp.zeros(q_i_transposed.shape), *carry)
        dq_i, dk, dv = _over_kv_blocks(plan, mask, i, bounds, kv_len, step, carry, heads, rows_first=False)
        return (dk, dv), jnp.swapaxes(dq_i, -1, -2) * plan.scale

    bounds = kv_bounds(mask, num_q_blocks, plan.block_q, plan.block_k, kv_len)
    blocks = [jnp.moveaxis(x, len(heads), 0) for x in (q_blocks, do_blocks, lse_blocks, delta_blocks)]
    carry = jnp.zeros(k.shape), jnp.zeros(v.shape)
    (dk, dv), dq = lax.scan(one_q_block, carry, (jnp.arange(num_q_blocks), *blocks, bounds))
    return jnp.moveaxis(dq, 0, -3), dk * (plan.scale / _query_factor(plan, q_blocks.dtype)), dv


def _over_kv_blocks(plan, mask, i, bounds, kv_len, step, carry, heads, *, rows_first):
    """step(carry, start, seen) over the blocks of keys that q block i sees; seen is None where all of it is."""
    first, whole_first, whole_end, end = bounds
    block_k = plan.block_k

    def whole_step(j, carry):
        return step(carry, j * block_k, None)

    def cut_step(j, carry):
        j = jnp.where(j < whole_first, j, j - whole_first + whole_end)
        start = jnp.minimum(j * block_k, kv_len - block_k)  # the last block ends at T: its overlap is masked
        q_index = i * plan.block_q + jnp.tile(jnp.arange(plan.block_q), plan.num_slots)
        seen = seen_keys(mask, q_index, start, block_k) & (start + jnp.arange(block_k) >= j * block_k)
        seen = seen if rows_first else jnp.swapaxes(seen, 1, 2)
        return step(carry, start, seen[:, None] if heads else seen[0])

    carry = lax.fori_loop(whole_first, whole_end, whole_step, carry)
    return lax.fori_loop(first, end - (whole_end - whole_first), cut_step, carry)


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
    """einsum in float32, from float32 on CPUs and from the narrower of the operands' types elsewhere."""
    dtype = jnp.float32 if plan.on_cpu else min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    precision = "highest" if dtype == jnp.float32 else None
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=jnp.float32)


def _add_at(x, start, update):
    old = lax.dynamic_slice_in_dim(x, start, update.shape[-2], axis=-2)
    return lax.dynamic_update_slice_in_dim(x, old + update, start, axis=-2)


# 2^f on [-1/2, 1/2], degree 6 (Chebyshev interpolation), relative error 1e-8 before rounding.
_EXP2_COEFFICIENTS = np.polynomial.Chebyshev.interpolate(np.exp2, 6, domain=[-0.5, 0.5]).convert(
    kind=np.polynomial.Polynomial
)


def _exp2(plan, x):
    """2^x for x <= 0, relative error 1e-7; at most 2^-126 where the true value is less.

    On CPUs the exponential is half of the time outside the matmuls, and XLA's is general: range checks, a conversion to
    int that saturates. Here n = round(x) is read from the low bits of x + 1.5·2²³ and enters as the exponent.
    """
    if not plan.on_cpu:
        return jnp.exp2(x)
    x = jnp.maximum(x, -126.0)
    shifted = lax.bitcast_convert_type(x + np.float32(ROUNDING_SHIFT), jnp.int32)
    n = shifted - np.float32(ROUNDING_SHIFT).view(np.int32)
    f = x - n.astype(jnp.float32)
    *rest, leading = (np.float32(c) for c in _EXP2_COEFFICIENTS.coef)
    power = jnp.full_like(f, leading)
    for c in reversed(rest):
        power = power * f + c
    return lax.bitcast_convert_type(lax.bitcast_convert_type(power, jnp.int32) + (n << 23), jnp.float32)
