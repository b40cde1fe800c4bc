"""The key/value cache: what is written where, per row, and what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.experimental import checkify

from gqe_jax.attention import KVCache

EMPTY = KVCache.empty(2, 6, 1, 4, jnp.float32)


def tokens(count, seed=0):
    k, v = np.random.default_rng(seed).standard_normal((2, 2, count, 1, 4)).astype(np.float32)
    return jnp.asarray(k), jnp.asarray(v)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_rows_grow_each_from_its_own_length(wrap):
    """Padding at a row's end is not counted, and the next tokens are written over it."""
    append = wrap(KVCache.append)
    (k, v), (k2, v2) = tokens(3), tokens(2, seed=1)
    cache = append(EMPTY, k, v, jnp.array([[1, 1, 1], [1, 0, 0]]))
    np.testing.assert_array_equal(cache.length, [3, 1])
    cache = append(cache, k2, v2)
    np.testing.assert_array_equal(cache.length, [5, 3])
    for buffer, first, second in ((cache.k, k, k2), (cache.v, v, v2)):
        np.testing.assert_array_equal(buffer[0, :5], jnp.concatenate([first[0], second[0]]))
        np.testing.assert_array_equal(buffer[1, :3], jnp.concatenate([first[1, :1], second[1]]))


def test_the_dtype_is_the_cache_s():
    """Keys of a float32 layer in a bfloat16 cache are rounded, not promoted: the buffer must not change its type."""
    cache = KVCache.empty(2, 6, 1, 4, jnp.bfloat16).append(*tokens(2))
    assert cache.k.dtype == cache.v.dtype == jnp.bfloat16


def test_more_tokens_than_the_cache_holds_are_refused():
    """With the numbers and the remedy; under jit by the static sizes alone."""
    cache = EMPTY.append(*tokens(4))
    with pytest.raises(ValueError, match=r"3 new tokens behind the 4 held exceed the cache's capacity of 6 tokens"):
        cache.append(*tokens(3))
    with pytest.raises(ValueError, match=r"7 new tokens behind the 0 held exceed the cache's capacity of 6"):
        jax.jit(KVCache.append)(EMPTY, *tokens(7))
    layer = tiny.gqe()
    with pytest.raises(ValueError, match=r"13 new tokens behind the 0 held exceed the cache's capacity of 12"):
        layer(tiny.inputs(), cache=layer.init_cache(2, 12))
    assert cache.append(*tokens(2)).length.tolist() == [6, 6]
    with pytest.raises(ValueError, match=r"3 new tokens behind the 4 held exceed the cache's capacity of 6"):
        jax.jit(lambda k, v: cache.append(k, v))(*tokens(3))  # closed over, its lengths are known


@pytest.mark.parametrize("wrap", [lambda f: jax.jit(checkify.checkify(f)), lambda f: checkify.checkify(jax.jit(f))])
def test_checkify_sees_what_jit_cannot(wrap):
    """Under `jit` the lengths are data: only checkify can report that they leave too little room."""
    append = wrap(KVCache.append)
    error, cache = append(EMPTY, *tokens(4))
    assert error.get() is None
    error, _ = append(cache, *tokens(3))
    assert "3 new tokens behind the 4 held exceed the cache's capacity of 6 tokens: make the" in error.get()


@pytest.mark.parametrize("sizes", [(2, 0), (2, -1), (0, 8)])
def test_an_empty_cache_is_refused(sizes):
    with pytest.raises(ValueError, match=r"batch=\d, capacity=-?\d: a cache holds at least one row"):
        tiny.gqa().init_cache(*sizes)


@pytest.mark.parametrize("make", [tiny.gqe, tiny.gqa])
def test_a_cache_that_is_not_the_layer_s(make):
    """Of another batch, of another layer (also where one head holds as many numbers), of a stack of layers."""
    layer, x = make(2, 2, head_dim=128), tiny.inputs()
    stacked = jax.tree.map(lambda leaf: leaf[None], layer.init_cache(2, 16))
    wide = KVCache.empty(2, 16, 1, 2 * 128, jnp.float32)
    for cache in (layer.init_cache(3, 16), make(4, 2).init_cache(2, 16), wide, stacked):
        with pytest.raises(ValueError, match=r"cache has keys of shape .* make it by this layer's init_cache\(2"):
            layer(x, cache=cache)


@pytest.mark.parametrize("make", [tiny.gqe, tiny.gqa])
def test_the_cache_is_that_of_its_kv_heads(make):
    """G · D numbers of a token for keys and for values, however many query heads or experts there are."""
    cache = make(2, 4).init_cache(3, 7)
    assert cache.k.shape == cache.v.shape and cache.k.size == 3 * 7 * 2 * tiny.HEAD_DIM
    np.testing.assert_array_equal(cache.length, [0, 0, 0])


def test_a_layer_of_a_stacked_cache_grows_in_place():
    """Appending at a layer equals appending to that layer's own cache, and leaves the other layers as they are."""
    k, v = tokens(3)
    alone = EMPTY.append(k, v, jnp.array([[1, 1, 1], [1, 0, 0]]))
    stacked = jax.tree.map(lambda x: jnp.stack([x, x, x]), EMPTY)
    append = jax.jit(lambda cache, layer: cache.at(layer).append(k, v, jnp.array([[1, 1, 1], [1, 0, 0]])).at(None))
    grown = append(stacked, 1)
    for layer, expected in ((0, EMPTY), (1, alone), (2, EMPTY)):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x, i=layer: x[i], grown), expected)
    assert grown.at(1).lengths.tolist() == [3, 1]


def test_narrow_heads_lie_side_by_side():
    """Heads that fill rows of 128 are kept so, group after group: the same numbers in the same order."""
    k, v = np.random.default_rng(0).standard_normal((2, 1, 3, 4, 64)).astype(np.float32)
    cache = KVCache.empty(1, 5, 4, 64, jnp.float32).append(k, v)
    assert cache.k.shape == (1, 5, 2, 128)
    np.testing.assert_array_equal(cache.k[:, :3].reshape(k.shape), k)
    np.testing.assert_array_equal(cache.v[:, :3].reshape(v.shape), v)
