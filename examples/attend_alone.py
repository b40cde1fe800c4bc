"""Calls `gqe_jax.attend` by itself: selected query heads of a prefill, then one token against a cache."""

import jax
import jax.numpy as jnp

import gqe_jax


def main():
    batch, length, groups, experts, dim = 2, 48, 4, 2, 16
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (batch, length, groups, experts, dim))  # the queries of all experts
    k = jax.random.normal(keys[1], (batch, length, groups, dim))
    v = jax.random.normal(keys[2], (batch, length, groups, dim))
    expert = jax.random.randint(keys[3], (batch, length, groups, 1), 0, experts)  # k = 1 for each token and group

    o = jax.jit(gqe_jax.attend)(q, k, v, expert)  # [B, S, G, k, D]: unselected experts cost nothing
    print("prefill:", o.shape)

    # The last token again, against a buffer of 64 tokens of which 48 are filled.
    pad = [(0, 0), (0, 16), (0, 0), (0, 0)]
    filled = jnp.full(batch, length)
    last = gqe_jax.attend(
        q[:, -1:], jnp.pad(k, pad), jnp.pad(v, pad), expert[:, -1:], q_offset=filled - 1, kv_length=filled
    )
    difference = float(jnp.abs(last[:, 0] - o[:, -1]).max())
    print(f"decode: {last.shape}, differs from the prefill's last row by {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
