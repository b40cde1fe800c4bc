"""`attend`: one signature for attention with selected query experts, several implementations."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gqe_jax.kernels.mask import Mask
from gqe_jax.kernels.reference import reference
from gqe_jax.kernels.xla import xla

IMPLEMENTATIONS: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {"reference": reference, "xla": xla}
"""Name → function(q, k, v, expert_index, mask, *, q_rope, q_norm, softcap, scale) → (o, lse)."""


def choose(platform: str) -> str:
    """The name of the implementation that `attend` takes on a platform ("cpu", "gpu", "tpu") when none is named."""
    return {"cpu": "xla", "gpu": "xla", "tpu": "xla"}.get(platform, "xla")


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    expert_index: jax.Array | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    q_offset: jax.Array | int = 0,
    kv_offset: jax.Array | int = 0,
    kv_length: jax.Array | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    q_rope: tuple[jax.Array, jax.Array] | None = None,
    q_norm: tuple[jax.Array, float] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Grouped-query attention of the selected query experts: o[b,s,g,j] = softmax(scale · q̂ k_gᵀ) v_g.

    q̂ is the query of expert `expert_index[b,s,g,j]` of group g, then RMS-normed (`q_norm`), then rotated (`q_rope`).
    Unselected experts cost no attention, and the gradient of their queries is exactly zero. Without an index every
    query head attends (dense: MHA, MQA, GQA by the sizes of G and M). `spec`: layer, step 4.

    Args:
      q: [B, S, G, M, D], all experts' queries; float32, bfloat16 or float16.
      k, v: [B, T, G, D] in q's dtype; k arrives finished (normed and rotated).
      expert_index: integer [B, S, G, K] with values in 0..M−1 (not checked: values are traced), K <= M.
      causal: a query sees no key at a later position.
      window: a query at position i sees keys at positions j with i − window < j (and j < i + window if not causal).
      q_offset, kv_offset: position of query 0 and of key 0; integers or int arrays, scalar or [B]; may be traced.
      kv_length: int [B]; keys at buffer index t >= kv_length[b] are invisible (an unfilled cache costs nothing).
      q_segment_ids, kv_segment_ids: int [B, S] and [B, T]; a query sees keys of its own segment; 0 is padding, which
        sees nothing and is seen by nothing.
      q_rope: (cos, sin), float32 [B or 1, S, D/2] each; rotate-half convention.
      q_norm: (scale [D], eps), differentiable in its scale.
      softcap: scores become softcap · tanh(scores / softcap), before the mask.
      scale: factor on the scores; 1/√D by default.
      return_lse: return the log-sum-exp of the scores too.
      implementation: a name in `IMPLEMENTATIONS`; by default `choose` picks it for the default JAX backend.

    Returns:
      o [B, S, G, K, D] in q's dtype (K = M without an index), and with `return_lse` also lse float32 [B, S, G, K],
      natural logarithm, differentiable. A query that sees no key gets o = 0, lse = `EMPTY_LSE` and gradient 0.

    Raises:
      ValueError: shapes, dtypes or options that do not fit together, or an unknown implementation.
    """
    name = choose(jax.default_backend()) if implementation is None else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={name!r} is unknown: choose one of {', '.join(sorted(IMPLEMENTATIONS))}")
    _check_arrays(q, k, v, expert_index)
    _check_options(q, q_rope, q_norm, window, softcap, scale)
    mask = _build_mask(q, k, causal, window, q_offset, kv_offset, kv_length, q_segment_ids, kv_segment_ids)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    o, lse = IMPLEMENTATIONS[name](
        q, k, v, expert_index, mask, q_rope=q_rope, q_norm=q_norm, softcap=softcap, scale=scale
    )
    return (o, lse) if return_lse else o


def _check_arrays(q, k, v, expert_index):
    if q.ndim != 5:
        raise ValueError(f"q has shape {q.shape}: attend needs [B, S, G, M, D] (one head per group is M = 1)")
    batch, q_len, num_groups, num_experts, head_dim = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.ndim != 4 or (x.shape[0], *x.shape[2:]) != (batch, num_groups, head_dim):
            raise ValueError(
                f"{name} has shape {x.shape}: with q of shape {q.shape} it must be [B, T, G, D] = "
                f"[{batch}, T, {num_groups}, {head_dim}]"
            )
    if k.shape != v.shape:
        raise ValueError(f"k has shape {k.shape} and v {v.shape}: they must have the same length T")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q has shape {q.shape} and k {k.shape}: no axis may be empty")
    if not jnp.issubdtype(q.dtype, jnp.floating) or q.dtype.itemsize > 4:
        raise ValueError(f"q has dtype {q.dtype}: attend takes float32, bfloat16 or float16")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}: cast them to one dtype")
    if expert_index is None:
        return
    if not jnp.issubdtype(expert_index.dtype, jnp.integer):
        raise ValueError(f"expert_index has dtype {expert_index.dtype}: it must be an integer array")
    if expert_index.ndim != 4 or expert_index.shape[:3] != (batch, q_len, num_groups):
        raise ValueError(
            f"expert_index has shape {expert_index.shape}: with q of shape {q.shape} it must be [B, S, G, K] = "
            f"[{batch}, {q_len}, {num_groups}, K]"
        )
    if not 1 <= expert_index.shape[3] <= num_experts:
        raise ValueError(
            f"expert_index selects K={expert_index.shape[3]} experts of M={num_experts} "
            f"(shape {expert_index.shape}, q {q.shape}): K must be in 1..M"
        )


def _check_options(q, q_rope, q_norm, window, softcap, scale):
    batch, q_len, _, _, head_dim = q.shape
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"window={window!r} must be an int of at least 1: a query's own key is the first it sees")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be positive, or None for no cap")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale={scale} must be positive, or None for 1/sqrt(head_dim)")
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
        value = jnp.asarray(value)
        if value.shape not in ((), (batch,)) or not jnp.issubdtype(value.dtype, jnp.integer):
            raise ValueError(
                f"{name} has shape {value.shape} and dtype {value.dtype}: it must be an integer, scalar or "
                f"[B] = [{batch}]"
            )
        return jnp.broadcast_to(value.astype(jnp.int32), (batch,))

    def segment_ids(name, value, length):
        if value.shape != (batch, length) or not jnp.issubdtype(value.dtype, jnp.integer):
            raise ValueError(
                f"{name} has shape {value.shape} and dtype {value.dtype}: it must be an integer array "
                f"[{batch}, {length}]"
            )
        return value.astype(jnp.int32)

    if (q_segment_ids is None) != (kv_segment_ids is None):
        given, missing = ("q", "kv") if kv_segment_ids is None else ("kv", "q")
        raise ValueError(f"{given}_segment_ids is given without {missing}_segment_ids: pass both or neither")
    if q_segment_ids is not None:
        q_segment_ids = segment_ids("q_segment_ids", q_segment_ids, q_len)
        kv_segment_ids = segment_ids("kv_segment_ids", kv_segment_ids, kv_len)
    return Mask(
        q_offset=per_row("q_offset", q_offset),
        kv_offset=per_row("kv_offset", kv_offset),
        kv_length=None if kv_length is None else per_row("kv_length", kv_length),
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        causal=causal,
        window=window,
    )
