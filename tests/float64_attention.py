"""Attention with selected query experts in float64 numpy, written from the definition: what kernels are tested against.

Gradients are the textbook ones of softmax attention: dS = P ∘ (dP − rowsum(dO ∘ O) + dlse).
"""

import numpy as np


def visible(q_len, kv_len, batch, *, causal, window, q_offset, kv_offset, kv_length, segments):
    """bool [B, S, T], key by key."""
    seen = np.zeros((batch, q_len, kv_len), bool)
    q_offset, kv_offset = np.broadcast_to(q_offset, batch), np.broadcast_to(kv_offset, batch)
    for b in range(batch):
        for s in range(q_len):
            for t in range(kv_len):
                i, j = q_offset[b] + s, kv_offset[b] + t
                ok = not causal or j <= i
                ok &= window is None or abs(i - j) < window
                ok &= kv_length is None or t < kv_length[b]
                ok &= segments is None or segments[0][b, s] == segments[1][b, t] != 0
                seen[b, s, t] = ok
    return seen


def finish_queries(q, q_norm, q_rope):
    """Norm and rotation of every expert's queries [B, S, G, M, D] (selection commutes with both)."""
    if q_norm is not None:
        scale, eps = q_norm
        q = q / np.sqrt((q**2).mean(-1, keepdims=True) + eps) * scale
    if q_rope is not None:
        cos, sin = (np.asarray(table, np.float64)[:, :, None, None, :] for table in q_rope)
        a, b = np.split(q, 2, axis=-1)
        q = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return q


def attention(
    q, k, v, expert_index=None, *, causal=True, window=None, q_offset=0, kv_offset=0, kv_length=None, segments=None,
    q_rope=None, q_norm=None, softcap=None, scale=None, do=None, dlse=None,
):  # fmt: skip
    """Returns {"o", "lse", "seen"}, and with the cotangents do and dlse also {"dq", "dk", "dv"} (dq of the finished
    queries: with q_norm or q_rope compare gradients by finite differences instead) and the size of the terms that
    cancel in two of them, {"dq_terms", "dk_terms"}. lse is −inf where nothing is seen.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    q = finish_queries(q, q_norm, q_rope)
    batch, q_len, num_groups, num_experts, head_dim = q.shape
    if expert_index is None:
        expert_index = np.broadcast_to(np.arange(num_experts), (batch, q_len, num_groups, num_experts))
    selected = np.take_along_axis(q, np.asarray(expert_index)[..., None], axis=3)
    scale = head_dim**-0.5 if scale is None else scale
    scores = scale * np.einsum("bsgkd,btgd->bsgkt", selected, k)
    slope = np.ones_like(scores)
    if softcap is not None:
        slope = 1 - np.tanh(scores / softcap) ** 2
        scores = softcap * np.tanh(scores / softcap)
    seen = visible(
        q_len, k.shape[1], batch, causal=causal, window=window, q_offset=q_offset, kv_offset=kv_offset,
        kv_length=kv_length, segments=segments,
    )[:, :, None, None, :]  # fmt: skip
    row_max = np.where(seen, scores, -np.inf).max(-1, keepdims=True)
    row_max = np.where(np.isfinite(row_max), row_max, 0.0)
    weights = np.exp(np.where(seen, scores - row_max, -np.inf))
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (row_max + np.log(total))[..., 0]
    p = weights / np.where(total > 0, total, 1.0)
    o = np.einsum("bsgkt,btgd->bsgkd", p, v)
    result = {"o": o, "lse": lse, "seen": seen.any(-1)[..., 0, 0]}
    if do is not None:
        do = np.asarray(do, np.float64)
        dp = np.einsum("bsgkd,btgd->bsgkt", do, v)
        ds = p * (dp - (do * o).sum(-1, keepdims=True) + (0.0 if dlse is None else dlse[..., None])) * slope * scale
        d_selected = np.einsum("bsgkt,btgd->bsgkd", ds, k)
        one_hot = expert_index[..., None] == np.arange(num_experts)
        result["dq"] = np.einsum("bsgkm,bsgkd->bsgmd", one_hot, d_selected)
        result["dk"] = np.einsum("bsgkt,bsgkd->btgd", ds, selected)
        result["dv"] = np.einsum("bsgkt,bsgkd->btgd", p, do)
        terms = p * (np.abs(dp) + np.abs((do * o).sum(-1, keepdims=True))) * slope * scale
        result["dq_terms"] = np.einsum("bsgkt,btgd->bsgkd", terms, np.abs(k))
        result["dk_terms"] = np.einsum("bsgkt,bsgkd->btgd", terms, np.abs(selected))
    return result


def relative_error(actual, expected, terms=0.0):
    """Frobenius error relative to what is expected, or to the terms that cancel in it where those are much larger (a
    few queries that see a few keys: the rounding is theirs); absolute where both are zero."""
    norm = max(np.linalg.norm(expected), np.linalg.norm(terms) / 4)
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / (norm if norm > 0 else 1.0)
