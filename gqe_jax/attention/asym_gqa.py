"""Dense attention on groups of unequal size: each KV head serves as many query heads as it was given (AsymGQA-style).

XLA wants one shape for all groups and layers, so every group is padded to the size of the largest. A mask on the heads'
outputs leaves the padding without influence and without a gradient. Cache and kernels are those of grouped-query
attention with R query heads on each KV head.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from gqe_jax.attention import dense_counts
from gqe_jax.attention.base import Attention
from gqe_jax.attention.report import Buffer, LayerReport
from gqe_jax.config import AttentionConfig, require, require_positive
from gqe_jax.kernels import Call
from gqe_jax.parallel.on_mesh import on_mesh, summed


@dataclasses.dataclass(frozen=True, kw_only=True)
class AsymGQAConfig(AttentionConfig):
    """Configures dense attention with H query heads on G KV heads, shared out unequally, differently in each layer.

    After AsymGQA (arXiv 2406.14963). `gqe convert --to asym_gqa` finds the groups; a layer that starts from random
    weights has them as equal as can be.
    """

    POSITIONAL: ClassVar = ("num_query_heads", "num_kv_heads", "max_group_size", "head_dim")

    kind: str = "asym_gqa"
    num_query_heads: int  # H, of all groups, without padding
    max_group_size: int  # R, places for query heads in each group
    out_bias: bool | None = None  # bias of the output projection; None: as `bias`

    @property
    def query_heads(self):
        return "num_kv_heads * max_group_size", self.num_kv_heads * self.max_group_size

    def __post_init__(self):
        require_positive(self, "num_query_heads", "num_kv_heads", "max_group_size")
        heads, places = self.num_query_heads, self.query_heads[1]
        require(
            self.max_group_size <= heads <= places,
            f"max_group_size={self.max_group_size} must lie between num_query_heads / num_kv_heads = {heads} / "
            f"{self.num_kv_heads} and {heads}: every query head needs a place in one of the groups, and no group more "
            f"places than there are heads",
        )
        super().__post_init__()

    def resolve(self, d_model):
        require(
            self.head_dim is not None or d_model % self.num_query_heads == 0,
            f"head_dim=None means d_model / num_query_heads, but {d_model} / {self.num_query_heads} is no integer: set "
            f"head_dim",
        )
        return dataclasses.replace(self, head_dim=self.head_dim or d_model // self.num_query_heads)

    @property
    def has_out_bias(self) -> bool:
        return self.bias if self.out_bias is None else self.out_bias

    @property
    def attending_heads(self):
        return self.query_heads[1]  # padding too

    @property
    def output_slots(self):
        return self.query_heads[1]

    @property
    def summary(self):
        return (
            f"num_query_heads {self.num_query_heads}, num_kv_heads {self.num_kv_heads}, head_dim {self.head_dim}, "
            f"groups of up to {self.max_group_size}"
        )

    @property
    def description(self):
        return (
            f"dense attention, {self.num_query_heads} query heads on {self.num_kv_heads} KV heads in groups of unequal "
            f"size, each padded to {self.max_group_size}"
        )

    parameters = dense_counts.parameters

    saved_bytes = dense_counts.saved_bytes

    def flops(self, d_model, tokens, pairs):
        """Counts the H heads alone: each padded place costs as much again, and computes nothing."""
        heads = 2 * self.num_query_heads + 2 * self.num_kv_heads  # of W_q and W_o, of W_k and W_v
        attention = 2 * 2 * self.head_dim * pairs * self.num_query_heads
        projections = 2 * tokens * d_model * self.head_dim * heads
        return {"projections": projections, "router": 0, "attention": attention, "shared_head": 0}

    cached_numbers = dense_counts.cached_numbers

    def dense_twin(self):
        return None

    def attend_calls(self, dtype, **shape):
        groups, places = self.num_kv_heads, self.max_group_size
        options = dense_counts.call_options(self, dtype, **shape)
        call = Call(num_runs=groups, num_kv_heads=groups, num_experts=places, num_slots=places, **options)
        return {"all heads, padded": call}

    @property
    def transformers_classes(self):
        return ()

    def modelling_settings(self):
        return {"num_query_heads": self.num_query_heads}

    @classmethod
    def from_modelling_settings(cls, config):
        return {
            "num_query_heads": config["num_query_heads"],
            "max_group_size": config["num_attention_heads"] // config["num_key_value_heads"],
        }

    def zero_tensors(self, d_model):
        return {}

    def buffer_fault(self, buffers):
        counts = np.asarray(buffers["head_mask"]).sum(axis=(1, 2))
        if (counts == self.num_query_heads).all():
            return None
        return f"head_mask has {counts.tolist()} query heads in its layers, but num_query_heads={self.num_query_heads}"

    def updated_buffers(self, buffers, metrics):
        return buffers

    def progress_note(self, metrics):
        return None

    def warnings(self, metrics):
        return []


class AsymGQAttention(Attention[AsymGQAConfig, LayerReport]):
    """Computes y = concat over g and the real heads m of group g of Attention(q[g, m], K_g, V_g) · W_o.

    Parameters have the shapes of `GQAttention` with M = R = max_group_size; `head_mask` [G, R] says which of the places
    hold a head. It is constructed and called as `Attention`; the fields are those of `AsymGQAConfig`.
    """

    Config = AsymGQAConfig

    def _make(self, linear, out_linear, rngs):
        config = self.config
        groups, places = config.num_kv_heads, config.max_group_size
        heads = (groups, places, config.head_dim)
        self.q_proj = linear(self.d_model, heads, axes=("embed", "group", None, None))
        self.o_proj = out_linear(
            heads, self.d_model, axes=("group", None, None, "embed"), use_bias=config.has_out_bias
        )
        sizes = (config.num_query_heads + jnp.arange(groups)[::-1]) // groups  # as equal as can be, larger ones first
        self.head_mask = Buffer(jnp.arange(places) < sizes[:, None])
        self.placement = (("head_mask", ("group", None)),)

    def _compute(self, tokens, rngs, layer_index):
        y_axes, cache_axes = summed("batch", "sequence", None), tokens.axes.cache
        y, cache = on_mesh(
            self, AsymGQAttention._forward, (tokens,), (tokens.axes,), (y_axes, cache_axes), dtype=self.k_proj.dtype
        )
        return y, LayerReport(), cache

    def _forward(self, shard, tokens):
        """Returns one device's summand of y [B, S, d], and the grown cache."""
        kv, cache = self._key_values(shard, tokens)  # K, V [B, T, G, D]
        o = kv.attend(self.q_proj(tokens.x))  # [B, S, G, R, D]
        # On the output, for then neither the padding's queries nor its rows of W_o get a gradient.
        o = jnp.where(self.head_mask[...].astype(bool)[..., None], o, 0)
        return self.o_proj.product(o), cache
