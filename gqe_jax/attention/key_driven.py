"""Dense attention whose KV heads are given query heads by the norms of their keys (key-driven GQA, arXiv 2408.08454).

The paper allocates from the batch at hand, at evaluation too: a causal model would see the future by it, and rows would
depend on each other. Here a training step uses the allocation that the step before left in the layer's buffers, and
evaluation and generation leave it as it is.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gqe_jax.attention import dense_counts
from gqe_jax.attention.base import Attention
from gqe_jax.attention.report import Buffer, LayerReport
from gqe_jax.attention.router import stream_key
from gqe_jax.config import AttentionConfig, require, require_positive
from gqe_jax.kernels import Call
from gqe_jax.parallel.on_mesh import axis_size, on_mesh, summed
from gqe_jax.parallel.zigzag import zigzag

Allocation = Literal["kdgqa", "dgqa_ema", "dgqa_diff", "static"]
EMA = 0.9  # weight of the new norms in "dgqa_ema"
SHARES = 1 << 20  # shares of the norms are rounded to one part in so many: what is equal but for rounding ties


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyDrivenConfig(AttentionConfig):
    """Configures dense attention with H query heads in runs on G KV heads, longer ones on heads with larger keys.

    `allocation` says what a run's length follows: "kdgqa" the norms of the last step's keys above the least of them;
    "dgqa_ema" their moving average and "dgqa_diff" their change, both every `allocation_window` steps; "static"
    nothing: the lengths stay as they are.
    """

    POSITIONAL: ClassVar = ("num_query_heads", "num_kv_heads", "head_dim")

    kind: str = "key_driven"
    num_query_heads: int  # H = G · M; M on each KV head before the first allocation
    out_bias: bool | None = None  # bias of the output projection; None: as `bias`
    allocation: Allocation = "kdgqa"  # what the lengths of the runs follow
    allocation_floor: int = 1  # query heads that each KV head has at least; 0: a KV head may have none
    allocation_window: int = 300  # steps between two allocations of "dgqa_ema" and "dgqa_diff"
    perturb: bool = False  # in training, subtract noise with the mean and deviation of each head's output (PGQA)

    @property
    def query_heads(self):
        return "num_query_heads", self.num_query_heads

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "allocation_window")
        members = self.num_query_heads // self.num_kv_heads
        require(
            0 <= self.allocation_floor <= members,
            f"allocation_floor={self.allocation_floor} must lie between 0 and num_query_heads / num_kv_heads = "
            f"{members}: no more query heads than that can be every KV head's",
        )
        require(
            self.num_query_heads * SHARES < 2**31,
            f"num_query_heads={self.num_query_heads} must be below {2**31 // SHARES}: shares of so many are counted in "
            f"int32",
        )
        require(
            not self.perturb or self.head_dim != 1,
            "perturb=True with head_dim=1: one number has no deviation; raise head_dim, or switch perturb off",
        )

    @property
    def has_out_bias(self) -> bool:
        return self.bias if self.out_bias is None else self.out_bias

    @property
    def unsplit(self):
        return (
            "query heads read the KV heads that the allocation gives them (attention.kind='key_driven'), which may lie "
            "on another device"
        )

    @property
    def attending_heads(self):
        return self.num_query_heads

    @property
    def output_slots(self):
        return self.num_query_heads

    @property
    def summary(self):
        window = f" every {self.allocation_window} steps" if self.allocation.startswith("dgqa") else ""
        return (
            f"num_query_heads {self.num_query_heads}, num_kv_heads {self.num_kv_heads}, head_dim {self.head_dim}, "
            f"{self.allocation}{window}, at least {self.allocation_floor} each" + (", perturbed" * self.perturb)
        )

    @property
    def description(self):
        return (
            f"dense attention, {self.num_query_heads} query heads in runs on {self.num_kv_heads} KV heads, whose "
            f"lengths follow the norms of the keys ([key-driven GQA](https://arxiv.org/abs/2408.08454), "
            f"{self.allocation})"
        )

    parameters = dense_counts.parameters
    flops = dense_counts.flops
    saved_bytes = dense_counts.saved_bytes
    cached_numbers = dense_counts.cached_numbers

    def dense_twin(self):
        return None

    def attend_calls(self, dtype, **shape):
        options = dense_counts.call_options(self, dtype, **shape)
        runs = {"num_runs": self.num_query_heads, "num_experts": 1, "num_slots": 1}
        return {"all heads": Call(num_kv_heads=self.num_kv_heads, kv_head=True, **runs, **options)}

    @property
    def transformers_classes(self):
        return ()

    def modelling_settings(self):
        names = ("allocation", "allocation_floor", "allocation_window", "perturb")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_modelling_settings(cls, config):
        settings = ("allocation", "allocation_floor", "allocation_window", "perturb")
        return {"num_query_heads": config["num_attention_heads"]} | {name: config[name] for name in settings}

    def zero_tensors(self, d_model):
        return {}

    def buffer_fault(self, buffers):
        heads = np.asarray(buffers["heads"])
        if (heads >= 0).all() and (heads.sum(axis=1) == self.num_query_heads).all():
            return None
        return f"heads_per_kv is {heads.tolist()} in its layers, but must add up to {self.num_query_heads} query heads"

    def updated_buffers(self, buffers, metrics):
        if self.allocation == "static":
            return buffers
        norms, cache, steps = metrics["key_norm"], buffers["key_norm"], buffers["steps"] + 1
        if self.allocation == "kdgqa":
            heads = allocate(norms - norms.min(-1, keepdims=True), self.num_query_heads, self.allocation_floor)
            return {"key_norm": norms, "heads": heads, "steps": steps}
        first, due = steps == self.allocation_window, steps % self.allocation_window == 0
        if self.allocation == "dgqa_ema":
            kept = values = jnp.where(first, norms, EMA * norms + (1 - EMA) * cache)
        else:
            kept, values = norms, jnp.where(first, 1.0, jnp.abs(norms - cache))
        heads = allocate(values, self.num_query_heads, self.allocation_floor)
        return {
            "key_norm": jnp.where(due, kept, cache),
            "heads": jnp.where(due, heads, buffers["heads"]),
            "steps": steps,
        }

    def progress_note(self, metrics):
        return f"heads on a KV head {int(metrics['heads'].min())} to {int(metrics['heads'].max())}"

    def warnings(self, metrics):
        return []


def allocate(values: jax.Array, heads: int, floor: int) -> jax.Array:
    """Shares query heads out over KV heads in proportion to `values`, by largest remainder.

    Each KV head gets `floor`; of the others its quota, rounded down, and those with the largest remainders one more,
    ties to the lower index. The sum is `heads`, and no head is further than 1 from its quota. Shares are rounded to
    1 / SHARES and counted in integers, so that devices that sum in another order come to the same.

    Args:
      values: [..., G], not negative; where they sum to 0, or are not finite, shares are equal.
      heads: below 2³¹ / SHARES.
      floor: at most heads / G.

    Returns:
      int32 [..., G].
    """
    groups = values.shape[-1]
    total = values.sum(-1, keepdims=True)
    share = jnp.where(jnp.isfinite(total) & (total > 0), values / total, 1 / groups)
    parts = jnp.round(share * SHARES).astype(jnp.int32)
    free, whole = heads - floor * groups, parts.sum(-1, keepdims=True)
    count, remainder = free * parts // whole, free * parts % whole
    rank = jnp.argsort(jnp.argsort(-remainder, axis=-1, stable=True), axis=-1)
    return floor + count + (rank < free - count.sum(-1, keepdims=True)).astype(jnp.int32)


def perturbation(o: jax.Array, noise: jax.Array) -> jax.Array:
    """PGQA's Z, in o's shape [..., D] and float32: noise given the mean and the deviation of each head's output over D.

    So o − Z has the mean 0 over D. The paper takes both over a sequence, which shows a token its future.
    """

    def centred(x):
        x = x.astype(jnp.float32)
        mean = x.mean(-1, keepdims=True)
        variance = jnp.square(x - mean).sum(-1, keepdims=True) / (x.shape[-1] - 1)
        return x - mean, mean, jnp.sqrt(variance + 1e-12)  # its root's derivative at 0 is infinite

    _, mean, deviation = centred(o)
    noise, _, spread = centred(noise)
    return noise / spread * deviation + mean


class KeyDrivenAttention(Attention[KeyDrivenConfig, LayerReport]):
    """Computes y = concat over heads h of Attention(q[h], K_{i(h)}, V_{i(h)}) · W_o, i the KV head of the run h is in.

    Parameters are those of `GQAttention`, whose function it is before the first allocation. Buffers: `heads` int32 [G],
    the lengths of the runs; `key_norm` float32 [G], the norms that the next allocation looks back on; `steps` int32
    [1], training steps taken. Metrics: `heads`, and `key_norm`, the mean over rows of the Frobenius norm of the keys of
    each KV head, padding left out. It is constructed and called as `Attention`; the fields are those of
    `KeyDrivenConfig`.
    """

    Config = KeyDrivenConfig

    def _make(self, linear, out_linear, rngs):
        config = self.config
        groups, members = config.num_kv_heads, config.num_query_heads // config.num_kv_heads
        heads = (groups, members, config.head_dim)
        self.q_proj = linear(self.d_model, heads, axes=("embed", "group", None, None))
        self.o_proj = out_linear(
            heads, self.d_model, axes=("group", None, None, "embed"), use_bias=config.has_out_bias
        )
        self.heads = Buffer(jnp.full(groups, members, jnp.int32))
        self.key_norm = Buffer(jnp.zeros(groups, jnp.float32))
        self.steps = Buffer(jnp.zeros(1, jnp.int32))
        self.placement = tuple((name, (None,)) for name in ("heads", "key_norm", "steps"))

    def _compute(self, tokens, rngs, layer_index):
        noise, squares_axes = None, ("batch", None) if tokens.cache is None else None
        if self.config.perturb and rngs is not None:  # drawn by place in the sequence, on one device or on many
            noise = jax.random.uniform(stream_key(rngs), (*tokens.x.shape[:2], *self.q_proj.kernel.shape[1:]))
            noise = zigzag(noise, axis_size("context"))
        y, squares, cache = on_mesh(
            self,
            KeyDrivenAttention._forward,
            (tokens, noise),
            (tokens.axes, ("batch", "sequence", "group", None, None)),
            (summed("batch", "sequence", None), squares_axes, tokens.axes.cache),
            dtype=self.k_proj.dtype,
        )
        if squares is None:
            return y, LayerReport(), cache
        norms = jax.lax.stop_gradient(jnp.sqrt(squares).mean(axis=0))
        return y, LayerReport(metrics={"key_norm": norms, "heads": self.heads[...].astype(jnp.float32)}), cache

    def _forward(self, shard, tokens, noise):
        """Returns one device's summand of y [B, S, d]; Σ K² of each row and KV head [B, G], None with a cache; the
        cache."""
        kv, cache = self._key_values(shard, tokens)  # K, V [B, T, G, D]
        q = self.q_proj(tokens.x)
        groups, members, dim = q.shape[2:]
        heads, lengths = groups * members, self.heads[...].astype(jnp.int32)
        index = jnp.repeat(jnp.arange(groups), lengths, total_repeat_length=heads)
        o = kv.attend(q.reshape(*q.shape[:2], heads, 1, dim), kv_head=index).reshape(q.shape)
        if noise is not None:
            o = (o - perturbation(o, noise)).astype(o.dtype)
        squares = None
        if cache is None:
            real = 1.0 if tokens.segment_ids is None else (tokens.segment_ids != 0)[..., None, None]
            squares = shard.sum(jnp.sum(jnp.square(kv.k.astype(jnp.float32)) * real, axis=(1, 3)), "context")
        return self.o_proj.product(o), squares, cache
