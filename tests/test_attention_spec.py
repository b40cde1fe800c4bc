"""The attention layers against the float64 NumPy statement of their equations: values, statistics and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spec_numpy
import tiny
from flax import nnx

from gqe_jax.attention import RouterConfig
from gqe_jax.convert import layer_from_torch, layer_to_torch

PACKED = np.array([[1] * 5 + [2] * 6 + [0] * 2, [1] * 13])  # two documents and padding; one document

# Every option alone and all together; the first row is the layer as it comes.
OPTIONS = {
    "plain": {},
    "no_rope": {"rope_theta": None},
    "qk_norm": {"qk_norm": True},
    "bias": {"bias": True},
    "softcap": {"softcap": 1.0},
    "window": {"window": 3},
    "packed": {},
    "all": {"qk_norm": True, "bias": True, "softcap": 1.0, "window": 4},
}
SHAPES = [(1, 1), (1, 2), (2, 2), (2, 4), (1, 4)]  # k, M


def cases():
    """(variant, k, M, option, implementation): every variant with every k and M, with rotary embedding and without for
    each k, and "gqe" with every option; the implementations take turns."""
    for v, variant in enumerate(("gqe", "hard_concat", "weighted_concat")):
        for n, (k, M) in enumerate(SHAPES):
            yield variant, k, M, ("all", "no_rope")[n % 2], ("reference", "xla")[(n // 2 + v) % 2]
    for n, option in enumerate(OPTIONS):
        yield "gqe", 1 + n % 2, 4, option, ("xla", "reference")[n // 2 % 2]
    yield "gqe", 2, 4, "all", "reference"
    yield "gqe", 2, 4, "all", "xla"


def masks(option):
    return {"segment_ids": PACKED} if option in ("packed", "all") else {}


def assert_equal(layer, x, option):
    y, stats = tiny.call(layer, x, **masks(option))
    want = spec_numpy.layer(layer_to_torch(layer), x, **tiny.spec_options(layer), **masks(option))
    real = PACKED != 0 if masks(option) else np.ones(x.shape[:2], bool)
    np.testing.assert_allclose(y[real], want.y[real], atol=1e-5, rtol=1e-5)
    return stats, want, real


@pytest.mark.parametrize(("variant", "k", "M", "option", "implementation"), sorted(set(cases())))
def test_layer_equals_the_spec(variant, k, M, option, implementation):
    """Within 1e-5 in float32, for outputs, selection and all statistics; padding counts in none of them."""
    layer = tiny.gqe(3, M, k, variant=variant, implementation=implementation, **OPTIONS[option])
    x = tiny.inputs()
    stats, want, real = assert_equal(layer, x, option)
    if M > 1:  # the comparison is meaningful only where rounding cannot change a selection
        assert np.diff(np.sort(want.probs, axis=-1), axis=-1).min() > 1e-5
    np.testing.assert_array_equal(stats.expert_index[real], want.expert_index[real])
    for name in ("load", "mean_prob", "load_balance_loss", "z_loss", "entropy"):
        np.testing.assert_allclose(getattr(stats, name), getattr(want, name), atol=1e-6, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("groups", "heads", "option"),
    [(4, 1, "plain"), (4, 1, "all"), (1, 4, "no_rope"), (1, 4, "all"), (2, 2, "packed"), (2, 2, "all")],
)
def test_dense_layer_equals_the_spec(groups, heads, option):
    """The dense kinds, with the same options."""
    layer = tiny.gqa(groups, heads, **OPTIONS[option])
    stats, _, _ = assert_equal(layer, tiny.inputs(), option)
    assert stats.auxiliary_loss == 0 and stats.metrics == {}


def test_positions_reach_the_rotary_embedding_and_nothing_else():
    """Given positions replace the count from 0, for each row its own; the causal mask keeps following the order."""
    layer = tiny.gqe(qk_norm=True)
    x, positions = tiny.inputs(), np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 0, 1], np.arange(13) + 40])
    want = spec_numpy.layer(layer_to_torch(layer), x, positions=positions, **tiny.spec_options(layer))
    np.testing.assert_allclose(tiny.call(layer, x, positions=positions)[0], want.y, atol=1e-5, rtol=1e-5)


GRADIENT_CASES = [
    {"variant": "gqe", "groups": 2, "experts": 2, "top_k": 1, "bias": True, "qk_norm": True, "softcap": 2.0},
    {"variant": "gqe", "groups": 1, "experts": 3, "top_k": 2},
    {"variant": "weighted_concat", "groups": 2, "experts": 2, "top_k": 1, "rope_theta": None},
    {"variant": "hard_concat", "groups": 2, "experts": 2, "top_k": 2},
]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda case: f"{case['variant']}-{case['top_k']}")
def test_gradients_equal_finite_differences_of_the_spec(case, implementation):
    """Central differences of the float64 statement, for every entry of every parameter, in y, load-balance loss and
    z-loss together. The selection is held, as it is constant between ties."""
    options = {"d_model": 6, "head_dim": 4, "implementation": implementation}
    layer = tiny.gqe(**case, **options)
    x = tiny.inputs(1, 5, d_model=6)
    weights = np.random.default_rng(2).standard_normal(x.shape)
    apply, params, rest = tiny.split(layer)

    @tiny.jit
    @jax.grad
    def gradient(params):
        y, stats = apply(params, rest, x)
        return jnp.sum(y * weights) + 3.0 * stats.load_balance_loss + 0.5 * stats.z_loss

    state = {name: value.astype(np.float64) for name, value in layer_to_torch(layer).items()}
    index = spec_numpy.layer(state, x, **tiny.spec_options(layer)).expert_index

    def loss():
        result = spec_numpy.layer(state, x, expert_index=index, **tiny.spec_options(layer))
        return np.sum(result.y * weights) + 3.0 * result.load_balance_loss + 0.5 * result.z_loss

    nnx.update(layer, gradient(params))
    for name, got in layer_to_torch(layer).items():  # gradients, in PyTorch's layout
        parameter, want, step = state[name], np.zeros(got.shape), 1e-5
        for entry in np.ndindex(got.shape):
            value = parameter[entry]
            parameter[entry] = value + step
            above = loss()
            parameter[entry] = value - step
            want[entry] = (above - loss()) / (2 * step)
            parameter[entry] = value
        np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-3, err_msg=name)


def test_gradients_with_all_experts_equal_those_of_dense_attention():
    """With k = M, a zero router and zero rows of W_o for ō and s, GQE is dense GQA: for every shared parameter the
    gradients agree too, and the input's."""
    options = {"bias": True, "qk_norm": True, "implementation": "reference"}
    dense, layer = tiny.gqa(2, 2, **options), tiny.gqe(2, 2, 2, **options)
    state = layer_to_torch(layer) | layer_to_torch(dense)
    extra = np.zeros((tiny.D_MODEL, 2 * tiny.HEAD_DIM))
    state |= {"o_proj.weight": np.concatenate([state["o_proj.weight"], extra], 1)}
    state |= {"router.weight": 0 * state["router.weight"]}
    layer_from_torch(layer, state)
    x, weights = tiny.inputs(), tiny.inputs(seed=3)

    def gradients(layer):
        apply, params, rest = tiny.split(layer)
        loss = jax.grad(lambda params, x: jnp.sum(apply(params, rest, x)[0] * weights), (0, 1))
        params, x_bar = tiny.jit(loss)(params, x)
        nnx.update(layer, params)
        return layer_to_torch(layer) | {"x": x_bar}

    got, want = gradients(layer), gradients(dense)
    got["o_proj.weight"] = got["o_proj.weight"][:, : 4 * tiny.HEAD_DIM]
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, atol=2e-5, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("variant", ["gqe", "hard_concat", "weighted_concat"])
def test_loss_free_bias_selects_but_does_not_weigh(variant):
    """The bias is added for the selection alone: slots are still ordered and weighted by p."""
    layer = tiny.gqe(2, 4, 2, variant=variant, router=RouterConfig(bias_update_rate=0.1))
    x = tiny.inputs()
    stats, want, _ = assert_equal(layer, x, "plain")
    np.testing.assert_array_equal(stats.expert_index, want.expert_index)
    state = layer_to_torch(layer)
    state.pop("router.bias_correction")
    without = spec_numpy.layer(state, x, **tiny.spec_options(layer)).expert_index
    assert (np.sort(want.expert_index) != np.sort(without)).any(), "a bias that changes no selection tests nothing"
