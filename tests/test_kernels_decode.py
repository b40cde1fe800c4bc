"""The decode kernel for TPUs: its numbers, in interpret mode with memory that starts as NaN, and what compiles."""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from float64_attention import attention, relative_error, visible
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from gqe_jax.aot.tpu_compile import Compiled, Job, compile_all
from gqe_jax.attention import GQEConfig
from gqe_jax.config import ModelConfig
from gqe_jax.kernels import EMPTY_LSE, attend
from gqe_jax.kernels.mask import Mask, make_mask
from gqe_jax.kernels.tpu.decode import decode
from gqe_jax.models.transformer import Transformer
from gqe_jax.tpu import GENERATIONS

TOLERANCE = {"float32": 2e-6, "bfloat16": 4e-3}


interpreting = functools.partial(
    pltpu.force_tpu_interpret_mode, pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
)


def check(
    seed=0, *, dtype="float32", batch=2, q_len=1, kv_len=300, num_groups=2, head_dim=16, heads=(2, 1), shared=True,
    causal=True, window=None, softcap=None, norm=False, rope=False, least_length=0, layers=None, value_dim=None,
    runs=None,
):  # fmt: skip
    """o, lse and the shared head's output for N(0, 1) inputs, each row at its own offset and length; what no query
    sees of the cache is NaN."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    num_experts, num_slots = heads
    num_runs = runs or num_groups
    kv_head = rng.integers(0, num_groups, num_runs) if runs else None
    q, q_shared = normal(batch, q_len, num_runs, num_experts, head_dim), normal(batch, q_len, head_dim)
    k, v = (normal(batch, kv_len, num_groups, dim) for dim in (head_dim, value_dim or head_dim))
    expert_index = None
    if num_slots is not None:
        order = np.argsort(rng.random((batch, q_len, num_runs, num_experts)), axis=-1)
        expert_index = order[..., :num_slots].astype(np.int32)
    length = rng.integers(least_length, kv_len + 1, batch)
    q_offset, kv_offset = length - rng.integers(0, q_len + 2, batch), rng.integers(-3, 3, batch)
    # Larger scores than N(0, 1) gives would enlarge the rounding of q beyond the tolerance.
    options = {"softcap": softcap, "scale": 1.2 * head_dim**-0.5, "q_norm": None, "q_rope": None}
    if norm:
        options["q_norm"] = (jnp.asarray(rng.uniform(0.5, 1.5, head_dim), jnp.float32), 1e-6)
    if rope:
        angle = rng.normal(size=(batch, q_len, head_dim // 2))
        options["q_rope"] = (jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32))
    mask = Mask(
        q_offset=jnp.asarray(q_offset, jnp.int32),
        kv_offset=jnp.asarray(kv_offset, jnp.int32),
        kv_length=jnp.asarray(length, jnp.int32),
        causal=causal,
        window=window,
    )
    masks = {"causal": causal, "window": window, "q_offset": q_offset, "kv_offset": kv_offset, "kv_length": length}
    hidden = ~visible(q_len, kv_len, batch, segments=None, **masks).any(axis=1)[:, :, None, None]
    poisoned = [jnp.where(hidden, jnp.nan, x) for x in (k, v)]
    if layers is not None:
        poisoned = [jnp.full((layers, *x.shape), jnp.nan, x.dtype).at[1].set(x) for x in poisoned]
        options["layer"] = jnp.int32(1)
    with interpreting():
        o, lse, *shared_o = decode(
            q, *poisoned, None if expert_index is None else jnp.asarray(expert_index), mask,
            q_shared=q_shared if shared else None, kv_head=None if kv_head is None else jnp.asarray(kv_head),
            block_kv=128, **options,
        )  # fmt: skip

    options.pop("layer", None)
    read = np.arange(num_groups) if kv_head is None else kv_head
    pairs = [(o, attention(q, k[:, :, read], v[:, :, read], expert_index, **masks, **options))]
    if shared:
        mean_k, mean_v = (np.asarray(x, np.float64).mean(axis=2, keepdims=True) for x in (k, v))
        mean_head = attention(np.asarray(q_shared)[:, :, None, None, :], mean_k, mean_v, **masks, **options)
        pairs.append((shared_o[0][:, :, None, None, :], mean_head))
    seen, expected_lse = pairs[0][1]["seen"], pairs[0][1]["lse"]
    for actual, expected in pairs:
        assert actual.dtype == jnp.dtype(dtype)
        assert relative_error(actual, expected["o"]) <= TOLERANCE[dtype]
        assert (np.asarray(actual, np.float32)[~seen] == 0).all()
    np.testing.assert_allclose(np.asarray(lse)[seen], expected_lse[seen], atol=1e-5 if dtype == "float32" else 3e-2)
    assert (np.asarray(lse)[~seen] == np.float32(EMPTY_LSE)).all()


FEATURES = {
    "seed": st.integers(0, 2**16),
    "dtype": st.sampled_from(["float32", "bfloat16"]),
    "batch": st.integers(1, 3),
    "q_len": st.sampled_from([1, 1, 3]),
    "kv_len": st.sampled_from([1, 100, 128, 300]),
    "num_groups": st.sampled_from([1, 2, 3, 8]),
    "runs": st.sampled_from([None, None, 1, 3, 5]),
    "head_dim": st.sampled_from([16, 64, 80, 128, 192]),
    "value_dim": st.sampled_from([None, None, 64, 160]),
    "heads": st.sampled_from([(1, None), (2, 1), (3, 2), (2, None)]),
    "shared": st.booleans(),
    "causal": st.booleans(),
    "window": st.sampled_from([None, 2, 130]),
    "softcap": st.sampled_from([None, 2.0]),
    "norm": st.booleans(),
    "rope": st.booleans(),
    "layers": st.sampled_from([None, 3]),
}


@pytest.mark.parametrize("max_examples", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_decode_equals_float64_attention_in_every_crossing(max_examples):
    """The definition in float64 knows no blocks, no heads side by side and no mean inside the kernel. Uninitialised
    memory, the cache beyond each row's length and the other layers are NaN: finite results never touched them."""

    @settings(derandomize=True, deadline=None, max_examples=max_examples)
    @given(**FEATURES)
    def holds(**features):
        check(**features)

    holds()


@pytest.mark.parametrize(
    "features",
    [
        {"num_groups": 8, "head_dim": 128, "dtype": "bfloat16", "least_length": 200},
        {"num_groups": 8, "head_dim": 64, "heads": (4, 2), "least_length": 200, "layers": 2},
        {"q_len": 3, "num_groups": 4, "head_dim": 32, "window": 100, "softcap": 5.0, "norm": True, "rope": True},
        {"num_groups": 3, "head_dim": 64, "heads": (3, None), "shared": False, "least_length": 200},
        {"num_groups": 1, "head_dim": 576, "value_dim": 512, "heads": (16, None), "shared": False, "dtype": "bfloat16"},
        {"num_groups": 4, "runs": 6, "head_dim": 64, "heads": (2, None), "least_length": 200},
    ],
    ids=["bfloat16", "side by side", "several tokens and every option", "SmolLM", "absorbed latent", "unequal groups"],
)
def test_decode_equals_float64_attention(features):
    """The same for the shapes that count."""
    check(**features)


@pytest.mark.parametrize(
    ("q_offset", "window"), [(300, 1), (2**31 - 1, 5), (-(2**31), 5), (127, 2**31 - 1), (-5, None)]
)
def test_it_reads_nothing_outside_of_the_cache(q_offset, window):
    """A window that lies behind the cache, or before it, holds no block; reads outside of an array raise here."""
    q, k = jnp.ones((1, 1, 1, 1, 128)), jnp.ones((1, 128, 1, 128))
    offset, zero = jnp.array([q_offset], jnp.int32), jnp.zeros(1, jnp.int32)
    mask = make_mask(1, 128, q_offset=offset, kv_offset=zero, kv_length=jnp.array([128]), window=window)
    with interpreting():
        o, lse = decode(q, k, k, None, mask, q_rope=None, q_norm=None, softcap=None, scale=1.0)
    sees = q_offset == 127
    assert (np.asarray(o) == float(sees)).all()
    np.testing.assert_allclose(lse, 128 + np.log(128) if sees else EMPTY_LSE, rtol=1e-6)


def test_the_mean_is_not_rounded_to_the_cache_s_dtype():
    """The shared head's scores are means of float32 scores: with keys whose mean bfloat16 cannot hold (1 and 1 + 2⁻⁷)
    the scores still follow the exact mean, which shows in a softmax over two tokens at a large scale."""
    k = jnp.asarray([[[1.0], [1.0 + 2**-7]], [[1.0], [1.0]]], jnp.bfloat16) * jnp.ones(128, jnp.bfloat16)  # [T, G, D]
    v = jnp.asarray([[[1.0]], [[0.0]]], jnp.bfloat16) * jnp.ones((2, 128), jnp.bfloat16)
    mask = Mask(q_offset=jnp.array([1]), kv_offset=jnp.array([0]), kv_length=jnp.array([2]))
    q = jnp.ones((1, 1, 2, 1, 128), jnp.bfloat16)
    with interpreting():
        _, _, shared = decode(
            q, k[None], v[None], None, mask, q_rope=None, q_norm=None, softcap=None, scale=1.0, q_shared=q[:, :, 0, 0]
        )
    expected = 1 / (1 + np.exp(-(2**-8) * 128))
    assert abs(float(shared[0, 0, 0]) - expected) < 4e-3


@pytest.mark.slow
def test_layers_decode_with_the_kernel_what_a_full_pass_gives(monkeypatch):
    """Prefill, then token by token through a cache that the kernel reads: the outputs are those of one pass over all
    tokens without a cache, which is causal. Rows have their own lengths."""
    layer = tiny.gqe(2, 2, 1, head_dim=64, d_model=32, window=90, qk_norm=True)
    x = jnp.asarray(tiny.inputs(2, 140, d_model=32))
    lengths = np.array([130, 70])
    full, _ = tiny.jit(layer)(x)
    segment_ids = jnp.asarray(np.arange(130) < lengths[:, None], jnp.int32)
    prefill = tiny.jit(lambda x: layer(x, segment_ids=segment_ids, cache=layer.init_cache(2, 150))[2])
    cache = prefill(x[:, :130])

    monkeypatch.setattr(importlib.import_module("gqe_jax.kernels.attend"), "target_platform", lambda array: "tpu")
    with interpreting():
        step = tiny.jit(lambda x, cache: layer(x, cache=cache)[::2])
        for i in range(2):
            at = lengths + i
            y, cache = step(x[np.arange(2), at][:, None], cache)
            np.testing.assert_allclose(y[:, 0], full[np.arange(2), at], atol=1e-5)
    assert "gqe_decode" in str(jax.make_jaxpr(lambda x, cache: layer(x, cache=cache)[::2])(x[:, :1], cache))


def test_a_shared_head_and_a_layer_of_a_stack_mean_the_same_to_every_implementation():
    """On this CPU: one call with a shared head, on the middle layer of a stack, is attention of the routed heads and of
    one head over the mean keys and values, each by the definition in float64."""
    rng = np.random.default_rng(0)
    q, q_shared = rng.normal(size=(2, 3, 2, 2, 8)), rng.normal(size=(2, 3, 8))
    k, v = rng.normal(size=(2, 3, 2, 11, 2, 8))
    expert_index = rng.integers(0, 2, (2, 3, 2, 1))
    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    options = {"q_shared": jnp.asarray(q_shared, jnp.float32), "layer": 1, "q_offset": 8}
    o, shared, lse = attend(*arrays, jnp.asarray(expert_index), return_lse=True, **options)
    routed = attention(q, k[1], v[1], expert_index, q_offset=8)
    mean = attention(q_shared[:, :, None, None, :], *(x[1].mean(axis=2, keepdims=True) for x in (k, v)), q_offset=8)
    assert relative_error(o, routed["o"]) <= 2e-6 and relative_error(lse, routed["lse"]) <= 2e-6
    assert relative_error(shared, mean["o"][:, :, 0, 0]) <= 2e-6
    with pytest.raises(ValueError, match=r"q_shared has shape \(2, 3, 4\).* must be \[B, S, D\] = \[2, 3, 8\]"):
        attend(*arrays, q_shared=jnp.ones((2, 3, 4)), layer=1)
    with pytest.raises(ValueError, match=r"k has shape \(2, 11, 2, 8\) and layer \(\): with a layer.*must be stacked"):
        attend(arrays[0], arrays[1][0], arrays[2][0], layer=1)


# ---- compiled for TPUs


def attention_alone(
    dtype="bfloat16", num_groups=8, head_dim=128, value_dim=None, q_len=1, num_slots=1, runs=None, **options
):
    """One call against a cache of 2 x 32768 tokens, for `Job.factory`; with `runs` query runs of any KV heads."""

    def function(q, q_shared, k, v, expert_index, length, kv_head):
        return attend(
            q, k, v, expert_index, q_shared=q_shared, q_offset=length - q_len, kv_length=length,
            kv_head=kv_head if runs else None, implementation="pallas_tpu_decode", **options,
        )  # fmt: skip

    def array(*sizes):
        return jax.ShapeDtypeStruct(sizes, dtype)

    k, v = (array(2, 32768, num_groups, dim) for dim in (head_dim, value_dim or head_dim))
    runs_or_groups = runs or num_groups
    index = jax.ShapeDtypeStruct((2, q_len, runs_or_groups, num_slots), jnp.int32)
    length, kv_head = (jax.ShapeDtypeStruct((size,), jnp.int32) for size in (2, runs_or_groups))
    q = array(2, q_len, runs_or_groups, 2 * num_slots, head_dim)
    return function, (q, array(2, q_len, head_dim), k, v, index, length, kv_head)


def model(head_dim, num_groups=8):
    """One step of a model of three layers, each with a cache of 2 x 32768 tokens, for `Job.factory`."""
    attention_config = GQEConfig(num_query_experts=2 * num_groups, num_kv_heads=num_groups, head_dim=head_dim)
    config = ModelConfig(d_model=256, num_layers=3, d_ff=256, context=32768, attention=attention_config)

    def make():
        return Transformer(config, rngs=nnx.Rngs(0))

    graphdef, state = nnx.split(nnx.eval_shape(make))
    cache = jax.eval_shape(lambda: make().init_cache(2, 32768))

    def function(state, token, cache):
        x, _, cache = nnx.merge(graphdef, state)(token, cache=cache)
        return x, cache

    token = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    return jax.jit(function, donate_argnums=2), (state, token, cache)


@pytest.mark.slow
def test_it_compiles_for_tpus_and_reads_the_cache_where_it_lies():
    """XLA puts no copy, transpose or conversion of the cache before the kernel, in a call by itself and in a model of
    several layers, also with one KV head or heads of 96, eight of which fill whole vectors: any would be a temporary
    as large as a layer's cache."""
    pytest.importorskip("libtpu")
    calls = [
        {},
        {"dtype": "float32", "num_groups": 4},
        {"num_groups": 1, "q_len": 4, "num_slots": 2, "window": 4096, "softcap": 30.0},
        {"num_groups": 1, "head_dim": 640, "value_dim": 512, "num_slots": 32},
        {"runs": 12},
    ]
    jobs = [(target, "attention_alone", call) for target in GENERATIONS for call in calls]
    jobs += [(target, "model", {"head_dim": dim}) for target in ("v5e", "v6e") for dim in (64, 128)]
    others = [{"head_dim": 128, "num_groups": 1}, {"head_dim": 96}]
    jobs += [("v5e", "model", heads) for heads in others]
    results = compile_all([Job(x, f"test_kernels_decode:{name}", given, schedules=False) for x, name, given in jobs])
    for job, result in zip(jobs, results, strict=True):
        assert isinstance(result, Compiled), result
        assert len(re.findall(r"gqe_decode[.\w]* = .*custom-call", result.hlo)) == 1, job
        assert result.temporaries < 2**22, job
