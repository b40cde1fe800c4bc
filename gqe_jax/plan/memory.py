"""What a device must hold, by what it is, from the configuration alone: an estimate; the compiler has the last word."""

import math
from collections.abc import Mapping

from gqe_jax.attention.context_parallel import GATHERED_BYTES
from gqe_jax.config import GQEConfig, ModelConfig, RunConfig
from gqe_jax.flops import parameter_count
from gqe_jax.plan.compile import Mode

LIVE_LAYERS = 1.5  # of the intermediate results of one layer, what its backward pass holds at a time
LIVE_KEYS = 4  # of gathered keys and values: as they come, in natural order, and their gradients
LIVE_LOGITS = 2.5  # float32 arrays of one chunk's logits: themselves, their exponentials, their gradient


def activation_width(model: ModelConfig, remat: str, expert: int = 1) -> int:
    """Bytes that a layer keeps of one token for its backward pass, on a device of `expert` that share the groups.

    Args:
      model: the model.
      remat: the policy, a key of `gqe_jax.models.transformer.REMAT_POLICIES`.
      expert: devices along that axis of the mesh.
    """
    attention, d = model.attention, model.d_model
    item = 2 if model.dtype == "bfloat16" else 4
    dim, groups = attention.head_dim, attention.num_kv_heads // expert
    heads = attention.query_heads[1] // expert
    routed = isinstance(attention, GQEConfig)
    shared = int(routed and attention.variant == "gqe")
    slots = groups * attention.top_k if routed else heads
    attended = item * dim * (slots + shared) + 4 * (slots + shared)  # outputs, and float32 log-sum-exps
    products = item * (dim * (heads + 2 * groups + shared) + d + 2 * model.d_ff // expert)
    products += 4 * heads * routed  # of the router, in float32
    kept = {
        "full": 0,
        "attention": attended,
        "dots": attended + products,
        # norms, rotated keys, silu(gate), silu(gate) * up beside them
        "none": attended + products + item * (2 * d + dim * groups + 2 * model.d_ff // expert) + 8,
    }
    return item * d + kept[remat]


def tokens_per_device(mesh: Mapping[str, int], rows: int, seq_len: int) -> tuple[int, int]:
    """(rows, tokens of each) on one device, of `rows` that are computed at a time."""
    return math.ceil(rows / (mesh["data"] * mesh["fsdp"])), seq_len // mesh["context"]


def gathered_keys(config: RunConfig, mesh: Mapping[str, int], batch_size: int, seq_len: int) -> int:
    """Bytes of a layer's keys and values of whole rows, where `context` gathers them on each device; 0: it does not."""
    attention = config.model.attention
    rows, _ = tokens_per_device(mesh, batch_size // config.train.accumulate, seq_len)
    item = 2 if config.model.dtype == "bfloat16" else 4
    size = 2 * item * rows * seq_len * attention.num_kv_heads // mesh["expert"] * attention.head_dim
    method = attention.context_parallel
    gathers = method == "gather" or (method == "auto" and size <= GATHERED_BYTES)
    return size if mesh["context"] > 1 and gathers else 0


def estimate(
    config: RunConfig, mesh: Mapping[str, int], mode: Mode, batch_size: int, seq_len: int
) -> dict[str, int]:
    """Bytes on one device, by what they are."""
    model, expert = config.model, mesh["expert"]
    item = 2 if model.dtype == "bfloat16" else 4
    parameters = parameter_count(model)["total"] // expert
    pieces = mesh["fsdp"] * mesh["context"]
    shard = parameters // pieces
    layer = item * (parameters - parameter_count(model)["embedding"] // expert) // model.num_layers
    table = item * model.vocab_size // expert * model.d_model
    parts = config.train.accumulate if mode == "train" else 1
    rows, tokens = tokens_per_device(mesh, batch_size // parts, seq_len)
    gathered = (2 * layer + 2 * table) if pieces > 1 else 0
    if mode != "train":
        attention = model.attention
        cache = item * 2 * model.num_layers * rows * seq_len * attention.num_kv_heads // expert * attention.head_dim
        working = rows * (1 if mode == "decode" else tokens) * activation_width(model, "none", expert)
        return {"weights": item * shard, "cache": cache, "gathered weights": gathered, "one layer": working}
    saved = model.num_layers * rows * tokens * activation_width(model, model.remat, expert)
    logits = 4 * rows * min(config.train.loss_chunk, tokens) * model.vocab_size // expert
    return {
        "parameters": 4 * shard,
        "moments": 8 * shard,
        "gradients": 4 * shard * (1 + (parts > 1)),
        "compute-dtype copy": item * shard if item < 4 else 0,
        "gathered weights": gathered,
        "saved activations": saved,
        "gathered keys and values": LIVE_KEYS * gathered_keys(config, mesh, batch_size, seq_len),
        "one layer's backward": round(LIVE_LAYERS * rows * tokens * activation_width(model, "none", expert)),
        "logits": round(LIVE_LOGITS * logits),
    }
