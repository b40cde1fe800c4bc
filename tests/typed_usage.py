"""What a user writes with the public names, for `make lint`: pyright checks this file, nothing runs it."""

import jax
from flax import nnx

import gqe_jax
from gqe_jax import (
    ConfigError,
    GQAttention,
    GQEAttention,
    GQEConfig,
    KVCache,
    MeshConfig,
    ModelConfig,
    RunConfig,
    attend,
    make_mesh,
    merge_partials,
)
from gqe_jax.data import load_tokenizer


def layer_without_cache(x: jax.Array) -> jax.Array:
    layer = GQEAttention(1024, 16, 8, 1, rngs=nnx.Rngs(0))
    y, stats = layer(x)
    return y + stats.load_balance_loss


def layer_with_cache(layer: GQEAttention, x: jax.Array, cache: KVCache) -> jax.Array:
    y, _stats, cache = layer(x, cache=cache)
    return y + cache.length[:, None, None]


def dense_layer(x: jax.Array) -> jax.Array:
    y, _ = GQAttention(1024, 16, 8, rngs=nnx.Rngs(0))(x)
    return y


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return attend(q, k, v)


def attention_in_parts(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    o, lse = attend(q, k, v, return_lse=True)
    o2, lse2 = attend(q, k, v, return_lse=True)
    return merge_partials(o, lse, o2, lse2)


def mesh() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(data=-1, expert=2), jax.devices())


def weights(layer: GQEAttention) -> list[str]:
    return sorted(gqe_jax.convert.layer_to_torch(layer))


def configuration() -> str:
    try:
        attention = GQEConfig(num_query_experts=16, num_kv_heads=8)
        return RunConfig(name="mine", model=ModelConfig(attention=attention)).name
    except ConfigError as error:
        return str(error)


def tokens(text: str) -> int:
    return len(load_tokenizer("bytes").encode(text))
