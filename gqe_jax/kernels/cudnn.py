"""Computes attention on NVIDIA GPUs: the selected queries, compacted, go through JAX's call of cuDNN's attention."""

from __future__ import annotations

import typing

import jax
from jax.ad_checkpoint import checkpoint_name

from gqe_jax.kernels.mask import Mask
from gqe_jax.kernels.queries import prepare_queries
from gqe_jax.remat import ATTENTION_OUT

if typing.TYPE_CHECKING:
    from gqe_jax.kernels.choose import Call


def obstacle(call: Call) -> str | None:
    """Says why cuDNN's attention cannot compute a call on an NVIDIA GPU; None where it can."""
    if call.dtype not in ("bfloat16", "float16"):
        return f"cudnn takes bfloat16 and float16, not {call.dtype}"
    if call.value_dim != call.head_dim:
        return f"JAX's call of cudnn needs values as wide as keys, not {call.value_dim} and {call.head_dim}"
    if call.head_dim % 8 or call.head_dim > 256:
        return f"cudnn needs a head_dim that is a multiple of 8 and at most 256, not {call.head_dim}"
    if call.head_dim > 128 and not _is_hopper_or_later():
        return f"cudnn takes head_dim={call.head_dim} on GPUs of compute capability 9.0 or later only"
    if call.softcap:
        return "cudnn has no soft cap"
    if call.segments:
        return "JAX's call of cudnn cannot express segment ids without an S × T array"
    if call.return_lse:
        return "JAX's call of cudnn rounds the log-sum-exp to the input's dtype and does not differentiate it"
    if call.kv_length or not call.aligned or (call.causal and call.q_len != call.kv_len):
        return "cudnn's masks know neither offsets nor a partly filled cache"
    if call.window is not None and not call.causal:
        return "cudnn has a sliding window in causal attention only"
    return None


def _is_hopper_or_later() -> bool:
    device = jax.devices()[0]
    return device.platform == "gpu" and float(device.compute_capability) >= 9.0


def cudnn(q, k, v, expert_index, mask: Mask, *, kv_head=None, q_rope, q_norm, softcap, scale) -> tuple[jax.Array, None]:
    """Computes softmax(scale · q kᵀ) v by cuDNN for a call that has no `obstacle`; arguments as in `attend`.

    The K selected queries of a run are heads of grouped-query attention: cuDNN sees R · K query heads on R KV heads,
    which `kv_head` selects from k and v. It returns no log-sum-exp; a soft cap, segment ids, offsets and lengths are
    ignored, as `obstacle` refuses calls that have them.
    """
    del softcap
    if kv_head is not None:
        k, v = (x[:, :, kv_head] for x in (k, v))
    q = prepare_queries(q, expert_index, q_norm, q_rope)
    batch, q_len, num_groups, num_slots, head_dim = q.shape
    o = jax.nn.dot_product_attention(
        q.reshape(batch, q_len, num_groups * num_slots, head_dim),
        k,
        v,
        scale=scale,
        is_causal=mask.causal,
        # Keys to the left of the query's own, and to the right.
        local_window_size=None if mask.window is None else (mask.window - 1, 0),
        implementation="cudnn",
    )
    return checkpoint_name(o.reshape(q.shape), ATTENTION_OUT), None
