"""The order in which a causal sequence is dealt out: an early and a late chunk to each device, so that all work alike.

A sequence of S tokens is cut into 2n chunks; device r of n holds chunks r and 2n − 1 − r. A query at position i sees
i + 1 keys, so every device has the same number of (query, key) pairs to compute.
"""

import jax
import jax.numpy as jnp
import numpy as np


def zigzag(x: np.ndarray | jax.Array, n: int, axis: int = 1) -> np.ndarray | jax.Array:
    """Tokens in their natural order → in the order in which a mesh's `context` axis of n devices holds them.

    Cut into 2n chunks, device r of n holds the chunks r and 2n − 1 − r, an early and a late one: with a causal mask all
    devices then have the same work. A layer under a mesh with `context` > 1 takes its tokens in this order, and with
    them `segment_ids` and `positions` where they are given; `natural` undoes it.

    Args:
      x: [B, S, ...]; NumPy arrays stay NumPy's.
      n: devices on `context`; with 1 x is returned as it is.
      axis: that of the tokens.

    Returns:
      x reordered along `axis`; its n equal parts are those of the devices.

    Raises:
      ValueError: S is no multiple of 2n.
    """
    return _take_chunks(x, [chunk for r in range(n) for chunk in (r, 2 * n - 1 - r)], axis) if n > 1 else x


def natural(x: np.ndarray | jax.Array, n: int, axis: int = 1) -> np.ndarray | jax.Array:
    """Tokens in the order of `zigzag` → in their natural order.

    Args:
      x: [B, S, ...], what a layer returns under a mesh with n devices on `context`; NumPy arrays stay NumPy's.
      n: devices on `context`; with 1 x is returned as it is.
      axis: that of the tokens.

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
