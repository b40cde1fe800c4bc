"""Tells how evenly a router uses its experts, in one number and in words."""

import numpy as np

DEAD = 0.01  # share of the uniform load below which an expert counts as dead
OVERLOADED = 0.9  # an expert counts as overloaded beyond this part of the way from the uniform load to all tokens
MAX_WARNINGS = 4  # groups that are named


def balance(load: np.ndarray) -> float:
    """Returns the worst max / mean of a router's load over layers and groups.

    1 is perfect; M / k means that all tokens choose the same experts.

    Args:
      load: [L, G, M] (L layers), share of the tokens that select each expert.
    """
    load = np.asarray(load, np.float64)
    return float(np.max(load.max(-1) / np.maximum(load.mean(-1), 1e-9)))


def router_warnings(load: np.ndarray, top_k: int) -> list[str]:
    """Describes what is wrong with the balance of a learned router.

    An expert is dead if it gets less than 1% of the uniform share k / M, and overloaded if its share is above nine
    tenths of the way from k / M to all tokens.

    Args:
      load: [L, G, M], share of the tokens that select each expert (sums to k over M).
      top_k: k, experts selected per token in each group.

    Returns:
      An empty list where the balance is good, else at most five lines: one for each of the four worst groups (those
      with the most dead experts, then those with the fullest expert), then how many more there are and what to do.
    """
    load = np.asarray(load, np.float64)
    uniform = top_k / load.shape[-1]
    if uniform == 1:
        return []
    dead, overloaded = load < DEAD * uniform, load > uniform + OVERLOADED * (1 - uniform)
    bad = np.argwhere((dead | overloaded).any(-1))
    worst = sorted(bad.tolist(), key=lambda at: (dead[*at].sum(), load[*at].max()), reverse=True)
    lines = []
    for layer, group in worst[:MAX_WARNINGS]:
        faults = []
        for name, mask in (("dead", dead[layer, group]), ("overloaded", overloaded[layer, group])):
            experts = ", ".join(f"expert {m} ({load[layer, group, m]:.1%})" for m in np.flatnonzero(mask))
            faults += [f"{name}: {experts}"] if experts else []
        lines.append(f"router of layer {layer}, group {group}: {'; '.join(faults)}; uniform: {uniform:.1%}")
    more = f"and {len(bad) - MAX_WARNINGS} more groups; " if len(bad) > MAX_WARNINGS else ""
    advice = (
        f"{more}usual in the first steps, while the learning rate rises; if it lasts, raise "
        f"model.attention.router.load_balance_weight or init_std"
    )
    return [*lines, advice] if lines else []
