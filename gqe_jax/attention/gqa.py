"""Dense attention by head counts: MHA, MQA, GQA (Ainslie et al. 2023) and SQA (arXiv 2510.01817)."""

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
    """Dense attention by head counts: MHA (H = G), GQA (H > G), MQA (G = 1), SQA (fewer query heads than usual)."""

    POSITIONAL: ClassVar = ("num_query_heads", "num_kv_heads", "head_dim")

    kind: str = "gqa"
    num_query_heads: int  # H = G · M
    out_bias: bool | None = None  # on the output projection; None: as `bias`. Qwen2 has biases on q, k and v only

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
        call = Call(num_groups=groups, num_kv_heads=groups, num_experts=heads, num_slots=heads, **options)
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
    """Dense grouped-query attention: y = concat over g, m of Attention(q[g, m], K_g, V_g) · W_o.

    Arguments and call are those of `Attention`; the fields are those of `GQAConfig`.
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
        heads, cache = self._key_values(shard, tokens)  # K, V [B, T, G, D]
        o = heads.attend(self.q_proj(tokens.x))  # [B, S, G, M, D]
        return self.o_proj.product(o), cache
