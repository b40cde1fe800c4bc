"""How far training has read: rows of each set, whatever the batch sizes, hosts and weights were on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gqe_jax.checked_json import OBJECTS, TEXT, check_record, is_whole
from gqe_jax.config import ConfigError
from gqe_jax.data.reading.prepared import PreparedData


@dataclasses.dataclass(frozen=True)
class SetPosition:
    """How far one set was read. order: number of its shuffled order, its own in the run; rows: read from the start."""

    order: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Position:
    """How far a run has read its data.

    Attributes:
      prepared: digest of the data (`PreparedData.digest`) that was read last.
      turn: rows that were read since the data is that, which say whose turn it is in a mixture.
      sets: digest → position, of every set that the run has ever read.
    """

    prepared: str = ""
    turn: int = 0
    sets: Mapping[str, SetPosition] = dataclasses.field(default_factory=dict)

    def on(self, data: PreparedData) -> Position:
        """Returns the same rows read, on the way to read `data`: a new mixture begins its turns, a new set its rows.

        Raises ConfigError if `data` was given more turns than rows of it were read.
        """
        turn = self.turn if self.prepared == data.digest else 0
        if any(rows < least for rows, least in zip(self.rows(data), data.schedule.given(turn), strict=True)):
            raise ConfigError(f"the position in the data has turn={turn}, more than the rows that were read: {_REMEDY}")
        sets = dict(self.sets)
        for part in data.sets:
            unused = max((known.order for known in sets.values()), default=-1) + 1
            sets.setdefault(part.digest, SetPosition(order=unused, rows=0))
        return Position(data.digest, turn, sets)

    def after(self, data: PreparedData, rows: int) -> Position:
        """Returns the position when `rows` more rows of the stream of `data` have been read."""
        begun = self.on(data)
        before, now = data.schedule.given(begun.turn), data.schedule.given(begun.turn + rows)
        sets = dict(begun.sets)
        for part, more in zip(data.sets, now - before, strict=True):
            sets[part.digest] = dataclasses.replace(sets[part.digest], rows=sets[part.digest].rows + int(more))
        return Position(data.digest, begun.turn + rows, sets)

    def rows(self, data: PreparedData) -> list[int]:
        """Says how many rows of each set of `data` were read."""
        return [self.sets[part.digest].rows if part.digest in self.sets else 0 for part in data.sets]

    def describe(self, data: PreparedData) -> str:
        """Says how much of each set of `data` was read, in words."""
        words = []
        for part, rows in zip(data.sets, self.rows(data), strict=True):
            epoch = rows // part.train_rows + 1
            words.append(f"{rows:,} of {part.name} (epoch {epoch})" if rows else f"none of {part.name}")
        return ", ".join(words)

    def to_json(self) -> dict[str, Any]:
        """Values that JSON has, for `read`."""
        sets = [{"digest": digest} | dataclasses.asdict(known) for digest, known in self.sets.items()]
        return {"prepared": self.prepared, "turn": self.turn, "sets": sets}

    @classmethod
    def read(cls, content: Any, origin: object) -> Position:
        """Makes one of what `to_json` gave. Raises ConfigError that names `origin` if it is nothing of the kind."""
        check_record(content, _RULES, origin, _REMEDY)
        sets = {}
        for known in content["sets"]:
            check_record(known, _SET_RULES, origin, _REMEDY)
            sets[known["digest"]] = SetPosition(known["order"], known["rows"])
        return cls(content["prepared"], content["turn"], sets)


BEGINNING = Position()
_ROWS = is_whole(0, 2**50)
_RULES = {"prepared": TEXT, "turn": _ROWS, "sets": OBJECTS}
_SET_RULES = {"digest": TEXT, "order": is_whole(0), "rows": _ROWS}
_REMEDY = "copy the checkpoint again from where it came from"
