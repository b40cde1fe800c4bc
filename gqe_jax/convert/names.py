"""The name table between PyTorch's parameters and ours, as data, and the one way of folding axes that it needs.

A kernel here keeps its axes apart, inputs first: the query projection is [d, G, M, D]. A PyTorch linear layer computes
x Wᵀ with W [outputs, inputs], each side folded into one axis: [(G M D), d]. A row of the table names both sides and the
kernel's axes, so that the same row serves export and import (`spec`: PyTorch parameter layout).
"""

import math
from typing import NamedTuple

import numpy as np


class Part(NamedTuple):
    """One of our parameters: its path in the module, and its axes.

    "d -> gmD" is a kernel with input axis d and output axes g, m, D: PyTorch's weight is [(g m D), d]. Without an arrow
    (biases, norm scales, buffers) all axes fold into one. Letters: d model width, g KV group, m query head of the
    group, k slot, D head dimension, e the two extra slots (ō, then the shared head).
    """

    path: str
    axes: str

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in PyTorch of our parameter of `shape`."""
        inputs, arrow, outputs = self.axes.partition(" -> ")
        if len(shape) != len(inputs + outputs):
            raise ValueError(f"{self.path} has shape {shape}, but the name table gives it the axes {self.axes!r}")
        if not arrow:
            return (math.prod(shape),)
        return math.prod(shape[len(inputs) :]), math.prod(shape[: len(inputs)])

    def to_torch(self, value: np.ndarray) -> np.ndarray:
        """Our array in PyTorch's layout."""
        return value.reshape(self.torch_shape(value.shape)[::-1]).T

    def from_torch(self, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """PyTorch's array in our layout, of `shape`."""
        return value.T.reshape(shape)


ATTENTION: dict[str, tuple[Part, ...]] = {
    "q_proj.weight": (Part("q_proj.kernel", "d -> gmD"),),
    "q_proj.bias": (Part("q_proj.bias", "gmD"),),
    "k_proj.weight": (Part("k_proj.kernel", "d -> gD"),),
    "k_proj.bias": (Part("k_proj.bias", "gD"),),
    "v_proj.weight": (Part("v_proj.kernel", "d -> gD"),),
    "v_proj.bias": (Part("v_proj.bias", "gD"),),
    "q_norm.weight": (Part("q_norm.scale", "D"),),
    "k_norm.weight": (Part("k_norm.scale", "D"),),
    "router.weight": (Part("router.proj.kernel", "d -> gm"),),
    "router.bias_correction": (Part("router.bias", "gm"),),
    "q_shared.weight": (Part("q_shared.kernel", "d -> D"),),
    "q_shared.bias": (Part("q_shared.bias", "D"),),
    "o_proj.weight": (Part("o_proj.kernel", "gkD -> d"), Part("o_extra.kernel", "eD -> d")),
    "o_proj.bias": (Part("o_proj.bias", "d"),),
}
"""PyTorch's name → our parameters, within one attention layer of either kind. A layer has the rows that it has a part
of. Several parts stand beside each other along the last axis of PyTorch's tensor: the inputs of a linear layer."""
