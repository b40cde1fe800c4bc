"""The dense parts of the decoder: SwiGLU and the vocabulary's two ends."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from gqe_jax.config import ModelConfig
from gqe_jax.linear import Linear


class SwiGLU(nnx.Module):
    """y = (silu(x W_gate) ⊙ x W_up) W_down (Shazeer 2020), without biases."""

    def __init__(self, config: ModelConfig, *, kernel_init: nnx.Initializer, out_kernel_init: nnx.Initializer, rngs):
        linear = functools.partial(
            Linear,
            use_bias=False,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )
        self.gate_proj = linear(config.d_model, config.d_ff, kernel_init=kernel_init)
        self.up_proj = linear(config.d_model, config.d_ff, kernel_init=kernel_init)
        self.down_proj = linear(config.d_ff, config.d_model, kernel_init=out_kernel_init)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, S, d] → [B, S, d]."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Vocabulary(nnx.Module):
    """Token embedding and, tied to it or not, the projection to logits."""

    def __init__(self, config: ModelConfig, *, kernel_init: nnx.Initializer, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(config.dtype)
        param_dtype = jnp.dtype(config.param_dtype)
        shape = (config.vocab_size, config.d_model)
        self.embedding = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        if not config.tie_embeddings:
            self.lm_head = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, S] → [B, S, d]."""
        return self.embedding[...][tokens].astype(self.dtype)

    def logits(self, x: jax.Array) -> jax.Array:
        """[..., d] → float32 [..., V]."""
        table = self.lm_head if hasattr(self, "lm_head") else self.embedding
        return jnp.einsum("...d,vd->...v", x, table[...].astype(self.dtype), preferred_element_type=jnp.float32)
