"""Grouped Query Experts: in each KV group a router picks k of M query heads per token (arXiv 2606.20945, section 3)."""

import dataclasses
import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from gqe_jax.attention import dense_counts
from gqe_jax.attention.balance import balance, router_warnings
from gqe_jax.attention.base import Attention
from gqe_jax.attention.gqa import GQAConfig
from gqe_jax.attention.router import Router, RouterConfig, RouterStats, Routing, balanced
from gqe_jax.attention.shared_head import attend_with_shared
from gqe_jax.config import AttentionConfig, require, require_positive
from gqe_jax.kernels import Call
from gqe_jax.parallel.on_mesh import on_mesh, summed


@dataclasses.dataclass(frozen=True, kw_only=True)
class GQEConfig(AttentionConfig):
    """Configures Grouped Query Experts: for each token, `top_k` of the M query experts of each KV group attend."""

    POSITIONAL: ClassVar = ("num_query_experts", "num_kv_heads", "top_k", "head_dim")

    kind: str = "gqe"
    num_query_experts: int  # N = G · M query heads in all
    top_k: int = 1  # k, experts selected per token and group
    variant: Literal["gqe", "hard_concat", "weighted_concat"] = "gqe"  # the last two have no ō and s, only the slots
    router: RouterConfig = RouterConfig()  # of the experts of a token

    @property
    def query_heads(self):
        return "num_query_experts", self.num_query_experts

    @property
    def experts_per_group(self) -> int:
        """The number of query experts in a group, M = N / G."""
        return self.num_query_experts // self.num_kv_heads

    @property
    def shared_heads(self) -> int:
        """The number of shared heads beside the experts: 1 in the variant "gqe", else 0."""
        return int(self.variant == "gqe")

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "top_k")
        require(
            self.top_k <= self.experts_per_group,
            f"top_k={self.top_k} exceeds experts_per_group={self.experts_per_group} (num_query_experts="
            f"{self.num_query_experts} / num_kv_heads={self.num_kv_heads}): lower top_k or raise num_query_experts",
        )

    @property
    def attending_heads(self):
        return self.num_kv_heads * self.top_k + self.shared_heads

    @property
    def output_slots(self):
        return self.num_kv_heads * self.top_k + 2 * self.shared_heads  # ō and s beside the experts

    @property
    def summary(self):
        return (
            f"num_query_experts {self.num_query_experts}, num_kv_heads {self.num_kv_heads}, head_dim {self.head_dim}, "
            f"top_k {self.top_k} of {self.experts_per_group}, {self.variant}, router {self.router.kind}"
        )

    @property
    def description(self):
        return (
            f"[Grouped Query Experts](https://arxiv.org/abs/2606.20945): in each of {self.num_kv_heads} KV groups a "
            f"router picks {self.top_k} of {self.experts_per_group} query heads per token; {self.attending_heads} "
            f"heads attend, and {self.num_query_experts} would in a dense layer"
        )

    def parameters(self, d_model):
        learned = self.router.kind == "learned"
        router = d_model * self.num_query_experts if learned else 0
        return dense_counts.parameters(self, d_model, self.shared_heads) | {"router": router}

    def flops(self, d_model, tokens, pairs):
        router = 2 * tokens * self.parameters(d_model)["router"]
        return dense_counts.flops(self, d_model, tokens, pairs, self.shared_heads) | {"router": router}

    def dense_twin(self):
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(AttentionConfig)}
        return GQAConfig(**shared | {"kind": "gqa", "num_query_heads": self.num_query_experts})

    def saved_bytes(self, policy, *, d_model, itemsize, expert=1):
        options = {"d_model": d_model, "itemsize": itemsize, "expert": expert}
        logits = 4 * self.num_query_experts // expert if policy in ("dots", "none") else 0  # in float32
        return dense_counts.saved_bytes(self, policy, shared=self.shared_heads, **options) + logits

    cached_numbers = dense_counts.cached_numbers

    def attend_calls(self, dtype, **shape):
        options, groups = dense_counts.call_options(self, dtype, **shape), self.num_kv_heads
        heads = {"num_runs": groups, "num_kv_heads": groups, "num_experts": self.experts_per_group}
        calls = {"routed heads": Call(num_slots=self.top_k, **heads, **options)}
        if self.shared_heads:
            calls["shared head"] = Call(num_runs=1, num_kv_heads=1, num_experts=1, num_slots=1, **options)
        return calls

    @property
    def transformers_classes(self):
        return ()

    def modelling_settings(self):
        router = self.router
        return {
            "router_top_k": self.top_k,
            "variant": self.variant,
            "router_kind": router.kind,
            "router_seed": router.seed,
            "router_aux_loss_coef": router.load_balance_weight,
            "router_z_loss_coef": router.z_loss_weight,
            "router_jitter": router.jitter,
            "router_bias": router.bias_update_rate > 0,
            "router_bias_update_rate": router.bias_update_rate,
            "output_router_logits": False,
        }

    @classmethod
    def from_modelling_settings(cls, config):
        missing = [key for key in ("router_top_k", "variant", "router_kind") if key not in config]
        if missing:
            raise KeyError(", ".join(missing))
        rate = config.get("router_bias_update_rate", 1e-3) if config.get("router_bias") else 0.0
        return {
            "num_query_experts": config["num_attention_heads"],
            "top_k": config["router_top_k"],
            "variant": config["variant"],
            "router": {
                "kind": config["router_kind"],
                "seed": config.get("router_seed", 0),
                "load_balance_weight": config.get("router_aux_loss_coef", 0.01),
                "z_loss_weight": config.get("router_z_loss_coef", 0.0),
                "jitter": config.get("router_jitter", 0.0),
                "bias_update_rate": rate,
            },
        }

    def zero_tensors(self, d_model):
        learned = self.router.kind == "learned"
        return {} if learned else {"router.weight": (self.num_query_experts, d_model)}

    def updated_buffers(self, buffers, metrics):
        update = functools.partial(
            balanced, load=metrics["load"], top_k=self.top_k, rate=self.router.bias_update_rate
        )
        return jax.tree.map(update, buffers)

    def progress_note(self, metrics):
        return f"router max/mean {balance(metrics['load']):5.2f}"

    def warnings(self, metrics):
        return router_warnings(metrics["load"], self.top_k) if self.router.kind == "learned" else []


class GQEAttention(Attention[GQEConfig, RouterStats]):
    """Computes a mixture of query-head experts on grouped-query attention (docs/algorithm.md, "The layer").

    With p = softmax over the M experts of each group g, e_1 … e_k the k most probable of them, and one shared head
    beside the experts:

        o[g, j] = Attention(q[g, e_j], K_g, V_g)                    the slots, k in each group
        w[g, j] = p[g, e_j] / Σ_{g',j'} p[g', e_j']                 weights over all slots of all groups
        ō       = Σ_{g,j} w[g, j] · o[g, j]
        s       = Attention(q_s, mean_g K_g, mean_g V_g)            the shared head
        y       = concat(o[1,1], …, o[G,k], ō, s) · W_o

    Keys and values are dense: the cache is that of grouped-query attention. Unselected experts cost no attention. The
    router computes in float32 whatever the dtypes are. The layer is constructed and called as `Attention`; the fields
    are those of `GQEConfig`.
    """

    Config = GQEConfig

    def _make(self, linear, out_linear, rngs):
        config, d = self.config, self.d_model
        groups, experts, dim = config.num_kv_heads, config.experts_per_group, config.head_dim
        self.q_proj = linear(d, (groups, experts, config.query_dim), axes=("embed", "group", None, None))
        self.router = Router(d, groups, experts, config.top_k, config.router, rngs=rngs)
        # W_o is two parameters: the slots' rows are split over devices with their groups, those of ō and s are not.
        self.o_proj = out_linear((groups, config.top_k, dim), d, axes=("group", None, None, "embed"))
        if config.shared_heads:
            self.q_shared = linear(d, config.query_dim, axes=("embed", None))
            self.o_extra = out_linear((2, dim), d, axes=(None, None, "embed"), use_bias=False)

    def _compute(self, tokens, rngs, layer_index):
        draws, draws_axes = self.router.draws(tokens.x, tokens.positions, rngs, layer_index)
        y, routing, cache = on_mesh(
            self,
            GQEAttention._forward,
            (tokens, draws),
            (tokens.axes, draws_axes),
            (summed("batch", "sequence", None), Routing.axes(), tokens.axes.cache),
            dtype=self.o_proj.dtype,
        )
        return y, routing.statistics(self.config.router), cache

    def _forward(self, shard, tokens, draws):
        """Returns one device's summand of y [B, S, d], its `Routing`, and the grown cache.

        `shard` says which part of the mesh the device is, `tokens` (`base.Tokens`) and `draws` (`Router.draws`) are the
        device's parts of the input, and the parameters are those of its groups. Without a mesh all of them are whole.
        """
        kv, cache = self._key_values(shard, tokens)  # K, V [B, T, G, D] are dense
        routing = self.router(tokens.x, segment_ids=tokens.segment_ids, draws=draws, num_groups=kv.num_groups)
        index, p = routing.expert_index, routing.selected_probs  # e_1 … e_k and their p, [B, S, G, k]
        q = self._queries(self.q_proj, tokens.x)  # of all experts, [B, S, G, M, D]

        if self.config.variant != "gqe":
            o = kv.attend(q, index)  # [B, S, G, k, D]
            if self.config.variant == "weighted_concat":
                o = (o * p[..., None]).astype(o.dtype)
            return self.o_proj.product(o), routing, cache

        q_shared = functools.partial(self._queries, self.q_shared)
        o, s = attend_with_shared(kv, q, index, tokens.x, q_shared)  # [B, S, G, k, D], [B, S, D]
        w = p / jnp.maximum(shard.sum(p.sum(axis=(-2, -1), keepdims=True), "expert"), 1e-9)
        mixed = _weighted_sum(o, w).astype(o.dtype)  # ō, [B, S, D]
        # The slots times their rows of W_o, plus ō and s times theirs: y is the sum of this over the devices.
        return self.o_proj.product(o) + self.o_extra.product(jnp.stack([mixed, s], axis=-2)), routing, cache


def _weighted_sum(o: jax.Array, weights: jax.Array) -> jax.Array:
    """Sums weights [B, S, G, k] · o [B, S, G, k, D] over groups and slots; float32 [B, S, D]."""
    # The slots are added one by one, as columns of the kernel's output: a TPU would transpose it to reduce over axes.
    num_slots = weights.shape[2] * weights.shape[3]
    slots = jnp.split(o.reshape(*o.shape[:2], -1), num_slots, axis=-1)
    columns = jnp.split(weights.reshape(*weights.shape[:2], -1), num_slots, axis=-1)
    return functools.reduce(jnp.add, [slot * weight for slot, weight in zip(slots, columns, strict=True)])
