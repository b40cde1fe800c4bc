"""`attend` against float64 numpy: every feature crossed with the others, edge shapes, gradients, error messages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64_attention import attention, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify

from gqe_jax.kernels import EMPTY_LSE, IMPLEMENTATIONS, attend, merge_partials
from gqe_jax.kernels.xla import xla

TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}
# Blocks so small that a dozen positions make several of each kind: whole, cut by the mask, last and partial.
IMPLEMENTATIONS_UNDER_TEST = {
    "reference": IMPLEMENTATIONS["reference"],
    "xla": xla,
    "xla in tiny blocks": functools.partial(xla, block_q=8, block_k=4),
}


@pytest.fixture(autouse=True)
def tiny_blocks(monkeypatch):
    for name, function in IMPLEMENTATIONS_UNDER_TEST.items():
        monkeypatch.setitem(IMPLEMENTATIONS, name, function)


def check(
    implementation, seed=0, *, dtype="float32", batch=2, q_len=19, kv_len=23, num_groups=2, num_experts=3, num_slots=2,
    head_dim=8, segments=None, kv_length=False, offsets=False, **options,
):  # fmt: skip
    """o, lse, dq, dk, dv for N(0, 1) inputs and cotangents of both outputs; num_slots=None is the dense call."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    q = normal(batch, q_len, num_groups, num_experts, head_dim)
    k, v = normal(batch, kv_len, num_groups, head_dim), normal(batch, kv_len, num_groups, head_dim)
    expert_index = None
    if num_slots is not None:
        order = np.argsort(rng.random((batch, q_len, num_groups, num_experts)), axis=-1)
        expert_index = order[..., :num_slots].astype(np.int32)
    do = normal(batch, q_len, num_groups, num_slots or num_experts, head_dim)
    dlse = rng.normal(size=do.shape[:-1]).astype(np.float32)
    ours, theirs = dict(options), dict(options)
    if segments is not None:
        ids = [rng.integers(0, 4, (batch, length)) for length in (q_len, kv_len)]
        ids = [np.sort(x, axis=1) for x in ids] if segments == "packed" else ids
        ours |= {"q_segment_ids": jnp.asarray(ids[0]), "kv_segment_ids": jnp.asarray(ids[1])}
        theirs |= {"segments": ids}
    if kv_length:
        length = rng.integers(0, kv_len + 1, batch)
        ours |= {"kv_length": jnp.asarray(length)}
        theirs |= {"kv_length": length}
    if offsets:
        q_offset, kv_offset = rng.integers(-4, kv_len, batch), rng.integers(-4, 5, batch)
        ours |= {"q_offset": jnp.asarray(q_offset), "kv_offset": jnp.asarray(kv_offset)}
        theirs |= {"q_offset": q_offset, "kv_offset": kv_offset}

    def ours_of(q, k, v):
        index = None if expert_index is None else jnp.asarray(expert_index)
        return attend(q, k, v, index, return_lse=True, implementation=implementation, **ours)

    @jax.jit
    def with_gradients(q, k, v, *cotangents):
        outputs, vjp = jax.vjp(ours_of, q, k, v)
        return *outputs, *vjp(cotangents)

    o, lse, dq, dk, dv = with_gradients(q, k, v, do, jnp.asarray(dlse))
    expected = attention(q, k, v, expert_index, do=do, dlse=dlse, **theirs)

    assert o.dtype == dq.dtype == dk.dtype == jnp.dtype(dtype) and lse.dtype == jnp.float32
    for name, actual in {"o": o, "dq": dq, "dk": dk, "dv": dv}.items():
        assert relative_error(actual, expected[name], expected.get(f"{name}_terms", 0.0)) <= TOLERANCE[dtype], name
    seen = expected["seen"]
    np.testing.assert_allclose(np.asarray(lse)[seen], expected["lse"][seen], atol=1e-5 if dtype == "float32" else 3e-2)
    assert (np.asarray(lse)[~seen] == np.float32(EMPTY_LSE)).all()
    assert (np.asarray(o, np.float32)[~seen] == 0).all() and (np.asarray(dq, np.float32)[~seen] == 0).all()
    if expert_index is not None:
        unselected = (expert_index[..., None] != np.arange(num_experts)).all(axis=3)
        assert (np.asarray(dq, np.float32)[unselected] == 0).all()


FEATURES = {
    "seed": st.integers(0, 2**16),
    "batch": st.integers(1, 3),
    "q_len": st.sampled_from([1, 2, 7, 8, 19, 33]),
    "kv_len": st.sampled_from([1, 3, 8, 23, 40]),
    "num_groups": st.integers(1, 2),
    "heads": st.sampled_from([(1, None), (1, 1), (2, 1), (3, 2), (3, 3), (2, None)]),
    "segments": st.sampled_from([None, "packed", "arbitrary"]),
    "kv_length": st.booleans(),
    "offsets": st.booleans(),
    "causal": st.booleans(),
    # Not 1: with one visible key the scores' gradient is dlse plus a difference that cancels, a matter of conditioning.
    "window": st.sampled_from([None, 2, 5, 17]),
    "softcap": st.sampled_from([None, 2.0]),
    "scale": st.sampled_from([None, 0.7]),
}


@pytest.mark.parametrize("max_examples", [7, pytest.param(30, marks=pytest.mark.slow)])
def test_xla_equals_float64_attention_in_every_crossing(max_examples):
    """Values, both gradients' paths and exact zeros: the definition in float64 knows no blocks, so whatever the loop
    bounds, the masked and unmasked branches or the recomputation get wrong shows."""

    @settings(derandomize=True, deadline=None, max_examples=max_examples)
    @given(**FEATURES)
    def holds(heads, **features):
        num_experts, num_slots = heads
        check("xla in tiny blocks", num_experts=num_experts, num_slots=num_slots, **features)

    holds()


@pytest.mark.parametrize("max_examples", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_reference_equals_float64_attention(max_examples):
    """The oracle of other kernels is itself held to the definition."""

    @settings(derandomize=True, deadline=None, max_examples=max_examples)
    @given(**FEATURES)
    def holds(heads, **features):
        num_experts, num_slots = heads
        check("reference", num_experts=num_experts, num_slots=num_slots, **features)

    holds()


@pytest.mark.parametrize(
    "shape",
    [
        {"q_len": 1, "kv_len": 1, "batch": 1, "num_groups": 1, "num_experts": 1, "num_slots": None},
        {"q_len": 1, "kv_len": 37, "offsets": True, "kv_length": True},  # decode
        {"q_len": 5, "kv_len": 37, "offsets": True, "kv_length": True, "window": 9},  # a few new tokens
        {"q_len": 40, "kv_len": 3},
        {"q_len": 31, "kv_len": 31, "num_slots": 3},  # k = M
        {"q_len": 31, "kv_len": 31, "num_groups": 1, "window": 1},
    ],
    ids=str,
)
def test_edge_shapes(shape):
    """Lengths of one, shorter than a block, no multiple of one, T < S, T > S, all experts selected."""
    check("xla in tiny blocks", **shape)


def test_default_blocks():
    """The block sizes that users get, on lengths that no block divides."""
    check("xla", q_len=600, kv_len=700, batch=1, num_groups=1, num_experts=1, num_slots=None, offsets=True)


@pytest.mark.parametrize("features", [{"segments": "packed", "softcap": 2.0}, {"q_len": 1, "kv_len": 40}], ids=str)
def test_bfloat16(features):
    """bfloat16 in and out, float32 inside: the error stays that of rounding the inputs and outputs."""
    check("xla in tiny blocks", dtype="bfloat16", **features)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("padding", ["last token", "everything"])
def test_padding(implementation, padding):
    """Segment 0 sees nothing and is seen by nothing: outputs 0, gradients 0, lse finite, nothing NaN."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(1, 6, 1, 1, 4)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(1, 6, 1, 4)), jnp.float32) for _ in range(2))
    ids = np.zeros((1, 6), np.int32) if padding == "everything" else np.array([[1, 1, 1, 1, 1, 0]], np.int32)

    def loss(q, k, v):
        ids_ = jnp.asarray(ids)
        o, lse = attend(
            q, k, v, q_segment_ids=ids_, kv_segment_ids=ids_, return_lse=True, implementation=implementation
        )
        return jnp.sum(jnp.sin(o)) + jnp.sum(lse), (o, lse)

    grads, (o, lse) = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    padded = ids[0] == 0
    for x in (o, *grads):
        assert np.isfinite(x).all() and (np.asarray(x)[:, padded] == 0).all()
        assert padding == "everything" or (np.asarray(x)[:, ~padded] != 0).any()
    assert np.isfinite(lse).all()


@pytest.mark.parametrize("implementation", ["reference", "xla in tiny blocks"])
def test_gradients_through_norm_rotation_and_selection_are_finite_differences(implementation):
    """d/dε loss(x + ε u) by central differences of the float64 definition equals ⟨grad, u⟩, for q, k, v and the norm's
    scale: the whole query path (select, norm, rotate) and both outputs take part."""
    rng = np.random.default_rng(0)
    batch, length, num_groups, num_experts, head_dim, num_slots = 2, 13, 2, 3, 8, 2
    angle = np.arange(length)[:, None] * 10.0 ** -np.arange(head_dim // 2)
    rope = np.cos(angle)[None].astype(np.float32), np.sin(angle)[None].astype(np.float32)
    index = np.argsort(rng.random((batch, length, num_groups, num_experts)), axis=-1)[..., :num_slots]
    point = {
        "q": rng.normal(size=(batch, length, num_groups, num_experts, head_dim)),
        "k": rng.normal(size=(batch, length, num_groups, head_dim)),
        "v": rng.normal(size=(batch, length, num_groups, head_dim)),
        "scale": 1 + 0.3 * rng.normal(size=head_dim),
    }
    weight_o = rng.normal(size=(batch, length, num_groups, num_slots, head_dim))
    weight_lse = rng.normal(size=weight_o.shape[:-1])

    def loss64(q, k, v, scale):
        out = attention(q, k, v, index, window=7, q_rope=rope, q_norm=(scale, 1e-6), softcap=3.0)
        return (weight_o * out["o"]).sum() + (weight_lse * out["lse"]).sum()

    def loss(q, k, v, scale):
        o, lse = attend(
            q, k, v, jnp.asarray(index), window=7, q_rope=tuple(map(jnp.asarray, rope)), q_norm=(scale, 1e-6),
            softcap=3.0, return_lse=True, implementation=implementation,
        )  # fmt: skip
        return jnp.sum(weight_o * o) + jnp.sum(weight_lse * lse)

    grads = jax.jit(jax.grad(lambda x: loss(**x)))({name: jnp.asarray(x, jnp.float32) for name, x in point.items()})
    for name, x in point.items():
        direction = rng.normal(size=x.shape)
        moved = [loss64(**(point | {name: x + step * direction})) for step in (1e-5, -1e-5)]
        slope = (moved[0] - moved[1]) / 2e-5
        np.testing.assert_allclose(np.sum(np.asarray(grads[name]) * direction), slope, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("cut", [0, 5, 12])
def test_merge_partials_of_two_halves_of_the_keys_is_the_whole(cut):
    """softmax over a union of keys from the two parts' outputs and log-sum-exps, gradients too (so that of lse); with
    cut = 0 or 12 some or all queries see nothing in one part."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 12, 2, 2, 4)).astype(np.float32)
    k, v = (rng.normal(size=(2, 12, 2, 4)).astype(np.float32) for _ in range(2))
    do = rng.normal(size=q.shape).astype(np.float32)
    dlse = rng.normal(size=q.shape[:-1]).astype(np.float32)

    def parts(q, k, v):
        left = attend(q, k, v, kv_length=jnp.full(2, cut), return_lse=True, implementation="xla in tiny blocks")
        if cut == 12:
            right = jnp.zeros(left[0].shape), jnp.full(left[1].shape, EMPTY_LSE)
        else:
            right = attend(q, k[:, cut:], v[:, cut:], kv_offset=cut, return_lse=True, implementation="xla")
        return merge_partials(*left, *right)

    (o, lse), vjp = jax.vjp(jax.jit(parts), *map(jnp.asarray, (q, k, v)))
    expected = attention(q, k, v, do=do, dlse=dlse)
    np.testing.assert_allclose(lse, expected["lse"], atol=1e-5)
    for name, actual in zip(("o", "dq", "dk", "dv"), (o, *vjp((jnp.asarray(do), jnp.asarray(dlse)))), strict=True):
        assert relative_error(actual, expected[name]) <= 2e-6, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": (2, 5, 3, 4)}, r"q has shape \(2, 5, 3, 4\): attend needs \[B, S, R, M, D\]"),
        ({"k": (2, 7, 4, 8)}, r"k has shape \(2, 7, 4, 8\): with q .* must be \[B, T, G, D\] = \[2, T, 3, 8\]"),
        ({"v": (2, 6, 3, 8)}, r"k has shape \(2, 7, 3, 8\) and v \(2, 6, 3, 8\): they must have the same length T"),
        ({"k": (2, 0, 3, 8), "v": (2, 0, 3, 8)}, "no axis may be empty"),
        ({"v_dtype": "bfloat16"}, "q, k, v have dtypes float32, float32, bfloat16: cast them to one dtype"),
        ({"q_dtype": "int32"}, "q has dtype int32: attend takes float32, bfloat16 or float16"),
        ({"expert_index": np.zeros((2, 5, 2, 1), int)}, r"expert_index has shape \(2, 5, 2, 1\): .* \[2, 5, 3, K\]"),
        ({"expert_index": np.zeros((2, 5, 3, 3), int)}, "expert_index selects K=3 experts of M=2 .* K must be in 1..M"),
        ({"expert_index": np.zeros((2, 5, 3, 1))}, "expert_index has dtype float.*: it must be an integer array"),
        ({"window": 0}, "window=0 must be an int of at least 1"),
        ({"softcap": -1.0}, "softcap=-1.0 must be positive, or None"),
        ({"scale": 0.0}, "scale=0.0 must be positive, or None"),
        ({"q_offset": np.zeros(3, int)}, r"q_offset has shape \(3,\) .* scalar or \[B\] = \[2\]"),
        ({"kv_length": np.zeros(2)}, "kv_length has shape .* dtype float.*: it must be an integer"),
        ({"q_segment_ids": np.zeros((2, 5), int)}, "q_segment_ids is given without kv_segment_ids: pass both"),
        (
            {"q_segment_ids": np.zeros((2, 5), int), "kv_segment_ids": np.zeros((2, 5), int)},
            r"kv_segment_ids has shape \(2, 5\) .* integer array \[2, 7\]",
        ),
        ({"q_rope": (np.zeros((1, 5, 8)),) * 2}, r"q_rope's cos has shape \(1, 5, 8\): .* = \[2 or 1, 5, 4\]"),
        ({"q_norm": (np.ones(4), 1e-6)}, r"q_norm's scale has shape \(4,\): it must be \[D\] = \[8\]"),
        ({"window": 2.5}, "window=2.5 must be an int of at least 1"),
        ({"scale": np.inf}, "scale=inf must be positive"),
        ({"kv_head": (0, 1)}, r"kv_head=\(0, 1\) has shape \(2,\) .* must be integers \[R\]"),
        ({"kv_head": [0, 1, 3]}, "kv_head must have values in 0..G-1 = 0..2, not 0 to 3"),
        ({"q_offset": 2**31}, "q_offset must have values within int32, not 2147483648 to 2147483648"),
        ({"q_offset": 2**31 - 1, "kv_offset": -9, "window": 5}, "differ by 2.31 or more: with a window"),
        ({"implementation": "fast"}, r"implementation='fast' is unknown: choose one of cudnn,"),
    ],
    ids=str,
)
def test_bad_input_is_named(changes, message):
    """Each message names the argument, its value or shape, and the rule."""
    shapes = {name: changes.get(name, default) for name, default in
              {"q": (2, 5, 3, 2, 8), "k": (2, 7, 3, 8), "v": (2, 7, 3, 8)}.items()}  # fmt: skip
    arrays = {name: jnp.zeros(shape, changes.get(f"{name}_dtype", "float32")) for name, shape in shapes.items()}
    options = {name: x for name, x in changes.items() if name not in shapes and not name.endswith("_dtype")}
    with pytest.raises(ValueError, match=message):
        attend(**arrays, **options)


def test_odd_head_dim_cannot_rotate():
    """rotate-half pairs coordinate d with d + D/2."""
    q, k = jnp.zeros((1, 2, 1, 1, 3)), jnp.zeros((1, 2, 1, 3))
    with pytest.raises(ValueError, match=r"q_rope needs an even head_dim, and q of shape .* has D=3"):
        attend(q, k, k, q_rope=(jnp.zeros((1, 2, 1)), jnp.zeros((1, 2, 1))))


@pytest.mark.parametrize("index", [-1, 3])
def test_an_expert_that_does_not_exist(index):
    """Values are checked where they are known: as arrays, also closed over by a jit, and under checkify. A plain jit
    does not pay for it."""
    q, k = jnp.ones((1, 2, 1, 3, 8)), jnp.ones((1, 2, 1, 8))
    expert_index = jnp.asarray([1, index]).reshape(1, 2, 1, 1)
    lowest, highest = min(index, 1), max(index, 1)
    rule = f"expert_index must have values in 0..M-1 = 0..2, not {lowest} to {highest}"
    for call in (attend, jax.jit(lambda q, k, v, _: attend(q, k, v, expert_index))):
        with pytest.raises(ValueError, match=rule):
            call(q, k, k, expert_index)
    error, _ = checkify.checkify(jax.jit(attend))(q, k, k, expert_index)
    assert rule in error.get()
    assert np.isfinite(jax.jit(attend)(q, k, k, expert_index)).all()


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 20.0, "causal": False}, {"segments": True}])
def test_inside_the_user_s_shard_map(implementation, options):
    """`jax.shard_map` checks by default along which axes of the mesh each array varies: loops too have to know. A mesh
    of one device does, and changes no number. k is the same everywhere: its gradient is summed over the axis."""
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(0)
    shapes = (2, 19, 2, 3, 8), (2, 19, 2, 8), (2, 19, 2, 8)
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    index = jnp.asarray(rng.integers(0, 3, (2, 19, 2, 1)))
    segments = jnp.asarray(np.repeat([[1] * 9 + [2] * 10], 2, axis=0)) if options.get("segments") else None
    options = {name: value for name, value in options.items() if name != "segments"}

    def call(q, k, v, index, segments):
        ids = {} if segments is None else {"q_segment_ids": segments, "kv_segment_ids": segments}
        return attend(q, k, v, index, implementation=implementation, **options, **ids)

    rows, whole = jax.P("rows"), jax.P()
    split = jax.shard_map(call, mesh=mesh, in_specs=(rows, whole, rows, rows, rows), out_specs=rows)

    def value_and_gradients(function):
        objective = jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(function(*x))), argnums=(0, 1, 2))
        return jax.tree.leaves(jax.jit(objective)(q, k, v, index, segments))

    for got, want in zip(value_and_gradients(split), value_and_gradients(call), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_explicit_axes_of_a_mesh():
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        q, k = jnp.ones((1, 2, 1, 3, 8)), jax.device_put(jnp.ones((1, 2, 1, 8)), jax.P("rows"))
        with pytest.raises(ValueError, match="k is split over the explicit mesh axes rows: attention takes automatic"):
            attend(q, k, k)


def test_options_in_any_number_type():
    """NumPy's and JAX's scalars, lists, an infinite soft cap and a window beyond int32 mean what Python's numbers do;
    traced ones, for which kernels would have to be compiled anew, are refused in one sentence."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 5, 1, 2, 4)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, 5, 1, 4)), jnp.float32) for _ in range(2))
    plain = attend(q, k, v, scale=0.5, kv_length=jnp.array([3, 5]))
    same = attend(q, k, v, scale=jnp.float32(0.5), softcap=np.inf, window=np.int64(2**40), kv_length=[3, 5])
    np.testing.assert_array_equal(same, plain)
    for name in ("scale", "softcap", "window"):
        with pytest.raises(ValueError, match=f"{name} is traced, and kernels are compiled for it: it must be"):
            jax.jit(lambda x, name=name: attend(q, k, v, **{name: x}))(2)


def test_a_second_derivative_says_what_to_use():
    """And only a second one: "reference" has it."""
    q, k = jnp.ones((1, 3, 1, 1, 4)), jnp.ones((1, 3, 1, 4))

    def slope(q, implementation):
        return jnp.sum(jax.grad(lambda q: jnp.sum(attend(q, k, k, implementation=implementation) ** 2))(q))

    with pytest.raises(NotImplementedError, match="once and in reverse mode: implementation='reference' has second"):
        jax.grad(slope)(q, "xla")
    assert np.isfinite(jax.grad(slope)(q, "reference")).all()


@pytest.mark.parametrize("implementation", ["reference", "xla in tiny blocks"])
def test_a_later_key_of_nan_does_not_reach_earlier_queries(implementation):
    """A key that some queries see and others do not: 0 · NaN in a matmul would reach all of them, forward in o and
    backward in the gradients of everything that they see."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(1, 8, 1, 1, 4)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(1, 8, 1, 4)), jnp.float32) for _ in range(2))

    def call(q, k, v):
        return attend(q, k, v, implementation=implementation)

    at = 5
    clean, vjp = jax.vjp(call, q, k, v)
    o, vjp_nan = jax.vjp(call, q, k.at[:, at].set(jnp.nan), v.at[:, at].set(jnp.inf))
    do = jnp.where(jnp.arange(8)[:, None, None, None] < at, 1.0, 0.0) * jnp.ones_like(o)
    np.testing.assert_allclose(o[:, :at], clean[:, :at], atol=1e-6)
    assert np.isnan(o[:, at:]).all()
    np.testing.assert_allclose(vjp_nan(do)[0][:, :at], vjp(do)[0][:, :at], atol=1e-6)
