"""Attention layers, and the registry that picks one by the config's `attention.kind`."""

import dataclasses
from typing import Any

from gqe_jax.attention.base import Attention
from gqe_jax.attention.cache import KVCache
from gqe_jax.attention.gqa import GQAttention
from gqe_jax.attention.gqe import GQEAttention
from gqe_jax.attention.rotary import rotary_tables
from gqe_jax.attention.router import Router, RouterBias, RouterStats, top_k_experts
from gqe_jax.config import AttentionConfig

ATTENTION: dict[str, type[Attention]] = {"gqe": GQEAttention, "gqa": GQAttention}


def make_attention(config: AttentionConfig, d_model: int, **options: Any) -> Attention:
    """The layer that `config` describes; `options` are the constructor's others (dtype, initialisation, rngs)."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return ATTENTION[fields.pop("kind")](d_model, **fields, **options)


__all__ = [
    "ATTENTION",
    "Attention",
    "GQAttention",
    "GQEAttention",
    "KVCache",
    "Router",
    "RouterBias",
    "RouterStats",
    "make_attention",
    "rotary_tables",
    "top_k_experts",
]
