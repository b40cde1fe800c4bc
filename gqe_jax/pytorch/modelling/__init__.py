"""The PyTorch side of an exported model: two files that `gqe export` copies into the folder beside the weights.

They import torch and transformers, and nothing of gqe_jax; gqe_jax imports nothing of them.
"""
