"""Counts parameters, FLOPs, bytes and calls of layers with G dense KV heads; kinds of this form use it as it is.

`shared` is the number of shared heads beside the others (GQE has one). A matrix product of [m, n] and [n, p] is 2·m·n·p
FLOPs; norms, rotary embedding and softmax are not counted.
"""

from typing import Any

from gqe_jax.config import AttentionConfig


def projections(config: AttentionConfig, d_model: int, shared: int = 0) -> int:
    """Counts the weights of W_q, W_k, W_v, of the shared heads' queries, and of W_o."""
    heads = config.query_heads[1] + 2 * config.num_kv_heads + shared + config.output_slots
    return d_model * config.head_dim * heads


def parameters(config: AttentionConfig, d_model: int, shared: int = 0) -> dict[str, int]:
    """Counts the parameters of the projections with their biases, and of the QK norm."""
    count = projections(config, d_model, shared)
    if config.bias:
        count += config.head_dim * (config.query_heads[1] + 2 * config.num_kv_heads + shared)
    if config.has_out_bias:
        count += d_model
    return {"attention": count, "norm": 2 * config.head_dim if config.qk_norm else 0}


def flops(config: AttentionConfig, d_model: int, tokens: int, pairs: int, shared: int = 0) -> dict[str, int]:
    """Counts the FLOPs of the projections and of the heads that attend; see `AttentionConfig.flops`."""
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
    """Counts the bytes that a device keeps of one token; see `AttentionConfig.saved_bytes`.

    The devices on `expert` share out the shared head's queries, but each has room for the results of all of them.
    """
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
    """Counts the numbers in the keys and values of one token; see `AttentionConfig.cached_numbers`."""
    return 2 * config.num_kv_heads // expert * config.head_dim


def call_options(
    config: AttentionConfig, dtype: str, *, batch: int, q_len: int, kv_len: int, cached: bool, partitioned: bool
) -> dict[str, Any]:
    """Returns the fields of a `Call` that all heads of a layer share; see `AttentionConfig.attend_calls`."""
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
