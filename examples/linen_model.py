"""Uses GQE attention in a Linen model, through flax's bridge, and takes one gradient step."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import gqe_jax


class Block(nn.Module):
    width: int = 64

    @nn.compact
    def __call__(self, x, train=False):
        attention = nnx.bridge.to_linen(gqe_jax.GQEAttention, self.width, 8, 4, 1, name="attention")
        rngs = nnx.Rngs(router=self.make_rng("router")) if train else None  # for jitter and the random router alone
        y, stats = attention(nn.RMSNorm()(x), rngs=rngs)
        return x + y, stats.auxiliary_loss


def main():
    block = Block()
    x = jax.random.normal(jax.random.key(0), (2, 32, 64))
    variables = block.init(jax.random.key(1), x)
    optimizer = optax.adamw(1e-3)

    @jax.jit
    def step(params, state):
        def loss(params):
            rngs = {"router": jax.random.key(2)}
            y, auxiliary_loss = block.apply(variables | {"params": params}, x, train=True, rngs=rngs)
            return jnp.mean((y - jnp.roll(x, 1, axis=1)) ** 2) + auxiliary_loss

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    params, state = variables["params"], optimizer.init(variables["params"])
    losses = []
    for _ in range(20):
        params, state, value = step(params, state)
        losses.append(float(value))
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
