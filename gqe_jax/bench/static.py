"""`gqe bench attention --target`: the comparison without a TPU, from what its compiler schedules.

Cycles of kernels come from their instructions (`gqe_jax.bench.tpu_compile`); those of everything else are XLA's own
estimates. A model, not a clock: waiting for memory is not in it.
"""

import dataclasses
import math
import os

import jax

from gqe_jax.bench import table
from gqe_jax.bench.rivals import RIVALS, Rival, Setting, flops, useful_cycles
from gqe_jax.bench.table import Cell
from gqe_jax.bench.tpu_compile import Compiled, CompileError, Job, Kernel, compile_all

SEQ_LENS = (2048, 8192, 32768, 65536)
FORWARD_KERNEL, BACKWARD_KERNEL = "gqe_forward", "gqe_backward"

# The goals that the kernels were built to (docs/kernels.md); for D = 128.
GOALS: dict[str, dict[str, float]] = {
    "forward, unmasked tile: matrix-unit cycles over bound": {"v5e": 0.98, "v6e": 0.90, "tpu7x": 0.82},
    "forward, masked tile over unmasked": {"v5e": 1.10, "v6e": 1.10, "tpu7x": 1.10},
    "backward, unmasked tile: matrix-unit cycles over bound": {"v5e": 0.98, "v6e": 0.92},
    "selection, rotary, norm of q over forward, S = 8192": {"v5e": 0.03, "v6e": 0.03, "tpu7x": 0.03},
    "useful over total, forward, S = 32768": {"v5e": 0.92, "v6e": 0.83, "tpu7x": 0.75},
    "attention against splash, S = 8192": {"v5e": 1.82, "v6e": 2.2, "tpu7x": 2.0},
    "attention against splash, S = 65536": {"v5e": 1.88, "v6e": 2.3, "tpu7x": 2.1},
    "attention against splash, forward + backward, S = 8192": {"v5e": 1.75, "v6e": 1.90},
    "attention against splash, forward + backward, S = 65536": {"v5e": 1.80, "v6e": 1.95},
    "whole layer against GQA with splash, S = 32768": {"v5e": 1.70, "v6e": 1.80},
}
AT_MOST = {name for name in GOALS if "masked tile over" in name or name.startswith("selection")}


@dataclasses.dataclass(frozen=True)
class Static:
    """The whole comparison for one target.

    Attributes:
      compiled: by (part, backward, rival's name, S); a CompileError where the compiler refuses.
      cells: the same as a table.
    """

    target: str
    head_dim: int
    compiled: dict[tuple[str, bool, str, int], Compiled | CompileError]
    cells: tuple[Cell, ...]


def measure(target: str, seq_lens: tuple[int, ...], head_dim: int) -> Static:
    """Compiles every part, pass and rival at every length, in as many processes as there are cores (at most four).

    Raises:
      CompileError: libtpu is missing.
    """
    keys = [
        (part, backward, rival, Setting(seq_len, head_dim))
        for seq_len in seq_lens
        for part in table.PARTS
        for backward in table.PASSES
        for rival in RIVALS["tpu"]
    ]
    jobs = [Job(target, "gqe_jax.bench.rivals:make", _options(*key, target)) for key in keys]
    results = compile_all(jobs, min(4, os.cpu_count() or 1))
    compiled = {(part, b, rival.name, s.seq_len): x for (part, b, rival, s), x in zip(keys, results, strict=True)}
    cells = tuple(_cell(*key, target, x) for key, x in zip(keys, results, strict=True))
    return Static(target, head_dim, compiled, cells)


def _options(part: str, backward: bool, rival: Rival, setting: Setting, target: str) -> dict[str, object]:
    plain = {"rival": dataclasses.asdict(rival), "setting": dataclasses.asdict(setting)}
    return plain | {"part": part, "backward": backward, "target": target}


def _cell(part: str, backward: bool, rival: Rival, s: Setting, target: str, result: Compiled | CompileError) -> Cell:
    common = {"part": part, "backward": backward, "rival": rival.name, "seq_len": s.seq_len, "unit": "cycles"}
    work = flops(rival, s, backward)
    if isinstance(result, CompileError):
        return Cell(**common, cost=None, flops=work, share=None, note=str(result))
    share = useful_cycles(rival, s, backward, target) / result.total if part == "attention" else None
    stalls = sum(kernel.scheduled_total for kernel in result.kernels) - result.kernel_cycles
    note = f"kernels {result.kernel_cycles}, XLA {result.xla_cycles}, stalls within kernels {stalls}"
    return Cell(**common, cost=result.total, flops=work, share=share, note=note)


def report(static: Static) -> str:
    """Heading, tables and goals, as the command prints them."""
    rivals, s = RIVALS["tpu"], Setting(0, static.head_dim)
    libtpu = {x.libtpu for x in static.compiled.values() if isinstance(x, Compiled)}
    parts = [
        f"{static.target}, STATIC: read from compiled programs (libtpu {', '.join(libtpu)}, jax {jax.__version__}); "
        f"a model, not a clock\n"
        f"bfloat16, causal, batch 1, {s.num_heads} query heads in {s.num_groups} groups, k = {s.top_k}, "
        f"D = {s.head_dim}, d = {s.d_model}; cycles of one core: issue or matrix unit, whichever is slower,\n"
        f"for each block of each kernel times its executions, and XLA's estimates for the rest. The bound counts the "
        f"matrix unit alone, for pairs that the mask lets through."
    ]
    parts += [table.text(static.cells, rivals, part, backward) for part in table.PARTS for backward in table.PASSES]
    rows = quantities(static)
    if rows:
        lines = ["quantities" + (" and the goals that they were built to" if static.head_dim == 128 else "")]
        for name, value in rows.items():
            goal = GOALS[name].get(static.target) if static.head_dim == 128 else None
            relation = "" if goal is None else f"{'<=' if name in AT_MOST else '>='} {goal}"
            missed = goal is not None and (value > goal if name in AT_MOST else value < goal)
            lines.append(f"  {name:58}{value:8.3f}  {relation}{'  missed' if missed else ''}".rstrip())
        parts.append("\n".join(lines))
    for cell in static.cells:
        if cell.cost is None:
            what = f"{cell.part}, {table.PASSES[cell.backward]}, {cell.rival}, S = {cell.seq_len}"
            parts.append(f"{what}: {cell.note.strip().splitlines()[0][:300]}")
    return "\n\n".join(parts)


def quantities(static: Static) -> dict[str, float]:
    """Those of `GOALS` that follow from what was compiled."""
    ours = RIVALS["tpu"][-1]
    found: dict[str, float] = {}

    def kernel(backward: bool, seq_len: int, name: str) -> Kernel | None:
        compiled = static.compiled.get(("attention", backward, ours.name, seq_len))
        kernels = [x for x in getattr(compiled, "kernels", ()) if name in x.name]
        return max(kernels, key=lambda x: x.total, default=None)  # of the routed heads, not of the shared one

    for what, backward, name in (("forward", False, FORWARD_KERNEL), ("backward", True, BACKWARD_KERNEL)):
        seq_len = max((s for *_, s in static.compiled), default=0)
        k = kernel(backward, seq_len, name)
        if k is not None and k.tiles:
            whole, *masked = k.tiles
            found[f"{what}, unmasked tile: matrix-unit cycles over bound"] = whole.mxu_cycles / whole.bound
            if masked and not backward:
                per_cycle = [tile.bound / tile.mxu_cycles for tile in (whole, masked[0])]
                found["forward, masked tile over unmasked"] = per_cycle[1] / per_cycle[0]
    k = kernel(False, 8192, FORWARD_KERNEL)
    if k is not None:
        share = sum(block.total for block in k.prologues) / k.total
        found["selection, rotary, norm of q over forward, S = 8192"] = share
    cell = table.find(static.cells, "attention", False, ours.name, 32768)
    if cell is not None:
        found["useful over total, forward, S = 32768"] = cell.share
    for seq_len in (8192, 65536):
        for backward, suffix in ((False, ""), (True, "forward + backward, ")):
            ratio = table.speed_up(static.cells, "attention", backward, RIVALS["tpu"], seq_len)
            found[f"attention against splash, {suffix}S = {seq_len}"] = ratio or math.nan
    ratio = table.speed_up(static.cells, "layer", False, RIVALS["tpu"], 32768)
    found["whole layer against GQA with splash, S = 32768"] = ratio or math.nan
    return {name: found[name] for name in GOALS if not math.isnan(found.get(name, math.nan))}
