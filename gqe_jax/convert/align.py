"""Turns that bring the KV heads of a group close to each other and leave what the layer computes as it is.

A layer does not change if a head's values are turned by any orthogonal matrix and its rows of W_o are turned back, nor
if keys and queries are turned alike: by any orthogonal matrix without a rotary embedding, by a rotation of each plane
(i, i + D/2) with one, for the embedding rotates the same planes (arXiv 2412.20677).

All that is needed of the heads' outputs A_h [tokens, D] are their pair moments A_hᵀ A_h'.
"""

from collections.abc import Callable
from typing import TypeVar

import numpy as np

ROUNDS = 100
LEAST_FALL = 1e-12  # of the objective in a round, relative to the energy Σ |A_h|²

Turns = TypeVar("Turns", bound=np.ndarray)


def pair_moments(moments: np.ndarray, kernel: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """A_hᵀ A_h' of all pairs of heads A_h = x W_h + b_h.

    Args:
      moments: Σ (x, 1)(x, 1)ᵀ over tokens, float64 [d + 1, d + 1].
      kernel: W, float64 [d, G, D].
      bias: b, float64 [G, D], or None.

    Returns:
      float64 [G, G, D, D].
    """
    last = np.zeros(kernel.shape[1:]) if bias is None else bias
    affine = np.concatenate([kernel, last[None]])
    flat = affine.reshape(len(affine), -1)
    moments = (flat.T @ moments @ flat).reshape(affine.shape[1:] * 2)
    return moments.transpose(0, 2, 1, 3)


def orthogonal_turns(pairs: np.ndarray) -> np.ndarray:
    """Generalised Procrustes: Q_h in O(D), reflections among them, that minimise Σ_h |A_h Q_h − mean|².

    The first round turns all heads towards the first one, the others towards the mean of the turned heads.

    Args:
      pairs: A_hᵀ A_h' of R heads, float64 [R, R, D, D].

    Returns:
      float64 [R, D, D], the best of all rounds, no turn at all among them.
    """
    none = np.broadcast_to(np.eye(pairs.shape[-1]), pairs.shape[1:])
    first = _nearest_orthogonal(pairs[:, 0])
    first[0] = none[0]

    def distance(turns: np.ndarray) -> float:
        return _distance(np.einsum("hhaa->", pairs), np.einsum("hax,hiab,ibx->", turns, pairs, turns, optimize=True),
                         len(pairs))  # fmt: skip

    def round_of(turns: np.ndarray) -> np.ndarray:
        return _nearest_orthogonal(np.einsum("hiab,ibx->hax", pairs, turns, optimize=True))

    return _best_of_rounds(none, first, round_of, distance, np.einsum("hhaa->", pairs))


def plane_turns(pairs: np.ndarray) -> np.ndarray:
    """Returns the same with rotations of the planes (i, i + D/2) alone: head h's plane, as a complex number, times the
    result.

    Args:
      pairs: as in `orthogonal_turns`.

    Returns:
      complex128 [R, D/2], of absolute value 1.
    """
    planes = planes_of(pairs)
    energy = np.einsum("hhi->", planes).real

    def distance(turns: np.ndarray) -> float:
        return _distance(energy, np.einsum("hi,hji,ji->", turns.conj(), planes, turns).real, len(pairs))

    def round_of(turns: np.ndarray) -> np.ndarray:
        return _unit(np.einsum("hji,ji->hi", planes, turns))

    return _best_of_rounds(np.ones(planes.shape[1:], complex), _unit(planes[:, 0]), round_of, distance, energy)


def planes_of(pairs: np.ndarray) -> np.ndarray:
    """Σ conj(z_h) z_h' over tokens of z = a_i + 𝕚 a_{i + D/2}, complex128 [R, R, D/2], from pairs [R, R, D, D]."""
    half = pairs.shape[-1] // 2
    within, across = (np.diagonal(pairs, offset, -2, -1) for offset in (0, half))
    back = np.diagonal(pairs, -half, -2, -1)
    return within[..., :half] + within[..., half:] + 1j * (across - back)


def turn_planes(x: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """x [..., D], whose planes (i, i + D/2) are multiplied by complex numbers [..., D/2]."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * turns
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _distance(energy: float, of_sum: float, count: int) -> float:
    """Σ_h |a_h − mean|² from Σ_h |a_h|² and |Σ_h a_h|²."""
    return float(energy - of_sum / count)


def _best_of_rounds(
    none: np.ndarray,
    first: np.ndarray,
    round_of: Callable[[np.ndarray], np.ndarray],
    distance: Callable[[np.ndarray], float],
    energy: float,
) -> np.ndarray:
    best, least = none, distance(none)
    turns, last = first, np.inf
    for _ in range(ROUNDS):
        now = distance(turns)
        if now < least:
            best, least = turns, now
        if last - now < LEAST_FALL * energy:
            break
        turns, last = round_of(turns), now
    return best


def _nearest_orthogonal(matrices: np.ndarray) -> np.ndarray:
    """U Vᵀ of the singular value decomposition of each [D, D]."""
    u, _, v = np.linalg.svd(matrices)
    return u @ v


def _unit(z: np.ndarray) -> np.ndarray:
    """z / |z|; 1 where z is 0."""
    return np.exp(1j * np.angle(z))
