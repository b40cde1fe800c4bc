"""The attention layer in float64 NumPy, written from its equations and from nothing else: what tests compare with.

It reads a PyTorch-layout state dict. Symbols: N = G·M query-head experts in G groups, k selected per token and group,
head dimension D; without a "router.weight" in the state the layer is dense and all its heads attend.
"""

from types import SimpleNamespace

import numpy as np


def rotary(x, positions, theta):
    """x [S, heads, D], positions [S]: dimension i and i + D/2 are a point that turns by position · theta^(-2i/D)."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None, :]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def attention(q, k, v, visible, softcap):
    """One head: q [S, D], k and v [T, D], visible [S, T]; a query that sees nothing gets 0."""
    scores = q @ k.T / np.sqrt(q.shape[-1])
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    weights = np.where(visible, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0.0)
    total = weights.sum(-1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0) @ v


def layer(
    state, x, *, num_kv_heads, top_k=None, head_dim, variant="gqe", rope_theta=None, qk_norm_eps=1e-6, softcap=None,
    window=None, segment_ids=None, positions=None, expert_index=None, x_router=None,
):
    """The layer of the spec on x [B, S, d]; `expert_index` [B, S, G, k] holds the selection instead of the top k.

    Returns:
      y [B, S, d], k and v [B, S, G, D], and of GQE also expert_index, probs [B, S, G, M], load and mean_prob [G, M],
      load_balance_loss, z_loss, entropy.
    """
    state = {name: np.asarray(value, np.float64) for name, value in state.items()}
    x = np.asarray(x, np.float64)
    (batch, length, _), G, D = x.shape, num_kv_heads, head_dim
    M = state["q_proj.weight"].shape[0] // (G * D)
    segment_ids = np.ones((batch, length), int) if segment_ids is None else np.asarray(segment_ids)
    positions = np.arange(length) if positions is None else np.asarray(positions)
    positions = np.broadcast_to(positions, (batch, length))
    dense = "router.weight" not in state

    def linear(name, x):
        return x @ state[name + ".weight"].T + state.get(name + ".bias", 0.0)

    def head(name, x, b, heads, norm):
        h = linear(name, x).reshape(length, heads, D)
        if norm + ".weight" in state:
            h = h / np.sqrt((h**2).mean(-1, keepdims=True) + qk_norm_eps) * state[norm + ".weight"]
        return h if rope_theta is None else rotary(h, positions[b], rope_theta)

    if not dense:
        logits = (x if x_router is None else x_router) @ state["router.weight"].T
        logits = logits.reshape(batch, length, G, M)
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        if expert_index is None:
            score = probs + state.get("router.bias_correction", np.zeros(G * M)).reshape(G, M)
            best = np.argsort(-score, axis=-1, kind="stable")[..., :top_k]  # stable: ties to the lower index
            best.sort(axis=-1)
            order = np.argsort(-np.take_along_axis(probs, best, -1), axis=-1, kind="stable")
            expert_index = np.take_along_axis(best, order, -1)
        p = np.take_along_axis(probs, expert_index, -1)  # [B, S, G, k]
        w = p / np.maximum(p.sum((-2, -1), keepdims=True), 1e-9)

    y, keys, values = np.zeros_like(x), [], []
    for b in range(batch):
        q = head("q_proj", x[b], b, G * M, "q_norm").reshape(length, G, M, D)
        K = head("k_proj", x[b], b, G, "k_norm")
        V = linear("v_proj", x[b]).reshape(length, G, D)
        keys.append(K)
        values.append(V)
        i, t = np.arange(length)[:, None], np.arange(length)[None, :]
        visible = (t <= i) & (segment_ids[b][:, None] == segment_ids[b][None, :]) & (segment_ids[b][:, None] != 0)
        if window is not None:
            visible &= t > i - window
        slots, mixed = [], 0.0
        for g in range(G):
            for j in range(M if dense else top_k):
                e = j if dense else expert_index[b, :, g, j]
                o = attention(q[np.arange(length), g, e], K[:, g], V[:, g], visible, softcap)
                if not dense:
                    mixed = mixed + w[b, :, g, j, None] * o
                slots.append(o * p[b, :, g, j, None] if variant == "weighted_concat" and not dense else o)
        if variant == "gqe" and not dense:
            q_shared = head("q_shared", x[b], b, 1, "q_norm")[:, 0]
            slots += [mixed, attention(q_shared, K.mean(1), V.mean(1), visible, softcap)]
        y[b] = linear("o_proj", np.concatenate(slots, axis=-1))
    result = SimpleNamespace(y=y, k=np.stack(keys), v=np.stack(values))
    if not dense:
        real = segment_ids != 0
        chosen = (expert_index[..., None] == np.arange(M)).any(-2)
        log_z = logits.max(-1) + np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))
        result.expert_index, result.probs = expert_index, probs
        result.load, result.mean_prob = chosen[real].mean(0), probs[real].mean(0)
        result.load_balance_loss = M * (result.load * result.mean_prob).sum(-1).mean()
        result.z_loss = (log_z[real] ** 2).mean()
        result.entropy = -(probs * np.log(probs))[real].sum(-1).mean()
    return result


def latent_layer(
    state, x, *, num_kv_heads, head_dim, rope_dim, rope_repeats=1, rope_theta=None, softcap=None, window=None,
    segment_ids=None,
):
    """Multi-head latent attention on x [B, S, d], head by head: y [B, S, d] and the latents [B, S, r + R]."""
    state = {name: np.asarray(value, np.float64) for name, value in state.items()}
    x, D, R = np.asarray(x, np.float64), head_dim, rope_dim
    batch, length, _ = x.shape
    heads = state["q_proj.weight"].shape[0] // (D + R)
    ids = np.ones((batch, length), int) if segment_ids is None else np.asarray(segment_ids)
    positions = np.arange(length)

    def linear(name, x):
        return x @ state[name + ".weight"].T + state.get(name + ".bias", 0.0)

    def turned(h):
        """Pair i of R/2 turns with frequency i // repeats of the table for R / repeats dimensions."""
        if rope_theta is None:
            return h
        half = R // 2
        angle = positions[:, None] * rope_theta ** (-(np.arange(half) // rope_repeats) / (half // rope_repeats))
        z = (h[:, :half] + 1j * h[:, half:]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag], axis=-1)

    y, latents = np.zeros_like(x), []
    i, t = positions[:, None], positions[None, :]
    for b in range(batch):
        c, k_r = linear("kv_down", x[b]), turned(linear("k_rope", x[b]))
        if "latent_norm.weight" in state:
            c = c / np.sqrt((c**2).mean(-1, keepdims=True) + 1e-6) * state["latent_norm.weight"]
        latents.append(np.concatenate([c, k_r], axis=-1))
        q = linear("q_proj", x[b]).reshape(length, heads, D + R)
        k, v = (linear(name, c).reshape(length, num_kv_heads, D) for name in ("k_up", "v_up"))
        visible = (t <= i) & (ids[b][:, None] == ids[b][None, :]) & (ids[b][:, None] != 0)
        if window is not None:
            visible &= t > i - window
        o = []
        for h in range(heads):
            g = h * num_kv_heads // heads
            own = np.concatenate([q[:, h, :D], turned(q[:, h, D:])], axis=-1)
            o.append(attention(own, np.concatenate([k[:, g], k_r], axis=-1), v[:, g], visible, softcap))
        y[b] = linear("o_proj", np.concatenate(o, axis=-1))
    return SimpleNamespace(y=y, latents=np.stack(latents))
