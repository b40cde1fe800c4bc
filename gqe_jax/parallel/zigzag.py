"""The order in which a causal sequence is dealt out: an early and a late chunk to each device, so that all work alike.

A sequence of S tokens is cut into 2n chunks; device r of n holds chunks r and 2n − 1 − r. A query at position i sees
i + 1 keys, so every device has the same number of (query, key) pairs to compute.
"""

import jax
import jax.numpy as jnp
import numpy as np


def zigzag(x: np.ndarray | jax.Array, n: int, axis: int = 1) -> np.ndarray | jax.Array:
    """Natural order → the order whose n equal parts are those of the n devices. Length a multiple of 2n."""
    return _take_chunks(x, [chunk for r in range(n) for chunk in (r, 2 * n - 1 - r)], axis) if n > 1 else x


def natural(x: np.ndarray | jax.Array, n: int, axis: int = 1) -> np.ndarray | jax.Array:
    """The reverse of `zigzag`."""
    order = [*range(0, 2 * n, 2), *range(2 * n - 1, 0, -2)]
    return _take_chunks(x, order, axis) if n > 1 else x


def _take_chunks(x, order, axis):
    if x.shape[axis] % len(order):
        raise ValueError(
            f"an axis of {x.shape[axis]} tokens cannot be cut into {len(order)} equal chunks, two for each device: "
            f"its length must be a multiple of {len(order)}"
        )
    library = np if isinstance(x, np.ndarray) else jnp
    chunks = library.split(x, len(order), axis=axis)
    return library.concatenate([chunks[i] for i in order], axis=axis)
