"""Every feature of the mask under every schedule of the TPU kernels, forward and backward; hidden memory is NaN."""

import functools

import float64_attention
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from gqe_jax.kernels import mask as masks_of_attend
from gqe_jax.kernels.reference import reference
from gqe_jax.kernels.tpu.blocks import BlockSizes
from gqe_jax.kernels.tpu.pallas_tpu import pallas_tpu

INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
FAST = functools.partial(pallas_tpu, interpret=True)
# Several units to a block, and several blocks in a row: whole ones, cut ones and the diagonal's.
BLOCKS = BlockSizes(
    block_q=256, block_kv=256, tile=256, unit=128, diagonal_part=128, row_part=128, backward_block_q=256,
    backward_block_kv=256, backward_piece_q=128, backward_piece_kv=128,
)  # fmt: skip


def make_mask(
    batch,
    q_len,
    kv_len,
    *,
    q_offset=0,
    kv_offset=0,
    kv_length=None,
    segments=None,
    causal=True,
    window=None,
    aligned=None,
):
    def rows(x):
        return jnp.broadcast_to(jnp.asarray(x, jnp.int32), (batch,))

    ids = (None, None) if segments is None else [jnp.asarray(x, jnp.int32) for x in segments]
    return masks_of_attend.make_mask(
        q_len,
        kv_len,
        q_offset=rows(q_offset),
        kv_offset=rows(kv_offset),
        kv_length=None if kv_length is None else rows(kv_length),
        q_segment_ids=ids[0],
        kv_segment_ids=ids[1],
        causal=causal,
        window=window,
        aligned=isinstance(q_offset, int) and q_offset == kv_offset,
    )


def check(seed=0, *, batch=1, q_len, kv_len=None, slots=1, softcap=None, attention=FAST, blocks=BLOCKS, **masks):
    """o, lse, dq, dk and dv against float64, where what no query sees and who sees nothing is NaN."""
    rng = np.random.default_rng(seed)
    kv_len, head_dim, experts = q_len if kv_len is None else kv_len, 128, 2
    q, do = rng.normal(size=(batch, q_len, 1, experts, head_dim)), rng.normal(size=(batch, q_len, 1, slots, head_dim))
    k, v = rng.normal(size=(2, batch, kv_len, 1, head_dim))
    index = np.argsort(rng.random((batch, q_len, 1, experts)), axis=-1)[..., :slots]
    dlse = rng.normal(size=do.shape[:-1])
    masks = {"causal": True, "window": None, "q_offset": 0, "kv_offset": 0, "kv_length": None, "segments": None} | masks
    expected = float64_attention.attention(q, k, v, index, softcap=softcap, do=do, dlse=dlse, **masks)
    seen = float64_attention.visible(q_len, kv_len, batch, **masks)
    blind, hidden = ~seen.any(2), ~seen.any(1)
    q, do, k, v = (
        np.where(at.reshape(*at.shape, *[1] * (x.ndim - 2)), np.nan, x)
        for x, at in ((q, blind), (do, blind), (k, hidden), (v, hidden))
    )
    mask = make_mask(batch, q_len, kv_len, **masks)

    def function(q, k, v):
        return attention(
            q, k, v, jnp.asarray(index, jnp.int32), mask, q_rope=None, q_norm=None, softcap=softcap,
            scale=head_dim**-0.5, block_sizes=blocks,
        )  # fmt: skip

    (o, lse), vjp = jax.vjp(function, *(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    actual = dict(zip(("dq", "dk", "dv"), vjp((jnp.asarray(do, o.dtype), jnp.asarray(dlse, lse.dtype))), strict=True))
    terms = {"dq": expected["dq_terms"], "dk": expected["dk_terms"]}
    for name, value in (actual | {"o": o}).items():
        error = float64_attention.relative_error(value, expected[name], terms.get(name, 0.0))
        assert error <= 3e-6, (name, error)
    np.testing.assert_allclose(np.asarray(lse)[~blind], expected["lse"][~blind], atol=2e-5)
    assert not np.asarray(o)[blind].any() and not np.asarray(actual["dq"])[blind].any()
    assert not np.asarray(actual["dk"])[hidden].any() and not np.asarray(actual["dv"])[hidden].any()


@pytest.mark.parametrize("kv_length", [[123], [200], [0]])
def test_a_length_cuts_the_diagonal_of_the_folded_schedule(kv_length):
    """A right-padded row, S = T and no offset: its last blocks on the diagonal hold keys beyond the length."""
    check(q_len=200, kv_length=np.array(kv_length))


def draw_masks(data):
    batch = 2
    q_len = data.draw(st.sampled_from([200, 300]))
    kv_len = data.draw(st.sampled_from([q_len, q_len, 130, 400]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    masks = {"causal": data.draw(st.booleans()), "window": data.draw(st.sampled_from([None, None, 1, 90, 2**31 - 1]))}
    if data.draw(st.booleans()):
        masks["kv_length"] = rng.integers(0, kv_len + 1, batch)
    if data.draw(st.sampled_from([False, False, True])):
        masks |= {"q_offset": rng.integers(-150, 250, batch), "kv_offset": rng.integers(-50, 50, batch)}
    if data.draw(st.booleans()):
        ids = np.sort(rng.integers(0, 4, (batch, max(q_len, kv_len))), axis=1)
        if data.draw(st.booleans()):
            ids = rng.permuted(ids // 3 * 2, axis=1)  # ids in no order, one that no query has
        masks["segments"] = (ids[:, :q_len], ids[:, :kv_len] + (ids[:, :kv_len] > 0) * (rng.random(kv_len) < 0.1))
    return {"batch": batch, "q_len": q_len, "kv_len": kv_len, **masks}


@pytest.mark.parametrize("max_examples", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_every_mask_under_every_schedule(max_examples):
    """Folded and general schedules, ragged ends, whole, cut and diagonal units, each with any features together."""

    @settings(max_examples=max_examples, deadline=None, derandomize=True)
    @given(st.data())
    def holds(data):
        options = draw_masks(data)
        check(data.draw(st.integers(0, 99)), **options, softcap=data.draw(st.sampled_from([None, 3.0])))

    holds()


def test_blocks_past_the_end_of_their_arrays():
    """Lengths that end within a block, where memory that nobody wrote is NaN: forward and backward, in one call."""
    blocks = BlockSizes(block_q=256, block_kv=512, tile=256, unit=256, backward_block_q=256, backward_block_kv=256)
    attention = functools.partial(pallas_tpu, interpret=INTERPRET)
    check(q_len=300, kv_len=330, causal=False, attention=attention, blocks=blocks)
    check(q_len=300, kv_length=np.array([290]), attention=attention, blocks=blocks)


@pytest.mark.parametrize(
    ("q_offset", "kv_offset", "window"),
    [
        (2**31 - 200, 2**31 - 200, None),
        (2**31 - 200, 2**31 - 250, 90),
        (2**31 - 200, -(2**31), 90),
        (-(2**31), 2**31 - 200, None),
        (2**31 - 200, -(2**31), None),
        (40, 0, 2**31 - 1),
    ],
)
def test_positions_at_the_limits_of_int32(q_offset, kv_offset, window):
    """Only the difference of positions counts, and a sum that overflows would turn the order of tokens round."""
    masks = {"window": window, "q_offset": np.array([q_offset]), "kv_offset": np.array([kv_offset])}
    check(q_len=150, **masks)


def test_a_key_of_nan_with_the_largest_value_in_padding():
    """Sums of such values overflow: 0 times infinity would be NaN, and a weight that is not quite 0 would count."""
    q, k, v = (jnp.ones((1, 200, 1, 128), jnp.float32).at[:, 150:].set(x) for x in (1.0, jnp.nan, 3.4e38))
    mask = make_mask(1, 200, 200, kv_length=150)
    o, lse = FAST(q[:, :, :, None], k, v, None, mask, q_rope=None, q_norm=None, softcap=None, scale=1.0)
    np.testing.assert_allclose(o, 1.0, rtol=1e-6)
    assert np.isfinite(lse).all()


def test_the_gradients_of_the_rotary_tables():
    """A learned table gets its gradient, through norm and selection, and the other gradients are the same with it."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    q, k, v, do = normal(2, 130, 1, 2, 128), normal(2, 130, 1, 128), normal(2, 130, 1, 128), normal(2, 130, 1, 1, 128)
    index = jnp.asarray(rng.integers(0, 2, (2, 130, 1, 1)), jnp.int32)
    mask = make_mask(2, 130, 130, kv_length=[123, 60])
    arguments = (normal(1, 130, 64), normal(1, 130, 64)), q, k, v, normal(128)  # no rotation: nothing is orthogonal

    def gradients(attention, which):
        def loss(rope, q, k, v, norm_scale):
            o, _ = attention(q, k, v, index, mask, q_rope=rope, q_norm=(norm_scale, 1e-5), softcap=None, scale=0.125)
            return jnp.sum(o * do)

        return jax.grad(loss, which)(*arguments)

    expected, actual = (jax.tree.leaves(gradients(attention, (0, 1, 2, 3, 4))) for attention in (reference, FAST))
    for a, e in zip(actual, expected, strict=True):
        assert float64_attention.relative_error(a, np.asarray(e, np.float64)) <= 3e-6


@pytest.mark.parametrize(
    "masks", [{}, {"kv_length": [100, 140], "window": 90, "q_offset": [3, 0]}], ids=["plain", "all"]
)
def test_each_group_reads_the_kv_head_that_it_names(masks):
    """The same as with K and V gathered by group, traced or not; a KV head's gradient is the sum over its groups, and 0
    where no group reads it. Values are narrower than keys."""
    rng = np.random.default_rng(0)
    batch, q_len, groups, heads, dim = 2, 150, 4, 3, 64

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    q, do = normal(batch, q_len, groups, 2, dim), normal(batch, q_len, groups, 2, 48)
    k, v = normal(batch, q_len, heads, dim), normal(batch, q_len, heads, 48)
    mask, options = (
        make_mask(batch, q_len, q_len, **masks),
        {"q_rope": None, "q_norm": None, "softcap": None, "scale": 0.125},
    )
    kv_head = np.array([2, 0, 0, 2])

    def named(q, k, v, kv_head):
        return FAST(q, k, v, None, mask, kv_head=kv_head, **options)

    def gathered(q, k, v):
        return reference(q, k[:, :, kv_head], v[:, :, kv_head], None, mask, **options)

    def gradients(function, *more):
        o, vjp = jax.vjp(lambda *x: function(*x, *more), q, k, v)
        return jax.tree.leaves((o, vjp((do, jnp.ones_like(o[1])))))

    actual = jax.jit(lambda kv_head: gradients(named, kv_head))(jnp.asarray(kv_head))
    for a, e in zip(actual, gradients(gathered), strict=True):
        assert float64_attention.relative_error(a, np.asarray(e, np.float64)) <= 3e-6
    assert not np.asarray(actual[3])[:, :, 1].any()
