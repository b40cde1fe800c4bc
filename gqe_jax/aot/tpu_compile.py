"""Compiles functions for a TPU on a machine that has none, and reads what their kernels will cost.

libtpu compiles ahead of time for any TPU on any host, and can be asked for the instructions of every Pallas kernel.
From these and from the values of a kernel's prefetched scalars follows how many cycles the whole kernel needs at least:
for each straight run of instructions the bundles in it or the matrix unit's cycles for them, whichever is more, times
the number of its executions (`gqe_jax.aot.bundles`). Waiting for HBM is not in it. It is a model, not a clock.

Compiling happens in child processes (`gqe_jax.aot.child`): `compile_all` describes functions by name.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import importlib
import importlib.metadata
import os
import pathlib
import re
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gqe_jax.aot import bundles, scalar_unit
from gqe_jax.aot.child import Child, CompileError
from gqe_jax.aot.operations import Operation, operations
from gqe_jax.aot.topologies import smallest_slice
from gqe_jax.aot.traced_kernels import KernelCall, kernel_calls
from gqe_jax.config import ConfigError
from gqe_jax.tpu import GENERATIONS


@dataclasses.dataclass(frozen=True)
class Job:
    """One function to compile.

    Attributes:
      target: a key of `gqe_jax.tpu.GENERATIONS`: the function is for one device of its smallest slice.
      factory: "package.module:name" of a function that returns (function, tuple of jax.ShapeDtypeStruct trees); what is
        jitted already keeps its donated arguments.
      options: the factory's keyword arguments; values that JSON can hold.
      schedules: read the kernels too. libtpu takes several times as long to compile where it writes out schedules.
      compiler_options: for XLA.
    """

    target: str
    factory: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    schedules: bool = True
    compiler_options: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Pallas kernel of a compiled function."""

    name: str
    blocks: tuple[bundles.Block, ...]

    @property
    def total(self) -> int:
        """Cycles of the whole kernel on one core, at least."""
        return sum(block.total for block in self.blocks)

    @property
    def scheduled_total(self) -> int:
        """Counts the kernel's cycles with the bundles that the compiler leaves empty while it waits for results."""
        return sum(block.scheduled_total for block in self.blocks)

    @property
    def tiles(self) -> tuple[bundles.Block, ...]:
        """The blocks of most work for the matrix unit, those with fewest vector selects for it (masks) first, and
        the largest of these."""
        most = max(block.mxu_cycles for block in self.blocks)
        tiles = [block for block in self.blocks if block.visits and block.mxu_cycles > most / 16]
        return tuple(sorted(tiles, key=lambda block: (block.selects / block.mxu_cycles, -block.mxu_cycles)))

    @property
    def prologues(self) -> tuple[bundles.Block, ...]:
        """The blocks before the first tile that use the matrix unit: there the selection reads its index."""
        before = self.blocks[: min(self.blocks.index(tile) for tile in self.tiles)] if self.tiles else ()
        return tuple(block for block in before if block.mxu_cycles)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What is known about a compiled function.

    Attributes:
      libtpu: version of the compiler.
      arguments, outputs, temporaries: bytes of HBM.
      hlo: the optimised program.
      kernels: Pallas kernels, in the order of their execution; none where a job does not ask for schedules.
      xla: the operations outside the kernels, the one with the highest estimate first.
    """

    libtpu: str
    arguments: int
    outputs: int
    temporaries: int
    hlo: str
    kernels: tuple[Kernel, ...]
    xla: tuple[Operation, ...]

    @property
    def kernel_cycles(self) -> int:
        return sum(kernel.total for kernel in self.kernels)

    @property
    def xla_cycles(self) -> int:
        """Sums XLA's estimates of the operations outside the kernels."""
        return sum(operation.estimate for operation in self.xla)

    @property
    def xla_need(self) -> int:
        """Sums the cycles that the operations outside the kernels need at the least."""
        return sum(operation.need for operation in self.xla)

    @property
    def total(self) -> int:
        """Counts the cycles of the kernels and, by XLA's estimate, of the rest."""
        return self.kernel_cycles + self.xla_cycles

    def kernel(self, name: str) -> Kernel:
        """Returns the only kernel whose name contains `name`."""
        (found,) = (kernel for kernel in self.kernels if name in kernel.name)
        return found


def compile_for(target: str, factory: str, **options: Any) -> Compiled:
    """Compiles one function: see `Job` for the arguments.

    Raises:
      CompileError: the compiler refuses it, or libtpu is missing.
    """
    (result,) = compile_all([Job(target, factory, options)])
    if isinstance(result, CompileError):
        raise result
    return result


def compile_all(
    jobs: Sequence[Job],
    processes: int | None = None,
    on_result: Callable[[int, Compiled | CompileError, float], None] | None = None,
) -> list[Compiled | CompileError]:
    """Compiles functions in child processes; returns one entry for each function, which is an error where one failed.

    Args:
      jobs: the functions.
      processes: children at one time; by default one per core that this process may use, at most four (memory).
      on_result: called as each result arrives, with the job's index and the seconds; by one thread at a time.

    Raises:
      CompileError: a target is unknown, or libtpu is missing.
    """
    for job in jobs:
        if job.target not in GENERATIONS:
            raise CompileError(f"target {job.target!r} is unknown: choose one of {', '.join(GENERATIONS)}")
    # libtpu reads its flags as it starts: a child of each sort, first those that write schedules.
    waiting = {
        schedules: collections.deque(n for n, job in enumerate(jobs) if job.schedules is schedules)
        for schedules in (True, False)
    }
    results: list[Compiled | CompileError | None] = [None] * len(jobs)
    one_at_a_time = threading.Lock()

    def work(_: int) -> None:
        for schedules, numbers in waiting.items():
            with tempfile.TemporaryDirectory(prefix="gqe_bundles_") as dump:
                with Child(_dump_flags(dump) if schedules else None) as child, contextlib.suppress(IndexError):
                    while True:
                        n = numbers.popleft()
                        start = time.monotonic()
                        results[n] = _compile_in(child, jobs[n], dump)
                        if on_result is not None:
                            with one_at_a_time:
                                on_result(n, results[n], time.monotonic() - start)

    processes = min(processes or min(4, len(os.sched_getaffinity(0))), len(jobs))
    if not processes:
        return []
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        try:
            list(pool.map(work, range(processes)))
        finally:  # interrupted: the threads finish what they have, and take no more
            for numbers in waiting.values():
                numbers.clear()
    return results


def _dump_flags(dump: str) -> str:
    return (
        f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
        f"--xla_jf_dump_llo_pass_label_regex=packed-bundles-post-ra"
    ).strip()


def _compile_in(child: Child, job: Job, dump: str) -> Compiled | CompileError:
    try:
        entry = child.call("gqe_jax.aot.tpu_compile:compile_job", dump=dump, **dataclasses.asdict(job))
    except ConfigError as error:
        return CompileError(f"{job.factory} for {job.target}: {error}")
    return _decode(entry)


def _decode(entry: dict[str, Any]) -> Compiled:
    kernels = tuple(Kernel(name, tuple(bundles.Block(**b) for b in blocks)) for name, blocks in entry.pop("kernels"))
    return Compiled(kernels=kernels, xla=tuple(Operation(**x) for x in entry.pop("xla")), **entry)


# ---- in the child process


def compile_job(
    dump: str, target: str, factory: str, options: dict[str, Any], schedules: bool, compiler_options: dict[str, str]
) -> dict[str, Any]:
    """Returns the fields of `Compiled` for a `Job`; `dump` is the folder that libtpu writes schedules to."""
    import jax

    for file in pathlib.Path(dump).iterdir():
        file.unlink()
    module, name = factory.split(":")
    function, args = getattr(importlib.import_module(module), name)(**options)
    device = smallest_slice(target).devices()[0]
    mesh = jax.sharding.Mesh(np.array([device]), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    with jax.set_mesh(mesh):  # some lowering rules of Pallas ask the mesh which TPU it is, or else the host
        compiled = jitted.lower(*placed).compile(compiler_options=compiler_options)
        jaxpr = jax.make_jaxpr(function)(*args) if schedules else None
    calls = kernel_calls(jaxpr) if schedules else []  # evaluates scalars: not for the mesh's devices
    memory = compiled.memory_analysis()
    hlo = compiled.as_text()
    return {
        "libtpu": importlib.metadata.version("libtpu"),
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "hlo": hlo,
        "kernels": _kernels(pathlib.Path(dump), hlo, calls, target) if schedules else [],
        "xla": [dataclasses.asdict(x) for x in operations(hlo, target)],
    }


def _kernels(dump: pathlib.Path, hlo: str, calls: list[KernelCall], target: str) -> list[tuple[str, list[dict]]]:
    """(name, blocks) of each Pallas kernel in the program, in its order."""
    programs: dict[str, bundles.Program] = {}
    traced: dict[str, list[KernelCall]] = {}
    for name in re.findall(r"^ *(?:ROOT )?%?([\w.-]+) = .*custom_call_target=\"tpu_custom_call\"", hlo, re.MULTILINE):
        files = [*dump.glob(f"*-{name}-*-packed-bundles-post-ra.txt")]
        files = [file for file in files if "schedule-analysis" not in file.name]
        if len(files) != 1:
            raise ValueError(f"libtpu dumped {len(files)} schedules of kernel {name}, not one")
        programs[name] = program = bundles.parse(files[0].read_text(errors="replace"), target)
        shapes = tuple(program.operands[i] for i in sorted(program.operands))
        same_name = [call for call in calls if call.name in name]  # jvp_NAME_.1 where it is differentiated
        traced[name] = [call for call in same_name if call.shapes[: len(shapes)] == shapes] or same_name

    kernels = []
    for name, program in programs.items():
        alike = [other for other, same in traced.items() if same == traced[name]]
        runs = [call.scalars for call in traced[name]]
        if len(alike) == sum(map(len, runs)) != len(runs):  # XLA has unrolled a loop over kernels
            runs = [[scalars] for run in runs for scalars in run]
        if len(alike) != len(runs):
            raise ValueError(f"kernels {alike} are not the {len(runs)} that were traced of {[x.name for x in calls]}")
        counted = [scalar_unit.count_visits(program, scalars) for scalars in runs[alike.index(name)]]
        visits = [sum(block.visits for block in same) for same in zip(*counted, strict=True)]
        blocks = [dataclasses.replace(block, visits=n) for block, n in zip(program.blocks, visits, strict=True)]
        kernels.append((name, [dataclasses.asdict(block) for block in blocks]))
    return kernels
