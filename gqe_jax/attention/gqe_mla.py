"""Grouped Query Experts on latent keys and values: routed attention that decodes from a cache of r + R numbers."""

import dataclasses
from typing import ClassVar

from gqe_jax.attention import latent_counts
from gqe_jax.attention.gqe import GQEAttention, GQEConfig
from gqe_jax.attention.latent import LatentAttention, LatentConfig
from gqe_jax.attention.mla import MLAConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class GQEMLAConfig(GQEConfig, LatentConfig):
    """Configures Grouped Query Experts whose G KV heads are formed from a latent, as a conversion from GQE makes them.

    The experts of a group share up-projections, and the shared head has the means of these over the groups.
    """

    POSITIONAL: ClassVar = ("num_query_experts", "num_kv_heads", "latent_dim", "rope_dim", "top_k", "head_dim")

    kind: str = "gqe_mla"

    @property
    def summary(self):
        return f"{super().summary}, latent_dim {self.latent_dim}, rope_dim {self.rope_dim}"

    @property
    def description(self):
        return (
            f"{super().description}; keys and values are formed from a latent of {self.latent_dim} numbers, "
            f"{self.cached_numbers()} cached for each token and layer"
        )

    def parameters(self, d_model):
        router = d_model * self.num_query_experts if self.router.kind == "learned" else 0
        return latent_counts.parameters(self, d_model, self.shared_heads) | {"router": router}

    def flops(self, d_model, tokens, pairs):
        router = 2 * tokens * self.parameters(d_model)["router"]
        return latent_counts.flops(self, d_model, tokens, pairs, self.shared_heads) | {"router": router}

    def decode_flops(self, d_model, seen):
        router = 2 * self.parameters(d_model)["router"]
        return latent_counts.decode_flops(self, d_model, seen, self.shared_heads) | {"router": router}

    def dense_twin(self):
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(LatentConfig)}
        return MLAConfig(**shared | {"kind": "mla", "num_query_heads": self.num_query_experts})

    def saved_bytes(self, policy, *, d_model, itemsize, expert=1):
        options = {"d_model": d_model, "itemsize": itemsize, "expert": expert}
        logits = 4 * self.num_query_experts // expert if policy in ("dots", "none") else 0  # in float32
        return latent_counts.saved_bytes(self, policy, shared=self.shared_heads, **options) + logits

    def cached_numbers(self, expert=1):
        return LatentConfig.cached_numbers(self, expert)

    def attend_calls(self, dtype, **shape):
        return latent_counts.attend_calls(self, dtype, self.top_k, self.shared_heads, **shape)

    def modelling_settings(self):
        return None


class GQEMLAttention(LatentAttention, GQEAttention):
    """Computes the equations of `GQEAttention` on the keys and values of `LatentAttention`.

    The shared head reads mean_g K_g = (c · mean_g W_kup,g, k_r) and mean_g V_g = c · mean_g W_vup,g. Absorbed, the
    selected heads and the shared one read the latents in one pass.
    """

    Config = GQEMLAConfig
