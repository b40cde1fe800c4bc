"""`gqe bench attention` on a TPU or GPU: the same comparison by the clock."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from gqe_jax.bench import rivals, table
from gqe_jax.bench.rivals import RIVALS, Rival, Setting
from gqe_jax.bench.table import Cell
from gqe_jax.flops import peak_flops
from gqe_jax.tpu import find_generation

SEQ_LENS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)


def measure(platform: str, seq_lens: tuple[int, ...], head_dim: int, repeats: int) -> tuple[Cell, ...]:
    """Times every part, pass and rival at every length; what fails (memory, an unsupported shape) has no cost.

    Args:
      platform: "tpu" or "gpu", where the arrays are.
      seq_lens, head_dim: S and D.
      repeats: rounds in which the rivals of one line take turns; the median counts.
    """
    cells = []
    for seq_len in seq_lens:
        for part in table.PARTS:
            for backward in table.PASSES:
                s = Setting(seq_len, head_dim)
                seconds = _line(platform, part, backward, s, repeats)
                cells += [_cell(part, backward, rival, s, *seconds[rival.name]) for rival in RIVALS[platform]]
    return tuple(cells)


def report(platform: str, cells: tuple[Cell, ...], head_dim: int) -> str:
    """Heading and tables, as the command prints them."""
    s, device = Setting(0, head_dim), jax.devices()[0]
    parts = [
        f"{device.device_kind}, timed, jax {jax.__version__}\n"
        f"bfloat16, causal, batch 1, {s.num_heads} query heads in {s.num_groups} groups, k = {s.top_k}, "
        f"D = {s.head_dim}, d = {s.d_model}; medians. The bound is the device's peak for the attention's FLOPs."
    ]
    parts += [table.text(cells, RIVALS[platform], part, backward) for part in table.PARTS for backward in table.PASSES]
    for cell in cells:
        if cell.cost is None:
            what = table.title(cell.part, cell.backward, cell.rival, cell.seq_len)
            parts.append(f"{what}: {cell.note.strip().splitlines()[0][:300]}")
    return "\n\n".join(parts)


def _line(platform: str, part: str, backward: bool, s: Setting, repeats: int) -> dict[str, tuple[float | None, str]]:
    """Rival's name → (median seconds, or None and why)."""
    generation = find_generation(jax.devices()[0].device_kind).name if platform == "tpu" else ""
    calls, failed = {}, {}
    for rival in RIVALS[platform]:
        function, shapes = rivals.make(part, dataclasses.asdict(rival), backward, dataclasses.asdict(s), generation)
        try:
            call = _compiled(function, shapes)
            jax.block_until_ready(call())
            calls[rival.name] = call
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            failed[rival.name] = (None, str(error))
    seconds = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return failed | {name: (statistics.median(x), "") for name, x in seconds.items()}


def _compiled(function: Callable, shapes) -> Callable:
    rng = np.random.default_rng(0)

    def draw(x):
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.asarray(rng.integers(0, 2, x.shape), x.dtype)
        return jnp.asarray(rng.standard_normal(x.shape, np.float32), x.dtype)

    return functools.partial(jax.jit(function), *jax.tree.map(draw, shapes))


def _cell(part: str, backward: bool, rival: Rival, s: Setting, seconds: float | None, note: str) -> Cell:
    work = rivals.flops(rival, s, backward)
    peak = peak_flops(jax.devices()[0].device_kind)
    share = work / (seconds * peak) if seconds and peak and part == "attention" else None
    cost = None if seconds is None else 1e3 * seconds
    return Cell(part, backward, rival.name, s.seq_len, cost, "ms", work, share, note)
