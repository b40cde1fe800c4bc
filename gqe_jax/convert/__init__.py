"""Parameters to PyTorch and back, without torch."""

from gqe_jax.pytorch.layer import layer_from_torch, layer_to_torch

__all__ = ["layer_from_torch", "layer_to_torch"]
