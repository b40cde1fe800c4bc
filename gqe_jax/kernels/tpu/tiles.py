"""What every TPU kernel knows of the registers and the matrix unit."""

import jax
import jax.numpy as jnp
from jax import lax


def lane_index(shape: tuple[int, ...]) -> jax.Array:
    """int32 of `shape`: each element's place on the last axis."""
    return lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)


def dot(a: jax.Array, b: jax.Array, *, contract: tuple[int, int], exact: bool) -> jax.Array:
    """Returns the product of two matrices over one axis of each, in float32; `exact`: float32 operands in full."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    precision = lax.Precision.HIGHEST if exact else None
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def finite(x: jax.Array) -> jax.Array:
    """x with 0 for what is NaN or infinite: a matmul multiplies with the zeros of a mask, and 0 · NaN is NaN."""
    return jnp.where(_zero_or_nan(x) == 0.0, x, jnp.zeros_like(x))


def mark_not_finite(k: jax.Array, v: jax.Array) -> jax.Array:
    """Keys [T, D] that are NaN where their values [T, D_v] are not finite.

    Whoever sees such a key gets NaN scores, so that `finite` values hide no fault; the mask hides them from the others.
    """
    mark = _zero_or_nan(v)
    width = k.shape[1]
    if mark.shape[1] != width:
        mark = jnp.sum(mark, axis=1, keepdims=True)
    return (k.astype(jnp.float32) + mark).astype(k.dtype)


def _zero_or_nan(x):
    # As the matrix unit takes it, whose passes over float32 are of bfloat16 parts; float32, as not every vector unit
    # knows bfloat16.
    return x.astype(jnp.bfloat16).astype(jnp.float32) * 0.0
