"""Compiles functions for a TPU on a machine that has none, and reads what their kernels will cost.

libtpu compiles ahead of time for any TPU on any host, and can be asked for the instructions of every Pallas kernel.
From these and from the values of a kernel's prefetched scalars follows how many cycles the whole kernel needs at least:
for each straight run of instructions the bundles in it or the matrix unit's cycles for them, whichever is more, times
the number of its executions (`gqe_jax.bench.bundles`). Waiting for HBM is not in it. It is a model, not a clock.

The compilers of different TPU generations read the same environment variables before JAX starts, so compiling happens
in a child process: `compile_all` describes functions by name.
"""

import concurrent.futures
import dataclasses
import importlib
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from gqe_jax.bench import bundles, scalar_unit
from gqe_jax.config import ConfigError

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
"""Target → the smallest topology of that generation that libtpu knows. The functions run on one device of it."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One function to compile.

    Attributes:
      target: a key of `TOPOLOGIES`.
      factory: "package.module:name" of a function that returns (function, tuple of jax.ShapeDtypeStruct trees).
      options: the factory's keyword arguments; values that JSON can hold.
    """

    target: str
    factory: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


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
        """The same, counting the bundles that the compiler leaves empty while results are on their way."""
        return sum(block.scheduled_total for block in self.blocks)

    @property
    def tiles(self) -> tuple[bundles.Block, ...]:
        """The blocks of most work for the matrix unit, those with fewest vector selects for it (masks) first."""
        most = max(block.mxu_cycles for block in self.blocks)
        tiles = [block for block in self.blocks if block.visits and block.mxu_cycles > most / 8]
        return tuple(sorted(tiles, key=lambda block: block.selects / block.mxu_cycles))

    @property
    def prologues(self) -> tuple[bundles.Block, ...]:
        """The blocks before the first tile that do not execute in every grid step: what a row of steps starts with."""
        before = self.blocks[: min(self.blocks.index(tile) for tile in self.tiles)] if self.tiles else ()
        most = max((block.visits for block in before), default=0)
        return tuple(block for block in before if 1 < block.visits < 0.9 * most)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What is known about a compiled function.

    Attributes:
      libtpu: version of the compiler.
      arguments, outputs, temporaries: bytes of HBM.
      kernels: Pallas kernels, in the order of their execution.
      xla: cycles that XLA estimates for each operation outside the kernels, largest first.
    """

    libtpu: str
    arguments: int
    outputs: int
    temporaries: int
    kernels: tuple[Kernel, ...]
    xla: tuple[tuple[str, int], ...]

    @property
    def kernel_cycles(self) -> int:
        return sum(kernel.total for kernel in self.kernels)

    @property
    def xla_cycles(self) -> int:
        return sum(cycles for _, cycles in self.xla)

    @property
    def total(self) -> int:
        """Cycles of the kernels, and of the rest by XLA's estimate."""
        return self.kernel_cycles + self.xla_cycles

    def kernel(self, name: str) -> Kernel:
        """The only kernel whose name contains `name`."""
        (found,) = (kernel for kernel in self.kernels if name in kernel.name)
        return found


class CompileError(ConfigError):
    """The compiler refuses a function: its message."""


def compile_for(target: str, factory: str, **options: Any) -> Compiled:
    """Compiles one function: see `Job` for the arguments.

    Raises:
      CompileError: the compiler refuses it, or libtpu is missing.
    """
    (result,) = compile_all([Job(target, factory, options)])
    if isinstance(result, CompileError):
        raise result
    return result


def compile_all(jobs: Sequence[Job], processes: int = 1) -> list[Compiled | CompileError]:
    """Compiles functions in child processes, each taking its share; an entry for each function, an error as a value.

    Raises:
      CompileError: a target is unknown, or a child process died.
    """
    for job in jobs:
        if job.target not in TOPOLOGIES:
            raise CompileError(f"target {job.target!r} is unknown: choose one of {', '.join(TOPOLOGIES)}")
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        shares = list(pool.map(_compile_in_child, [jobs[n::processes] for n in range(processes)]))
    return [shares[n % processes][n // processes] for n in range(len(jobs))]


def child_environment(libtpu_flags: str | None = None) -> dict[str, str]:
    """Environment variables of a Python process that compiles for TPUs on a machine that has none."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    return environment if libtpu_flags is None else environment | {"LIBTPU_INIT_ARGS": libtpu_flags}


def _compile_in_child(jobs: Sequence[Job]) -> list[Compiled | CompileError]:
    if not jobs:
        return []
    with tempfile.TemporaryDirectory(prefix="gqe_bundles_") as directory:
        dump = pathlib.Path(directory, "dump")
        dump.mkdir()
        results = pathlib.Path(directory, "results.json")
        request = {"jobs": [dataclasses.asdict(job) for job in jobs], "dump": str(dump), "results": str(results)}
        flags = (
            f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
            f"--xla_jf_dump_llo_pass_label_regex=packed-bundles-post-ra"
        )
        child = subprocess.run(
            [sys.executable, "-m", "gqe_jax.bench.tpu_compile"],
            input=json.dumps(request), env=child_environment(flags.strip()),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if child.returncode or not results.exists():
            raise CompileError(f"compiling for TPUs failed (exit code {child.returncode}):\n{child.stderr[-4000:]}")
        return [_decode(entry) for entry in json.loads(results.read_text())]


def _decode(entry: dict[str, Any]) -> Compiled | CompileError:
    if "error" in entry:
        return CompileError(entry["error"])
    kernels = tuple(Kernel(name, tuple(bundles.Block(**b) for b in blocks)) for name, blocks in entry.pop("kernels"))
    return Compiled(kernels=kernels, xla=tuple((name, cycles) for name, cycles in entry.pop("xla")), **entry)


# ---- in the child process


def _main() -> None:
    request = json.load(sys.stdin)
    entries = []
    for job in request["jobs"]:
        dump = pathlib.Path(request["dump"])
        for file in dump.iterdir():
            file.unlink()
        try:
            entries.append(_compile(dump, **job))
        except Exception as error:  # a kernel that does not fit, or is not supported: the caller's to judge
            entries.append({"error": f"{job['factory']} for {job['target']}: {type(error).__name__}: {error}"[:4000]})
    pathlib.Path(request["results"]).write_text(json.dumps(entries))


def _compile(dump: pathlib.Path, target: str, factory: str, options: dict[str, Any]) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    import jax
    from jax.experimental import topologies

    try:
        libtpu = version("libtpu")
    except PackageNotFoundError as error:
        raise ConfigError("libtpu is not installed: pip install 'jax[tpu]'") from error
    module, name = factory.split(":")
    function, args = getattr(importlib.import_module(module), name)(**options)
    device = topologies.get_topology_desc(TOPOLOGIES[target], platform="tpu").devices[0]
    mesh = jax.sharding.Mesh(np.array([device]), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    with jax.set_mesh(mesh):  # some lowering rules of Pallas ask the mesh which TPU it is, or else the host
        compiled = jax.jit(function).lower(*placed).compile()
        jaxpr = jax.make_jaxpr(function)(*args)
    calls = _kernel_calls(jaxpr)
    memory = compiled.memory_analysis()
    hlo = compiled.as_text()
    return {
        "libtpu": libtpu,
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "kernels": _kernels(dump, hlo, calls, target),
        "xla": _estimates(hlo),
    }


def _estimates(hlo: str) -> list[tuple[str, int]]:
    """XLA's own estimate of each operation, where it makes one, times the trips of the loop it stands in."""
    computations = {}
    for text in hlo.split("\n}\n"):
        if header := re.search(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$", text, re.MULTILINE):
            computations[header.group(1)] = text
    trips = {}
    for condition, body in re.findall(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)", hlo):
        limit = re.findall(r" constant\((\d+)\)", computations[condition])  # loops of JAX count from 0
        trips[body] = int(limit[0]) if len(limit) == 1 else 1
    estimates = [
        (name, int(cycles) * trips.get(computation, 1))
        for computation, text in computations.items()
        for name, cycles in re.findall(
            r"^ *(?:ROOT )?%?([\w.-]+) = .*\"estimated_cycles\":\"(\d+)\"", text, re.MULTILINE
        )
    ]
    return sorted((x for x in estimates if x[1]), key=lambda estimate: -estimate[1])


def _kernels(dump: pathlib.Path, hlo: str, calls: list["_Call"], target: str) -> list[tuple[str, list[dict]]]:
    """(name, blocks) of each Pallas kernel in the program, in its order."""
    programs: dict[str, bundles.Program] = {}
    traced: dict[str, list[_Call]] = {}
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


@dataclasses.dataclass(eq=False)
class _Call:
    """A pallas_call as traced.

    Attributes:
      name: of the kernel.
      shapes: of its operands, as HLO writes them.
      scalars: for each time it runs, the values that it fetches into scalar memory, by operand.
    """

    name: str
    shapes: tuple[str, ...]
    scalars: list[dict[int, np.ndarray]]


def _kernel_calls(closed_jaxpr) -> list[_Call]:
    """The Pallas kernels of a program, in order.

    Evaluates what does not depend on the function's arguments and is small; prefetched scalars are both.
    """
    from jax.extend.core import Literal

    calls: dict[int, _Call] = {}
    short = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int32": "s32", "int8": "s8", "uint8": "u8"}

    def hlo_shape(aval):
        return f"{short.get(aval.dtype.name, aval.dtype.name)}[{','.join(map(str, aval.shape))}]"

    def record(eqn, inputs):
        grid = eqn.params["grid_mapping"]
        scalars = {i: np.asarray(x) for i, x in enumerate(inputs[: grid.num_index_operands]) if x is not None}
        shapes = tuple(hlo_shape(x.aval) for x in eqn.invars)
        calls.setdefault(id(eqn), _Call(str(eqn.params["name"]), shapes, [])).scalars.append(scalars)

    def scan(eqn, inputs):
        params = eqn.params
        consts, carry = params["num_consts"], params["num_consts"] + params["num_carry"]
        state = inputs[consts:carry]
        for t in range(params["length"]):
            t = params["length"] - 1 - t if params["reverse"] else t
            xs = [None if x is None else x[t] for x in inputs[carry:]]
            outputs = evaluate(params["jaxpr"].jaxpr, params["jaxpr"].consts, [*inputs[:consts], *state, *xs])
            state = outputs[: params["num_carry"]]
        return [*state, *[None] * (len(eqn.outvars) - len(state))]

    def evaluate(jaxpr, consts, args):
        values = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))

        def read(x):
            return x.val if isinstance(x, Literal) else values[x]

        for eqn in jaxpr.eqns:
            inputs = [read(x) for x in eqn.invars]
            outputs = [None] * len(eqn.outvars)
            inner = _inner_jaxprs(eqn)
            has_kernels = any(_has_kernels(x) for x in inner)
            if eqn.primitive.name == "pallas_call":
                record(eqn, inputs)
            elif eqn.primitive.name == "scan" and has_kernels:
                outputs = scan(eqn, inputs)
            elif len(inner) == 1 and eqn.primitive.name not in ("scan", "while"):
                outputs = evaluate(getattr(inner[0], "jaxpr", inner[0]), getattr(inner[0], "consts", ()), inputs)
            elif has_kernels:
                raise ValueError(f"how often {eqn.primitive.name} runs the kernels in it is not known")
            elif all(x is not None for x in inputs) and sum(math.prod(x.aval.shape) for x in eqn.outvars) < 1 << 20:
                result = eqn.primitive.bind(*inputs, **eqn.params)
                outputs = result if eqn.primitive.multiple_results else [result]
            values.update(zip(eqn.outvars, outputs, strict=True))
        return [read(x) for x in jaxpr.outvars]

    jaxpr = closed_jaxpr.jaxpr
    evaluate(jaxpr, closed_jaxpr.consts, [None] * len(jaxpr.invars))
    return list(calls.values())


def _inner_jaxprs(eqn) -> list:
    values = [y for x in eqn.params.values() for y in (x if isinstance(x, tuple | list) else [x])]
    return [x for x in values if hasattr(x, "eqns") or hasattr(x, "jaxpr")]


def _has_kernels(jaxpr) -> bool:
    eqns = getattr(jaxpr, "jaxpr", jaxpr).eqns
    return any(eqn.primitive.name == "pallas_call" or any(_has_kernels(x) for x in _inner_jaxprs(eqn)) for eqn in eqns)


if __name__ == "__main__":
    _main()
