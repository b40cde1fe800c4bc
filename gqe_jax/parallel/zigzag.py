"""Orders a causal sequence so that each device gets an early and a late chunk, and all have the same work.

A sequence of S tokens is cut into 2n chunks; device r of n holds chunks r and 2n − 1 − r. A query at position i sees
i + 1 keys, so every device has the same number of (query, key) pairs to compute.
"""

import jax
import jax.numpy as jnp
import numpy as np


def zigzag(x: np.ndarray | jax.Array, n: int, axis: int = 1) -> np.ndarray | jax.Array:
    """Reorders tokens from their natural order to that in which n devices on a mesh's `context` axis hold them.

    A layer under a mesh with `context` > 1 takes its tokens in this order, and with them `segment_ids` and `positions`
    where they are given; `natural` undoes it.

    Args:
      x: [B, S, ...]; NumPy arrays stay NumPy's.
      n: devices on `context`; with 1 x is returned as it is.
      axis: the axis of the tokens.

    Returns:
      x reordered along `axis`; the r-th of its n equal parts is that of device r.

    Raises:
      ValueError: S is no multiple of 2n.
    """
    return _take_chunks(x, [chunk for r in range(n) for chunk in (r, 2 * n - 1 - r)], axis) if n > 1 else x


def natural(x: np.ndarray | jax.Array, n: int, axis: int = 1) -> np.ndarray | jax.Array:
    """Reorders tokens from the order of `zigzag` to their natural order.

    Args:
      x: [B, S, ...], what a layer returns under a mesh with n devices on `context`; NumPy arrays stay NumPy's.
      n: devices on `context`; with 1 x is returned as it is.
      axis: the axis of the tokens.

    Returns:
      x reordered along `axis`.

    Raises:
      ValueError: S is no multiple of 2n.
    """
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
