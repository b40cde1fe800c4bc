"""`attend` with shapes, features and hidden memory drawn together, for every implementation, against float64."""

import functools
import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64_attention import relative_error, visible, whole_attention
from jax.experimental.pallas import tpu as pltpu

from gqe_jax.kernels import EMPTY_LSE, IMPLEMENTATIONS, BlockSizes, attend
from gqe_jax.kernels.tpu.pallas_tpu import pallas_tpu
from gqe_jax.kernels.xla import xla

attend_module = importlib.import_module("gqe_jax.kernels.attend")
INT32 = np.iinfo(np.int32)
INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")
SMALL = BlockSizes(
    block_q=256, block_kv=256, tile=256, unit=128, diagonal_part=128, row_part=128, backward_block_q=128,
    backward_block_kv=128, backward_piece_q=128, backward_piece_kv=128, backward_chunk_q=64,
)  # fmt: skip
FUNCTIONS = {
    "reference": IMPLEMENTATIONS["reference"],
    "xla": functools.partial(xla, block_q=8, block_k=4),
    "pallas_tpu": functools.partial(pallas_tpu, block_sizes=SMALL, interpret=INTERPRET),
    "pallas_tpu_decode": IMPLEMENTATIONS["pallas_tpu_decode"],
}
LENGTHS = {
    "reference": ([1, 2, 7, 19, 33], [1, 3, 8, 23, 40]),
    "xla": ([1, 2, 7, 19, 33], [1, 3, 8, 23, 40]),
    "pallas_tpu": ([1, 130, 200, 256], [3, 128, 200, 300]),
    "pallas_tpu_decode": ([1, 2, 3], [1, 100, 128, 300]),
}


def draw(implementation, seed):
    """(arrays, options of `attend`, the same options for float64, KV heads that no query run reads)."""
    rng = np.random.default_rng([seed, sorted(FUNCTIONS).index(implementation)])

    def one_of(*values):
        return values[rng.integers(len(values))]

    on_tpu, decodes = implementation.startswith("pallas"), implementation == "pallas_tpu_decode"
    q_lens, kv_lens = LENGTHS[implementation]
    q_len, kv_len = one_of(*q_lens), one_of(*kv_lens)
    if q_len > 1 and one_of(True, False):
        kv_len = q_len
    batch, num_kv_heads = one_of(1, 2), one_of(1, 2, 3)
    num_experts, num_slots = one_of((1, None), (2, 1), (3, 2), (2, None))
    head_dim = one_of(64, 128) if on_tpu else one_of(4, 8)
    value_dim = one_of(head_dim, head_dim, head_dim // 2, 2 * head_dim)
    num_runs, kv_head = num_kv_heads, None
    if one_of(True, False):
        num_runs = one_of(1, 2, 3)
        kv_head = rng.integers(0, num_kv_heads, num_runs)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    arrays = {
        "q": normal(batch, q_len, num_runs, num_experts, head_dim),
        "k": normal(batch, kv_len, num_kv_heads, head_dim),
        "v": normal(batch, kv_len, num_kv_heads, value_dim),
    }
    options, plain = {}, {}
    if num_slots is not None:
        order = np.argsort(rng.random((batch, q_len, num_runs, num_experts)), axis=-1)
        options["expert_index"] = plain["expert_index"] = order[..., :num_slots].astype(np.int32)
    if kv_head is not None:
        plain["kv_head"] = kv_head
        options["kv_head"] = one_of(tuple(kv_head.tolist()), jnp.asarray(kv_head))
    options["causal"] = plain["causal"] = bool(one_of(True, True, False))
    window = one_of(None, None, 2, 5, 17, 150, INT32.max, sys.maxsize, INT32.max - 3)
    if window is not None:
        options["window"], plain["window"] = one_of(window, np.int64(window)), int(window)
    kind = "rows" if decodes else one_of("none", "none", "rows", "near the limits")
    if kind != "none":
        at = 0 if kind == "rows" else int(one_of(INT32.max - 1, INT32.min + 50, INT32.max - q_len, 2**30))
        kv_offset = np.clip(at + rng.integers(-4, 5, batch), INT32.min, INT32.max)
        q_offset = np.clip(kv_offset + rng.integers(-4, kv_len + 3, batch), INT32.min, INT32.max)
        for name, x in (("q_offset", q_offset), ("kv_offset", kv_offset)):
            plain[name] = x
            options[name] = one_of(jnp.asarray(x, jnp.int32), x.tolist())
    if decodes or one_of(True, False):
        plain["kv_length"] = rng.integers(0, kv_len + 1, batch)
        options["kv_length"] = one_of(jnp.asarray(plain["kv_length"], jnp.int32), plain["kv_length"].tolist())
    if not decodes and one_of(True, False):
        ids = [np.sort(rng.integers(0, 4, (batch, length)), axis=1) for length in (q_len, kv_len)]
        ids = ids if one_of(True, False) else [rng.permutation(x, axis=1) for x in ids]
        plain["segments"] = ids
        options |= {"q_segment_ids": jnp.asarray(ids[0]), "kv_segment_ids": ids[1].tolist()}
    if one_of(True, False):
        options["softcap"] = one_of(2.0, np.float32(2.0), jnp.float32(2.0))
        plain["softcap"] = 2.0
    if one_of(True, False):
        options["scale"], plain["scale"] = one_of(0.3, jnp.float32(0.3)), float(np.float32(0.3))
    if one_of(True, False):
        arrays["norm_scale"] = 1 + 0.3 * normal(head_dim)
    if one_of(True, False):
        angle = rng.normal(size=(one_of(1, batch), q_len, head_dim // 2))
        arrays |= {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}
    if one_of(True, False):
        arrays["q_shared"] = normal(batch, q_len, head_dim)
    return arrays, options, plain, rng


def hide(arrays, plain, rng):
    """The arrays with NaN, infinity or float32's maximum where no query looks, and in queries that see nothing."""
    hidden = {name: x.copy() for name, x in arrays.items()}
    batch, q_len, _, num_experts, _ = arrays["q"].shape
    mask = {"causal": True, "window": None, "q_offset": 0, "kv_offset": 0, "kv_length": None, "segments": None}
    seen = visible(q_len, arrays["k"].shape[1], batch, **{name: plain.get(name, x) for name, x in mask.items()})

    def poison(x, where):
        x[where] = rng.choice([np.nan, np.inf, -np.inf, np.finfo(np.float32).max], x[where].shape)

    for name in ("k", "v"):
        poison(hidden[name], ~seen.any(axis=1))
        if "kv_head" in plain and "q_shared" not in arrays:
            unread = [head for head in range(arrays["k"].shape[2]) if head not in plain["kv_head"]]
            hidden[name][:, :, unread] = np.nan
    for name in ("q", "q_shared"):
        if name in hidden:
            poison(hidden[name], ~seen.any(axis=2))
    if "expert_index" in plain:
        hidden["q"][(plain["expert_index"][..., None] != np.arange(num_experts)).all(axis=3)] = np.nan
    return hidden


def check(implementation, seed):
    arrays, options, plain, rng = draw(implementation, seed)
    named = {"cos", "sin", "norm_scale"} & set(arrays)
    float64 = {name: x for name, x in arrays.items() if name not in named}
    if "norm_scale" in named:
        plain["q_norm"] = arrays["norm_scale"].astype(np.float64), 1e-6
    if "cos" in named:
        plain["q_rope"] = arrays["cos"], arrays["sin"]
    forward = whole_attention(**float64, **plain)
    cotangents = {"do": rng.normal(size=forward["o"].shape), "dlse": rng.normal(size=forward["lse"].shape)}
    if "q_shared" in arrays:
        cotangents["d_shared"] = rng.normal(size=forward["shared"].shape)
    expected = whole_attention(**float64, **plain, **cotangents)

    def call(arrays):
        arrays, given = dict(arrays), dict(options)
        if "norm_scale" in named:
            given["q_norm"] = arrays.pop("norm_scale"), 1e-6
        if "cos" in named:
            given["q_rope"] = arrays.pop("cos"), arrays.pop("sin")
        o, *shared, lse = attend(**arrays, **given, return_lse=True, implementation=implementation)
        return {"o": o, "lse": lse} | ({"shared": shared[0]} if shared else {})

    inputs = {name: jnp.asarray(x) for name, x in hide(arrays, plain, rng).items()}
    if implementation == "pallas_tpu_decode":
        with pltpu.force_tpu_interpret_mode(INTERPRET):
            actual, gradients = jax.jit(call)(inputs), None
    else:
        d = {"o": "do", "lse": "dlse", "shared": "d_shared"}

        @jax.jit
        def with_gradients(inputs):
            actual, vjp = jax.vjp(call, inputs)
            return actual, vjp({name: jnp.asarray(cotangents[d[name]], x.dtype) for name, x in actual.items()})[0]

        actual, gradients = with_gradients(inputs)
    seen = expected["seen"]
    for name in {"o", "shared"} & set(actual):
        assert relative_error(actual[name], expected[name]) <= 5e-6, name
        assert not np.asarray(actual[name])[~seen].any(), name
    np.testing.assert_allclose(np.asarray(actual["lse"])[seen], expected["lse"][seen], atol=2e-5)
    assert (np.asarray(actual["lse"])[~seen] == np.float32(EMPTY_LSE)).all()
    for name, gradient in (gradients or {}).items():
        error = relative_error(gradient, expected["gradients"][name], expected["terms"])
        assert error <= 1e-5, (name, error)


def refusal(error):
    """Whether an implementation says beforehand that it does not compute such calls."""
    return "cannot run" in str(error)


def sweep(monkeypatch, implementation, seeds):
    for name, function in FUNCTIONS.items():
        monkeypatch.setitem(IMPLEMENTATIONS, name, function)
    if implementation.startswith("pallas"):
        monkeypatch.setattr(attend_module, "target_platform", lambda array: "tpu")
    computed = 0
    for seed in seeds:
        try:
            check(implementation, seed)
        except ValueError as error:
            if not refusal(error):
                raise AssertionError(f"seed {seed}: {error}") from error
            continue
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        computed += 1
    assert computed >= len(seeds) // 4


@pytest.mark.parametrize(
    ("implementation", "count"), [("reference", 3), ("xla", 6), ("pallas_tpu", 4), ("pallas_tpu_decode", 5)]
)
def test_random_calls_equal_float64_attention(monkeypatch, implementation, count):
    """Outputs and the gradients of every differentiable argument are those of a definition that knows no blocks, no
    int32 and no memory of others: so no crossing of features is wrong, no position overflows, and what is hidden (NaN,
    infinity and float32's maximum) has no influence. A call that an implementation refuses beforehand is no fault."""
    sweep(monkeypatch, implementation, range(count))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("implementation", "count"), [("reference", 8), ("xla", 10), ("pallas_tpu", 5), ("pallas_tpu_decode", 12)]
)
def test_many_random_calls_equal_float64_attention(monkeypatch, implementation, count):
    """The same, over many more draws."""
    sweep(monkeypatch, implementation, range(1000, 1000 + count))
