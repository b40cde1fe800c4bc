"""The name table between PyTorch's parameters and ours, as data, and the one way of folding axes that it needs.

A kernel here keeps its axes apart, inputs first: the query projection is [d, G, M, D]. A PyTorch linear layer computes
x Wᵀ with W [outputs, inputs], each side folded into one axis: [(G M D), d]. A row of the table names both sides and the
kernel's axes, so that the same row serves export and import (docs/algorithm.md, PyTorch layout). Outside the attention
the names are Llama's, which Mistral, Qwen2 and Qwen3 share.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from gqe_jax.pytorch.safetensors_io import StoredTensor


class TensorPart(NamedTuple):
    """One of our parameters: its path in the module, and its axes.

    "d -> gmD" is a kernel with input axis d and output axes g, m, D: PyTorch's weight is [(g m D), d]. Without an arrow
    (biases, norm scales, buffers) nothing is transposed, and each word is an axis of PyTorch's: "gmD" is one axis,
    "v d" two. Letters: d model width, g KV group, m query head of the group, k slot, D head dimension, e the two extra
    slots (ō, then the shared head), r latent, R the key that heads share, f hidden width of the MLP, v vocabulary, 1 a
    single number.
    """

    path: str
    axes: str

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape in PyTorch of our parameter of `shape`."""
        groups = self.axes.replace("->", " ").split()
        if len(shape) != sum(map(len, groups)):
            raise ValueError(f"{self.path} has shape {shape}, but the name table gives it the axes {self.axes!r}")
        ends = itertools.accumulate(map(len, groups))
        folded = tuple(math.prod(shape[end - len(group) : end]) for group, end in zip(groups, ends, strict=True))
        return folded[::-1] if self.transposed else folded

    @property
    def transposed(self) -> bool:
        return "->" in self.axes

    def to_torch(self, value: np.ndarray) -> np.ndarray:
        """Our array in PyTorch's layout; truth values and counts as float32, as everything there is a float."""
        shape = self.torch_shape(value.shape)
        if value.dtype.kind in "biu":
            value = value.astype(np.float32)
        return value.reshape(shape[::-1]).T if self.transposed else value.reshape(shape)

    def from_torch(self, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """PyTorch's array in our layout, of `shape`."""
        return (value.T if self.transposed else value).reshape(shape)


Rows = dict[str, tuple[TensorPart, ...]]
"""PyTorch's name → our parameters. Several parts stand beside each other along the last axis of PyTorch's tensor: the
inputs of a linear layer. A module has the rows that it has a part of."""

ATTENTION_ROWS: Rows = {
    "q_proj.weight": (TensorPart("q_proj.kernel", "d -> gmD"),),
    "q_proj.bias": (TensorPart("q_proj.bias", "gmD"),),
    "k_proj.weight": (TensorPart("k_proj.kernel", "d -> gD"),),
    "k_proj.bias": (TensorPart("k_proj.bias", "gD"),),
    "v_proj.weight": (TensorPart("v_proj.kernel", "d -> gD"),),
    "v_proj.bias": (TensorPart("v_proj.bias", "gD"),),
    "kv_down.weight": (TensorPart("kv_down.kernel", "d -> r"),),
    "kv_down.bias": (TensorPart("kv_down.bias", "r"),),
    "latent_norm.weight": (TensorPart("latent_norm.scale", "r"),),
    "k_rope.weight": (TensorPart("k_rope.kernel", "d -> R"),),
    "k_rope.bias": (TensorPart("k_rope.bias", "R"),),
    "k_up.weight": (TensorPart("k_up.kernel", "r -> gD"),),
    "v_up.weight": (TensorPart("v_up.kernel", "r -> gD"),),
    "q_norm.weight": (TensorPart("q_norm.scale", "D"),),
    "k_norm.weight": (TensorPart("k_norm.scale", "D"),),
    "router.weight": (TensorPart("router.proj.kernel", "d -> gm"),),
    "router.bias_correction": (TensorPart("router.bias", "gm"),),
    "q_shared.weight": (TensorPart("q_shared.kernel", "d -> D"),),
    "q_shared.bias": (TensorPart("q_shared.bias", "D"),),
    "head_mask": (TensorPart("head_mask", "g m"),),
    "heads_per_kv": (TensorPart("heads", "g"),),
    "key_norm": (TensorPart("key_norm", "g"),),
    "allocation_steps": (TensorPart("steps", "1"),),
    "o_proj.weight": (TensorPart("o_proj.kernel", "gkD -> d"), TensorPart("o_extra.kernel", "eD -> d")),
    "o_proj.bias": (TensorPart("o_proj.bias", "d"),),
}
"""Rows of one attention layer of any kind. The names are the public `gqe` module's, a dense layer's are Llama's."""

BLOCK_ROWS: Rows = {
    "input_layernorm.weight": (TensorPart("attention_norm.scale", "d"),),
    **{
        f"self_attn.{name}": tuple(TensorPart(f"attention.{part.path}", part.axes) for part in parts)
        for name, parts in ATTENTION_ROWS.items()
    },
    "post_attention_layernorm.weight": (TensorPart("mlp_norm.scale", "d"),),
    "mlp.gate_proj.weight": (TensorPart("mlp.gate_proj.kernel", "d -> f"),),
    "mlp.up_proj.weight": (TensorPart("mlp.up_proj.kernel", "d -> f"),),
    "mlp.down_proj.weight": (TensorPart("mlp.down_proj.kernel", "f -> d"),),
}
"""The rows of one block of the decoder."""

MODEL_ROWS: Rows = {
    "model.embed_tokens.weight": (TensorPart("vocabulary.embedding", "v d"),),
    "model.norm.weight": (TensorPart("final_norm.scale", "d"),),
    "lm_head.weight": (TensorPart("vocabulary.lm_head", "v d"),),
}
"""The rows of the model outside its blocks; the head is absent where it is tied to the embedding."""

BLOCK_PREFIX = "model.layers.{layer}."
ATTENTION_PREFIX = BLOCK_PREFIX + "self_attn."
STACKED = "layers"
"""Our blocks are stacked: the parameter `layers.<path>` has a leading axis of layers, one slice for each prefix."""


def split_fused(stored: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Phi-3's tensors under Llama's names: `qkv_proj` holds the rows of q, k and v, `gate_up_proj` those of two more.

    A fused tensor whose rows are not as many as `config`, its config.json, says keeps its name, so that it is refused.
    """
    heads, width = config["num_attention_heads"], config["intermediate_size"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    kv = (config.get("num_key_value_heads") or heads) * dim
    parts = {
        "self_attn.qkv_proj.weight": {"q_proj": heads * dim, "k_proj": kv, "v_proj": kv},
        "mlp.gate_up_proj.weight": {"gate_proj": width, "up_proj": width},
    }
    result = {}
    for name, tensor in stored.items():
        rows = next((rows for end, rows in parts.items() if name.endswith(f".{end}")), {})
        if not rows or len(tensor.shape) != 2 or tensor.shape[0] != sum(rows.values()):
            result[name] = tensor
            continue
        first = 0
        for own, count in rows.items():
            result[f"{name.rsplit('.', 2)[0]}.{own}.weight"] = tensor.rows(first, count)
            first += count
    return result
