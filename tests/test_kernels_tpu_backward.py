"""The backward TPU kernel, in interpret mode: memory that nobody wrote is NaN, and reads outside of an array raise."""

import functools

import float64_attention
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from gqe_jax.kernels.attend import _build_mask
from gqe_jax.kernels.reference import reference
from gqe_jax.kernels.tpu.blocks import BlockSizes
from gqe_jax.kernels.tpu.pallas_tpu import pallas_tpu
from gqe_jax.kernels.tpu.q_bounds import q_bounds

INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
SMALL = BlockSizes(
    backward_block_q=128, backward_block_kv=128, backward_piece_q=128, backward_piece_kv=128, backward_chunk_q=64
)
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 4e-3}


def make_inputs(*, batch=1, q_len=256, kv_len=256, groups=2, experts=2, slots=1, head_dim=128, dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    q, do = normal(batch, q_len, groups, experts, head_dim), normal(batch, q_len, groups, slots, head_dim)
    k, v = (normal(batch, kv_len, groups, head_dim) for _ in range(2))
    order = np.argsort(rng.random((batch, q_len, groups, experts)), axis=-1)
    index = jnp.asarray(order[..., :slots], jnp.int32)
    dlse = jnp.asarray(rng.standard_normal(do.shape[:-1]), jnp.float32)
    return q, k, v, index, do, dlse


def gradients(
    q, k, v, index, do, dlse, *, blocks=SMALL, q_rope=None, q_norm=None, softcap=None, scale=None, causal=True,
    window=None, q_offset=0, kv_offset=0, kv_length=None, segments=(None, None), attention=None,
):  # fmt: skip
    """(dq, dk, dv) of the kernel, or of another implementation; with q_norm also the gradient of its scale."""
    if attention is None:
        attention = functools.partial(pallas_tpu, block_sizes=blocks, interpret=INTERPRET)
    kv_length = None if kv_length is None else jnp.asarray(kv_length)
    mask = _build_mask(q, k, causal, window, q_offset, kv_offset, kv_length, *segments)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    norm_scale = () if q_norm is None else (q_norm[0],)

    def function(q, k, v, *norm_scale):
        norm = (norm_scale[0], q_norm[1]) if norm_scale else None
        return attention(q, k, v, index, mask, q_rope=q_rope, q_norm=norm, softcap=softcap, scale=scale)

    (o, _), vjp = jax.vjp(function, q, k, v, *norm_scale)
    return vjp((do.astype(o.dtype), dlse))


def check(inputs, **options):
    """Against float64; a NaN anywhere fails too."""
    q, k, v, index, do, dlse = inputs
    actual = gradients(*inputs, **options)
    options.pop("blocks", None)
    segments = options.pop("segments", None)
    expected = float64_attention.attention(
        q, k, v, index, do=np.asarray(do, np.float64), dlse=np.asarray(dlse, np.float64),
        segments=None if segments is None else [np.asarray(ids) for ids in segments], **options,
    )  # fmt: skip
    for name, gradient in zip(("dq", "dk", "dv"), actual, strict=True):
        error = float64_attention.relative_error(gradient, expected[name])
        assert error <= TOLERANCE[q.dtype.type], (name, error)
    return actual


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_causal(dtype):
    """The plain case, log-sum-exp cotangent included: blocks above the diagonal left out, on it, and below it."""
    check(make_inputs(dtype=dtype))


def test_gradient_of_unselected_experts_is_zero():
    """dq goes to the selected experts' places and nowhere else: exactly 0 in all others."""
    inputs = make_inputs(q_len=128, kv_len=128, experts=4, slots=2)
    dq = np.asarray(check(inputs)[0])
    selected = np.any(np.asarray(inputs[3])[..., None] == np.arange(4), axis=3)
    assert not np.any(dq[~selected])
    assert np.all(np.any(dq[selected], axis=-1))


def test_two_groups_share_the_lanes_of_a_block():
    """D = 64: each group's gradients come from its own half of the 128 lanes, for each of several slots."""
    check(make_inputs(q_len=128, kv_len=128, head_dim=64, experts=3, slots=2))


def test_lengths_that_fit_no_block():
    """S and T end within a block, and blocks reach past the arrays: what lies there (NaN here) counts for nothing."""
    blocks = BlockSizes(
        backward_block_q=256, backward_block_kv=256, backward_piece_q=128, backward_piece_kv=256, backward_chunk_q=8
    )
    check(make_inputs(q_len=300, kv_len=330, groups=1), blocks=blocks, causal=False)


def test_chunks_of_queries_add_up():
    """Where the queries do not fit VMEM, dk and dv are sums over chunks; the last chunk may have fewer blocks."""
    blocks = BlockSizes(
        backward_block_q=128, backward_block_kv=256, backward_piece_q=128, backward_piece_kv=128, backward_chunk_q=2
    )
    check(make_inputs(q_len=384, kv_len=384, groups=1), blocks=blocks)


def test_window_offsets_and_lengths_by_batch_row():
    """Each batch row has its own position of its queries and its own length; rows that see nothing have gradient 0."""
    options = dict(window=70, q_offset=jnp.array([0, 200]), kv_offset=jnp.array([0, 90]), kv_length=[40, 256])
    dq = np.asarray(check(make_inputs(batch=2, groups=1), **options)[0])
    assert not np.any(dq[0, 40 + 70 :])


def test_packed_segments():
    """Blocks without a common segment are skipped; padding (segment 0) sees nothing and is seen by nothing."""
    rng = np.random.default_rng(1)
    q_ids, kv_ids = (jnp.asarray(np.sort(rng.integers(0, 4, (2, 256)), axis=-1), jnp.int32) for _ in range(2))
    check(make_inputs(batch=2, groups=1), segments=(q_ids, kv_ids), causal=False)


def test_soft_cap_and_scale():
    """The cap's slope, 1 − tanh², and a scale that is not 1/√D."""
    check(make_inputs(groups=1, q_len=128, kv_len=128), softcap=2.0, scale=0.3)


def test_norm_and_rotation():
    """The gradients through the norm and rotation, which the kernel undoes in VMEM, and of the norm's scale."""
    inputs = make_inputs(head_dim=64, experts=4, slots=2, q_len=128, kv_len=128)
    rng = np.random.default_rng(2)
    angles = rng.uniform(0, 6, (1, 128, 32))
    options = dict(
        q_rope=tuple(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin)),
        q_norm=(jnp.asarray(rng.uniform(0.5, 1.5, 64), jnp.float32), 1e-3),
    )
    actual, expected = gradients(*inputs, **options), gradients(*inputs, **options, attention=reference)
    for name, a, e in zip(("dq", "dk", "dv", "d norm_scale"), actual, expected, strict=True):
        assert float64_attention.relative_error(a, np.asarray(e, np.float64)) <= 2e-6, name


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 90])
@pytest.mark.parametrize("with_length", [False, True])
@pytest.mark.parametrize("with_segments", [False, True])
def test_bounds_are_those_of_the_mask(causal, window, with_length, with_segments):
    """No visible pair lies outside of a kv block's range of q blocks, and no hidden pair inside its whole part."""
    batch, q_len, kv_len, block_q, block_kv = 3, 210, 300, 32, 64
    rng = np.random.default_rng(3)
    options = dict(causal=causal, window=window, q_offset=np.array([0, 40, 7]), kv_offset=np.array([0, 0, 60]))
    kv_length = np.array([300, 130, 64]) if with_length else None
    segments = [np.sort(rng.integers(0, 4, (batch, n)), axis=-1) for n in (q_len, kv_len)] if with_segments else None
    q, k = jnp.zeros((batch, q_len, 1, 1, 2)), jnp.zeros((batch, kv_len, 1, 2))
    mask = _build_mask(
        q, k, causal, window, options["q_offset"], options["kv_offset"],
        None if kv_length is None else jnp.asarray(kv_length),
        *((None, None) if segments is None else (jnp.asarray(ids, jnp.int32) for ids in segments)),
    )  # fmt: skip
    bounds = np.asarray(q_bounds(mask, q_len, kv_len, block_q, block_kv))
    seen = float64_attention.visible(q_len, kv_len, batch, kv_length=kv_length, segments=segments, **options)
    for b in range(batch):
        for j in range(bounds.shape[2]):
            first, whole_first, whole_end, end = bounds[:, b, j]
            assert 0 <= first <= whole_first <= whole_end <= end
            column = seen[b, :, j * block_kv : (j + 1) * block_kv]
            assert not column[: first * block_q].any() and not column[end * block_q :].any()
            assert column[whole_first * block_q : whole_end * block_q].all()
            if whole_first < whole_end:
                assert (j + 1) * block_kv <= kv_len
