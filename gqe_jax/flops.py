"""Counts a model's parameters and FLOPs from its configuration, and computes model FLOP utilisation (MFU).

A matrix product of [m, n] and [n, p] is 2·m·n·p FLOPs; norms, rotary embedding, softmax and activations are not counted
(the usual convention). "active" counts what the model computes; "dense_equivalent" counts the same model with all of
its query heads attending, the measure by which models of different k are compared.
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
    """Holds the FLOPs of one forward pass over one sequence, by part of the model."""

    projections: int  # q, k, v, the shared query, and the output projection
    router: int
    attention: int  # q·k and p·v of the selected experts (in a dense model, of all heads)
    shared_head: int  # the same of the shared head
    mlp: int
    logits: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def parameter_count(model: ModelConfig) -> dict[str, int]:
    """Counts parameters by part: embedding (with an untied output head), attention, mlp, norm, router, and total."""
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
    """Counts the (query, key) pairs of causal attention over `sequence` tokens.

    Each token sees itself and the `window` − 1 tokens before it; None: all before it.
    """
    window = min(window or sequence, sequence)
    return window * (window + 1) // 2 + (sequence - window) * window


def forward_flops(
    model: ModelConfig, sequence: int, kind: Literal["active", "dense_equivalent"] = "active"
) -> ForwardFlops:
    """Counts the FLOPs of a forward pass over one unpadded sequence, logits at every position included.

    Args:
      model: the model's configuration.
      sequence: length of the sequence in tokens.
      kind: "active", or "dense_equivalent": with the attention's dense twin, in which every query head attends. The two
        are equal for a dense model.
    """
    attention = model.attention
    if kind == "dense_equivalent":
        attention = attention.dense_twin() or attention
    pairs = scored_pairs(sequence, attention.window)
    return _of_model(model, sequence, attention.flops(model.d_model, sequence, pairs))


def decode_flops(
    model: ModelConfig, length: int, kind: Literal["active", "dense_equivalent"] = "active"
) -> ForwardFlops:
    """Counts the FLOPs of one token that is the last of `length` in a cache, with its logits; `kind` as above."""
    attention = model.attention
    if kind == "dense_equivalent":
        attention = attention.dense_twin() or attention
    return _of_model(model, 1, attention.decode_flops(model.d_model, min(length, attention.window or length)))


def _of_model(model: ModelConfig, tokens: int, layer: dict[str, int]) -> ForwardFlops:
    """Returns the FLOPs of `tokens` tokens, from those of a layer's attention."""
    return ForwardFlops(
        **{part: model.num_layers * count for part, count in layer.items()},
        mlp=model.num_layers * tokens * 2 * 3 * model.d_model * model.d_ff,
        logits=tokens * 2 * model.d_model * model.vocab_size,
    )


def flops_per_token(
    model: ModelConfig,
    sequence: int,
    kind: Literal["active", "dense_equivalent"] = "active",
    *,
    backward: bool = True,
) -> float:
    """Counts the FLOPs per token, averaged over a sequence: forward and backward (3 times the forward), or forward.

    What remat recomputes is not counted, as the model itself does not ask for it.
    """
    return (3 if backward else 1) * forward_flops(model, sequence, kind).total / sequence


def flops_per_step(
    model: ModelConfig, batch_size: int, sequence: int, kind: Literal["active", "dense_equivalent"] = "active"
) -> int:
    """Counts the FLOPs, forward and backward, of a training step on `batch_size` rows of `sequence` tokens."""
    return 3 * batch_size * forward_flops(model, sequence, kind).total


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak dense bfloat16 FLOP/s of one device (`jax.Device.device_kind`); None where it is not known."""
    with contextlib.suppress(UnknownGeneration):
        return find_generation(device_kind).peak_flops["bfloat16"]
    known = [name for name in PEAK_FLOPS if device_kind.lower().startswith(name.lower())]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def mfu(flops: float, seconds: float, num_devices: int, device_kind: str) -> float | None:
    """Computes model FLOP utilisation: the model's FLOPs over what the devices could do in the time.

    Args:
      flops: FLOPs of the whole step, over all devices.
      seconds: time that the step took.
      num_devices: number of devices that shared the step.
      device_kind: `jax.Device.device_kind`.

    Returns:
      A share of 1, or None where the peak of the device is not known.
    """
    peak = peak_flops(device_kind)
    return None if peak is None else flops / (seconds * num_devices * peak)
