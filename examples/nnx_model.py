"""Trains a small NNX language model with GQE attention on the characters of one text."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import gqe_jax

TEXT = "Keys and values stay dense; in each group a router picks the query heads of a token. " * 200
VOCABULARY = sorted(set(TEXT))


class Block(nnx.Module):
    def __init__(self, width, *, rngs):
        self.attention_norm, self.mlp_norm = nnx.RMSNorm(width, rngs=rngs), nnx.RMSNorm(width, rngs=rngs)
        self.attention = gqe_jax.GQEAttention(width, num_query_experts=8, num_kv_heads=4, top_k=1, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        y, stats = self.attention(self.attention_norm(x))  # y [B, S, d]; stats: the experts, their load, the losses
        x = x + y
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x)))), stats.auxiliary_loss


class Model(nnx.Module):
    def __init__(self, width=64, depth=2, *, rngs):
        self.embedding = nnx.Embed(len(VOCABULARY), width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs=rngs) for _ in range(depth)])

    def __call__(self, tokens):
        x, auxiliary_loss = self.embedding(tokens), 0.0
        for block in self.blocks:
            x, added = block(x)
            auxiliary_loss += added
        return self.embedding.attend(x), auxiliary_loss


@nnx.jit
def train_step(model, optimizer, tokens):
    def loss(model):
        logits, auxiliary_loss = model(tokens[:, :-1])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
        return nats + auxiliary_loss, nats  # the balance of the experts, weighted already

    (_, nats), gradients = nnx.value_and_grad(loss, has_aux=True)(model)
    optimizer.update(model, gradients)
    return nats


def main():
    model = Model(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
    data = jnp.array([VOCABULARY.index(character) for character in TEXT])
    for step in range(31):
        starts = jax.random.randint(jax.random.key(step), (8,), 0, len(data) - 65)
        nats = train_step(model, optimizer, data[starts[:, None] + jnp.arange(65)])
        if step % 10 == 0:
            print(f"step {step:2}: {nats:.3f} nats per character")
    return nats


if __name__ == "__main__":
    main()
