"""Analytic parameter and FLOP counts of a model, device peaks, and model FLOP utilisation (MFU).

A matrix product of [m, n] and [n, p] is 2·m·n·p FLOPs; norms, rotary embedding, softmax and activations are not counted
(the usual convention). `active` is what GQE computes; `dense_equivalent` is the same model with all of its N query
experts attending, the denominator to compare speeds of different k with.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from gqe_jax.config import GQEConfig, ModelConfig

# Peak dense bf16 FLOP/s of what JAX counts as one device, by the start of its `device_kind`; the longest match holds.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v4 lite": 138e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # a chip is two devices
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
    attention, d = model.attention, model.d_model
    dim = _head_dim(model)
    heads, kv_heads, slots = _query_heads(model), attention.num_kv_heads, _output_slots(model)
    shared = int(_has_shared_head(model))
    per_layer = d * dim * (heads + 2 * kv_heads + shared + slots)
    if attention.bias:
        per_layer += dim * (heads + 2 * kv_heads + shared)
    if attention.has_out_bias:
        per_layer += d
    counts = {
        "embedding": model.vocab_size * d * (1 if model.tie_embeddings else 2),
        "attention": model.num_layers * per_layer,
        "mlp": model.num_layers * 3 * d * model.d_ff,
        "norm": (2 * model.num_layers + 1) * d + (2 * model.num_layers * dim if attention.qk_norm else 0),
        "router": model.num_layers * d * heads if _is_learned(model) else 0,
    }
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
      kind: "active", or "dense_equivalent": each of the N query heads attends and fills one output slot; no router, no
        shared head. The two are the same for a dense model.
    """
    attention, d = model.attention, model.d_model
    dim = _head_dim(model)
    heads, kv_heads = _query_heads(model), attention.num_kv_heads
    active = kind == "active"
    shared = int(active and _has_shared_head(model))
    attending = attention.num_kv_heads * attention.top_k if active and isinstance(attention, GQEConfig) else heads
    slots = _output_slots(model) if active else heads
    per_pair = 2 * 2 * dim * scored_pairs(sequence, attention.window)
    layers = model.num_layers
    return ForwardFlops(
        projections=layers * sequence * 2 * d * dim * (heads + 2 * kv_heads + shared + slots),
        router=layers * sequence * 2 * d * heads if active and _is_learned(model) else 0,
        attention=layers * attending * per_pair,
        shared_head=layers * shared * per_pair,
        mlp=layers * sequence * 2 * 3 * d * model.d_ff,
        logits=sequence * 2 * d * model.vocab_size,
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


def _head_dim(model: ModelConfig) -> int:
    assert model.attention.head_dim is not None  # ModelConfig resolves it
    return model.attention.head_dim


def _query_heads(model: ModelConfig) -> int:
    return model.attention.query_heads[1]


def _has_shared_head(model: ModelConfig) -> bool:
    return isinstance(model.attention, GQEConfig) and model.attention.variant == "gqe"


def _is_learned(model: ModelConfig) -> bool:
    return isinstance(model.attention, GQEConfig) and model.attention.router.kind == "learned"


def _output_slots(model: ModelConfig) -> int:
    """Head-sized slots into the output projection: k·G of the selected experts, ō and the shared head; dense: heads."""
    if isinstance(model.attention, GQEConfig):
        return model.attention.num_kv_heads * model.attention.top_k + 2 * _has_shared_head(model)
    return _query_heads(model)
