"""Counts parameters, FLOPs, bytes and calls of layers on a latent, as `dense_counts` does of others.

`shared` is the number of shared heads beside the others (GQE has one), which read the means over the KV heads.
"""

from gqe_jax.attention import dense_counts
from gqe_jax.attention.latent import LatentConfig
from gqe_jax.kernels import Call


def outside(config: LatentConfig, d_model: int, shared: int) -> int:
    """Counts the weights of the queries' projections and of W_o."""
    queries = (config.query_heads[1] + shared) * config.query_dim
    return d_model * (queries + config.output_slots * config.dim)


def parameters(config: LatentConfig, d_model: int, shared: int = 0) -> dict[str, int]:
    """Counts the parameters of the projections with their biases, and of the latent's norm."""
    count = outside(config, d_model, shared) + d_model * config.cached_numbers()
    count += 2 * config.latent_dim * config.num_kv_heads * config.dim
    if config.bias:
        count += (config.query_heads[1] + shared) * config.query_dim + config.cached_numbers()
    if config.has_out_bias:
        count += d_model
    return {"attention": count, "norm": config.latent_dim if config.latent_norm else 0}


def flops(config: LatentConfig, d_model: int, tokens: int, pairs: int, shared: int = 0) -> dict[str, int]:
    """Counts the FLOPs of the expanded form; see `AttentionConfig.flops`."""
    weights = outside(config, d_model, shared) + d_model * config.cached_numbers()
    weights += 2 * config.latent_dim * config.num_kv_heads * config.dim
    return _flops(config, 2 * tokens * weights, 2 * (config.query_dim + config.dim) * pairs, shared)


def decode_flops(config: LatentConfig, d_model: int, seen: int, shared: int = 0) -> dict[str, int]:
    """Counts the FLOPs of the absorbed form, in which up-projections act on each head that attends."""
    weights = outside(config, d_model, shared) + d_model * config.cached_numbers()
    weights += 2 * config.latent_dim * config.attending_heads * config.dim
    return _flops(config, 2 * weights, 2 * (config.cached_numbers() + config.latent_dim) * seen, shared)


def _flops(config: LatentConfig, projections: int, per_head: int, shared: int) -> dict[str, int]:
    attention = (config.attending_heads - shared) * per_head
    return {"projections": projections, "router": 0, "attention": attention, "shared_head": shared * per_head}


def saved_bytes(
    config: LatentConfig, policy: str, *, d_model: int, itemsize: int, expert: int = 1, shared: int = 0
) -> int:
    """Counts the bytes that a device keeps of one token; see `AttentionConfig.saved_bytes`."""
    heads, groups = config.query_heads[1] // expert + shared, config.num_kv_heads // expert
    attending = (config.attending_heads - shared) // expert + shared
    attended = attending * (itemsize * config.dim + 4)  # outputs, and float32 log-sum-exps
    queries, keys = heads * config.query_dim, groups * config.query_dim
    products = itemsize * (queries + config.cached_numbers() + 2 * groups * config.dim + d_model)
    finished = itemsize * (queries + keys + config.rope_dim)
    return {
        "full": 0,
        "attention": attended,
        "dots": attended + products,
        "none": attended + products + finished,
    }[policy]


def attend_calls(config: LatentConfig, dtype: str, num_slots: int, shared: int = 0, **shape) -> dict[str, Call]:
    """Describes the calls of a layer that selects `num_slots` heads of a group; see `AttentionConfig.attend_calls`."""
    options = dense_counts.call_options(config, dtype, **shape)
    if shape["cached"] and config.absorbs(shape["q_len"]):
        rows, width = config.attending_heads, config.cached_numbers()
        options |= {"head_dim": width, "value_dim": width}
        return {"absorbed heads": Call(num_runs=1, num_kv_heads=1, num_experts=rows, num_slots=rows, **options)}
    options |= {"head_dim": config.query_dim}
    groups, members = config.num_kv_heads, config.query_heads[1] // config.num_kv_heads
    heads = {"num_runs": groups, "num_kv_heads": groups, "num_experts": members, "num_slots": num_slots}
    calls = {"all heads" if num_slots == members and not shared else "routed heads": Call(**heads, **options)}
    if shared:
        calls["shared head"] = Call(num_runs=1, num_kv_heads=1, num_experts=1, num_slots=1, **options)
    return calls
