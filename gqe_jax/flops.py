"""Analytic parameter and FLOP counts of a model, device peaks, and model FLOP utilisation (MFU).

A matrix product of [m, n] and [n, p] is 2·m·n·p FLOPs; norms, rotary embedding, softmax and activations are not counted
(the usual convention). `active` is what GQE computes; `dense_equivalent` is the same model with all of its N query
experts attending, the denominator to compare speeds of different k with.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Literal

from gqe_jax.config import ModelConfig
from gqe_jax.tpu import UnknownGeneration, find_generation

# Peak dense bf16 FLOP/s of a GPU by the start of its `device_kind`, the longest match holds; TPUs are in gqe_jax.tpu.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
}


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one forward pass over one sequence, by part."""

    projections: int  # q, k, v, the shared query, and the output projection
    router: int
    attention: int  # q·k and p·v of the selected experts (dense: of all heads)
    shared_head: int
    mlp: int
    logits: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def parameter_count(model: ModelConfig) -> dict[str, int]:
    """Parameters by part: embedding (with an untied output head), attention, mlp, norm, router, and their total."""
    d, layers = model.d_model, model.num_layers
    counts = {
        "embedding": model.vocab_size * d * (1 if model.tie_embeddings else 2),
        "attention": 0,
        "mlp": layers * 3 * d * model.d_ff,
        "norm": (2 * layers + 1) * d,
        "router": 0,
    }
    for part, count in model.attention.parameters(d).items():
        counts[part] += layers * count
    return counts | {"total": sum(counts.values())}


def scored_pairs(sequence: int, window: int | None = None) -> int:
    """(query, key) pairs of causal attention over `sequence` tokens, each seeing itself and `window` - 1 before it."""
    window = min(window or sequence, sequence)
    return window * (window + 1) // 2 + (sequence - window) * window


def forward_flops(
    model: ModelConfig, sequence: int, kind: Literal["active", "dense_equivalent"] = "active"
) -> ForwardFlops:
    """FLOPs of a forward pass over one unpadded sequence of `sequence` tokens, logits at every position included.

    Args:
      model: the model.
      sequence: tokens.
      kind: "active", or "dense_equivalent": of the attention's dense twin, in which every query head attends. The two
        are the same for a dense model.
    """
    attention = model.attention
    if kind == "dense_equivalent":
        attention = attention.dense_twin() or attention
    layer = attention.flops(model.d_model, sequence, scored_pairs(sequence, attention.window))
    return ForwardFlops(
        **{part: model.num_layers * count for part, count in layer.items()},
        mlp=model.num_layers * sequence * 2 * 3 * model.d_model * model.d_ff,
        logits=sequence * 2 * model.d_model * model.vocab_size,
    )


def flops_per_token(
    model: ModelConfig,
    sequence: int,
    kind: Literal["active", "dense_equivalent"] = "active",
    *,
    backward: bool = True,
) -> float:
    """FLOPs per token, averaged over a sequence: forward, or forward and backward (3 times as many).

    What remat recomputes is not counted: it is work that the model does not ask for.
    """
    return (3 if backward else 1) * forward_flops(model, sequence, kind).total / sequence


def flops_per_step(
    model: ModelConfig, batch_size: int, sequence: int, kind: Literal["active", "dense_equivalent"] = "active"
) -> int:
    """FLOPs, forward and backward, of a training step on `batch_size` rows of `sequence` tokens."""
    return 3 * batch_size * forward_flops(model, sequence, kind).total


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bf16 FLOP/s of one device (`jax.Device.device_kind`), or None where it is not known."""
    with contextlib.suppress(UnknownGeneration):
        return find_generation(device_kind).peak_flops["bfloat16"]
    known = [name for name in PEAK_FLOPS if device_kind.lower().startswith(name.lower())]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def mfu(flops: float, seconds: float, num_devices: int, device_kind: str) -> float | None:
    """Model FLOP utilisation: FLOPs asked for over what the devices could do in that time; None for unknown devices.

    Args:
      flops: of the whole step, over all devices.
      seconds: the step took.
      num_devices: devices that shared it.
      device_kind: `jax.Device.device_kind`.
    """
    peak = peak_flops(device_kind)
    return None if peak is None else flops / (seconds * num_devices * peak)
