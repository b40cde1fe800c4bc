"""The table of `gqe bench attention` on TPUs and GPUs, measured or modelled: rows, text, CSV, the plot."""

import csv
import dataclasses
from collections.abc import Iterable, Sequence

from gqe_jax.bench.rivals import Rival
from gqe_jax.config import ConfigError

PARTS = {"attention": "attention alone", "layer": "whole layer"}
PASSES = {False: "forward", True: "forward + backward"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One rival at one length.

    Attributes:
      part: "attention" or "layer".
      backward: with the gradients.
      rival: its name.
      seq_len: S.
      cost: milliseconds, or cycles (then `unit` says so).
      unit: "ms" or "cycles".
      flops: of the attention, by the mask.
      share: of what matrix units could do in that time, or None where it is not known.
      note: anything else for the CSV, or why there is no cost.
    """

    part: str
    backward: bool
    rival: str
    seq_len: int
    cost: float | None
    unit: str
    flops: int
    share: float | None
    note: str = ""


def title(part: str, backward: bool, rival: str, seq_len: int) -> str:
    """Describes in words what a cell holds."""
    return f"{PARTS[part]}, {PASSES[backward]}, {rival}, S = {seq_len}"


def find(cells: Iterable[Cell], part: str, backward: bool, rival: str, seq_len: int) -> Cell | None:
    """Returns the cell with these keys, if it was computed and has a cost."""
    key = (part, backward, rival, seq_len)
    return next((c for c in cells if (c.part, c.backward, c.rival, c.seq_len) == key and c.cost is not None), None)


def dense(rivals: Sequence[Rival]) -> list[Rival]:
    """Returns the rivals that speed-ups refer to: dense attention of others, then our own, where there is one."""
    return [rival for rival in rivals if rival.kind == "gqa"]


def speed_up(
    cells: Iterable[Cell], part: str, backward: bool, over: Rival, ours: Rival, seq_len: int
) -> float | None:
    """Cost of `over` divided by the cost of `ours`; None where either has none."""
    slow, fast = (find(cells, part, backward, rival.name, seq_len) for rival in (over, ours))
    return slow.cost / fast.cost if slow and fast else None


def text(cells: Sequence[Cell], rivals: Sequence[Rival], part: str, backward: bool) -> str:
    """Returns one block of the table: a line for each length."""
    scale, unit = (1e3, "thousand cycles") if cells[0].unit == "cycles" else (1, "ms")
    lines = [f"{PARTS[part]}, {PASSES[backward]}: {unit}; speed-up of {rivals[-1].name}"]
    header = f"{'S':>8}" + "".join(f"{rival.name:>14}" for rival in rivals)
    header += "".join(f"{'over ' + rival.name:>18}" for rival in dense(rivals))
    shares = part == "attention"
    if shares:
        header += f"{'GFLOP':>10}  share of bound: {' / '.join(rival.name for rival in rivals)}"
    lines.append(header)
    for seq_len in sorted({cell.seq_len for cell in cells}):
        row = [find(cells, part, backward, rival.name, seq_len) for rival in rivals]
        line = f"{seq_len:8}" + "".join(f"{cell.cost / scale:14,.1f}" if cell else f"{'-':>14}" for cell in row)
        for over in dense(rivals):
            ratio = speed_up(cells, part, backward, over, rivals[-1], seq_len)
            line += f"{ratio:18.2f}" if ratio else f"{'-':>18}"
        if shares:
            line += f"{row[-1].flops / 1e9:10,.0f}" if row[-1] else f"{'-':>10}"
            share = ["-" if not cell or cell.share is None else f"{cell.share:.0%}" for cell in row]
            line += f"  {' / '.join(share)}"
        lines.append(line)
    return "\n".join(lines)


def write_csv(path: str, cells: Sequence[Cell], constants: dict[str, object]) -> None:
    """One row per cell; `constants` fill further columns, the same in every row."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*constants, *(field.name for field in dataclasses.fields(Cell))])
        writer.writeheader()
        writer.writerows(constants | dataclasses.asdict(cell) | {"backward": int(cell.backward)} for cell in cells)


def plot(path: str, cells: Sequence[Cell], rivals: Sequence[Rival], bound: float, title: str) -> None:
    """Figure 1 of the paper: speed-up over dense attention, our own where there is one, against context length.

    Args:
      path: an image file; its ending chooses the format.
      cells: of both parts and passes.
      rivals: as in the table.
      bound: speed-up of attention if cost went by heads alone.
      title: of the figure.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'gqe_jax[viz]'") from error
    over = dense(rivals)[-1]
    axes = Figure(figsize=(7, 4.2), layout="constrained").add_subplot()
    for part, name in PARTS.items():
        for backward, passes in PASSES.items():
            lengths = sorted({cell.seq_len for cell in cells})
            points = [(s, speed_up(cells, part, backward, over, rivals[-1], s)) for s in lengths]
            points = [(s, ratio) for s, ratio in points if ratio]
            style = {"marker": "o", "linestyle": "--" if backward else "-", "color": "C0" if part == "layer" else "C1"}
            axes.plot(*zip(*points, strict=True) if points else ([], []), label=f"{name}, {passes}", **style)
    axes.axhline(bound, color="grey", linewidth=0.8, label=f"heads that attend: {bound:.2f}")
    axes.set_xscale("log", base=2)
    lengths = sorted({cell.seq_len for cell in cells})
    axes.set_xticks(lengths, [f"{s // 1024}k" if s % 1024 == 0 else str(s) for s in lengths])
    measure = "modelled cycles" if cells[0].unit == "cycles" else "measured time"
    axes.set(xlabel="context length (tokens)", ylabel=f"speed-up over {over.name}, {measure}", title=title)
    axes.set_ylim(bottom=0)  # the height of a point is the ratio itself
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    axes.figure.savefig(path, dpi=150)
