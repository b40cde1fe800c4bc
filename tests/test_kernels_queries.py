"""What happens to queries before attention: selection, norm, rotation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqe_jax.kernels import rms_norm, rotate, select_experts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_norm_is_computed_in_float32(dtype):
    """Against float64: only the output's rounding may show, although squares of 300 overflow nothing but precision."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(300 * rng.normal(size=(3, 5, 16)), dtype)
    scale = jnp.asarray(rng.normal(size=16), jnp.float32)
    x64 = np.asarray(x, np.float64)
    expected = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(scale, np.float64)
    actual = rms_norm(x, scale, 1e-6)
    assert actual.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=1e-6 if dtype == "float32" else 2**-8)


@pytest.mark.parametrize("head_axes", [(), (3,), (2, 3)])
def test_rotate_is_a_rotation_of_coordinate_pairs(head_axes):
    """The pair (d, d + D/2), as the complex number x_d + i·x_{d+D/2}, is multiplied by e^{iθ}, whatever head axes."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, *head_axes, 8)).astype(np.float32)
    theta = rng.uniform(0, 6, (2, 5, 4))
    actual = np.asarray(rotate(jnp.asarray(x), jnp.cos(theta), jnp.sin(theta)))
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * theta.reshape(2, 5, *(1 for _ in head_axes), 4))
    np.testing.assert_allclose(actual, np.concatenate([turned.real, turned.imag], -1), atol=2e-6)


@pytest.mark.parametrize(("num_experts", "num_slots"), [(1, 1), (2, 1), (4, 2), (3, 3)])
def test_select_experts_takes_slots_in_order_and_its_gradient_scatters_back(num_experts, num_slots):
    """Exactly the gathered values; the gradient is exactly the cotangent at selected experts and 0 elsewhere, also
    where an unselected expert holds NaN (a multiplication by a one-hot would spread it)."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 5, 3, num_experts, 4)).astype(np.float32)
    index = np.argsort(rng.random((2, 5, 3, num_experts)), axis=-1)[..., :num_slots]
    unselected = (index[..., None] != np.arange(num_experts)).all(axis=3)
    q[unselected] = np.nan
    selected, vjp = jax.vjp(lambda q: select_experts(q, jnp.asarray(index)), jnp.asarray(q))
    np.testing.assert_array_equal(selected, np.take_along_axis(q, index[..., None], axis=3))
    cotangent = rng.normal(size=selected.shape).astype(np.float32)
    expected = np.zeros_like(q)
    np.put_along_axis(expected, index[..., None], cotangent, axis=3)
    np.testing.assert_array_equal(vjp(jnp.asarray(cotangent))[0], expected)
