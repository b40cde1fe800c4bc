"""The TPU implementation of `attend`: layouts around the Pallas kernels, and their gradient.

The kernels read what the projections write: queries of all experts [B, S, G·M·D], keys and values [B, T, G·D]. Only
shapes that the hardware's tiles do not fit are padded: lengths to multiples of 128, D = 80, 96 or 192 to 128 or 256.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from gqe_jax.kernels.mask import Mask, visible
from gqe_jax.kernels.queries import prepare_queries
from gqe_jax.kernels.tpu.backward import backward
from gqe_jax.kernels.tpu.blocks import BlockSizes, tpu_generation
from gqe_jax.kernels.tpu.forward import forward
from gqe_jax.kernels.tpu.plan import KernelPlan, MaskKind
from gqe_jax.kernels.tpu.schedule import row_bounds
from gqe_jax.remat import ATTENTION_LSE, ATTENTION_OUT
from gqe_jax.rounding import round_up
from gqe_jax.tpu import LANES, UnknownGeneration

MAX_HEADS = 32
"""Heads of a block (slots, of two groups where D = 64). Code is straight over them: beyond, compiling takes minutes."""


def obstacle(call) -> str | None:
    """Why these kernels cannot compute a `choose.Call` on a TPU; None where they can."""
    if call.dtype not in ("bfloat16", "float32"):
        return f"pallas_tpu takes float32 and bfloat16, not {call.dtype}"
    if call.head_dim % 2 or call.head_dim > 256:
        return f"pallas_tpu needs an even head_dim of at most 256, not {call.head_dim}"
    if call.value_dim > call.head_dim:
        return f"pallas_tpu takes values at most as wide as keys, not {call.value_dim} and {call.head_dim}"
    if call.num_experts > 256:
        return f"pallas_tpu selects among at most 256 experts of a group, not {call.num_experts}"
    if call.partitioned:
        return "XLA cannot split a Pallas kernel over devices: call it inside jax.shard_map"
    heads = call.num_slots * _lanes(call.num_runs, call.num_experts, call.head_dim, call.kv_head)[1]
    if heads > MAX_HEADS:
        return f"pallas_tpu computes at most {MAX_HEADS} heads of a KV group at one time, not {heads}"
    return None if call.block_sizes else _lack_of_memory(call)


def _lack_of_memory(call) -> str | None:
    """Returns what the error says where no blocks fit the VMEM of the TPU that the call is lowered for, if one is
    known."""
    try:
        generation = tpu_generation()
    except UnknownGeneration as error:
        return f"pallas_tpu: {error}"
    except ValueError:  # a host without a TPU asks what a TPU would run
        return None
    padded_dim, groups_per_block = _lanes(call.num_runs, call.num_experts, call.head_dim, call.kv_head)
    plan = KernelPlan(
        batch=call.batch,
        num_groups=call.num_runs,
        num_experts=call.num_experts,
        num_slots=call.num_slots,
        head_dim=padded_dim,
        norm_dim=call.head_dim,
        groups_per_block=groups_per_block,
        q_len=call.q_len,
        kv_len=call.kv_len,
        rope_batch=1,
        norm_eps=0.0,
        scale=1.0,
        softcap=1.0 if call.softcap else None,
        dtype=jnp.dtype(call.dtype),
        mask=MaskKind(call.causal, call.window, call.aligned, call.kv_length, call.segments),
        generation=generation,
        block_sizes=BlockSizes(),
        has_kv_head=call.kv_head,
        interpret=False,
    )
    try:
        _ = plan.blocks, plan.backward_blocks
    except ValueError as error:
        return f"pallas_tpu: {error}"
    return None


def _lanes(num_groups: int, num_experts: int, head_dim: int, has_kv_head: bool) -> tuple[int, int]:
    """Lanes of a head, padding included, and groups that share a block: none where neighbours read any KV heads."""
    if head_dim == 64 and num_groups % 2 == 0 and not has_kv_head:
        return head_dim, 2
    if head_dim == 64 and num_groups == num_experts == 1:
        return head_dim, 1
    return round_up(head_dim, LANES), 1


def pallas_tpu(
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
    block_sizes: BlockSizes | None = None,
    interpret: object = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention by Pallas kernels; arguments, results and errors as in `attend`.

    kv_head: int32 [G], may be traced: the head of k and v, which have any number of them, that each group of q reads.
    `interpret` runs the kernels on a CPU, for tests: True or `pltpu.InterpretParams`.
    """
    batch, q_len, num_groups, num_experts, head_dim = q.shape
    kv_len, num_slots = k.shape[1], num_experts if expert_index is None else expert_index.shape[-1]
    value_dim = v.shape[3]
    v = jnp.pad(v, [(0, 0)] * 3 + [(0, head_dim - value_dim)])  # narrower values are padded to the width of keys
    padded_dim, groups_per_block = _lanes(num_groups, num_experts, head_dim, kv_head is not None)
    plan = KernelPlan(
        batch=batch,
        num_groups=num_groups,
        num_experts=num_experts,
        num_slots=num_slots,
        head_dim=padded_dim,
        norm_dim=head_dim,
        groups_per_block=groups_per_block,
        q_len=q_len,
        kv_len=kv_len,
        rope_batch=0 if q_rope is None else q_rope[0].shape[0],
        norm_eps=0.0 if q_norm is None else q_norm[1],
        scale=scale,
        softcap=softcap,
        dtype=q.dtype,
        mask=MaskKind(mask.causal, mask.window, mask.aligned, mask.has_length, mask.has_segments),
        generation="v5e" if interpret else tpu_generation(),
        block_sizes=BlockSizes() if block_sizes is None else block_sizes,
        has_kv_head=kv_head is not None,
        interpret=interpret,
    )
    norm_scale = None if q_norm is None else q_norm[0]
    o, lse = _attend(plan, mask, expert_index, kv_head, q_rope, q, k, v, norm_scale)
    return o[..., :value_dim], lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: KernelPlan, mask: Mask, expert_index, kv_head, q_rope, q, k, v, norm_scale):
    """o [B, S, G, K, D] in q's dtype, lse float32 [B, S, G, K]."""
    o, lse = forward(plan, _operands(plan, mask, expert_index, kv_head, q_rope, q, k, v, norm_scale))
    return _heads_apart(plan, o, plan.num_slots), _rows_to_heads(plan, lse)


def _attend_fwd(plan, *args):
    """Returns the forward pass, and what the backward pass needs of it.

    The kernel turns queries by the rotary tables and has no gradient in them. Where that is asked for, queries are
    selected, normed and turned before the kernel, by differentiable XLA operations: slower, and only then.
    """
    perturbed = any(table.perturbed for table in args[3] or ())
    args = jax.tree.map(lambda x: x.value, args)
    if not perturbed:
        o, lse = _named(*_attend(plan, *args))
        return (o, lse), (args, None, o, lse)
    mask, expert_index, kv_head, q_rope, q, k, v, norm_scale = args

    # A query that sees nothing may hold NaN, and 0 · NaN would reach the tables' gradient.
    sees_any = visible(mask, plan.q_len, plan.kv_len).any(axis=-1)[:, :, None, None, None]

    def prepare(q_rope, q, norm_scale):
        q = jnp.where(sees_any, q, 0)
        q_norm = None if norm_scale is None else (norm_scale, plan.norm_eps)
        return prepare_queries(q, expert_index, q_norm, q_rope)

    q, undo = jax.vjp(prepare, q_rope, q, norm_scale)
    args = mask, None, kv_head, None, q, k, v, None
    o, lse = _named(*_attend(_of_finished_queries(plan), *args))
    return (o, lse), (args, undo, o, lse)


def _named(o, lse):
    return checkpoint_name(o, ATTENTION_OUT), checkpoint_name(lse, ATTENTION_LSE)  # for remat policies


def _of_finished_queries(plan):
    """Returns the plan of the same call on finished queries: already selected, normed and rotated."""
    return dataclasses.replace(plan, num_experts=plan.num_slots, rope_batch=0, norm_eps=0.0)


def _attend_bwd(plan, residuals, cotangents):
    (mask, expert_index, kv_head, q_rope, q, k, v, norm_scale), undo, o, lse = residuals
    do, dlse = (jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x for x in cotangents)
    plan = plan if undo is None else _of_finished_queries(plan)
    operands = _operands(plan, mask, expert_index, kv_head, q_rope, q, k, v, norm_scale)
    dq, dk, dv, dnorm_scale = backward(
        plan, mask, operands, _heads_together(plan, o), _heads_together(plan, do), _heads_to_rows(plan, lse),
        _heads_to_rows(plan, dlse),
    )  # fmt: skip
    dq, dk, dv = (_heads_apart(plan, dx, heads) for dx, heads in ((dq, plan.num_experts), (dk, None), (dv, None)))
    if norm_scale is not None:
        dnorm_scale = _unpad_dim(dnorm_scale, plan).astype(norm_scale.dtype)
    dq_rope = None
    if undo is not None:
        dq_rope, dq, dnorm_scale = undo(dq)
    if kv_head is not None:  # the kernel's are those of each group, in float32
        dk, dv = (
            jnp.zeros(x.shape, dx.dtype).at[:, :, kv_head].add(dx).astype(x.dtype) for x, dx in ((k, dk), (v, dv))
        )
    return None, None, None, dq_rope, dq, dk, dv, dnorm_scale


_attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)


def _operands(plan, mask, expert_index, kv_head, q_rope, q, k, v, norm_scale) -> dict[str, jax.Array]:
    """Returns the arrays that the kernels read, in their layout in HBM, without those that the call lacks."""
    operands = {"q": _heads_together(plan, q), "k": _heads_together(plan, k), "v": _heads_together(plan, v)}
    if expert_index is not None:
        index = expert_index.astype(jnp.float32).reshape(plan.batch, plan.q_len, -1)  # as the vector unit compares it
        operands["expert_index"] = _pad_length(index, axis=1)
    if q_rope is not None:
        operands["rope"] = _pad_length(_rope_lanes(plan, *q_rope), axis=1)
    if norm_scale is not None:
        operands["norm_scale"] = jnp.tile(_pad_dim(norm_scale.astype(jnp.float32), plan), plan.groups_per_block)[None]
    if plan.mask.has_segments:
        operands["q_segments"] = _pad_length(mask.q_segment_ids, axis=1)[:, None]
        operands["kv_segments"] = _pad_length(mask.kv_segment_ids, axis=1)[:, None]
    if kv_head is not None:
        operands["kv_head"] = jnp.clip(kv_head.astype(jnp.int32), 0, k.shape[2] - 1)
    if plan.schedule.bounded:
        operands["bounds"] = row_bounds(mask, plan.schedule).reshape(-1)
    if not plan.mask.aligned or plan.mask.has_length:
        end = jnp.full((plan.batch,), plan.kv_len, jnp.int32)
        end = end if mask.kv_length is None else jnp.minimum(mask.kv_length, end)
        operands["limits"] = jnp.concatenate([mask.q_offset - mask.kv_offset, end])
    return operands


def _rope_lanes(plan, cos, sin):
    """[B or 1, S, D/2] each → [B or 1, S, 2 W]: cos in both halves of a head's lanes, then −sin and sin."""

    def lanes(first, second):
        table = _pad_dim(jnp.concatenate([first, second], axis=-1), plan)
        return jnp.tile(table, plan.groups_per_block)

    return jnp.concatenate([lanes(cos, cos), lanes(-sin, sin)], axis=-1)


def _heads_together(plan, x):
    """[B, S or T, ..., D] → [B, padded length, heads · lanes]: the projection's own layout where nothing is padded."""
    x = _pad_dim(x, plan)
    return _pad_length(x.reshape(*x.shape[:2], -1), axis=1)


def _heads_apart(plan, x, heads):
    """Returns the reverse, for an array of q's length with that many heads per group, or (None) of K's."""
    length = plan.kv_len if heads is None else plan.q_len
    shape = (plan.num_groups,) if heads is None else (plan.num_groups, heads)
    x = x[:, :length].reshape(plan.batch, length, *shape, plan.head_dim)
    return _unpad_dim(x, plan)


def _rows_to_heads(plan, rows):
    """[B, G·K, 1, padded S] → [B, S, G, K]."""
    rows = rows[:, :, 0, : plan.q_len].reshape(plan.batch, plan.num_groups, plan.num_slots, plan.q_len)
    return jnp.transpose(rows, (0, 3, 1, 2))


def _heads_to_rows(plan, x):
    rows = jnp.transpose(x, (0, 2, 3, 1)).reshape(plan.batch, plan.num_groups * plan.num_slots, 1, plan.q_len)
    return _pad_length(rows, axis=3)


def _pad_length(x, *, axis):
    padding = -x.shape[axis] % LANES
    if not padding:
        return x
    return jnp.pad(x, [(0, padding if n == axis else 0) for n in range(x.ndim)])


def _pad_dim(x, plan):
    """Each half of D is padded, so that rotary pairs stay half a head apart."""
    half, padding = plan.norm_dim // 2, (plan.head_dim - plan.norm_dim) // 2
    if not padding:
        return x
    halves = x.reshape(*x.shape[:-1], 2, half)
    return jnp.pad(halves, [(0, 0)] * (halves.ndim - 1) + [(0, padding)]).reshape(*x.shape[:-1], plan.head_dim)


def _unpad_dim(x, plan):
    half = plan.norm_dim // 2
    if plan.head_dim == plan.norm_dim:
        return x
    return x.reshape(*x.shape[:-1], 2, plan.head_dim // 2)[..., :half].reshape(*x.shape[:-1], plan.norm_dim)
