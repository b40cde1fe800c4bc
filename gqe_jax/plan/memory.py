"""Estimates from the configuration alone what a device must hold; the compiler's figure decides."""

from collections.abc import Mapping

import jax.numpy as jnp

from gqe_jax.attention.context_parallel import GATHERED_BYTES
from gqe_jax.config import ModelConfig, RunConfig
from gqe_jax.flops import parameter_count
from gqe_jax.plan.compile import Mode
from gqe_jax.rounding import ceil_div

LIVE_LAYERS = 1.5  # of the intermediate results of one layer, what its backward pass holds at a time
LIVE_KEYS = 4  # of gathered keys and values: as they come, in natural order, and their gradients
LIVE_LOGITS = 2.5  # float32 arrays of one chunk's logits: themselves, their exponentials, their gradient


def compute_bytes(model: ModelConfig) -> int:
    """Bytes of a number in the dtype that the model computes in."""
    return jnp.dtype(model.dtype).itemsize


def activation_width(model: ModelConfig, remat: str, expert: int = 1) -> int:
    """Bytes that a layer keeps of one token for its backward pass, on a device of `expert` that share the groups.

    Args:
      model: the model.
      remat: the policy, a key of `gqe_jax.remat.POLICIES`.
      expert: devices along that axis of the mesh.
    """
    d, item, hidden = model.d_model, compute_bytes(model), 2 * model.d_ff // expert
    attention = model.attention.saved_bytes(remat, d_model=d, itemsize=item, expert=expert)
    mlp = {
        "full": 0,
        "attention": 0,
        "dots": item * hidden,
        "none": item * (2 * hidden + 2 * d) + 8,  # norms, silu(gate), silu(gate) * up beside them
    }
    return item * d + attention + mlp[remat]


def tokens_per_device(mesh: Mapping[str, int], rows: int, seq_len: int) -> tuple[int, int]:
    """Returns (rows, tokens of each row) on one device, of `rows` that are computed at a time."""
    return ceil_div(rows, mesh["data"] * mesh["fsdp"]), seq_len // mesh["context"]


def gathered_keys(config: RunConfig, mesh: Mapping[str, int], batch_size: int, seq_len: int) -> int:
    """Bytes of a layer's keys and values of whole rows, where `context` gathers them on each device; 0: it does not."""
    attention = config.model.attention
    rows, _ = tokens_per_device(mesh, batch_size // config.train.accumulate, seq_len)
    item = compute_bytes(config.model)
    size = item * rows * seq_len * attention.attended_numbers(mesh["expert"])
    method = attention.context_parallel
    gathers = method == "gather" or (method == "auto" and size <= GATHERED_BYTES)
    return size if mesh["context"] > 1 and gathers else 0


def estimate(
    config: RunConfig, mesh: Mapping[str, int], mode: Mode, batch_size: int, seq_len: int
) -> dict[str, int]:
    """Bytes on one device, by what they are."""
    model, expert = config.model, mesh["expert"]
    item = compute_bytes(model)
    parameters = parameter_count(model)["total"] // expert
    pieces = mesh["fsdp"] * mesh["context"]
    shard = parameters // pieces
    layer = item * (parameters - parameter_count(model)["embedding"] // expert) // model.num_layers
    table = item * model.vocab_size // expert * model.d_model
    parts = config.train.accumulate if mode == "train" else 1
    rows, tokens = tokens_per_device(mesh, batch_size // parts, seq_len)
    gathered = (2 * layer + 2 * table) if pieces > 1 else 0
    if mode != "train":
        cache = item * model.num_layers * rows * seq_len * model.attention.cached_numbers(expert)
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
