"""Multi-head latent attention, MLA (DeepSeek-V2, arXiv 2405.04434), trained from scratch or converted (TransMLA)."""

import dataclasses
from typing import ClassVar

from gqe_jax.attention import latent_counts
from gqe_jax.attention.latent import LatentAttention, LatentConfig
from gqe_jax.attention.report import LayerReport
from gqe_jax.parallel.on_mesh import on_mesh, summed


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig(LatentConfig):
    """Configures latent attention: H query heads on KV heads that one latent of a token expands to.

    With num_kv_heads = H every head has up-projections of its own, as published. With fewer, the query heads of a group
    share theirs (`tied_groups`): the form of a converted GQA model.
    """

    POSITIONAL: ClassVar = ("num_query_heads", "num_kv_heads", "latent_dim", "rope_dim", "head_dim")

    kind: str = "mla"
    num_query_heads: int  # H = G · M
    out_bias: bool | None = None  # bias of the output projection; None: as `bias`

    @property
    def tied_groups(self) -> bool:
        """Whether query heads share up-projections."""
        return self.num_kv_heads < self.num_query_heads

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
        return (
            f"num_query_heads {self.num_query_heads}, num_kv_heads {self.num_kv_heads}, head_dim {self.head_dim}, "
            f"latent_dim {self.latent_dim}, rope_dim {self.rope_dim}"
        )

    @property
    def description(self):
        tied = f" in {self.num_kv_heads} groups" if self.tied_groups else ""
        return (
            f"multi-head latent attention, {self.num_query_heads} query heads{tied} on a latent of {self.latent_dim} "
            f"numbers, {self.latent_dim + self.rope_dim} cached for each token and layer"
        )

    parameters = latent_counts.parameters
    flops = latent_counts.flops
    decode_flops = latent_counts.decode_flops
    saved_bytes = latent_counts.saved_bytes

    def dense_twin(self):
        return None

    def attend_calls(self, dtype, **shape):
        return latent_counts.attend_calls(self, dtype, self.num_query_heads // self.num_kv_heads, **shape)

    @property
    def transformers_classes(self):
        return ()

    def modelling_settings(self):
        return self.latent_settings()

    @classmethod
    def from_modelling_settings(cls, config):
        return {"num_query_heads": config["num_attention_heads"]} | cls.from_latent_settings(config)

    def zero_tensors(self, d_model):
        return {}

    def updated_buffers(self, buffers, metrics):
        return buffers

    def progress_note(self, metrics):
        return None

    def warnings(self, metrics):
        return []


class MLAttention(LatentAttention[MLAConfig, LayerReport]):
    """Computes multi-head latent attention (docs/latent.md).

        c = x W_down,  k_r = RoPE(x W_kr),  (q_h, q_r,h) = x W_q,h
        score_h = (q_h · c W_kup,h + RoPE(q_r,h) · k_r) / √(D + R)
        y = concat over h of (softmax(score_h) c W_vup,h) · W_o

    The cache holds (c, k_r), r + R numbers for each token. It is constructed and called as `Attention`; the fields are
    those of `MLAConfig`.
    """

    Config = MLAConfig

    def _make(self, linear, out_linear, rngs):
        config = self.config
        groups, members = config.num_kv_heads, config.num_query_heads // config.num_kv_heads
        axes = ("group", None, None)
        self.q_proj = linear(self.d_model, (groups, members, config.query_dim), axes=("embed", *axes))
        heads = (groups, members, config.head_dim)
        self.o_proj = out_linear(heads, self.d_model, axes=(*axes, "embed"), use_bias=config.has_out_bias)

    def _compute(self, tokens, rngs, layer_index):
        y_axes, cache_axes = summed("batch", "sequence", None), tokens.axes.cache
        y, cache = on_mesh(
            self, MLAttention._forward, (tokens,), (tokens.axes,), (y_axes, cache_axes), dtype=self.o_proj.dtype
        )
        return y, LayerReport(), cache

    def _forward(self, shard, tokens):
        """Returns one device's summand of y [B, S, d], and the grown cache."""
        kv, cache = self._key_values(shard, tokens)
        return self.o_proj.product(kv.attend(self._queries(self.q_proj, tokens.x))), cache
