"""Statistics of studies against tables, worked examples and simulated studies whose truth is known."""

import math

import numpy as np
import pytest
from scipy import stats

from gqe_jax.config import ConfigError
from gqe_jax.study.statistics import mean_interval, paired_differences

STUDIES, SEEDS = 1000, 5


def studies(rng, arms, *, spread=0.004, seed_spread=0.05):
    """Simulated studies: each seed shifts all arms alike, by far more than the arms' own noise and means."""
    for _ in range(STUDIES):
        shift = rng.normal(0, seed_spread, SEEDS)
        yield {
            arm: dict(enumerate(1.3 + mean + shift + rng.normal(0, spread / math.sqrt(2), SEEDS)))
            for arm, mean in arms.items()
        }


def within_chance(count, rate):
    """Whether `count` of `STUDIES` is what a rate gives, but for one draw in 10,000."""
    return abs(count - STUDIES * rate) <= 3.9 * math.sqrt(STUDIES * rate * (1 - rate))


def test_interval_of_a_mean():
    """t with 4 degrees of freedom has its 97.5% point at 2.776 (every textbook's table), with 1 at 12.706."""
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    found = mean_interval(values)
    assert found.mean == 3.0
    assert found.half_width == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5), rel=1e-3)
    assert mean_interval([1.0, 2.0]).half_width == pytest.approx(12.706 * 0.5, rel=1e-4)


def test_planted_differences_are_found_at_the_stated_rate():
    """An arm that is worse by 0.006 is resolved as often as the noncentral t distribution says, and the 95% interval of
    the difference holds the truth in 95% of studies: the seeds' common shift, ten times as large, is paired away."""
    rng, planted, spread = np.random.default_rng(0), 0.006, 0.004
    found = [
        paired_differences(losses, "a")["b"] for losses in studies(rng, {"a": 0.0, "b": planted}, spread=spread)
    ]
    t = stats.t.ppf(0.975, SEEDS - 1)
    noncentrality = planted / spread * math.sqrt(SEEDS)
    power = stats.nct.sf(t, SEEDS - 1, noncentrality) + stats.nct.cdf(-t, SEEDS - 1, noncentrality)
    assert within_chance(sum(each.resolved for each in found), power)
    covered = sum(abs(each.interval.mean - planted) <= each.interval.half_width for each in found)
    assert within_chance(covered, 0.95)
    assert all(each.interval.mean > 0 for each in found if each.resolved)


def test_none_are_found_in_noise():
    """Of studies of eight arms that are all the same, at most 5% call any difference resolved."""
    arms = dict.fromkeys("abcdefghi", 0.0)
    wrong = 0
    for losses in studies(np.random.default_rng(1), arms):
        wrong += any(each.resolved for each in paired_differences(losses, "a").values())
    assert wrong <= 0.05 * STUDIES + 3.9 * math.sqrt(STUDIES * 0.05 * 0.95)


def test_a_large_difference_among_many_arms_is_found():
    """Correction for eight comparisons leaves a difference of ten standard deviations resolved, and alone."""
    rng = np.random.default_rng(2)
    arms = dict.fromkeys("abcdefghi", 0.0) | {"e": 0.04}
    for losses in [next(studies(rng, arms)) for _ in range(20)]:
        found = paired_differences(losses, "a")
        assert found["e"].resolved


def test_holm_correction():
    """Worked by hand: of three p-values the smallest counts three times, the next twice, and none below one before."""
    rng = np.random.default_rng(3)
    losses = next(studies(rng, {"a": 0.0, "b": 0.002, "c": 0.01, "d": 0.004}))
    found = paired_differences(losses, "a")
    plain = {arm: stats.ttest_rel(list(losses[arm].values()), list(losses["a"].values())).pvalue for arm in "bcd"}
    first, second, third = sorted(plain, key=plain.get)
    expected = {first: min(1, 3 * plain[first])}
    expected[second] = max(expected[first], min(1, 2 * plain[second]))
    expected[third] = max(expected[second], plain[third])
    assert {arm: each.p for arm, each in found.items()} == pytest.approx(expected, rel=1e-9)
    assert {arm: each.resolved for arm, each in found.items()} == {arm: p <= 0.05 for arm, p in expected.items()}


def test_a_copy_of_the_reference_does_not_differ():
    """Equal losses have no spread: p is 1, not a division by zero. A constant gap without spread is certain."""
    base = {0: 1.3, 1: 1.4}
    apart = {seed: loss + 0.25 for seed, loss in base.items()}
    found = paired_differences({"a": base, "b": dict(base), "c": apart}, "a")
    assert not found["b"].resolved and found["b"].p == 1.0
    assert found["c"].resolved and found["c"].interval.mean == pytest.approx(0.25)


def test_unequal_seeds_are_refused():
    """A difference of unlike seeds is no difference of arms; the message names both sets and what to do."""
    with pytest.raises(ConfigError, match=r"arm b has the seeds 0, 2, the reference a 0, 1: .*--seeds"):
        paired_differences({"a": {0: 1.3, 1: 1.4}, "b": {0: 1.3, 2: 1.4}}, "a")


def test_one_seed_is_refused():
    """One loss has no spread, and so no interval."""
    with pytest.raises(ConfigError, match=r"1 seed\(s\) give no interval: take at least two"):
        paired_differences({"a": {0: 1.3}, "b": {0: 1.4}}, "a")
