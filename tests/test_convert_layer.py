"""A layer's parameters under PyTorch's names: golden names and shapes, both directions, and states that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from gqe_jax.attention import GQEAttention, RouterConfig
from gqe_jax.convert import layer_from_torch, layer_to_torch

# G = 3, M = 4, k = 2, D = 8, d = 16: users' files hold these names and shapes, so they must not change.
GOLDEN_GQE = {
    "q_proj.weight": (96, 16),
    "q_proj.bias": (96,),
    "k_proj.weight": (24, 16),
    "k_proj.bias": (24,),
    "v_proj.weight": (24, 16),
    "v_proj.bias": (24,),
    "q_norm.weight": (8,),
    "k_norm.weight": (8,),
    "router.weight": (12, 16),
    "router.bias_correction": (12,),
    "q_shared.weight": (8, 16),
    "q_shared.bias": (8,),
    "o_proj.weight": (16, 64),
    "o_proj.bias": (16,),
}
EVERYTHING = {"bias": True, "qk_norm": True, "router": RouterConfig(bias_update_rate=0.1)}


def shapes(layer):
    return {name: value.shape for name, value in layer_to_torch(layer).items()}


def test_names_and_shapes_are_the_published_ones():
    """Options add and remove rows of the table and change no other."""
    assert shapes(tiny.gqe(3, 4, 2, **EVERYTHING)) == GOLDEN_GQE
    plain = {n: s for n, s in GOLDEN_GQE.items() if not ("bias" in n or "norm" in n)}
    assert shapes(tiny.gqe(3, 4, 2)) == plain
    concat = {n: s for n, s in plain.items() if n != "q_shared.weight"} | {"o_proj.weight": (16, 48)}
    assert shapes(tiny.gqe(3, 4, 2, variant="hard_concat")) == concat
    dense = {n: s for n, s in concat.items() if n != "router.weight"} | {"o_proj.weight": (16, 96)}
    assert shapes(tiny.gqa(3, 4)) == dense


def test_order_of_rows_and_columns():
    """Rows of q_proj run over g, then m, then D; columns of o_proj over g, then k, then D, then ō, then s; a linear
    layer computes x Wᵀ."""
    layer = tiny.gqe(3, 4, 2)
    state = layer_to_torch(layer)
    q, o, extra = (p.kernel.get_value() for p in (layer.q_proj, layer.o_proj, layer.o_extra))
    g, m, k, D = 2, 1, 1, 5
    np.testing.assert_array_equal(state["q_proj.weight"][(g * 4 + m) * 8 + D], q[:, g, m, D])
    np.testing.assert_array_equal(state["o_proj.weight"][:, (g * 2 + k) * 8 + D], o[g, k, D])
    np.testing.assert_array_equal(state["o_proj.weight"][:, 48 + D], extra[0, D])
    np.testing.assert_array_equal(state["o_proj.weight"][:, 56 + D], extra[1, D])
    np.testing.assert_array_equal(state["router.weight"][g * 4 + m], layer.router.proj.kernel.get_value()[:, g, m])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("make", [lambda **o: tiny.gqe(3, 4, 2, **o, **EVERYTHING), lambda **o: tiny.gqa(2, 3, **o)])
def test_round_trip_is_bitwise(make, dtype):
    """Into a layer with other weights and back; dtypes stay (the router's is float32 always)."""
    state = layer_to_torch(make(seed=1, param_dtype=dtype))
    other = make(seed=2, param_dtype=dtype)
    layer_from_torch(other, state)
    again = layer_to_torch(other)
    assert again.keys() == state.keys()
    for name, value in state.items():
        assert again[name].dtype == (np.float32 if name.startswith("router") else dtype), name
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_torch_tensors_are_read_without_importing_torch():
    """Parameters that require gradients and bfloat16 ones, exactly; a float64 state is rounded to the layer's dtype."""
    torch = pytest.importorskip("torch")
    layer, want = tiny.gqe(seed=1), layer_to_torch(tiny.gqe(seed=2))
    layer_from_torch(layer, {name: torch.nn.Parameter(torch.tensor(value)) for name, value in want.items()})
    for name, value in layer_to_torch(layer).items():
        np.testing.assert_array_equal(value, want[name])
    layer_from_torch(layer, {name: torch.tensor(value).bfloat16() for name, value in want.items()})
    for name, value in layer_to_torch(layer).items():
        np.testing.assert_array_equal(value, want[name].astype(jnp.bfloat16).astype(np.float32))
    layer_from_torch(layer, {name: value.astype(np.float64) + 1e-12 for name, value in want.items()})
    assert layer.q_proj.kernel.dtype == jnp.float32


def test_parameters_are_bound_to_a_device_only_if_they_were():
    """JAX moves an array that nobody has placed to the devices of a mesh; one that was placed it refuses to move."""
    source = layer_to_torch(tiny.gqe())
    layer = tiny.gqe(seed=1)
    layer_from_torch(layer, source)
    assert not any(value.committed for value in jax.tree.leaves(nnx.state(layer)))
    nnx.update(layer, jax.device_put(nnx.state(layer), jax.devices()[0]))
    layer_from_torch(layer, source)
    assert all(value.committed for value in jax.tree.leaves(nnx.state(layer, nnx.Param)))


def test_an_abstract_layer_can_be_filled():
    """A layer made by `nnx.eval_shape` has shapes only: importing needs no initialisation."""
    layer = nnx.eval_shape(lambda: GQEAttention(16, 4, 2, 1, 8, rngs=nnx.Rngs(0)))
    want = tiny.gqe()
    layer_from_torch(layer, layer_to_torch(want))
    x = tiny.inputs()
    np.testing.assert_array_equal(tiny.call(layer, x)[0], tiny.call(want, x)[0])


def test_every_mismatch_is_listed_and_nothing_changes():
    """Missing, unexpected, misshaped (found and expected), not floating point: in one error, before any write."""
    layer = tiny.gqe(2, 2, 1, bias=True)
    before = layer_to_torch(layer)
    state = {name: value + 1 for name, value in before.items()}
    del state["k_proj.bias"]
    state |= {"rotary.inv_freq": np.zeros(4), "o_proj.weight": np.zeros((32, 16)), "v_proj.bias": np.zeros(16, np.int8)}
    with pytest.raises(ValueError) as error:
        layer_from_torch(layer, state)
    assert str(error.value).splitlines() == [
        "the state does not fit this GQEAttention; make the layer with the sizes and options that the state was made "
        "for:",
        "  k_proj.bias is missing, expected shape (16,)",
        "  v_proj.bias has dtype int8, expected floating point",
        "  o_proj.weight has shape (32, 16), expected (16, 32)",
        "  rotary.inv_freq is unexpected (shape (4,))",
    ]
    for name, value in layer_to_torch(layer).items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("kind", ["fixed", "random"])
def test_routers_without_parameters(kind):
    """They write a zero router, under which a learned router ties and takes experts 0..k-1, as the fixed one does; they
    read a zero one or none, and refuse one that says something."""
    layer = tiny.gqe(2, 2, 1, router=RouterConfig(kind=kind))
    state = layer_to_torch(layer)
    np.testing.assert_array_equal(state["router.weight"], np.zeros((4, 16)))
    layer_from_torch(layer, state)
    if kind == "fixed":
        learned = tiny.gqe(2, 2, 1)
        layer_from_torch(learned, state)
        want = tiny.call(learned, tiny.inputs())[0]
        np.testing.assert_allclose(tiny.call(layer, tiny.inputs())[0], want, atol=1e-6)
    message = rf"router.weight is not zero, but this layer has no parameter for it \(.*router {kind}\)"
    with pytest.raises(ValueError, match=message):
        layer_from_torch(layer, state | {"router.weight": np.ones((4, 16))})
    with pytest.raises(ValueError, match=r"router.weight has shape \(4, 15\), expected \(4, 16\)"):
        layer_from_torch(layer, state | {"router.weight": np.zeros((4, 15))})
    layer_from_torch(layer, {name: value for name, value in state.items() if name != "router.weight"})


def test_parameters_without_a_name_are_refused():
    """A kind of attention with parameters of its own must not be exported without them."""
    layer = tiny.gqa()
    layer.extra = nnx.Param(jnp.zeros(3))
    with pytest.raises(ValueError, match="PyTorch's names are not known for the parameters extra"):
        layer_to_torch(layer)
