"""What a compiled program does outside its kernels: XLA's estimate of each operation, and what its bytes need."""

import dataclasses
import math
import re

from gqe_jax.rounding import ceil_div, round_up
from gqe_jax.tpu import GENERATIONS

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$", re.MULTILINE)
_INSTRUCTION = re.compile(r"^ *(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*)$", re.MULTILINE)
_ARRAY = re.compile(r"[a-z]+(\d+)?\[([\d,]*)\](?:\{([^}]*)\})?")
_MATRIX_PRODUCT = re.compile(r" (?:convolution|dot)\(")


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of a compiled program outside the kernels, in all trips of the loop that it stands in.

    Attributes:
      name: in the program.
      estimate: cycles, by XLA.
      need: cycles that its operands and results take through HBM at the chip's bandwidth, each whole and with the
        padding of its layout; of a matrix product XLA's estimate, because bytes are not what limits it.
    """

    name: str
    estimate: int
    need: int


def operations(hlo: str, target: str) -> list[Operation]:
    """Lists the operations that XLA has an estimate for, the highest first.

    Args:
      hlo: text of the optimised program.
      target: a key of `gqe_jax.tpu.GENERATIONS`.
    """
    computations = {match[1]: text for text in hlo.split("\n}\n") if (match := _COMPUTATION.search(text))}
    trips = {}
    for condition, body in re.findall(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)", hlo):
        limit = re.findall(r" constant\((\d+)\)", computations[condition])  # loops of JAX count from 0
        trips[body] = int(limit[0]) if len(limit) == 1 else 1
    found = []
    for computation, text in computations.items():
        instructions = _INSTRUCTION.findall(text)
        types = {name: result for name, result, _, _ in instructions}
        for name, result, opcode, rest in instructions:
            estimate = int(match[1]) if (match := re.search(r"\"estimated_cycles\":\"(\d+)\"", rest)) else 0
            if not estimate:
                continue
            called = re.search(r"calls=%?([\w.-]+)", rest)
            computed = f" {opcode}(" + (computations.get(called[1], "") if called else "")
            need = estimate
            if not _MATRIX_PRODUCT.search(computed):
                operands = {x for x in re.findall(r"%([\w.-]+)", rest.partition(")")[0]) if x in types}
                need = _cycles(sum(map(hbm_bytes, (result, *(types[x] for x in operands)))), target)
            count = trips.get(computation, 1)
            found.append(Operation(name, estimate * count, need * count))
    return sorted(found, key=lambda operation: -operation.estimate)


def hbm_bytes(type_text: str) -> int:
    """Counts the bytes of HBM that the arrays of a type take in their layout; what lies in vector memory takes none.

    A layout is {minor to major:T(tile)...}: the tile's sizes round up the last axes, the most minor one last.
    """
    total = 0
    for bits, sizes, layout in _ARRAY.findall(type_text):
        if re.search(r"S\([1-9]\)", layout):
            continue
        shape = [int(size) for size in sizes.split(",") if size]
        order, _, tiling = layout.partition(":")
        minor_first = [shape[int(axis)] for axis in order.split(",") if axis] if order else shape[::-1]
        if tile := re.match(r"T\(([\d,]+)\)", tiling):
            for n, size in enumerate(reversed(tile[1].split(","))):
                if n < len(minor_first):
                    minor_first[n] = round_up(minor_first[n], int(size))
        total += ceil_div(math.prod(minor_first) * int(bits or 8), 8)  # pred, token: no number of bits
    return total


def _cycles(num_bytes: int, target: str) -> int:
    """Cycles of one core in which HBM moves so many bytes; its cores share bandwidth and peak alike."""
    x = GENERATIONS[target]
    flops_per_cycle = 2 * x.matrix_units * x.matrix_unit_width**2 * x.matrix_unit_rows
    return ceil_div(num_bytes * int(x.peak_flops["bfloat16"]), int(x.hbm_bandwidth * flops_per_cycle))
