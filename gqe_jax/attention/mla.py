"""Multi-head latent attention, MLA (DeepSeek-V2, arXiv 2405.04434), trained from scratch or converted (TransMLA)."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from gqe_jax.attention import dense_counts
from gqe_jax.attention.latent import LatentAttention, LatentConfig, halves_together
from gqe_jax.attention.report import LayerReport
from gqe_jax.kernels import Call
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

    def _outside(self, d_model: int) -> int:
        """Weights of W_q and W_o."""
        return d_model * self.num_query_heads * (self.query_dim + self.dim)

    def parameters(self, d_model):
        biases = self.bias * self.num_query_heads * self.query_dim + self.has_out_bias * d_model
        count = self._outside(d_model) + biases + self.latent_parameters(d_model)
        return {"attention": count, "norm": self.latent_norm * self.latent_dim}

    def flops(self, d_model, tokens, pairs):
        weights = self._outside(d_model) + d_model * self.cached_numbers()
        weights += 2 * self.latent_dim * self.num_kv_heads * self.dim
        return self._counted(2 * tokens * weights, self.query_dim + self.dim, pairs)

    def decode_flops(self, d_model, seen):
        weights = self._outside(d_model) + d_model * self.cached_numbers()
        weights += 2 * self.latent_dim * self.num_query_heads * self.dim  # of each head: absorbed
        return self._counted(2 * weights, self.cached_numbers() + self.latent_dim, seen)

    def _counted(self, projections: int, width: int, pairs: int) -> dict[str, int]:
        """`flops` of heads whose keys and values have `width` numbers together."""
        attention = self.num_query_heads * 2 * width * pairs
        return {"projections": projections, "router": 0, "attention": attention, "shared_head": 0}

    def dense_twin(self):
        return None

    def saved_bytes(self, policy, *, d_model, itemsize, expert=1):
        heads, groups = self.num_query_heads // expert, self.num_kv_heads // expert
        attended = heads * (itemsize * self.dim + 4)  # outputs, and float32 log-sum-exps
        queries, keys = heads * self.query_dim, groups * self.query_dim
        products = itemsize * (queries + self.cached_numbers() + 2 * groups * self.dim + d_model)
        finished = itemsize * (queries + keys + self.rope_dim)
        return {
            "full": 0,
            "attention": attended,
            "dots": attended + products,
            "none": attended + products + finished,
        }[policy]

    def attend_calls(self, dtype, **shape):
        options, heads = dense_counts.call_options(self, dtype, **shape), self.num_query_heads
        if shape["cached"] and self.absorbs(shape["q_len"]):
            options |= dict.fromkeys(("head_dim", "value_dim"), self.cached_numbers())
            return {"absorbed heads": Call(num_groups=1, num_kv_heads=1, num_experts=heads, num_slots=heads, **options)}
        groups, members = self.num_kv_heads, heads // self.num_kv_heads
        sizes = {"num_groups": groups, "num_kv_heads": groups, "num_experts": members, "num_slots": members}
        return {"all heads": Call(**sizes, **options | {"head_dim": self.query_dim})}

    @property
    def transformers_classes(self):
        return ()

    def modelling_settings(self):
        return {
            "kv_lora_rank": self.latent_dim,
            "qk_rope_head_dim": self.rope_dim,
            "rope_repeats": self.rope_repeats,
            "latent_norm": self.latent_norm,
        }

    @classmethod
    def from_modelling_settings(cls, config):
        return {
            "num_query_heads": config["num_attention_heads"],
            "latent_dim": config["kv_lora_rank"],
            "rope_dim": config["qk_rope_head_dim"],
            "rope_repeats": config.get("rope_repeats", 1),
            "latent_norm": config.get("latent_norm", False),
        }

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
        """One device's summand of y [B, S, d], and the grown cache."""
        kv, cache = self._key_values(shard, tokens)
        q = halves_together(*jnp.split(self.q_proj(tokens.x), [self.config.dim], axis=-1))  # [B, S, G, M, D + R]
        return self.o_proj.product(kv.attend(q)), cache
