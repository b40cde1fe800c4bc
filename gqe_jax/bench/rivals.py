"""What `gqe bench attention` compares: functions and argument shapes, FLOPs, and what the hardware could do.

Everything is bfloat16, causal, batch 1, in the paper's proportions: N query heads in G groups, k of N / G selected.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gqe_jax.attention import Attention, GQAttention, GQEAttention
from gqe_jax.attention.key_values import KeyValues
from gqe_jax.flops import scored_pairs
from gqe_jax.kernels import IMPLEMENTATIONS, attend
from gqe_jax.rounding import ceil_div
from gqe_jax.tpu import GENERATIONS


@dataclasses.dataclass(frozen=True)
class Rival:
    """One way to compute attention.

    Attributes:
      name: in tables.
      kind: "gqa", dense attention of all N heads; "gqe", of the selected ones and the shared head.
      implementation: of `attend`; "splash" is JAX's splash attention, at its best block sizes.
    """

    name: str
    kind: Literal["gqa", "gqe"]
    implementation: str


RIVALS = {
    "tpu": (
        Rival("GQA, splash", "gqa", "splash"),
        Rival("GQA, ours", "gqa", "pallas_tpu"),
        Rival("GQE", "gqe", "pallas_tpu"),
    ),
    "gpu": (
        Rival("GQA, cudnn", "gqa", "cudnn"),
        Rival("GQE, XLA", "gqe", "xla"),
        Rival("GQE", "gqe", "cudnn"),
    ),
}
"""Platform → the rivals, our GQE last. Its speed-up is stated over each that is dense."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """Holds the sizes: S tokens, N query heads (experts) in G groups, k selected, head dimension D, width d."""

    seq_len: int
    head_dim: int = 128
    num_heads: int = 16
    num_groups: int = 8
    top_k: int = 1
    d_model: int = 2048

    def attending_heads(self, kind: str) -> int:
        return self.num_heads if kind == "gqa" else self.top_k * self.num_groups + 1


def make(part: str, rival: dict[str, str], backward: bool, setting: dict[str, int], target: str):
    """(function, argument shapes) of one cell of the table: see `Job.factory`, which wants plain data.

    Args:
      part: "attention" or "layer".
      rival, setting: fields of `Rival` and `Setting`.
      backward: the gradients too.
      target: TPU generation, for splash's block sizes; "" on other hardware.
    """
    sizes, rival = Setting(**setting), Rival(**rival)
    if rival.implementation == "splash":
        IMPLEMENTATIONS["splash"] = splash_implementation(target, sizes)
    return {"attention": attention, "layer": layer}[part](rival, sizes, backward, target)


def splash_implementation(target: str, s: Setting) -> Callable:
    """Returns an implementation of `attend` by JAX's splash attention, at the best block sizes for a TPU."""
    from gqe_jax.bench import splash

    return splash.implementation(splash.splash_blocks(target, s.head_dim, s.seq_len))


def attention(rival: Rival, s: Setting, backward: bool, target: str) -> tuple[Callable, tuple]:
    """Attention alone: for GQE the selection, the rotation of the selected queries and all heads.

    Arrays are as projections write them, [1, S, heads · D]; but dense attention gets its queries rotated, and splash
    its heads first, which in a layer has to be paid for. With `backward`, the gradients of q, k, v (and of the shared
    head's queries) from those of the outputs.
    """
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    flat_q, flat_kv = (shape((1, s.seq_len, heads * s.head_dim)) for heads in (s.num_heads, s.num_groups))
    q_shape = (1, s.seq_len, s.num_groups, s.num_heads // s.num_groups, s.head_dim)
    kv_shape = (1, s.seq_len, s.num_groups, s.head_dim)
    if rival.kind == "gqa":
        if rival.implementation == "splash":
            from gqe_jax.bench.splash import splash, splash_blocks

            q, kv = (shape((heads, s.seq_len, s.head_dim)) for heads in (s.num_heads, s.num_groups))
            function = functools.partial(splash, blocks=splash_blocks(target, s.head_dim, s.seq_len))
        else:
            q, kv = flat_q, flat_kv

            def function(q, k, v):
                q, k, v = q.reshape(q_shape), k.reshape(kv_shape), v.reshape(kv_shape)
                return attend(q, k, v, implementation=rival.implementation).reshape(flat_q.shape)

        return (_gradients(function, 3), (q, kv, kv, q)) if backward else (function, (q, kv, kv))

    index = jax.ShapeDtypeStruct((1, s.seq_len, s.num_groups, s.top_k), jnp.int32)
    table = jax.ShapeDtypeStruct((1, s.seq_len, s.head_dim // 2), jnp.float32)
    q_shared, o = shape((1, s.seq_len, s.head_dim)), shape((1, s.seq_len, s.num_groups * s.top_k * s.head_dim))

    def selected(q, k, v, q_shared, expert_index, cos, sin):
        q, k, v = q.reshape(q_shape), k.reshape(kv_shape), v.reshape(kv_shape)
        options = {"q_rope": (cos, sin), "implementation": rival.implementation}
        routed, shared = attend(q, k, v, expert_index, q_shared=q_shared, **options)
        return routed.reshape(o.shape), shared

    args = (flat_q, flat_kv, flat_kv, q_shared, index, table, table)
    return (_gradients(selected, 4), (*args, (o, q_shared))) if backward else (selected, args)


def layer(rival: Rival, s: Setting, backward: bool, target: str) -> tuple[Callable, tuple]:
    """Returns a whole layer, [1, S, d] to [1, S, d]: projections, rotary embedding, router, attention, output
    projection.

    With `backward`, the gradients of the input and of all parameters.
    """
    del target

    def make_layer() -> Attention:
        base, slots = (GQAttention, ()) if rival.kind == "gqa" else (GQEAttention, (s.top_k,))
        sizes = (s.d_model, s.num_heads, s.num_groups, *slots, s.head_dim)
        kind = _computed_by(rival.implementation, base)
        return kind(*sizes, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    graph, parameters, rest = nnx.split(nnx.eval_shape(make_layer), nnx.Param, ...)
    x = jax.ShapeDtypeStruct((1, s.seq_len, s.d_model), jnp.bfloat16)

    def function(parameters, x, rest):
        return nnx.merge(graph, parameters, rest)(x)[0]

    args = (parameters, x, rest)
    return (_gradients(function, 2), (*args, x)) if backward else (function, args)


def _computed_by(implementation: str, base: type[Attention]) -> type[Attention]:
    """Returns the layer with this implementation, also with one that only the comparison knows."""

    class Computed(KeyValues):
        @property
        def options(self):
            return super().options | {"implementation": implementation}

    class Layer(base):
        def _key_values(self, *args):
            kv, cache = super()._key_values(*args)
            return Computed(**{field.name: getattr(kv, field.name) for field in dataclasses.fields(kv)}), cache

    return Layer


def _gradients(function: Callable, num_differentiated: int) -> Callable:
    """(*arguments, cotangents) → gradients of the first few arguments."""

    def gradients(*args: Any):
        *args, cotangents = args
        differentiated, fixed = args[:num_differentiated], args[num_differentiated:]
        return jax.vjp(lambda *x: function(*x, *fixed), *differentiated)[1](cotangents)

    return gradients


def flops(rival: Rival, s: Setting, backward: bool) -> int:
    """Returns the FLOPs of attention alone: 2·D for each pair that the mask lets through, head and matrix product."""
    return _matmuls(backward) * 2 * s.head_dim * scored_pairs(s.seq_len) * s.attending_heads(rival.kind)


def useful_cycles(rival: Rival, s: Setting, backward: bool, target: str) -> float:
    """Cycles of one core's matrix units for the (query, key) pairs that the mask lets through, at this D, no more.

    A unit W wide takes a row against W keys, or W of the D columns, at a time: D = 64 costs as much as D = W.
    """
    generation = GENERATIONS[target]
    width, rows_per_cycle = generation.matrix_unit_width, generation.matrix_units * generation.matrix_unit_rows
    per_pair = ceil_div(s.head_dim, width) / width / rows_per_cycle
    return _matmuls(backward) * per_pair * scored_pairs(s.seq_len) * s.attending_heads(rival.kind)


def _matmuls(backward: bool) -> int:
    """Matrix products per head: q·k and p·v; the backward pass has five, one of them the scores once more."""
    return 7 if backward else 2
