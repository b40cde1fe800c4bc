"""What `gqe plan` prints about one compiled step."""

from collections.abc import Mapping, Sequence
from typing import Literal

from gqe_jax.aot.topologies import topology
from gqe_jax.flops import parameter_count
from gqe_jax.plan.collectives import NETWORK, kernel_calls, read_collectives
from gqe_jax.plan.compile import Compiled, OutOfMemory, Request
from gqe_jax.plan.memory import estimate
from gqe_jax.plan.published import factor
from gqe_jax.plan.roofline import Roofline, ici_seconds, roofline, step_flops
from gqe_jax.plan.search import Candidate
from gqe_jax.tpu import GIB

DAY = 86400.0


class Plan:
    """A compiled step with what follows from it.

    Attributes:
      request: what was compiled.
      compiled: what came of it.
      collectives: in it, per step and device.
      roofline: its times.
    """

    def __init__(self, request: Request, compiled: Compiled):
        self.request = request
        self.compiled = compiled
        self.topology = topology(request.topology)
        self.collectives = read_collectives(compiled.hlo, compiled.mesh)
        self.roofline = roofline(
            request.config, self.topology, compiled.mesh, request.mode, request.batch_size, request.seq_len,
            ici_seconds(self.topology, compiled.extents, self.collectives),
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """The number of tokens that a step takes or generates."""
        return self.request.batch_size * (1 if self.request.mode == "decode" else self.request.seq_len)

    def flops(self, kind: Literal["active", "dense_equivalent"]) -> int:
        """Returns the FLOPs of a step on all devices, without what remat computes again."""
        request = self.request
        forward = step_flops(request.config.model, request.mode, request.batch_size, request.seq_len, kind).total
        return forward * (3 if request.mode == "train" else 1)

    def __str__(self) -> str:
        sections = [headline(self.request, self.compiled.mesh), self._memory(), self._flops(), self._collectives()]
        return "\n\n".join([*sections, self._times()])

    def _memory(self) -> str:
        compiled = self.compiled
        rows = [(f"{name} (argument)", size) for name, size in compiled.inputs.items()]
        rows.append(("temporaries", compiled.temporaries))
        rows += [("new outputs", compiled.outputs - compiled.aliased), ("program", compiled.code)]
        hbm = self.topology.generation.hbm
        lines = [f"memory of a device, GiB: fits, {compiled.peak / GIB:.2f} of {hbm / GIB:.0f}"]
        return "\n".join([*lines, *_sizes(rows), *_estimates(self.request, compiled.mesh)])

    def _flops(self) -> str:
        active, dense = self.flops("active"), self.flops("dense_equivalent")
        calls = kernel_calls(self.compiled.hlo)
        kernels = f"{calls:,}" if calls else "none: attention falls to XLA (gqe inspect kernels says why)"
        return (
            f"TFLOPs of a step: {active / 1e12:,.2f} active, {dense / 1e12:,.2f} dense-equivalent "
            f"({dense / active:.2f} times)\n"
            f"calls of Pallas kernels: {kernels}"
        )

    def _collectives(self) -> str:
        lines = ["collectives of a step, on one device"]
        lines.append(f"  {'kind':<20}{'axes':<18}{'count':>7}{'hidden':>8}{'GB':>10}{'GB sent':>10}")
        for each in self.collectives:
            axes = " + ".join(each.axes) or "-"
            lines.append(
                f"  {each.kind:<20}{axes:<18}{each.count:>7}{each.hidden:>8}{each.size / 1e9:>10.3f}"
                f"{each.sent / 1e9:>10.3f}"
            )
        return "\n".join(lines) if self.collectives else "no collectives"

    def _times(self) -> str:
        times, chip = self.roofline, self.topology.generation
        peaks = (
            f"{chip.peak_flops['bfloat16'] / 1e12:,.0f} TFLOP/s, HBM {chip.hbm_bandwidth / 1e9:,.0f} GB/s, a link "
            f"{chip.link_bandwidth / 1e9:.0f} GB/s each way"
        )
        lines = [f"roofline, ms (peaks of a device: {peaks})"]
        lines += [f"  {name:<38}{seconds * 1e3:10.2f}" for name, seconds in time_rows(times)]
        known = factor(chip.name) if self.request.mode == "train" else None
        if known is not None:
            lines.append(f"  {f'calibrated: {known:.2f} of that (scaling.md)':<38}{known * times.serial * 1e3:10.2f}")
        best, worst = times.overlapped, times.serial
        lines.append(f"tokens per second: {self.tokens / worst:,.0f} to {self.tokens / best:,.0f}")
        lines.append(f"MFU: {times.mfu(worst):.1%} to {times.mfu(best):.1%}")
        if self.request.mode == "train":
            steps = self.request.config.train.steps
            lines.append(
                f"{steps:,} steps, {steps * self.tokens / 1e9:,.1f}B tokens: {steps * best / DAY:,.2f} to "
                f"{steps * worst / DAY:,.2f} days"
            )
        return "\n".join(lines)


def headline(request: Request, mesh: Mapping[str, int]) -> str:
    """Describes in two lines what is planned."""
    config = request.config
    axes = " × ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1)
    rows = f"{request.batch_size:,} rows of {request.seq_len:,} tokens"
    parts = config.train.accumulate
    work = {
        "train": f"training on {rows}" + f" in {parts} microbatches" * (parts > 1) + f", remat {config.model.remat}",
        "prefill": f"prefill of {rows}",
        "decode": f"one token more for each of {rows}",
    }[request.mode]
    total = parameter_count(config.model)["total"]
    return f"{config.name} on {request.topology}, {axes}\n{total:,} parameters; {work}"


def time_rows(times: Roofline) -> list[tuple[str, float]]:
    """(term, seconds) of a step."""
    rows = [("matrix products with weights", times.matmul), ("attention", times.attention), ("HBM", times.hbm)]
    rows += [(_link(axes), seconds) for axes, seconds in times.ici.items()]
    return [*rows, ("a step, if all overlap", times.overlapped), ("a step, if nothing does", times.serial)]


def _link(axes: tuple[str, ...]) -> str:
    return "network between slices" if axes == NETWORK else f"ICI over {' + '.join(axes) or 'no axis'}"


def out_of_memory(request: Request, failure: OutOfMemory) -> str:
    """Why the step does not fit."""
    chip = topology(request.topology).generation
    need = "" if failure.needed is None else f": {failure.needed / GIB:.2f} of temporaries"
    have = chip.hbm if failure.available is None else failure.available
    inputs = sum(failure.inputs.values())
    return "\n".join([
        headline(request, failure.mesh),
        "",
        f"memory of a device, GiB: DOES NOT FIT{need} and {inputs / GIB:.2f} of arguments, of {have / GIB:.2f}",
        *_sizes([(f"{name} (argument)", size) for name, size in failure.inputs.items()]),
        *_estimates(request, failure.mesh),
        f"the compiler: {failure.message}",
    ])  # fmt: skip


def remedies(request: Request, candidates: Sequence[Candidate]) -> str:
    """Returns what would make it fit."""
    if not candidates:
        return "\nno one change of remat, microbatches, mesh or batch would make it fit, by estimate: try --search"
    return "\nwould fit, by estimate:\n" + _table(request, candidates)


def ranking(request: Request, candidates: Sequence[Candidate]) -> str:
    """Returns what a search found, the fastest first."""
    config = request.config
    shown = candidates[:10]
    return (
        f"{config.name} on {request.topology}, {request.batch_size:,} rows of {request.seq_len:,} tokens: "
        f"{len(candidates)} meshes fit by estimate, each with its best remat policy and number of microbatches\n"
        + _table(request, shown)
    )


def comparison(plan: Plan, twin: Plan) -> str:
    """Two plans beside each other, and the second over the first."""

    def row(name: str, form: str, *values: float) -> str:
        cells = "".join(f"{format(value, form):>16}" for value in values)
        return f"  {name:<38}{cells}" + (f"{values[1] / values[0]:10.2f}" if values[0] else "")

    plans = plan, twin
    kinds = "".join(f"{each.request.config.model.attention.kind:>16}" for each in plans)
    lines = [f"  {'':<38}{kinds}{'ratio':>10}"]
    lines.append(row("parameters", ",", *(parameter_count(each.request.config.model)["total"] for each in plans)))
    lines.append(row("peak memory, GiB", ".2f", *(each.compiled.peak / GIB for each in plans)))
    lines.append(row("TFLOPs of a step", ",.2f", *(each.flops("active") / 1e12 for each in plans)))
    lines.append(row("sent in collectives, GB", ",.3f", *(sum(c.sent for c in p.collectives) / 1e9 for p in plans)))
    ici = [sum(each.roofline.ici.values()) for each in plans]
    for name, seconds in (
        ("matrix products with weights, ms", [each.roofline.matmul for each in plans]),
        ("attention, ms", [each.roofline.attention for each in plans]),
        ("HBM, ms", [each.roofline.hbm for each in plans]),
        ("ICI, ms", ici),
        ("a step, if all overlap, ms", [each.roofline.overlapped for each in plans]),
        ("a step, if nothing does, ms", [each.roofline.serial for each in plans]),
    ):
        lines.append(row(name, ",.2f", *(1e3 * each for each in seconds)))
    return "\n".join(lines)


def _table(request: Request, candidates: Sequence[Candidate]) -> str:
    lines = [f"  {'GiB':>6}{'ms (all overlap)':>18}{'ms (nothing)':>14}  overrides"]
    for each in candidates:
        overlapped, serial = 1e3 * each.times.overlapped, 1e3 * each.times.serial
        lines.append(f"  {each.memory / GIB:6.1f}{overlapped:18,.1f}{serial:14,.1f}  {each.overrides(request.config)}")
    return "\n".join(lines)


def _sizes(rows: Sequence[tuple[str, int]], indent: str = "  ") -> list[str]:
    return [f"{indent + name:<38}{size / GIB:10.2f}" for name, size in rows]


def _estimates(request: Request, mesh: Mapping[str, int]) -> list[str]:
    parts = estimate(request.config, mesh, request.mode, request.batch_size, request.seq_len)
    largest_first = sorted(((name, size) for name, size in parts.items() if size), key=lambda part: -part[1])
    lines = _sizes(largest_first, indent="    ")
    return [*_sizes([("for comparison, an estimate by kind", sum(parts.values()))]), *lines]
