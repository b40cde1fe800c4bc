"""Which KV heads to pool into one: the partition that loses least, after AsymGQA (arXiv 2406.14963).

The paper's measure and search are not public; these are ours. A partition P costs

    J(P) = Σ over groups g of (1 / |g|) Σ over pairs i < j in g of Δ_ij        Δ_ij = |a_i − a_j|² / Σ_h |a_h|²

with a_h what head h gives: the share of the energy that is lost when each group is replaced by its mean. So groups of
different size are compared fairly.
"""

from collections.abc import Callable, Sequence

import numpy as np

from gqe_jax.convert.align import planes_of

MOST_EXACT = 12  # heads up to which all partitions are compared
STARTS = 19  # random ones of the descent, beside the neighbours
LEAST_GAIN = 1e-12  # of J, for which a step is taken

Groups = list[np.ndarray]
"""The heads of each group, ascending; groups in the order of their smallest head."""

Overlap = Callable[[np.ndarray], np.ndarray]
"""A_hᵀ A_h' of all pairs, float64 [n, n, D, D] → the largest ⟨a_h, a_h'⟩ that the allowed turns reach, [n, n]."""


def unturned(pairs: np.ndarray) -> np.ndarray:
    """Returns the overlap of heads as they are."""
    return np.trace(pairs, axis1=-2, axis2=-1)


def turned(pairs: np.ndarray) -> np.ndarray:
    """Returns the overlap where a head may be turned by any orthogonal matrix: the nuclear norm."""
    return np.linalg.svd(pairs, compute_uv=False).sum(axis=-1)


def turned_in_planes(pairs: np.ndarray) -> np.ndarray:
    """Returns the overlap where the planes (i, i + D/2) of a head may be rotated."""
    return np.abs(planes_of(pairs)).sum(axis=-1)


def distances(pairs: np.ndarray, overlap: Overlap) -> np.ndarray:
    """Δ, float64 [n, n], of heads with the pair moments [n, n, D, D] of `align.pair_moments`; 0 if all heads are 0."""
    energy = np.diagonal(unturned(pairs))
    gaps = energy[:, None] + energy - 2 * overlap(pairs)
    np.fill_diagonal(gaps, 0.0)
    return np.maximum(gaps, 0.0) / (energy.sum() or 1.0)


def cost(gaps: np.ndarray, groups: Sequence[np.ndarray]) -> float:
    """J of a partition, from Δ."""
    return float(sum(gaps[np.ix_(own, own)].sum() / (2 * len(own)) for own in groups))


def neighbours(heads: int, groups: int) -> Groups:
    """Heads in their order, in groups as equal as can be, the larger ones first."""
    return np.array_split(np.arange(heads), groups)


def best_groups(
    gaps: np.ndarray, groups: int, rng: np.random.Generator, *, most: int | None = None, start: Groups | None = None
) -> Groups:
    """Returns the partition of n heads into `groups` groups with the least J.

    Up to MOST_EXACT heads it is the optimum. Beyond, steepest descent from the neighbours and from STARTS random
    partitions: a step moves one head, where sizes may differ, or swaps two; of equal steps the first in this order and
    in the heads' order is taken.

    Args:
      gaps: Δ, float64 [n, n].
      groups: a number from 1 to n.
      rng: of the random starts.
      most: heads of the largest group; None: all groups have the same size, which `groups` must allow.
      start: a further partition to descend from.
    """
    heads = len(gaps)
    if heads <= MOST_EXACT:
        return _ordered(_exact(gaps, groups, *((1, most) if most else (heads // groups,) * 2)))
    starts = [neighbours(heads, groups), *([start] if start else [])]
    starts += [np.array_split(rng.permutation(heads), groups) for _ in range(STARTS)]
    found = [_descended(gaps, own, most) for own in starts]
    return _ordered(found[int(np.argmin([cost(gaps, own) for own in found]))])


def _ordered(groups: Sequence[np.ndarray]) -> Groups:
    return sorted((np.sort(own) for own in groups), key=lambda own: own[0])


def _exact(gaps: np.ndarray, groups: int, least: int, most: int) -> Groups:
    """Dynamic programming over subsets: the best partition of a subset takes one group, with its lowest head, away."""
    heads = len(gaps)
    members = np.arange(2**heads)[:, None] >> np.arange(heads) & 1
    sizes = members.sum(axis=1)
    costs = np.einsum("si,ij,sj->s", members, gaps, members, optimize=True) / (2 * np.maximum(sizes, 1))
    costs[(sizes < least) | (sizes > most)] = np.inf
    best = np.full((groups + 1, len(costs)), np.inf)  # of a subset, in so many groups
    taken = np.zeros(best.shape, np.int64)  # the group with the subset's lowest head
    best[0, 0] = 0.0
    for subset in range(1, len(costs)):
        lowest = subset & -subset
        options = np.array([lowest])
        for head in np.flatnonzero(members[subset ^ lowest]):
            options = np.concatenate([options, options | 1 << head])
        values = costs[options] + best[:-1, subset ^ options]
        first = values.argmin(axis=1)
        best[1:, subset], taken[1:, subset] = values[np.arange(groups), first], options[first]
    found, subset = [], len(costs) - 1
    for count in range(groups, 0, -1):
        found.append(np.flatnonzero(members[taken[count, subset]]))
        subset ^= taken[count, subset]
    return found


def _descended(gaps: np.ndarray, start: Sequence[np.ndarray], most: int | None) -> Groups:
    heads, groups = len(gaps), len(start)
    label = np.zeros(heads, np.int64)
    for group, own in enumerate(start):
        label[own] = group
    here = np.arange(heads)
    while True:
        member = (label[:, None] == np.arange(groups)).astype(np.float64)
        size, to = member.sum(axis=0), gaps @ member  # Σ of Δ from a head to each group, [n, G]
        within = (member * to).sum(axis=0) / 2
        now, without = within / size, within[label] - to[here, label]
        moves = np.full((heads, groups), np.inf)
        if most is not None:
            left = without / np.maximum(size[label] - 1, 1)
            moves = (left - now[label])[:, None] + (within + to) / (size + 1) - now
            moves[(member > 0) | (size[label] == 1)[:, None] | (size >= most)] = np.inf
        one = (without[:, None] + to.T[label] - gaps) / size[label][:, None]  # J of i's group with j in its place
        swaps = one + one.T - now[label][:, None] - now[label]
        swaps[(label[:, None] == label) | (here[:, None] >= here)] = np.inf
        steps = np.concatenate([moves.ravel(), swaps.ravel()])
        best = int(steps.argmin())
        if not steps[best] < -LEAST_GAIN:
            return [np.flatnonzero(label == group) for group in range(groups)]
        if best < moves.size:
            label[best // groups] = best % groups
        else:
            pair = list(divmod(best - moves.size, heads))
            label[pair] = label[pair[::-1]]
