"""Defines the decoder-only language model: embedding, blocks scanned over depth, final norm, logits."""

import jax
import jax.numpy as jnp
from flax import nnx

from gqe_jax.attention import Cache, LayerReport
from gqe_jax.config import ModelConfig
from gqe_jax.linear import make_norm
from gqe_jax.models.block import Block
from gqe_jax.models.layers import Vocabulary
from gqe_jax.parallel.on_mesh import axis_size
from gqe_jax.remat import POLICIES


class Transformer(nnx.Module):
    """Computes a pre-norm decoder (RMSNorm, SwiGLU, rotary embedding), compatible with Llama in every dense detail.

    The blocks' parameters are stacked: each leaf of `layers` has a leading axis of `num_layers`. Weights start normal
    with the standard deviation `init_std`, or init_std / sqrt(2 · num_layers) for the projections back into the
    residual stream, or its own `init_std` for the router; norms start at 1 and biases at 0.

    `config.remat` says what the forward pass keeps for the backward pass, which recomputes the rest: "none" keeps
    everything, "dots" the results of weight matmuls and of attention, "attention" the results of attention, "full" the
    blocks' inputs alone.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        init = nnx.initializers.normal(config.init_std)
        self.vocabulary = Vocabulary(config, kernel_init=init, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(axis_size=config.num_layers)
        def stack(rngs):
            return Block(config, rngs=rngs)

        self.layers = stack(rngs)
        self.final_norm = make_norm(
            config.d_model,
            epsilon=config.norm_eps,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )

    def __call__(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerReport] | tuple[jax.Array, LayerReport, Cache]:
        """Computes the final hidden state of every token; `logits` maps it to the vocabulary.

        Args:
          tokens: int32 [B, S].
          segment_ids: int32 [B, S], tokens see their own segment only, 0 = padding; with a cache, see `Attention`.
          positions: int32 [B or 1, S]; None: 0, 1, … (behind what the cache holds).
          cache: from `init_cache`, stacked over layers; the S tokens continue it.
          key: randomness of training (routers); None in evaluation and generation.

        Returns:
          (hidden states [B, S, d], the layers' reports, each array with a leading axis of layers), and the grown cache
          if one was given.
        """
        x = self.vocabulary.embed(tokens)
        graphdef, state = nnx.split(self.layers)
        keys = None if key is None else jax.random.split(key, self.config.num_layers)

        def body(carry, layer):
            x, cache = carry
            index, state, key = layer
            block = nnx.merge(graphdef, state)
            rngs = None if key is None else nnx.Rngs(router=key)
            # The scan carries the cache and does not stack it: the loop then updates a donated cache in place.
            cache = None if cache is None else cache.at(index)
            x, report, cache = block(
                x, segment_ids=segment_ids, positions=positions, cache=cache, rngs=rngs, layer_index=index
            )
            return (x, None if cache is None else cache.at(None)), report

        if self.config.remat != "none" or axis_size("fsdp") * axis_size("context") > 1:
            # Within a scan XLA cannot merge the recomputation with the forward pass: no barrier against it is needed.
            body = jax.checkpoint(body, policy=POLICIES[self.config.remat], prevent_cse=False)
        layers = jnp.arange(self.config.num_layers)
        (x, cache), reports = jax.lax.scan(body, (x, cache), (layers, state, keys))
        x = self.final_norm(x)
        return (x, reports) if cache is None else (x, reports, cache)

    def logits(self, x: jax.Array) -> jax.Array:
        """Maps hidden states [..., d] to logits, float32 [..., V]."""
        return self.vocabulary.logits(x)

    def losses(self, x: jax.Array, targets: jax.Array, chunk: int) -> jax.Array:
        """Computes the cross-entropy in nats, float32 [B, S], of targets int32 [B, S]; see `Vocabulary.losses`."""
        return self.vocabulary.losses(x, targets, chunk)

    def init_cache(self, batch: int, capacity: int) -> Cache:
        """Makes an empty cache for generation, in the model's dtype; every leaf has a leading axis of num_layers.

        Args:
          batch: number of rows, B.
          capacity: most tokens of a row, the prompt included.
        """
        one = self.layers.attention.init_cache(batch, capacity)
        return jax.tree.map(lambda x: jnp.repeat(x[None], self.config.num_layers, axis=0), one)


def abstract_model(config: ModelConfig) -> Transformer:
    """Makes the model with shapes and dtypes in place of arrays."""
    return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
