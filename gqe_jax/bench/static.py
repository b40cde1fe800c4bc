"""`gqe bench attention --target`: the comparison without a TPU, from what its compiler schedules.

Cycles of kernels come from their instructions (`gqe_jax.aot.tpu_compile`). For everything else there are two figures,
XLA's own estimates and what the bytes need at the chip's bandwidth (`gqe_jax.aot.operations`), and each side gets the
one that is less favourable to GQE: dense attention the lower, GQE the higher. A model, not a clock: kernels that wait
for memory are not in it.
"""

import dataclasses
import itertools
import math
import sys

import jax

from gqe_jax.aot.tpu_compile import Compiled, CompileError, Job, Kernel, compile_all
from gqe_jax.bench import table
from gqe_jax.bench.rivals import RIVALS, Rival, Setting, flops, useful_cycles
from gqe_jax.bench.table import Cell

SEQ_LENS = (2048, 8192, 32768, 65536)
FORWARD_KERNEL, BACKWARD_KERNEL = "gqe_forward", "gqe_backward"

# The goals that the kernels were built to (docs/kernels.md); for D = 128.
GOALS: dict[str, dict[str, float]] = {
    "forward, unmasked tile: matrix-unit cycles over bound": {"v5e": 0.98, "v6e": 0.90, "tpu7x": 0.82},
    "forward, masked tile over unmasked": {"v5e": 1.10, "v6e": 1.10, "tpu7x": 1.10},
    "backward, unmasked tile: matrix-unit cycles over bound": {"v5e": 0.98, "v6e": 0.92},
    "selection, rotary, norm of q over forward, S = 8192": {"v5e": 0.03, "v6e": 0.03, "tpu7x": 0.03},
    "useful over total of the kernels, forward, S = 32768": {"v5e": 0.92, "v6e": 0.83, "tpu7x": 0.75},
    "attention alone, forward, over our GQA, S = 8192": {"v5e": 1.65, "v6e": 1.65},
    "attention alone, forward, over our GQA, S = 65536": {"v5e": 1.74, "v6e": 1.74},
    "attention alone, forward + backward, over our GQA, S = 8192": {"v5e": 1.60, "v6e": 1.60},
    "attention alone, forward + backward, over our GQA, S = 65536": {"v5e": 1.72, "v6e": 1.72},
    "whole layer, forward, over our GQA, S = 8192": {"v5e": 1.32, "v6e": 1.32},
    "whole layer, forward, over our GQA, S = 65536": {"v5e": 1.65, "v6e": 1.65},
    "whole layer, forward + backward, over our GQA, S = 8192": {"v5e": 1.28, "v6e": 1.28},
    "whole layer, forward + backward, over our GQA, S = 65536": {"v5e": 1.62, "v6e": 1.62},
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
    """Compiles every part, pass and rival at every length, and says on stderr how far it is.

    Raises:
      CompileError: libtpu is missing.
    """
    keys = [
        (part, backward, rival, Setting(seq_len, head_dim))
        for part in table.PARTS
        for seq_len in seq_lens
        for backward in table.PASSES
        for rival in RIVALS["tpu"]
    ]
    jobs = [_job(*key, target) for key in keys]
    done: list[int] = []

    def on_result(n: int, result: Compiled | CompileError, seconds: float) -> None:
        done.append(n)
        part, backward, rival, setting = keys[n]
        what = table.title(part, backward, rival.name, setting.seq_len)
        outcome = f": {str(result).splitlines()[0][:200]}" if isinstance(result, CompileError) else ""
        print(f"compiled {len(done)} of {len(jobs)}: {what} ({seconds:.0f} s){outcome}", file=sys.stderr, flush=True)

    results = compile_all(jobs, on_result=on_result)
    compiled = {(part, b, rival.name, s.seq_len): x for (part, b, rival, s), x in zip(keys, results, strict=True)}
    cells = tuple(_cell(*key, target, compiled) for key in keys)
    return Static(target, head_dim, compiled, cells)


def _job(part: str, backward: bool, rival: Rival, s: Setting, target: str) -> Job:
    plain = {"rival": dataclasses.asdict(rival), "setting": dataclasses.asdict(s)}
    options = plain | {"part": part, "backward": backward, "target": target}
    # Splash leaves its VMEM to the compiler, whose 16 MiB on v5e are 4% too few for its best blocks within a layer.
    memory = {"xla_tpu_scoped_vmem_limit_kib": "32768"} if rival.implementation == "splash" else {}
    return Job(target, "gqe_jax.bench.rivals:make", options, part == "attention", memory)


def _cell(part: str, backward: bool, rival: Rival, s: Setting, target: str, compiled: dict) -> Cell:
    common = {"part": part, "backward": backward, "rival": rival.name, "seq_len": s.seq_len, "unit": "cycles"}
    work = flops(rival, s, backward)
    counts = compiled["attention", backward, rival.name, s.seq_len]  # of both parts: schedules are slow to write
    whole = compiled[part, backward, rival.name, s.seq_len]
    for result in (whole, counts):
        if isinstance(result, CompileError):
            return Cell(**common, cost=None, flops=work, share=None, note=str(result))
    if whole.xla_cycles >= 2**60:  # XLA writes the largest int64 where it has none
        note = f"XLA has no estimates for some of it on {target}"
        return Cell(**common, cost=None, flops=work, share=None, note=note)
    kernels = counts.kernel_cycles
    less_favourable = min if rival.kind == "gqa" else max
    cost = kernels + less_favourable(whole.xla_cycles, whole.xla_need)
    share = useful_cycles(rival, s, backward, target) / cost if part == "attention" else None
    stalls = sum(kernel.scheduled_total for kernel in counts.kernels) - kernels
    note = (
        f"kernels {kernels}, the rest by XLA {whole.xla_cycles}, by its bytes {whole.xla_need}, stalls within kernels "
        f"{stalls}"
    )
    return Cell(**common, cost=cost, flops=work, share=share, note=note)


def report(static: Static) -> str:
    """Heading, tables and goals, as the command prints them."""
    rivals, s = RIVALS["tpu"], Setting(0, static.head_dim)
    libtpu = {x.libtpu for x in static.compiled.values() if isinstance(x, Compiled)}
    parts = [
        f"{static.target}, STATIC: read from compiled programs (libtpu {', '.join(libtpu)}, jax {jax.__version__}); "
        f"a model, not a clock\n"
        f"bfloat16, causal, batch 1, {s.num_heads} query heads in {s.num_groups} groups, k = {s.top_k}, "
        f"D = {s.head_dim}, d = {s.d_model}; cycles of one core: issue or matrix unit, whichever is slower,\n"
        f"for each block of each kernel times its executions; for the rest XLA's estimates, or what its bytes need at "
        f"the chip's bandwidth:\nthe lower for GQA, the higher for GQE (--csv has both). A layer's kernels are counted "
        f"in attention alone, where GQA gets its queries rotated.\nThe bound counts the matrix unit alone, for pairs "
        f"that the mask lets through."
    ]
    for part, backward in itertools.product(table.PARTS, table.PASSES):
        readings = _one_figure_for_both(static, part, backward)
        parts.append("\n".join([table.text(static.cells, rivals, part, backward), *readings]))
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
            what = table.title(cell.part, cell.backward, cell.rival, cell.seq_len)
            parts.append(f"{what}: {cell.note.strip().splitlines()[0][:300]}")
    return "\n\n".join(parts)


def _one_figure_for_both(static: Static, part: str, backward: bool) -> list[str]:
    """Says in a line for each length what the speed-up over our dense attention is where both sides get one figure."""
    lines = []
    dense, ours = table.dense(RIVALS["tpu"])[-1], RIVALS["tpu"][-1]
    for seq_len in sorted({cell.seq_len for cell in static.cells}):
        keys = [[(x, backward, rival.name, seq_len) for rival in (dense, ours)] for x in ("attention", part)]
        kernels, whole = ([static.compiled.get(key) for key in pair] for pair in keys)
        if not all(isinstance(x, Compiled) for x in [*kernels, *whole]):
            continue
        by_xla, by_bytes = (
            (kernels[0].kernel_cycles + slow) / (kernels[1].kernel_cycles + fast)
            for slow, fast in ([x.xla_cycles for x in whole], [x.xla_need for x in whole])
        )
        lines.append(
            f"{seq_len:8}  over {dense.name}, one figure for both sides: {by_xla:.2f} by XLA's estimates, "
            f"{by_bytes:.2f} by bytes"
        )
    return lines


def quantities(static: Static) -> dict[str, float]:
    """Returns the quantities of `GOALS` that follow from what was compiled."""
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
            whole, on_diagonal = k.tiles[0], k.tiles[-1]
            found[f"{what}, unmasked tile: matrix-unit cycles over bound"] = whole.mxu_cycles / whole.bound
            if on_diagonal.selects and not backward:
                per_cycle = [tile.bound / tile.mxu_cycles for tile in (whole, on_diagonal)]
                found["forward, masked tile over unmasked"] = per_cycle[1] / per_cycle[0]
    k = kernel(False, 8192, FORWARD_KERNEL)
    if k is not None:
        share = sum(block.total for block in k.prologues) / k.total
        found["selection, rotary, norm of q over forward, S = 8192"] = share
    compiled = static.compiled.get(("attention", False, ours.name, 32768))
    if isinstance(compiled, Compiled):
        useful = useful_cycles(ours, Setting(32768, static.head_dim), False, static.target)
        found["useful over total of the kernels, forward, S = 32768"] = useful / compiled.kernel_cycles
    for part, backward, seq_len in itertools.product(table.PARTS, table.PASSES, (8192, 65536)):
        ratio = table.speed_up(static.cells, part, backward, table.dense(RIVALS["tpu"])[-1], ours, seq_len)
        name = f"{table.PARTS[part]}, {table.PASSES[backward]}, over our GQA, S = {seq_len}"
        found[name] = ratio or math.nan
    return {name: found[name] for name in GOALS if not math.isnan(found.get(name, math.nan))}
