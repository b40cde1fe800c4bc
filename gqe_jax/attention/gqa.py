"""Dense attention, in which every query head attends. Its head counts make it MHA, GQA, MQA or SQA."""

import dataclasses
from typing import ClassVar

from gqe_jax.attention import dense_counts
from gqe_jax.attention.base import Attention
from gqe_jax.attention.report import LayerReport
from gqe_jax.config import AttentionConfig
from gqe_jax.kernels import Call
from gqe_jax.parallel.on_mesh import on_mesh, summed


@dataclasses.dataclass(frozen=True, kw_only=True)
class GQAConfig(AttentionConfig):
    """Configures dense attention with H query heads on G KV heads.

    H = G is multi-head (MHA), H > G grouped-query (GQA, Ainslie et al. 2023), G = 1 multi-query attention (MQA); H
    below the model's usual number is sparse-query attention (SQA, arXiv 2510.01817).
    """

    POSITIONAL: ClassVar = ("num_query_heads", "num_kv_heads", "head_dim")

    kind: str = "gqa"
    num_query_heads: int  # H = G · M
    out_bias: bool | None = None  # bias of the output projection; None: as `bias`. Qwen2 has it on q, k and v only

    @property
    def query_heads(self):
        return "num_query_heads", self.num_query_heads

    @property
    def has_out_bias(self) -> bool:
        return self.bias if self.out_bias is None else self.out_bias

    @property
    def attending_heads(self):
        return self.num_query_heads

    @property
    def output_slots(self):
        return self.num_query_heads

    @property
    def summary(self):
        return f"num_query_heads {self.num_query_heads}, num_kv_heads {self.num_kv_heads}, head_dim {self.head_dim}"

    @property
    def description(self):
        return f"dense attention, {self.num_query_heads} query heads on {self.num_kv_heads} KV heads"

    parameters = dense_counts.parameters
    flops = dense_counts.flops
    saved_bytes = dense_counts.saved_bytes
    cached_numbers = dense_counts.cached_numbers

    def dense_twin(self):
        return None

    def attend_calls(self, dtype, **shape):
        groups, heads = self.num_kv_heads, self.num_query_heads // self.num_kv_heads
        options = dense_counts.call_options(self, dtype, **shape)
        call = Call(num_runs=groups, num_kv_heads=groups, num_experts=heads, num_slots=heads, **options)
        return {"all heads": call}

    @property
    def transformers_classes(self):
        return "llama", "mistral", "qwen2", "qwen3"

    def modelling_settings(self):
        return {}

    @classmethod
    def from_modelling_settings(cls, config):
        return {"num_query_heads": config["num_attention_heads"]}

    def zero_tensors(self, d_model):
        return {}

    def updated_buffers(self, buffers, metrics):
        return buffers

    def progress_note(self, metrics):
        return None

    def warnings(self, metrics):
        return []


class GQAttention(Attention[GQAConfig, LayerReport]):
    """Computes dense grouped-query attention, y = concat over g, m of Attention(q[g, m], K_g, V_g) · W_o.

    It is constructed and called as `Attention`; the fields are those of `GQAConfig`.
    """

    Config = GQAConfig

    def _make(self, linear, out_linear, rngs):
        config = self.config
        heads = (config.num_kv_heads, config.num_query_heads // config.num_kv_heads, config.head_dim)
        self.q_proj = linear(self.d_model, heads, axes=("embed", "group", None, None))
        self.o_proj = out_linear(
            heads, self.d_model, axes=("group", None, None, "embed"), use_bias=config.has_out_bias
        )

    def _compute(self, tokens, rngs, layer_index):
        y_axes, cache_axes = summed("batch", "sequence", None), tokens.axes.cache
        y, cache = on_mesh(
            self, GQAttention._forward, (tokens,), (tokens.axes,), (y_axes, cache_axes), dtype=self.k_proj.dtype
        )
        return y, LayerReport(), cache

    def _forward(self, shard, tokens):
        """Returns one device's summand of y [B, S, d], and the grown cache."""
        kv, cache = self._key_values(shard, tokens)  # K, V [B, T, G, D]
        o = kv.attend(self.q_proj(tokens.x))  # [B, S, G, M, D]
        return self.o_proj.product(o), cache
