"""Defines the dense parts of the decoder: SwiGLU, and the vocabulary's embedding and logits."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from gqe_jax.config import ModelConfig
from gqe_jax.linear import Linear
from gqe_jax.parallel.on_mesh import Shard, on_mesh, summed, total


class SwiGLU(nnx.Module):
    """Computes y = (silu(x W_gate) ⊙ x W_up) W_down (Shazeer 2020), without biases."""

    def __init__(self, config: ModelConfig, *, kernel_init: nnx.Initializer, out_kernel_init: nnx.Initializer, rngs):
        linear = functools.partial(
            Linear,
            use_bias=False,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )
        self.gate_proj = linear(config.d_model, config.d_ff, axes=("embed", "hidden"), kernel_init=kernel_init)
        self.up_proj = linear(config.d_model, config.d_ff, axes=("embed", "hidden"), kernel_init=kernel_init)
        self.down_proj = linear(config.d_ff, config.d_model, axes=("hidden", "embed"), kernel_init=out_kernel_init)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, S, d] to y [B, S, d]."""
        tokens = ("batch", "sequence", None)
        return on_mesh(self, SwiGLU._forward, (x,), (tokens,), summed(*tokens), dtype=self.gate_proj.dtype)

    def _forward(self, shard: Shard, x: jax.Array) -> jax.Array:
        """Computes one device's summand of y, from its part of the hidden width."""
        return self.down_proj.product(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Vocabulary(nnx.Module):
    """Holds the token embedding and, tied to it or not, the projection to logits; both are [V, d]."""

    def __init__(self, config: ModelConfig, *, kernel_init: nnx.Initializer, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(config.dtype)
        param_dtype = jnp.dtype(config.param_dtype)
        shape, axes = (config.vocab_size, config.d_model), ("vocabulary", "embed")
        self.embedding = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        if not config.tie_embeddings:
            self.lm_head = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.placement = (("embedding", axes), ("lm_head", axes))

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens int32 [B, S] to their embeddings [B, S, d], in the computation's dtype."""
        axes = ("batch", "sequence")
        return on_mesh(self, Vocabulary._embed, (tokens,), (axes,), summed(*axes, None), dtype=self.dtype)

    def _embed(self, shard: Shard, tokens: jax.Array) -> jax.Array:
        """Computes one device's summand: embeddings of the tokens in its part of the vocabulary, 0 for the others."""
        table = self.embedding[...]
        if shard.size("expert") == 1:
            return table[tokens].astype(self.dtype)
        tokens = tokens - shard.index("expert") * table.shape[0]
        own = (tokens >= 0) & (tokens < table.shape[0])
        return jnp.where(own[..., None], table[jnp.where(own, tokens, 0)], 0).astype(self.dtype)

    def logits(self, x: jax.Array) -> jax.Array:
        """Maps hidden states [..., d] to logits, float32 [..., V]."""
        table = self.lm_head if hasattr(self, "lm_head") else self.embedding
        return jnp.einsum("...d,vd->...v", x, table[...].astype(self.dtype), preferred_element_type=jnp.float32)

    def losses(self, x: jax.Array, targets: jax.Array, chunk: int) -> jax.Array:
        """Computes the cross-entropy of each token in nats, with the logits of few tokens in memory at a time.

        Args:
          x: [B, S, d], final hidden states.
          targets: int32 [B, S].
          chunk: most tokens of each row whose logits a device holds at a time; its part of the row is cut into equal
            chunks, of which the last is padded.

        Returns:
          float32 [B, S].
        """
        axes = ("batch", "sequence")
        largest, exps, chosen = on_mesh(
            self,
            functools.partial(Vocabulary._losses, chunk=chunk),
            (x, targets),
            ((*axes, None), axes),
            (("partial", *axes),) * 3,
            dtype=self.dtype,
        )
        log_z = jax.nn.logsumexp(largest + jnp.log(exps), axis=0)  # over the parts of the vocabulary
        return log_z - total(chosen)

    def _losses(self, shard: Shard, x: jax.Array, targets: jax.Array, chunk: int) -> tuple[jax.Array, ...]:
        """Computes, over this device's part of the vocabulary, what the cross-entropy needs.

        Returns:
          The largest logit, Σ exp(logit − largest), and the target's logit (0 where another device has it): float32
          [1, B, S] each.
        """

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def losses(x, targets):
            logits = self.logits(x)
            own = jnp.ones(targets.shape, bool)
            if shard.size("expert") > 1:
                targets = targets - shard.index("expert") * logits.shape[-1]
                own = (targets >= 0) & (targets < logits.shape[-1])
            chosen = jnp.take_along_axis(logits, jnp.where(own, targets, 0)[..., None], axis=-1)[..., 0]
            largest = jax.lax.stop_gradient(logits.max(axis=-1))
            return largest, jnp.exp(logits - largest[..., None]).sum(axis=-1), jnp.where(own, chosen, 0)

        batch, length = targets.shape
        count = -(-length // chunk)
        chunk = -(-length // count)

        def split(a):
            padded = jnp.pad(a, [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (a.ndim - 2))
            return jnp.moveaxis(padded.reshape(batch, count, chunk, *a.shape[2:]), 1, 0)

        def join(a):
            return jnp.moveaxis(a, 0, 1).reshape(batch, count * chunk)[None, :, :length]

        return jax.tree.map(join, jax.lax.map(lambda pair: losses(*pair), (split(x), split(targets))))
