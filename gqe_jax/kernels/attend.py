"""Defines `attend`: attention with selected query experts has one signature and several implementations."""

import dataclasses
import functools
import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from gqe_jax.kernels.choose import Call, announce, check, choose, is_partitioned, target_platform
from gqe_jax.kernels.cudnn import cudnn
from gqe_jax.kernels.mask import INT32, Mask, make_mask
from gqe_jax.kernels.mesh_axes import check_not_explicit, debug_check, vary, varying_axes
from gqe_jax.kernels.reference import reference
from gqe_jax.kernels.tpu.blocks import BlockSizes
from gqe_jax.kernels.tpu.decode import decode
from gqe_jax.kernels.tpu.pallas_tpu import pallas_tpu
from gqe_jax.kernels.xla import xla

IMPLEMENTATIONS: dict[str, Callable[..., tuple[jax.Array, jax.Array | None]]] = {
    "reference": reference,
    "xla": xla,
    "cudnn": cudnn,
    "pallas_tpu": pallas_tpu,
    "pallas_tpu_decode": decode,
}
"""Name → function(q, k, v, expert_index, mask, *, kv_head, q_rope, q_norm, softcap, scale) → (o, lse), with kv_head an
int32 array [R] or None; where the caller gives block sizes, "pallas_tpu" takes `block_sizes` too."""


@overload
def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, expert_index: jax.Array | None = None, *, q_shared: None = None,
    return_lse: Literal[False] = False, **options: Any,
) -> jax.Array: ...
@overload
def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, expert_index: jax.Array | None = None, *, q_shared: None = None,
    return_lse: Literal[True], **options: Any,
) -> tuple[jax.Array, jax.Array]: ...
@overload
def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, expert_index: jax.Array | None = None, *, q_shared: jax.Array,
    return_lse: bool = False, **options: Any,
) -> tuple[jax.Array, ...]: ...  # fmt: skip
def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    expert_index: jax.Array | None = None,
    *,
    kv_head: jax.Array | Sequence[int] | None = None,
    q_shared: jax.Array | None = None,
    causal: bool = True,
    window: int | None = None,
    q_offset: jax.Array | int = 0,
    kv_offset: jax.Array | int = 0,
    kv_length: jax.Array | None = None,
    layer: jax.Array | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    q_rope: tuple[jax.Array, jax.Array] | None = None,
    q_norm: tuple[jax.Array, float] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    block_sizes: BlockSizes | None = None,
) -> jax.Array | tuple[jax.Array, ...]:
    """Computes grouped-query attention of the selected query experts (docs/algorithm.md, "What attend computes").

        o[b,s,r,j] = softmax(scale · q̂ k_gᵀ) v_g,   g = kv_head[r]

    q̂ is the query of expert `expert_index[b,s,r,j]` of query run r, RMS-normed (`q_norm`), then rotated (`q_rope`). A
    query run is M query heads that read the same KV head; by default there is one run for each KV head, R = G.
    Unselected experts cost no attention, and the gradient of their queries is exactly zero. Without an index every
    query head attends (dense attention: MHA, MQA or GQA by the sizes of G and M).

    First derivatives in reverse mode are defined for q, k, v, q_shared and the arrays in q_rope and q_norm; the
    implementation "reference" alone has forward mode (`jax.jvp`) and second derivatives too.

    What is invisible has no influence on results and gradients, whatever its bits (NaN, infinity): keys and values that
    no query of their batch row sees (padding, an unfilled cache, outside of every window), and queries that see no key.
    In "reference" and "xla" this holds for each pair: a key of NaN does not reach the queries that do not see it. A
    value that is seen and not finite makes the output NaN.

    Args:
      q: [B, S, R, M, D], all experts' queries; float32, bfloat16 or float16.
      k, v: [B, T, G, D] and [B, T, G, Dv] in q's dtype; k arrives finished (normed and rotated). Values may be wider
        or narrower than keys.
      expert_index: integer [B, S, R, K] with values in 0..M−1, K <= M. Other values raise outside `jit`, and
        under `checkify.checkify` (not under a mesh of several devices, where JAX cannot carry its errors); elsewhere,
        where values are not known, they select some expert.
      kv_head: integer [R] with values in 0..G−1, the KV head that each query run reads; a tuple, a list, or an array,
        which may be traced and is checked as expert_index is. None: run r reads head r.
      q_shared: [B, S, D], queries of one head more (GQE's shared head): it attends to the means of k and v over groups.
      causal: a query sees no key at a later position.
      window: a query at position i sees keys at positions j with i − window < j (and j < i + window if not causal); any
        int, also beyond int32.
      q_offset, kv_offset: position of query 0 and of key 0; integers or int arrays, scalar or [B], within
        int32; may be traced. With a window they must differ by less than 2³¹.
      kv_length: int [B]; keys at buffer index t >= kv_length[b] are invisible (an unfilled cache costs nothing).
      layer: int scalar, may be traced: k and v are then stacked over layers, [L, B, T, G, D or Dv], and this layer's
        are used. A decode kernel reads them without a copy.
      q_segment_ids, kv_segment_ids: int [B, S] and [B, T]; a query sees keys of its own segment; 0 is padding, which
        sees nothing and is seen by nothing.
      q_rope: (cos, sin), float32 [B or 1, S, D/2] each; rotate-half convention.
      q_norm: (scale [D], eps), differentiable in its scale.
      softcap: scores become softcap · tanh(scores / softcap), before the mask; not traced, infinity is none.
      scale: factor on the scores, not traced; 1/√D by default.
      return_lse: return the log-sum-exp of the scores too.
      implementation: a name in `IMPLEMENTATIONS`; None takes the fastest that can compute the call on the platform that
        it is lowered for (`kernels/choose.py`), and says in the log "gqe_jax" which and why.
      block_sizes: replace the tuned block sizes of "pallas_tpu"; an error where "pallas_tpu" cannot compute the call.

    Returns:
      o [B, S, R, K, Dv] in q's dtype (K = M without an index), and with `return_lse` also lse float32 [B, S, R, K],
      natural logarithm, differentiable. A query that sees no key gets o = 0, lse = `EMPTY_LSE` and gradient 0. With
      `q_shared` the shared head's output [B, S, Dv] comes right after o.

    Raises:
      ValueError: shapes, dtypes or options do not fit together; the implementation is unknown, or cannot compute the
        call on this platform; blocks exceed the TPU's VMEM (those of the gradient are checked when it is taken).
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} is unknown: choose one of {', '.join(sorted(IMPLEMENTATIONS))}"
        )
    check_not_explicit(q=q, k=k, v=v)
    window, softcap, scale, q_norm = _known_options(window, softcap, scale, q_norm)
    if expert_index is not None and not isinstance(expert_index, jax.Array):
        expert_index = np.asarray(expert_index)
    if q_rope is not None:
        q_rope = tuple(jnp.asarray(table, jnp.float32) for table in q_rope)
    positions = (q_offset, kv_offset, kv_length, q_segment_ids, kv_segment_ids)
    axes = varying_axes((q, k, v, expert_index, kv_head, q_shared, layer, q_rope, q_norm, positions))
    q, k, v, expert_index, q_shared, layer, q_rope = vary((q, k, v, expert_index, q_shared, layer, q_rope), axes)
    q_norm = None if q_norm is None else (vary(q_norm[0], axes), q_norm[1])
    stacked_k, stacked_v = k, v
    if layer is not None:
        k, v = (_layer_of(name, x, layer) for name, x in (("k", k), ("v", v)))
    kv_head = vary(_check_kv_head(kv_head, q, k), axes)
    _check_arrays(q, k, v, expert_index, kv_head)
    if q_shared is not None and (q_shared.shape != (*q.shape[:2], q.shape[-1]) or q_shared.dtype != q.dtype):
        raise ValueError(
            f"q_shared has shape {q_shared.shape} and dtype {q_shared.dtype}: with q of shape {q.shape} and dtype "
            f"{q.dtype} it must be [B, S, D] = {[*q.shape[:2], q.shape[-1]]} in the same dtype"
        )
    _check_queries(q, q_rope, q_norm)
    mask = vary(_build_mask(q, k, causal, window, *positions), axes)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    call = Call(
        batch=q.shape[0],
        q_len=q.shape[1],
        kv_len=k.shape[1],
        num_runs=q.shape[2],
        num_experts=q.shape[3],
        num_slots=q.shape[3] if expert_index is None else expert_index.shape[3],
        head_dim=q.shape[4],
        value_dim=v.shape[3],
        num_kv_heads=k.shape[2],
        kv_head=kv_head is not None,
        dtype=q.dtype.name,
        causal=causal,
        window=mask.window,
        softcap=softcap is not None,
        segments=q_segment_ids is not None,
        kv_length=kv_length is not None,
        aligned=mask.aligned,
        return_lse=return_lse,
        partitioned=is_partitioned(),
        block_sizes=block_sizes is not None,
    )
    platform = target_platform(q)

    def chosen(call: Call) -> str:
        choice = choose(platform, call) if implementation is None else check(implementation, platform, call)
        announce(platform, call, choice)
        return choice.name

    options = {"kv_head": kv_head, "q_rope": q_rope, "q_norm": q_norm, "softcap": softcap, "scale": scale}
    if block_sizes is not None:
        options["block_sizes"] = block_sizes
    name = chosen(call)
    if name == "pallas_tpu_decode":
        o, lse, *shared = IMPLEMENTATIONS[name](
            q, stacked_k, stacked_v, expert_index, mask, q_shared=q_shared, layer=layer, **options
        )
    else:
        o, lse = IMPLEMENTATIONS[name](q, k, v, expert_index, mask, **options)
        shared = []
        if q_shared is not None:
            one_head = {"num_runs": 1, "num_experts": 1, "num_slots": 1, "num_kv_heads": 1, "kv_head": False}
            name = chosen(dataclasses.replace(call, **one_head, return_lse=False))
            q_shared, options["kv_head"] = q_shared[:, :, None, None, :], None
            o_shared, _ = IMPLEMENTATIONS[name](q_shared, mean_head(k), mean_head(v), None, mask, **options)
            shared = [o_shared[:, :, 0, 0]]
    outputs = (o, *shared, lse) if return_lse else (o, *shared)
    return outputs if len(outputs) > 1 else o


def _layer_of(name: str, x: jax.Array, layer: jax.Array) -> jax.Array:
    if x.ndim != 5 or jnp.shape(layer) != ():
        raise ValueError(
            f"{name} has shape {x.shape} and layer {jnp.shape(layer)}: with a layer, which is a scalar, {name} must be "
            f"stacked, [L, B, T, G, D]"
        )
    return jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)


def mean_head(x: jax.Array) -> jax.Array:
    """Returns the mean over groups of x [B, T, G, D], [B, T, 1, D]."""
    # Groups are added one by one, as columns of the projection's output: a TPU would transpose it to reduce over axes.
    *tokens, num_groups, head_dim = x.shape
    groups = jnp.split(x.reshape(*tokens, num_groups * head_dim), num_groups, axis=-1)
    total = functools.reduce(jnp.add, [group.astype(jnp.float32) for group in groups])
    return (total / num_groups).astype(x.dtype)[..., None, :]


def _check_kv_head(kv_head, q, k) -> jax.Array | None:
    """Returns `kv_head` as an int32 array [R], or None where run r reads head r."""
    if kv_head is None:
        return None
    given, kv_head = kv_head, kv_head if isinstance(kv_head, jax.Array) else np.asarray(kv_head)
    if (q.ndim == 5 and kv_head.shape != q.shape[2:3]) or not jnp.issubdtype(kv_head.dtype, jnp.integer):
        raise ValueError(
            f"kv_head={given} has shape {kv_head.shape} and dtype {kv_head.dtype}: with q of shape {q.shape} it must "
            f"be integers [R], one for each query run (q's axis 2)"
        )
    num_kv_heads = k.shape[-2] if k.ndim > 1 else 0
    _check_values("kv_head", kv_head, "G", num_kv_heads)
    if isinstance(kv_head, np.ndarray) and kv_head.tolist() == list(range(num_kv_heads)):
        return None
    return jnp.asarray(kv_head, jnp.int32)


def _check_values(name: str, x: jax.Array | np.ndarray, letter: str, count: int) -> None:
    """Raises ValueError for values outside 0..count−1: here if they are known, else under `checkify.checkify`."""
    rule = f"{name} must have values in 0..{letter}-1 = 0..{count - 1}"
    if isinstance(x, jax.core.Tracer):
        lowest, highest = x.min(), x.max()
        debug_check(
            (lowest >= 0) & (highest < count), rule + ", not {lowest} to {highest}", lowest=lowest, highest=highest
        )
        return
    with jax.ensure_compile_time_eval():  # known here, even where a jit around this call closes over it
        lowest, highest = int(x.min()), int(x.max())
    if not 0 <= lowest <= highest < count:
        raise ValueError(f"{rule}, not {lowest} to {highest}")


def _check_arrays(q, k, v, expert_index, kv_head):
    if q.ndim != 5:
        raise ValueError(f"q has shape {q.shape}: attend needs [B, S, R, M, D] (one head per query run is M = 1)")
    batch, q_len, num_runs, num_experts, head_dim = q.shape
    num_kv_heads = num_runs if kv_head is None or k.ndim != 4 else k.shape[2]
    for name, x, width, width_name in (("k", k, head_dim, "D"), ("v", v, "Dv", "Dv")):
        widths = x.shape[-1:] if width == "Dv" else (width,)
        if x.ndim != 4 or (x.shape[0], *x.shape[2:]) != (batch, num_kv_heads, *widths):
            raise ValueError(
                f"{name} has shape {x.shape}: with q of shape {q.shape} it must be [B, T, G, {width_name}] = "
                f"[{batch}, T, {num_kv_heads}, {width}]"
                + (", where no kv_head says which KV head each query run reads" if kv_head is None else "")
            )
    if k.shape[1] != v.shape[1]:
        raise ValueError(f"k has shape {k.shape} and v {v.shape}: they must have the same length T")
    if 0 in (*q.shape, *k.shape, *v.shape):
        raise ValueError(f"q has shape {q.shape}, k {k.shape} and v {v.shape}: no axis may be empty")
    if not jnp.issubdtype(q.dtype, jnp.floating) or q.dtype.itemsize > 4:
        raise ValueError(f"q has dtype {q.dtype}: attend takes float32, bfloat16 or float16")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}: cast them to one dtype")
    if expert_index is None:
        return
    if not jnp.issubdtype(expert_index.dtype, jnp.integer):
        raise ValueError(f"expert_index has dtype {expert_index.dtype}: it must be an integer array")
    if expert_index.ndim != 4 or expert_index.shape[:3] != (batch, q_len, num_runs):
        raise ValueError(
            f"expert_index has shape {expert_index.shape}: with q of shape {q.shape} it must be [B, S, R, K] = "
            f"[{batch}, {q_len}, {num_runs}, K]"
        )
    if not 1 <= expert_index.shape[3] <= num_experts:
        raise ValueError(
            f"expert_index selects K={expert_index.shape[3]} experts of M={num_experts} "
            f"(shape {expert_index.shape}, q {q.shape}): K must be in 1..M"
        )
    _check_values("expert_index", expert_index, "M", num_experts)


def _known_options(window, softcap, scale, q_norm):
    """Returns the options that kernels are compiled for as Python numbers; an infinite soft cap becomes None."""

    def known(name, value, kind, rule):
        if isinstance(value, jax.core.Tracer):
            raise ValueError(f"{name} is traced, and kernels are compiled for it: it {rule}")
        try:
            return None if value is None else kind(value)
        except (TypeError, ValueError):
            raise ValueError(f"{name}={value!r} {rule}") from None

    rule = "must be an int of at least 1: a query's own key is the first it sees"
    window = known("window", window, operator.index, rule)
    if window is not None and window < 1:
        raise ValueError(f"window={window!r} {rule}")
    rule = "must be positive, or None for no cap"
    softcap = known("softcap", softcap, float, rule)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} {rule}")
    rule = "must be positive, or None for 1/sqrt(head_dim); multiply q, or q_norm's scale, by a factor that is traced"
    scale = known("scale", scale, float, rule)
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale={scale} {rule}")
    if q_norm is not None:
        q_norm = jnp.asarray(q_norm[0]), known("q_norm's eps", q_norm[1], float, "must be a number")
    return window, None if softcap == math.inf else softcap, scale, q_norm


def _check_queries(q, q_rope, q_norm):
    batch, q_len, _, _, head_dim = q.shape
    if q_norm is not None and jnp.shape(q_norm[0]) != (head_dim,):
        raise ValueError(f"q_norm's scale has shape {jnp.shape(q_norm[0])}: it must be [D] = [{head_dim}]")
    if q_rope is not None:
        if head_dim % 2:
            raise ValueError(f"q_rope needs an even head_dim, and q of shape {q.shape} has D={head_dim}")
        for name, table in zip(("cos", "sin"), q_rope, strict=True):
            if table.shape not in ((1, q_len, head_dim // 2), (batch, q_len, head_dim // 2)):
                raise ValueError(
                    f"q_rope's {name} has shape {table.shape}: with q of shape {q.shape} it must be [B or 1, S, D/2] "
                    f"= [{batch} or 1, {q_len}, {head_dim // 2}]"
                )


def _build_mask(q, k, causal, window, q_offset, kv_offset, kv_length, q_segment_ids, kv_segment_ids) -> Mask:
    batch, q_len, kv_len = q.shape[0], q.shape[1], k.shape[1]

    def per_row(name, value):
        value = value if isinstance(value, jax.Array) else np.asarray(value)
        if value.shape not in ((), (batch,)) or not jnp.issubdtype(value.dtype, jnp.integer):
            raise ValueError(
                f"{name} has shape {value.shape} and dtype {value.dtype}: it must be an integer, scalar or "
                f"[B] = [{batch}]"
            )
        return jnp.broadcast_to(_as_int32(name, value), (batch,))

    def segment_ids(name, value, length):
        value = value if isinstance(value, jax.Array) else np.asarray(value)
        if value.shape != (batch, length) or not jnp.issubdtype(value.dtype, jnp.integer):
            raise ValueError(
                f"{name} has shape {value.shape} and dtype {value.dtype}: it must be an integer array "
                f"[{batch}, {length}]"
            )
        return _as_int32(name, value)

    if (q_segment_ids is None) != (kv_segment_ids is None):
        given, missing = ("q", "kv") if kv_segment_ids is None else ("kv", "q")
        raise ValueError(f"{given}_segment_ids is given without {missing}_segment_ids: pass both or neither")
    if q_segment_ids is not None:
        q_segment_ids = segment_ids("q_segment_ids", q_segment_ids, q_len)
        kv_segment_ids = segment_ids("kv_segment_ids", kv_segment_ids, kv_len)
    known = [np.asarray(x, object) for x in (q_offset, kv_offset) if not isinstance(x, jax.Array)]
    if window is not None and len(known) == 2 and np.any(abs(known[0] - known[1]) > INT32.max):
        raise ValueError(
            f"q_offset={q_offset} and kv_offset={kv_offset} differ by 2^31 or more: with a window they must be nearer"
        )
    return make_mask(
        q_len,
        kv_len,
        q_offset=per_row("q_offset", q_offset),
        kv_offset=per_row("kv_offset", kv_offset),
        kv_length=None if kv_length is None else per_row("kv_length", kv_length),
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        causal=bool(causal),
        window=window,
        aligned=all(isinstance(x, numbers.Integral) for x in (q_offset, kv_offset)) and q_offset == kv_offset,
    )


def _as_int32(name: str, x: jax.Array | np.ndarray) -> jax.Array:
    """Returns x as int32; raises ValueError for values beyond it: here if known, else under `checkify.checkify`."""
    if not np.can_cast(x.dtype, np.int32):
        rule = f"{name} must have values within int32"
        if isinstance(x, jax.core.Tracer):
            lowest, highest = x.min(), x.max()
            fits = (lowest >= INT32.min) & (highest <= INT32.max)
            debug_check(fits, rule + ", not {lowest} to {highest}", lowest=lowest, highest=highest)
        else:
            with jax.ensure_compile_time_eval():
                lowest, highest = int(x.min()), int(x.max())
            if not INT32.min <= lowest <= highest <= INT32.max:
                raise ValueError(f"{rule}, not {lowest} to {highest}")
    return jnp.asarray(x, jnp.int32)
