"""What a slice of TPUs would take for a study, by the estimate of `gqe plan --search`; nothing is compiled."""

from __future__ import annotations

from collections.abc import Sequence

from gqe_jax.aot.topologies import topology
from gqe_jax.plan.compile import Request
from gqe_jax.plan.search import Candidate, search
from gqe_jax.runs.metrics import format_duration
from gqe_jax.study.definition import Cell
from gqe_jax.tpu import GIB


def estimate(planned: Sequence[Cell], name: str) -> str:
    """Returns a table: each arm's fastest layout that fits, with the time of a cell and of all its cells.

    Times lie between a step whose arithmetic, memory traffic and collectives all overlap and one in which none does.

    Raises:
      ConfigError: no such slice, or an arm that fits in no layout.
    """
    where = topology(name)
    seeds = {cell.arm: sum(other.arm == cell.arm for other in planned) for cell in planned}
    lines = [f"roofline of {where.name}, {where.num_devices} devices (gqe plan compiles an arm, and knows more):"]
    lines.append(f"  {'arm':<24}{'GiB':>6}{'a cell takes':>20}{'all its cells':>20}  overrides")
    total = [0.0, 0.0]
    for arm, count in seeds.items():
        cell = next(cell for cell in planned if cell.arm == arm)
        best = _best(cell, where.name)
        times = [cell.config.train.steps * seconds for seconds in (best.times.overlapped, best.times.serial)]
        total = [sum_ + count * seconds for sum_, seconds in zip(total, times, strict=True)]
        lines.append(
            f"  {arm:<24}{best.memory / GIB:6.1f}{_span(times):>20}{_span([count * s for s in times]):>20}  "
            f"{best.overrides(cell.config)}"
        )
    return "\n".join([*lines, f"  {'all, one after the other':<30}{'':>20}{_span(total):>20}"])


def _best(cell: Cell, name: str) -> Candidate:
    config = cell.config
    request = Request(
        config=config, topology=name, mode="train", batch_size=config.data.batch_size, seq_len=config.model.context
    )
    return search(request)[0]


def _span(seconds: Sequence[float]) -> str:
    return f"{format_duration(min(seconds))} to {format_duration(max(seconds))}"
