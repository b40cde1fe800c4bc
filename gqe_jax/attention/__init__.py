"""This folder holds the attention layers, one file for each kind, and the registry of kinds."""

from gqe_jax.attention.asym_gqa import AsymGQAConfig, AsymGQAttention
from gqe_jax.attention.base import Attention
from gqe_jax.attention.caches import Cache, KVCache, LatentCache
from gqe_jax.attention.gqa import GQAConfig, GQAttention
from gqe_jax.attention.gqe import GQEAttention, GQEConfig
from gqe_jax.attention.gqe_mla import GQEMLAConfig, GQEMLAttention
from gqe_jax.attention.key_driven import KeyDrivenAttention, KeyDrivenConfig
from gqe_jax.attention.kinds import KINDS, Kind, make_attention
from gqe_jax.attention.mla import MLAConfig, MLAttention
from gqe_jax.attention.report import Buffer, LayerReport
from gqe_jax.attention.rotary import rotary_tables
from gqe_jax.attention.router import Router, RouterConfig, RouterStats, top_k_experts

__all__ = [
    "KINDS",
    "AsymGQAConfig",
    "AsymGQAttention",
    "Attention",
    "Buffer",
    "Cache",
    "GQAConfig",
    "GQAttention",
    "GQEAttention",
    "GQEConfig",
    "GQEMLAConfig",
    "GQEMLAttention",
    "KVCache",
    "KeyDrivenAttention",
    "KeyDrivenConfig",
    "Kind",
    "LatentCache",
    "LayerReport",
    "MLAConfig",
    "MLAttention",
    "Router",
    "RouterConfig",
    "RouterStats",
    "make_attention",
    "rotary_tables",
    "top_k_experts",
]
