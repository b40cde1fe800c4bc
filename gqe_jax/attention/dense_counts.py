"""Counts of a layer with G dense KV heads: parameters, FLOPs, bytes and calls, for the kinds that have such.

A matrix product of [m, n] and [n, p] is 2·m·n·p FLOPs; norms, rotary embedding and softmax are not counted.
"""

from typing import Any

from gqe_jax.config import AttentionConfig


def projections(config: AttentionConfig, d_model: int, shared: int = 0) -> int:
    """Numbers in the kernels of W_q, W_k, W_v, of `shared` queries beside them, and of W_o."""
    heads = config.query_heads[1] + 2 * config.num_kv_heads + shared + config.output_slots
    return d_model * config.head_dim * heads


def parameters(config: AttentionConfig, d_model: int, shared: int = 0) -> dict[str, int]:
    """Parameters of the projections with their biases, and of the QK norm."""
    count = projections(config, d_model, shared)
    if config.bias:
        count += config.head_dim * (config.query_heads[1] + 2 * config.num_kv_heads + shared)
    if config.has_out_bias:
        count += d_model
    return {"attention": count, "norm": 2 * config.head_dim if config.qk_norm else 0}


def flops(config: AttentionConfig, d_model: int, tokens: int, pairs: int, shared: int = 0) -> dict[str, int]:
    """FLOPs of the projections, and of the heads that attend; see `AttentionConfig.flops`."""
    per_head = 2 * 2 * config.head_dim * pairs
    return {
        "projections": 2 * tokens * projections(config, d_model, shared),
        "router": 0,
        "attention": (config.attending_heads - shared) * per_head,
        "shared_head": shared * per_head,
    }


def saved_bytes(
    config: AttentionConfig, policy: str, *, d_model: int, itemsize: int, expert: int = 1, shared: int = 0
) -> int:
    """Bytes kept of one token; see `AttentionConfig.saved_bytes`. Over `expert` each device has its part of the shared
    head's rows, and room for all."""
    dim, groups, heads = config.head_dim, config.num_kv_heads // expert, config.query_heads[1] // expert
    attending = (config.attending_heads - shared) // expert + shared
    attended = attending * (itemsize * dim + 4)  # outputs, and float32 log-sum-exps
    products = itemsize * (dim * (heads + 2 * groups + shared) + d_model)
    rotated_keys = itemsize * dim * groups
    return {
        "full": 0,
        "attention": attended,
        "dots": attended + products,
        "none": attended + products + rotated_keys,
    }[policy]


def cached_numbers(config: AttentionConfig, expert: int = 1) -> int:
    """Keys and values of a token."""
    return 2 * config.num_kv_heads // expert * config.head_dim


def call_options(
    config: AttentionConfig, dtype: str, *, batch: int, q_len: int, kv_len: int, cached: bool, partitioned: bool
) -> dict[str, Any]:
    """Fields of a `Call` that all heads of a layer share; see `AttentionConfig.attend_calls`."""
    return {
        "batch": batch,
        "q_len": q_len,
        "kv_len": kv_len,
        "head_dim": config.head_dim,
        "value_dim": config.head_dim,
        "dtype": dtype,
        "window": config.window,
        "softcap": config.softcap is not None,
        "segments": not cached,
        "kv_length": cached,
        "aligned": not cached,
        "partitioned": partitioned,
    }
