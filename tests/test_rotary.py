"""Rotary tables and their scalings, against the published formulas in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import spec_numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from gqe_jax.attention import GQAConfig, rotary_tables
from gqe_jax.config import ConfigError, RopeScaling
from gqe_jax.kernels import rotate

POSITIONS = np.array([[0, 1, 2, 31, 100, 1000]])


def frequencies(D, theta):
    return [theta ** (-2 * i / D) for i in range(D // 2)]


def linear(D, theta, scaling, length):
    """Chen et al. 2023, position interpolation: position / factor."""
    return [f / scaling.factor for f in frequencies(D, theta)], 1.0


def dynamic(D, theta, scaling, length):
    """NTK-aware: the base grows so that the lowest frequency is interpolated by the stretch s of the present length,
    s = factor · length / original - (factor - 1), and the highest is left alone: theta · s^(D / (D - 2))."""
    stretch = scaling.factor * max(length, scaling.original_context) / scaling.original_context - (scaling.factor - 1)
    return frequencies(D, theta * stretch ** (D / (D - 2))), 1.0


def llama3(D, theta, scaling, length):
    """Llama 3.1, by wavelength λ: long ones are divided by the factor, short ones left alone, between them a blend
    that is linear in original / λ."""
    result = []
    for f in frequencies(D, theta):
        wavelength = 2 * math.pi / f
        if wavelength < scaling.original_context / scaling.high_freq_factor:
            result.append(f)
        elif wavelength > scaling.original_context / scaling.low_freq_factor:
            result.append(f / scaling.factor)
        else:
            smooth = scaling.original_context / wavelength - scaling.low_freq_factor
            smooth /= scaling.high_freq_factor - scaling.low_freq_factor
            result.append((1 - smooth) * f / scaling.factor + smooth * f)
    return result, 1.0


def yarn(D, theta, scaling, length):
    """Peng et al. 2023, as the published models count: the ramp runs linearly between the (whole) dimensions that turn
    beta_fast and beta_slow times within the original context; cos and sin carry 0.1 ln(factor) + 1."""

    def dimension(turns):  # where original_context · theta^(-2i/D) / 2π = turns
        return D / 2 * math.log(scaling.original_context / (2 * math.pi * turns), theta)

    low, high = max(math.floor(dimension(scaling.beta_fast)), 0), min(math.ceil(dimension(scaling.beta_slow)), D - 1)
    result = []
    for i, f in enumerate(frequencies(D, theta)):
        interpolated = min(max((i - low) / (high - low), 0.0), 1.0)
        result.append(interpolated * f / scaling.factor + (1 - interpolated) * f)
    factor = scaling.attention_factor
    return result, 0.1 * math.log(scaling.factor) + 1 if factor is None else factor


@pytest.mark.parametrize("D", [8, 64, 128])
@pytest.mark.parametrize(
    ("formula", "scaling", "theta"),
    [
        (linear, RopeScaling(kind="linear", factor=4.0), 10_000.0),
        (dynamic, RopeScaling(kind="dynamic", factor=2.0, original_context=256), 10_000.0),
        (dynamic, RopeScaling(kind="dynamic", factor=2.0, original_context=4096), 10_000.0),  # not yet exceeded
        (llama3, RopeScaling(kind="llama3", factor=8.0, original_context=8192), 500_000.0),
        (llama3, RopeScaling(kind="llama3", factor=32.0, original_context=512, low_freq_factor=2.0), 500_000.0),
        (yarn, RopeScaling(kind="yarn", factor=4.0, original_context=2048), 10_000.0),
        (yarn, RopeScaling(kind="yarn", factor=16.0, original_context=512, beta_fast=16.0, beta_slow=2.0), 10_000.0),
        (yarn, RopeScaling(kind="yarn", factor=4.0, original_context=2048, attention_factor=0.7), 1_000_000.0),
        (lambda D, theta, scaling, length: (frequencies(D, theta), 1.0), RopeScaling(), 10_000.0),
    ],
)
def test_tables_equal_the_published_formulas(D, formula, scaling, theta):
    """To the accuracy of a float32 angle: 1000 radians are known to 6e-5."""
    cos, sin = rotary_tables(jnp.asarray(POSITIONS), D, theta, scaling)
    frequency, amplitude = formula(D, theta, scaling, POSITIONS.max() + 1)
    angle = POSITIONS[..., None] * np.array(frequency)
    assert cos.dtype == sin.dtype == jnp.float32 and cos.shape == (1, POSITIONS.shape[1], D // 2)
    np.testing.assert_allclose(cos, amplitude * np.cos(angle), atol=5e-4)
    np.testing.assert_allclose(sin, amplitude * np.sin(angle), atol=5e-4)
    np.testing.assert_allclose(sin[:, :3], amplitude * np.sin(angle[:, :3]), atol=2e-6)


def test_scalings_by_one_change_nothing():
    """factor = 1 stretches nothing, in any of the forms."""
    want = rotary_tables(jnp.arange(9)[None], 16, 10_000.0)
    for kind in ("linear", "dynamic", "llama3", "yarn"):
        got = rotary_tables(jnp.arange(9)[None], 16, 10_000.0, RopeScaling(kind=kind, original_context=64))
        np.testing.assert_allclose(got, want, atol=1e-6, err_msg=kind)


@settings(deadline=None, max_examples=8)
@given(st.integers(1, 3), st.integers(1, 7), st.sampled_from([2, 4, 64]), st.booleans(), st.integers(0, 100))
def test_rotation_is_that_of_points_in_the_plane(batch, length, D, per_row, seed):
    """rotate-half: dimensions i and i + D/2 are one complex number, multiplied by e^{i · angle}."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, length, 3, D)).astype(np.float32)
    positions = rng.integers(0, 500, (batch if per_row else 1, length))
    got = rotate(jnp.asarray(x), *rotary_tables(jnp.asarray(positions), D, 10_000.0))
    rows = np.broadcast_to(positions, (batch, length))
    want = np.stack([spec_numpy.rotary(x[b].astype(np.float64), rows[b], 10_000.0) for b in range(batch)])
    np.testing.assert_allclose(got, want, atol=3e-4)


def test_scores_depend_on_the_distance_alone():
    """What makes the embedding relative: shifting both positions leaves every product of a query and a key."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 6, 1, 8)).astype(np.float32)

    def scores(start):
        tables = rotary_tables(start + jnp.arange(6)[None], 8, 10_000.0)
        return np.einsum("bshd,bthd->bst", rotate(q, *tables), rotate(k, *tables))

    np.testing.assert_allclose(scores(40), scores(0), atol=1e-4)


def test_options_that_do_not_fit_are_refused():
    """By field, value, rule and remedy."""
    with pytest.raises(ConfigError, match=r"rope_scaling.factor=0.5 must be at least 1"):
        RopeScaling(kind="linear", factor=0.5)
    with pytest.raises(ConfigError, match=r"low_freq_factor=4.0 must be below high_freq_factor=4.0"):
        RopeScaling(kind="llama3", low_freq_factor=4.0)
    with pytest.raises(ConfigError, match=r"rope_scaling.kind='yarn' has nothing to scale, since rope_theta=None"):
        GQAConfig(num_query_heads=2, num_kv_heads=1, rope_theta=None, rope_scaling=RopeScaling(kind="yarn"))
