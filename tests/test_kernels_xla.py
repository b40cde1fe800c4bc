"""What the blockwise implementation promises beyond numbers: work it skips, memory it does not use, transformations."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64_attention import attention, relative_error
from jax import lax

from gqe_jax.kernels import IMPLEMENTATIONS, attend
from gqe_jax.kernels.xla import xla


@pytest.fixture
def tiny_blocks(monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "xla", functools.partial(xla, block_q=8, block_k=8))


def inputs(q_len, kv_len, *, batch=1, num_groups=1, num_experts=1, head_dim=8, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    kv_shape = batch, kv_len, num_groups, head_dim
    return normal(batch, q_len, num_groups, num_experts, head_dim), normal(*kv_shape), normal(*kv_shape)


def with_gradients(function, q, k, v):
    o, vjp = jax.vjp(function, q, k, v)
    return o, *vjp(jnp.ones_like(o))


@pytest.mark.parametrize(
    ("options", "poisoned"),
    [
        ({}, slice(32, 64)),
        ({"q_offset": 32, "window": 8}, slice(0, 24)),
        ({"causal": False, "window": 8}, slice(40, 64)),
        ({"q_offset": 64, "kv_length": np.array([40])}, slice(40, 64)),
        (
            {
                "q_offset": 64,
                "q_segment_ids": np.full((1, 32), 2),
                "kv_segment_ids": np.repeat([[1, 2]], 32, axis=1),
            },
            slice(0, 32),
        ),
    ],
    ids=["above the diagonal", "before the window", "after the window", "past kv_length", "another segment"],
)
def test_blocks_that_the_mask_hides_are_never_computed(tiny_blocks, options, poisoned):
    """Hidden whole blocks of K and V hold NaN. Any product with them, even one with a weight of 0, would be NaN, so
    finite outputs and gradients prove that the blocks were not touched."""
    q, k, v = inputs(32, 64)
    k, v = k.at[:, poisoned].set(jnp.nan), v.at[:, poisoned].set(jnp.nan)
    masked = functools.partial(attend, implementation="xla", **options)
    for x in jax.jit(functools.partial(with_gradients, masked))(q, k, v):
        assert np.isfinite(x).all()


def largest_array(compiled_text):
    shapes = re.findall(r"\b(?:f32|bf16|pred|s32|u32|s8|u8)\[([\d,]+)\]", compiled_text)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("features", ["plain", "segments"])
def test_no_array_of_all_scores_is_compiled(direction, features):
    """The compiled program names no array near S×T, and all its temporaries are fewer bytes than S×T has elements."""
    length = 4096
    q, k, v = inputs(length, length)
    options = {}
    if features == "segments":
        options = {"q_segment_ids": jnp.ones((1, length), int), "kv_segment_ids": jnp.ones((1, length), int)}
    function = functools.partial(attend, implementation="xla", **options)
    if direction == "backward":
        function = functools.partial(with_gradients, function)
    compiled = jax.jit(function).lower(q, k, v).compile()
    assert largest_array(compiled.as_text()) < length * length / 8
    assert compiled.memory_analysis().temp_size_in_bytes < length * length


def test_memory_of_decode_does_not_copy_the_cache():
    """One new token against a long cache: temporaries stay at a few blocks, far below the cache's size."""
    q, k, v = inputs(1, 65536, num_groups=2)
    decode = jax.jit(lambda q, k, v, length: attend(q, k, v, q_offset=length, kv_length=length, implementation="xla"))
    compiled = decode.lower(q, k, v, jnp.array([100])).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < k.nbytes / 4


def test_offsets_and_lengths_do_not_recompile(tiny_blocks):
    """Traced, so one compilation serves every decode position."""
    q, k, v = inputs(4, 40, batch=2)
    decode = jax.jit(lambda q, k, v, at: attend(q, k, v, q_offset=at, kv_length=at + 4, implementation="xla"))
    for at in (0, 7, 36):
        offset = jnp.array([at, at // 2])
        expected = attention(q, k, v, q_offset=np.asarray(offset), kv_length=np.asarray(offset) + 4)["o"]
        assert relative_error(decode(q, k, v, offset), expected) <= 2e-6
    assert decode._cache_size() == 1


def test_transformations(tiny_blocks):
    """vmap (also over offsets: loops of different lengths), scan, checkpoint and jit keep values and gradients."""
    q, k, v = inputs(21, 21, batch=3)
    offsets = jnp.array([0, 2, -5])
    expected = attention(q, k, v, q_offset=np.asarray(offsets), do=np.ones(q.shape))

    def mapped(q, k, v):
        def one(q, k, v, at):
            return attend(q[None], k[None], v[None], q_offset=at, implementation="xla")[0]

        return jax.vmap(one)(q, k, v, offsets)

    def scanned(q, k, v):
        @jax.checkpoint
        def body(carry, xs):
            q, k, v, at = xs
            return carry, attend(q[None], k[None], v[None], q_offset=at, implementation="xla")[0]

        return lax.scan(body, 0, (q, k, v, offsets))[1]

    for function in (mapped, scanned):
        results = jax.jit(functools.partial(with_gradients, function))(q, k, v)
        for name, actual in zip(("o", "dq", "dk", "dv"), results, strict=True):
            assert relative_error(actual, expected[name]) <= 2e-6, name


def test_large_scores_do_not_overflow(tiny_blocks):
    """Scores in the hundreds: the running maximum keeps every exponential in range. Values follow the definition; the
    gradient of a softmax that is almost one-hot is rounding noise, and has to be finite."""
    q, k, v = inputs(21, 21)
    q, k = 20 * q, 20 * k
    expected = attention(q, k, v)["o"]
    function = functools.partial(with_gradients, functools.partial(attend, implementation="xla"))
    o, *grads = jax.jit(function)(q, k, v)
    assert relative_error(o, expected) <= 1e-4
    assert all(np.isfinite(x).all() for x in grads)


@pytest.mark.parametrize("size", [1.0, 2.4, 20.0], ids=["small scores", "at the bound", "large scores"])
@pytest.mark.parametrize(
    "options", [{}, {"window": 9, "softcap": 20.0}, {"segments": True}], ids=["causal", "window and cap", "segments"]
)
def test_long_sequences_with_and_without_a_running_maximum(size, options):
    """From 1024 keys on, scores with a small bound are summed without a running maximum. Either way the values are
    those of the definition, and queries that see nothing (padding) get exactly 0."""
    q, k, v = inputs(30, 1030, seed=1)
    # One query along one key: the bound is attained, with either sign.
    q = q.at[0, :2, 0, 0].set(jnp.stack([k[0, 5, 0], -k[0, 5, 0]]))
    q, k = size * q, size * k
    segments = None
    if options.get("segments"):
        ids = np.repeat([[3, 1, 2, 0]], [500, 500, 25, 5], axis=1)
        segments = ids[:, -30:], ids
        options = {"q_segment_ids": segments[0], "kv_segment_ids": segments[1]}
    plain = {name: x for name, x in options.items() if not name.endswith("segment_ids")}
    expected = attention(q, k, v, q_offset=1000, segments=segments, **plain)
    o, lse = attend(q, k, v, q_offset=1000, return_lse=True, implementation="xla", **options)
    assert relative_error(o, expected["o"]) <= (2e-6 if size < 20 else 1e-4)
    seen = np.isfinite(expected["lse"])
    np.testing.assert_allclose(np.asarray(lse)[seen], expected["lse"][seen], rtol=1e-5, atol=1e-5)
    assert not np.asarray(o)[~seen].any() and seen.all() == (segments is None)


def test_nan_inputs_are_not_hidden(tiny_blocks):
    """A NaN in a visible key reaches the output, so that a run that diverges is seen to."""
    q, k, v = inputs(21, 21)
    o = attend(q, k.at[0, 3].set(jnp.nan), v, implementation="xla")
    assert np.isfinite(o[0, :3]).all() and np.isnan(o[0, 3:]).all()


def test_float32_stays_float32_where_64_bits_are_enabled(tiny_blocks):
    """Users' programs may run with x64: arrays made without a dtype would then be float64, and the exponential, which
    works on the bits, needs 32 of them."""
    q, k, v = inputs(9, 9)
    want = with_gradients(functools.partial(attend, implementation="xla"), q, k, v)
    with jax.enable_x64(True):
        got = with_gradients(functools.partial(attend, implementation="xla"), q, k, v)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=1e-6)
