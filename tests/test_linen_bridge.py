"""GQEAttention in a Flax Linen model, through flax's own bridge: as the documentation shows it."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from flax import linen as nn
from flax import nnx

from gqe_jax.attention import GQEAttention, RouterConfig


class Block(nn.Module):
    """A Linen module with our layer inside."""

    @nn.compact
    def __call__(self, x, train=False):
        attention = nnx.bridge.to_linen(
            GQEAttention, 16, 4, 2, 1, head_dim=8, router=RouterConfig(jitter=0.1), name="attention"
        )
        rngs = nnx.Rngs(router=self.make_rng("router")) if train else None
        y, stats = attention(nn.RMSNorm()(x), rngs=rngs)
        return x + y, stats


def test_linen_module_trains_our_layer():
    """init, apply and gradients; its output is that of our layer with the same parameters, and training randomness
    comes from Linen's own stream."""
    block, x = Block(), jnp.asarray(tiny.inputs())
    variables = jax.jit(block.init)(jax.random.key(0), x)
    assert variables.keys() == {"params"}
    apply = jax.jit(block.apply, static_argnames="train")
    y, stats = apply(variables, x)

    layer = tiny.gqe(2, 2, 1)
    nnx.update(layer, variables["params"]["attention"])
    normed = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(y - x, tiny.call(layer, normed)[0], atol=1e-5)

    def loss(variables):
        y, stats = block.apply(variables, x, train=True, rngs={"router": jax.random.key(1)})
        return jnp.mean(jnp.square(y - 1.0)) + 0.01 * stats.load_balance_loss

    gradient = jax.jit(jax.grad(loss))(variables)["params"]["attention"]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    jittered = apply(variables, x, train=True, rngs={"router": jax.random.key(1)})[1]
    assert (jittered.router_probs != stats.router_probs).any()
