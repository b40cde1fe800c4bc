"""Means with t-intervals, differences paired by seed, and which of several differences are resolved."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from gqe_jax.config import ConfigError

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95% interval by Student's t: mean ± half_width."""

    mean: float
    half_width: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean over seeds of one arm's loss minus the reference's.

    Attributes:
      interval: of the mean, at 95% for this arm alone.
      p: of no difference, two-sided, after Holm's correction over all arms that were compared.
      resolved: p is at most 0.05. So of studies without any difference, at most 5% call one resolved.
    """

    interval: Interval
    p: float
    resolved: bool


def mean_interval(values: Sequence[float]) -> Interval:
    """Computes the mean and t · s / √n, with n − 1 degrees of freedom.

    Raises:
      ConfigError: fewer than two values.
    """
    n = len(values)
    if n < 2:
        raise ConfigError(f"{n} seed(s) give no interval: take at least two, and train the cells that they name")
    quantile = stats.t.ppf((1 + LEVEL) / 2, n - 1)
    return Interval(float(np.mean(values)), float(quantile * np.std(values, ddof=1) / math.sqrt(n)))


def paired_differences(losses: Mapping[str, Mapping[int, float]], reference: str) -> dict[str, Difference]:
    """Compares every arm with the reference, seed by seed: cells of a seed share initial draws and order of rows.

    Args:
      losses: arm → seed → loss.
      reference: the arm that is subtracted.

    Raises:
      ConfigError: an arm has other seeds than the reference, or there are fewer than two.
    """
    base = losses[reference]
    for arm, by_seed in losses.items():
        if by_seed.keys() != base.keys():
            raise ConfigError(
                f"arm {arm} has the seeds {_listed(by_seed)}, the reference {reference} {_listed(base)}: only equal "
                f"seeds can be paired; train the missing cells, or choose those that all arms have with --seeds"
            )
    gaps = {arm: [by_seed[seed] - base[seed] for seed in base] for arm, by_seed in losses.items() if arm != reference}
    intervals = {arm: mean_interval(values) for arm, values in gaps.items()}
    adjusted = _holm({arm: _p_value(values) for arm, values in gaps.items()})
    return {arm: Difference(intervals[arm], adjusted[arm], adjusted[arm] <= 1 - LEVEL) for arm in gaps}


def _p_value(values: Sequence[float]) -> float:
    """P of a mean as far from 0 as this, by Student's t; 1 where all values are 0, as of an arm beside its copy."""
    spread = np.std(values, ddof=1) / math.sqrt(len(values))
    if spread == 0:
        return 0.0 if np.any(values) else 1.0
    return float(2 * stats.t.sf(abs(np.mean(values)) / spread, len(values) - 1))


def _holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction (1979): the i-th smallest of m times m − i + 1, never below one before it."""
    adjusted, largest = {}, 0.0
    for rank, arm in enumerate(sorted(p, key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[arm]))
        adjusted[arm] = largest
    return adjusted


def _listed(seeds: Mapping[int, float]) -> str:
    return ", ".join(map(str, sorted(seeds))) or "none"
