"""Weighted mixtures: which prepared sets, and which of them gives the row at each position of the training stream."""

from __future__ import annotations

import dataclasses
import heapq
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from gqe_jax.config import ConfigError

MIXTURE_FILE = "mixture.json"

_LONGEST_PERIOD = 10**6  # positions; a table of them is held


class Schedule:
    """Position p of a mixture's stream → (number of the set, how many rows that set has given before).

    In every prefix of n positions set i has given n · quotas[i] / Σ quotas rows, to within less than one row: row j of
    a set with share w has the window [floor(j / w), ceil((j + 1) / w)) of positions, and the row whose window closes
    first is taken (Pfair scheduling: Baruah et al. 1996, Proportionate Progress, Algorithmica 15). The order repeats
    after Σ quotas positions, so any position is looked up at once.
    """

    def __init__(self, quotas: Sequence[int]):
        self._quotas = list(quotas)
        self._order, self._before = _one_period(self._quotas)

    def __getitem__(self, position: int) -> tuple[int, int]:
        cycle, place = divmod(position, len(self._order))
        chosen = int(self._order[place])
        return chosen, cycle * self._quotas[chosen] + int(self._before[place])


def _one_period(quotas: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(set at each position, rows it has given before)."""
    period = sum(quotas)
    order, before = np.empty(period, np.int32), np.empty(period, np.int32)
    released = [(0, i, 0) for i in range(len(quotas))]  # (first position of the window, set, number of the row)
    ready: list[tuple[int, int, int]] = []  # (end of the window, set, number of the row)
    for position in range(period):
        while released and released[0][0] <= position:
            _, i, number = heapq.heappop(released)
            heapq.heappush(ready, (-(-(number + 1) * period // quotas[i]), i, number))
        _, i, number = heapq.heappop(ready)
        order[position], before[position] = i, number
        heapq.heappush(released, ((number + 1) * period // quotas[i], i, number + 1))
    return order, before


@dataclasses.dataclass(frozen=True)
class Part:
    """A prepared set of a mixture. weight: its share of the rows, to be divided by the sum of all weights."""

    path: str
    weight: Fraction


def parse_mixture(text: str) -> list[Part]:
    """The parts of "DIR:WEIGHT,DIR:WEIGHT"; a weight is a decimal number or a fraction. Raises ConfigError."""
    parts = []
    for item in text.split(","):
        path, colon, weight = item.strip().rpartition(":")
        try:
            parts.append(Part(path, Fraction(weight)))
            usable = bool(path and colon) and parts[-1].weight > 0
        except (ValueError, ZeroDivisionError):
            usable = False
        if not usable:
            raise ConfigError(
                f"data.mixture={text!r} cannot be read at {item!r}: write prepared folders with positive weights, such "
                "as 'data/web:0.7,data/books:0.3'"
            )
    _refuse_repeated(text, [part.path for part in parts])
    return parts


def _refuse_repeated(text: str, paths: list[str]) -> None:
    repeated = sorted({path for path in paths if paths.count(path) > 1})
    if repeated:
        raise ConfigError(f"data.mixture={text!r} names {repeated[0]!r} more than once: add up its weights")


def quotas(parts: Sequence[Part]) -> list[int]:
    """The weights as the smallest whole numbers in the same proportion. Raises ConfigError if they are too fine."""
    denominator = math.lcm(*(part.weight.denominator for part in parts))
    numbers = [int(part.weight * denominator) for part in parts]
    common = math.gcd(*numbers)
    numbers = [number // common for number in numbers]
    if sum(numbers) > _LONGEST_PERIOD:
        shown = ", ".join(str(part.weight) for part in parts)
        raise ConfigError(
            f"the mixture's weights {shown} are exact only over {sum(numbers):,} rows, and at most {_LONGEST_PERIOD:,} "
            "are allowed: round them, for instance to four digits after the point that add up to 1"
        )
    return numbers


def rounded_shares(shares: Sequence[float]) -> list[Fraction]:
    """Shares as whole numbers that add up to about 100,000, in their proportions; none is 0."""
    total = math.fsum(shares)
    units = [max(round(share / total * 10**5), 1) for share in shares]
    return [Fraction(unit, sum(units)) for unit in units]


def write_mixture(directory: Path, name: str, parts: Sequence[Part]) -> None:
    """Writes `directory/mixture.json`, which makes the folder one that `data.path` can name; paths are inside it."""
    content = {"name": name, "sets": [{"path": part.path, "weight": str(part.weight)} for part in parts]}
    (directory / MIXTURE_FILE).write_text(json.dumps(content, indent=1) + "\n")


def read_mixture(directory: Path) -> list[Part] | None:
    """The parts that `directory/mixture.json` names; None if there is no such file. Raises ConfigError."""
    path = directory / MIXTURE_FILE
    if not path.exists():
        return None
    try:
        sets = json.loads(path.read_text())["sets"]
        return [Part(str(directory / entry["path"]), Fraction(entry["weight"])) for entry in sets]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}): delete the folder and prepare it again with `gqe prepare`"
        ) from error
