"""Weighted mixtures: which prepared sets, and which of them gives the row at each position of the training stream."""

from __future__ import annotations

import collections
import dataclasses
import heapq
import json
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from gqe_jax.checked_json import OBJECTS, TEXT, check_record, read_object, shown
from gqe_jax.config import ConfigError
from gqe_jax.safe_names import checked_name

MIXTURE_FILE = "mixture.json"

_LONGEST_PERIOD = 10**6  # positions; a table of them is held
# Fraction would also take "1e999999999", a number of a billion digits.
_WEIGHT = re.compile(r"(?=\.?\d)\d{0,12}(\.\d{0,30})?(e[+-]?\d{1,2})?|\d{1,12}/\d{1,12}", re.ASCII | re.IGNORECASE)
_WEIGHTS = "a positive decimal number or fraction"
_AGAIN = "delete the folder and prepare it again with `gqe prepare`"


class MixtureSchedule:
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

    def given(self, position: int) -> np.ndarray:
        """Says how many rows each set has given before a position, [sets]."""
        cycle, place = divmod(position, len(self._order))
        return cycle * np.array(self._quotas) + np.bincount(self._order[:place], minlength=len(self._quotas))


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
class MixturePart:
    """A prepared set of a mixture; `weight` divided by the sum of all weights is its share of the rows."""

    path: str
    weight: Fraction


def parse_mixture(text: str) -> list[MixturePart]:
    """Returns the parts of "DIR:WEIGHT,DIR:WEIGHT"; a weight is a decimal number or a fraction. Raises ConfigError."""
    parts = []
    for item in text.split(","):
        path, _, written = item.strip().rpartition(":")
        weight = _weight(written)
        if not path or weight is None:
            raise ConfigError(
                f"data.mixture={shown(text)} cannot be read at {shown(item)}: write prepared folders, each with "
                f"{_WEIGHTS}, such as 'data/web:0.7,data/books:0.3'"
            )
        parts.append(MixturePart(path, weight))
    _refuse_repeated(f"data.mixture={shown(text)}", parts)
    return parts


def _weight(value: Any) -> Fraction | None:
    """Returns the number that a text, or a number of JSON, stands for; None where it is none above 0."""
    text = str(value) if type(value) in (str, int, float) else ""
    try:
        return Fraction(text) or None if _WEIGHT.fullmatch(text) else None
    except ZeroDivisionError:
        return None


def _refuse_repeated(origin: str, parts: Sequence[MixturePart]) -> None:
    (path, count), *_ = collections.Counter(part.path for part in parts).most_common(1)
    if count > 1:
        raise ConfigError(f"{origin} names {shown(path)} more than once: add up its weights")


def quotas(parts: Sequence[MixturePart]) -> list[int]:
    """Returns the weights as the smallest whole numbers in the same proportion. Raises ConfigError if they are too
    fine."""
    denominator = math.lcm(*(part.weight.denominator for part in parts))
    numbers = [int(part.weight * denominator) for part in parts]
    common = math.gcd(*numbers)
    numbers = [number // common for number in numbers]
    if sum(numbers) > _LONGEST_PERIOD:
        weights = ", ".join(str(part.weight) for part in parts[:20])
        raise ConfigError(
            f"the mixture's weights {weights} are exact only over {sum(numbers):,} rows, and at most "
            f"{_LONGEST_PERIOD:,} are allowed: round them, for instance to four digits after the point that add up to 1"
        )
    return numbers


def rounded_shares(shares: Sequence[float]) -> list[Fraction]:
    """Shares as whole numbers that add up to about 100,000, in their proportions; none is 0."""
    total = math.fsum(shares)
    units = [max(round(share / total * 10**5), 1) for share in shares]
    return [Fraction(unit, sum(units)) for unit in units]


def write_mixture(directory: Path, name: str, parts: Sequence[MixturePart]) -> None:
    """Writes `directory/mixture.json`, which makes the folder one that `data.path` can name; paths are inside it."""
    content = {"name": name, "sets": [{"path": part.path, "weight": str(part.weight)} for part in parts]}
    (directory / MIXTURE_FILE).write_text(json.dumps(content, indent=1) + "\n")


def read_mixture(directory: Path) -> list[MixturePart] | None:
    """Returns the parts that `directory/mixture.json` names; None if there is no such file. Raises ConfigError.

    Weights may also stand there as numbers.
    """
    path = directory / MIXTURE_FILE
    if not path.exists():
        return None
    content = check_record(read_object(path, _AGAIN), {"name": TEXT, "sets": OBJECTS}, path, _AGAIN)
    parts = []
    for entry in content["sets"]:
        weight = _weight(entry.get("weight"))
        check_record(entry, {"path": TEXT, "weight": (lambda _, w=weight: w is not None, _WEIGHTS)}, path, _AGAIN)
        parts.append(MixturePart(str(directory / checked_name(entry["path"], path)), weight))
    if not parts:
        raise ConfigError(f"{path} names no sets: {_AGAIN}")
    _refuse_repeated(str(path), parts)
    return parts
