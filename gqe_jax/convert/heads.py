"""Which k query heads of each KV group, alone and with an output projection of their own, predict a target best."""

import itertools
import math

import numpy as np

from gqe_jax.convert.refit import RIDGE, Regression

MOST_COMBINATIONS = 256  # up to here all are tried
SWEEPS = 3
LEAST_GAIN = 1e-9  # of the target's energy, for which a choice is changed


def best_heads(sums: Regression, groups: int, members: int, keep: int) -> np.ndarray:
    """Returns the heads to keep.

    The measure is min over W of |Y − F_chosen W|² + λ |W|², λ = RIDGE · mean diagonal of FᵀF of the chosen heads. Ties
    go to the lower heads. Beyond MOST_COMBINATIONS one group after the other is changed, from the lowest heads on.

    Args:
      sums: of all heads' outputs, features ordered g, m, D, and of the target.
      groups, members: G and M.
      keep: k, at most M.

    Returns:
      int64 [G, k], ascending in each group.
    """
    combinations = list(itertools.combinations(range(members), keep))
    if len(combinations) ** groups <= MOST_COMBINATIONS:
        every = list(itertools.product(combinations, repeat=groups))
        costs = [_cost(sums, chosen, members) for chosen in every]
        best = every[_first_least(costs, LEAST_GAIN * sums.energy)]
        return np.array(best)
    chosen = [combinations[0]] * groups
    cost = _cost(sums, chosen, members)
    for _ in range(SWEEPS):
        before = list(chosen)
        for group in range(groups):
            for option in combinations:
                other = [*chosen[:group], option, *chosen[group + 1 :]]
                now = _cost(sums, other, members)
                if now < cost - LEAST_GAIN * sums.energy:
                    chosen, cost = other, now
        if chosen == before:
            break
    return np.array(chosen)


def _first_least(costs: list[float], tolerance: float) -> int:
    best = 0
    for number, cost in enumerate(costs):
        if cost < costs[best] - tolerance:
            best = number
    return best


def _cost(sums: Regression, chosen, members: int) -> float:
    dim = len(sums.gram) // (len(chosen) * members)
    heads = [group * members + head for group, own in enumerate(chosen) for head in own]
    rows = (np.array(heads)[:, None] * dim + np.arange(dim)).ravel()
    gram, cross = sums.gram[np.ix_(rows, rows)], sums.cross[rows]
    pull = RIDGE * np.trace(gram) / len(rows)
    if not pull:
        return math.inf
    half = np.linalg.solve(np.linalg.cholesky(gram + pull * np.eye(len(rows))), cross)
    return sums.energy - float(np.sum(half * half))
