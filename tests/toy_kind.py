"""A kind of attention of one's own, in one file: multi-head attention in which each head has a learned gain."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from gqe_jax.attention import Attention, Buffer, LayerReport, dense_counts
from gqe_jax.config import AttentionConfig
from gqe_jax.kernels import Call
from gqe_jax.parallel.on_mesh import on_mesh, summed


@dataclasses.dataclass(frozen=True, kw_only=True)
class GainConfig(AttentionConfig):
    POSITIONAL: ClassVar = ("num_kv_heads", "head_dim")
    kind: str = "gain"
    query_heads = property(lambda self: ("num_kv_heads", self.num_kv_heads))
    attending_heads = output_slots = property(lambda self: self.num_kv_heads)
    summary = description = property(lambda self: f"{self.num_kv_heads} heads, each with a gain")
    transformers_classes = ()

    def parameters(self, d_model):
        return dense_counts.parameters(self, d_model) | {"router": self.num_kv_heads}

    flops = dense_counts.flops
    cached_numbers = dense_counts.cached_numbers
    saved_bytes = dense_counts.saved_bytes

    def dense_twin(self):
        return None

    def attend_calls(self, dtype, **shape):
        heads = {"num_runs": self.num_kv_heads, "num_kv_heads": self.num_kv_heads, "num_experts": 1, "num_slots": 1}
        return {"heads": Call(**heads, **dense_counts.call_options(self, dtype, **shape))}

    def modelling_settings(self):
        return None

    @classmethod
    def from_modelling_settings(cls, config):
        raise KeyError("attention_kind")

    def zero_tensors(self, d_model):
        return {}

    def updated_buffers(self, buffers, metrics):
        return {"largest": jnp.maximum(buffers["largest"], metrics["gain"])}

    def progress_note(self, metrics):
        return f"largest gain {float(metrics['gain'].max()):.2f}"

    def warnings(self, metrics):
        return []


class GainAttention(Attention[GainConfig, LayerReport]):
    Config = GainConfig

    def _make(self, linear, out_linear, rngs):
        heads = (self.config.num_kv_heads, 1, self.config.head_dim)
        self.q_proj = linear(self.d_model, heads, axes=("embed", "group", None, None))
        self.o_proj = out_linear(heads, self.d_model, axes=("group", None, None, "embed"))
        self.gain, self.largest = nnx.Param(jnp.ones(heads[0])), Buffer(jnp.zeros(heads[0]))
        self.placement = (("gain", ("group",)), ("largest", ("group",)))

    def _compute(self, tokens, rngs, layer_index):
        out = (summed("batch", "sequence", None), tokens.axes.cache)
        y, cache = on_mesh(self, GainAttention._forward, (tokens,), (tokens.axes,), out, dtype=self.k_proj.dtype)
        loss = 0.01 * jnp.square(self.gain[...] - 1).sum()
        return y, LayerReport(auxiliary_loss=loss, metrics={"gain": jax.lax.stop_gradient(self.gain[...])}), cache

    def _forward(self, shard, tokens):
        heads, cache = self._key_values(shard, tokens)
        o = heads.attend(self.q_proj(tokens.x)) * self.gain[...][:, None, None]
        return self.o_proj.product(o.astype(heads.v.dtype)), cache
