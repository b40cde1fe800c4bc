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


def query_gradients(q, d_finished, q_norm, q_rope):
    """From the gradient of what `finish_queries` returns to {"q", and where given "cos", "sin", "norm_scale"}."""
    gradients = {}
    q = np.asarray(q, np.float64)
    if q_rope is not None:
        cos, sin = (np.asarray(table, np.float64)[:, :, None, None, :] for table in q_rope)
        a, b = np.split(finish_queries(q, q_norm, None), 2, axis=-1)
        da, db = np.split(d_finished, 2, axis=-1)
        for name, table, d_table in (("cos", cos, da * a + db * b), ("sin", sin, db * a - da * b)):
            gradients[name] = d_table.sum(axis=(2, 3))
            if table.shape[0] == 1:
                gradients[name] = gradients[name].sum(axis=0, keepdims=True)
        d_finished = np.concatenate([da * cos + db * sin, db * cos - da * sin], axis=-1)
    if q_norm is not None:
        scale, eps = q_norm
        inverse_rms = 1 / np.sqrt((q**2).mean(-1, keepdims=True) + eps)
        gradients["norm_scale"] = (d_finished * q * inverse_rms).sum(axis=(0, 1, 2, 3))
        d_normed = d_finished * scale
        along = (d_normed * q * inverse_rms).mean(-1, keepdims=True)
        d_finished = inverse_rms * (d_normed - q * inverse_rms * along)
    return gradients | {"q": d_finished}


def whole_attention(
    q, k, v, expert_index=None, *, kv_head=None, q_shared=None, do=None, dlse=None, d_shared=None, **options
):
    """`attention` with query runs that read any KV head, and with the shared head on the mean of all KV heads.

    Returns {"o", "lse", "seen", and "shared" with `q_shared`}, and with cotangents {"gradients": one for each of q, k,
    v and, where given, q_shared, cos, sin and norm_scale, "terms": the size of the terms that cancel in them}.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    num_kv_heads = k.shape[2]
    kv_head = np.arange(num_kv_heads) if kv_head is None else np.asarray(kv_head)
    routed = attention(q, k[:, :, kv_head], v[:, :, kv_head], expert_index, do=do, dlse=dlse, **options)
    result = {name: routed[name] for name in ("o", "lse", "seen")}
    if q_shared is not None:
        q_shared = np.asarray(q_shared, np.float64)[:, :, None, None, :]
        mean_k, mean_v = (x.mean(axis=2, keepdims=True) for x in (k, v))
        d_shared = None if do is None else np.asarray(d_shared, np.float64)[:, :, None, None, :]
        shared = attention(q_shared, mean_k, mean_v, do=d_shared, **options)
        result["shared"] = shared["o"][:, :, 0, 0]
    if do is None:
        return result
    finishing = options.get("q_norm"), options.get("q_rope")
    gradients = query_gradients(q, routed["dq"], *finishing)
    for name, x in (("k", k), ("v", v)):
        gradients[name] = np.zeros_like(x)
        for run, head in enumerate(kv_head):
            gradients[name][:, :, head] += routed[f"d{name}"][:, :, run]
    terms = np.linalg.norm(routed["dq_terms"]) + np.linalg.norm(routed["dk_terms"])
    if q_shared is not None:
        of_shared = query_gradients(q_shared, shared["dq"], *finishing)
        gradients["q_shared"] = of_shared.pop("q")[:, :, 0, 0]
        gradients |= {name: gradients[name] + x for name, x in of_shared.items()}
        for name in ("k", "v"):
            gradients[name] = gradients[name] + shared[f"d{name}"] / num_kv_heads
        terms += np.linalg.norm(shared["dq_terms"])
    return result | {"gradients": gradients, "terms": terms}


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
