"""The collectives of a compiled program: by kind, by axes of the mesh, with their number and bytes.

What goes between slices is a `send` that the runtime of several slices reduces or gathers: it is of the axis `NETWORK`.
Read from the text of the optimised HLO. What stands in the body of a loop counts once for each of its trips, and an
asynchronous pair (`all-gather-start` and `-done`, or a collective wrapped in `async-start`) once.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
NETWORK = ("network",)

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128} | {
    f"{letter}{bits}": bits for letter in "fsu" for bits in (4, 8, 16, 32, 64)
}
_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"^ *(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[\w-]+)\((?P<rest>.*)$"
)
_ARRAY = re.compile(r"(?<![\w.])([a-z]+\d*[a-z\d]*)\[([\d,]*)\]")
_REFERENCE = re.compile(r"%([\w.-]+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """Sums all collectives of one kind over the same axes.

    Attributes:
      kind: one of `KINDS`.
      axes: of the mesh, over which they run; () where the groups follow none; `NETWORK` between slices.
      count: in one run of the program.
      hidden: of these, how many run while the device computes: the rest it waits for.
      size: bytes of their arrays on one device, summed: of the larger side, so of what is gathered or is reduced.
      sent: bytes that a device sends: by a ring of n devices (n - 1)/n of the size, for an all-reduce twice that.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    hidden: int
    size: int
    sent: int


@dataclasses.dataclass
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        depth = 1
        for end, character in enumerate(self.rest):
            depth += {"(": 1, ")": -1}.get(character, 0)
            if depth == 0:
                return _REFERENCE.findall(self.rest[:end])
        raise ValueError(f"instruction {self.name} of the HLO text has no end of its operands")

    def called(self, attribute: str) -> list[str]:
        match = re.search(rf"[ ,]{attribute}=(\{{[^}}]*\}}|%?[\w.-]+)", self.rest)
        return re.findall(r"[\w.-]+", match.group(1)) if match else []


def read_collectives(hlo: str, mesh: Mapping[str, int]) -> list[Collective]:
    """Returns the collectives of a program for one device of `mesh` (axis → devices), the largest first.

    Raises:
      ValueError: text that is no HLO module, or a loop whose number of trips is not written in it.
    """
    computations, entry = _computations(hlo)
    count, hidden, size, sent = (collections.Counter() for _ in range(4))
    for instruction, shapes, trips, asynchronous in _walk(computations, entry, 1):
        array = sum(_bytes(shapes[name]) for name in instruction.operands)
        if instruction.opcode == "send":
            kind, (axes, devices) = _transfer(instruction.rest)
        else:
            kind, (axes, devices) = instruction.opcode.removesuffix("-start"), _group(instruction.rest, mesh)
        if kind == "all-gather":
            array *= devices
        key = kind, axes
        count[key] += trips
        hidden[key] += trips if asynchronous or instruction.opcode.endswith(("-start", "send")) else 0
        size[key] += trips * array
        shares = {"all-reduce": 2 * (devices - 1) / devices, "collective-permute": 1}
        sent[key] += round(trips * array * shares.get(kind, (devices - 1) / devices))
    found = [
        Collective(kind=key[0], axes=key[1], count=count[key], hidden=hidden[key], size=size[key], sent=sent[key])
        for key in count
    ]
    return sorted(found, key=lambda collective: -collective.sent)


def kernel_calls(hlo: str) -> int:
    """Says how often one run of the program calls a Pallas kernel."""
    computations, entry = _computations(hlo)
    return sum(
        trips for instruction, _, trips, _ in _walk(computations, entry, 1, "custom-call")
        if 'custom_call_target="tpu_custom_call"' in instruction.rest
    )  # fmt: skip


def _computations(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry = current = None
    for line in hlo.splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = computations.setdefault(header["name"], [])
                entry = header["name"] if header["entry"] else entry
        elif line.startswith("}"):
            current = None
        elif instruction := _INSTRUCTION.match(line):
            current.append(_Instruction(**instruction.groupdict()))
    if entry is None:
        raise ValueError("this text holds no HLO module: it has no ENTRY computation")
    return computations, entry


def _walk(
    computations: dict[str, list[_Instruction]], name: str, trips: int, opcode: str | None = None
) -> Iterator[tuple[_Instruction, dict[str, str], int, bool]]:
    """(instruction, shapes of its computation by name, executions, whether the device computes meanwhile) of all
    collectives that run when computation `name` does; with an `opcode`, of the instructions that have it."""
    wanted = {opcode} if opcode else {kind + suffix for kind in KINDS for suffix in ("", "-start")} | {"send"}
    shapes = {instruction.name: instruction.shape for instruction in computations[name]}
    spread: set[str] = set()
    for instruction in computations[name]:
        if instruction.opcode in wanted and ("megascale" in instruction.rest or instruction.opcode != "send"):
            yield instruction, shapes, trips, False
        elif instruction.opcode == "while":
            (body,), (condition,) = instruction.called("body"), instruction.called("condition")
            yield from _walk(computations, body, trips * _trips(computations, instruction, condition), opcode)
        elif instruction.opcode == "conditional":  # of its branches the one that does most
            branches = instruction.called("branch_computations")
            branches += instruction.called("true_computation") + instruction.called("false_computation")
            runs = [list(_walk(computations, branch, trips, opcode)) for branch in branches]
            yield from max(runs, key=len)
        elif instruction.opcode in ("fusion", "async-start"):
            for called in instruction.called("calls"):
                # libtpu's other form of a start: %async-collective-start = fusion(...)
                asynchronous = instruction.opcode == "async-start" or instruction.name.startswith("async-collective")
                for found, its_shapes, runs, _ in _walk(computations, called, trips, opcode):
                    if called.startswith("all-reduce-scatter") and found.opcode == "all-reduce":
                        found = dataclasses.replace(found, opcode="reduce-scatter")  # and a slice, as one operation
                    channel = re.search(r"channel_id=\d+", found.rest)
                    # A collective that XLA spreads over several fusions, to hide it behind them, stands in each.
                    if channel is None or channel.group() not in spread:
                        yield found, its_shapes, runs, asynchronous
                    spread |= {channel.group()} if channel else set()
        elif instruction.opcode == "call":
            for called in instruction.called("to_apply"):
                yield from _walk(computations, called, trips, opcode)


def _trips(computations: dict[str, list[_Instruction]], loop: _Instruction, condition: str) -> int:
    if known := re.search(r'known_trip_count[^}]*?"n":"(\d+)"', loop.rest):
        return int(known.group(1))
    limits = [
        re.match(r"\d+", instruction.rest) for instruction in computations[condition]
        if instruction.opcode == "constant" and instruction.shape.startswith(("s32", "s64", "u32", "u64"))
    ]  # fmt: skip
    if len(limits) != 1 or limits[0] is None:  # loops of JAX count from 0 to a constant
        raise ValueError(f"how often the loop {loop.name} of the HLO text runs is not written in it")
    return int(limits[0].group())


def _bytes(shape: str) -> int:
    """Returns the bytes of an array or of a tuple of arrays, without the padding of its layout."""
    return sum(
        math.prod(int(size) for size in sizes.split(",") if size) * _BITS[dtype] // 8
        for dtype, sizes in _ARRAY.findall(shape)
        if dtype in _BITS
    )


def _transfer(attributes: str) -> tuple[str, tuple[tuple[str, ...], int]]:
    """(kind, (NETWORK, number of slices)) of a transfer between slices."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', attributes)
    name = kind.group(1).lower().replace("_", "-") if kind else ""
    slices = re.search(r'_xla_megascale_target="\{([\d,]+)\}', attributes)
    return name if name in KINDS else "collective-permute", (NETWORK, slices.group(1).count(",") + 1 if slices else 2)


def _group(attributes: str, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """(axes of the mesh, number of devices) of the groups that a collective runs in."""
    shape = tuple(mesh.values())
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes):
        groups = [list(map(int, re.findall(r"\d+", pair))) for pair in re.findall(r"\{(.*?)\}", pairs.group(1))]
    else:
        groups = _replica_groups(attributes, math.prod(shape))
    places = np.stack(np.unravel_index(np.asarray(groups), shape), axis=-1)  # [groups, devices, axes]
    varies = (places != places[:, :1]).any(axis=(0, 1))
    axes = tuple(axis for axis, differs in zip(mesh, varies, strict=True) if differs)
    size = len(groups[0])
    if not pairs and math.prod(mesh[axis] for axis in axes) != size:
        axes = ()
    return axes, size


def _replica_groups(attributes: str, num_devices: int) -> list[list[int]]:
    """Lists of devices, from any of the ways to write them; all devices where none are written."""
    if explicit := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", attributes):
        return [_integers(group) for group in re.findall(r"\{([\d, ]*)\}", explicit.group(1))]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        groups, dims, order = (part and _integers(part) for part in iota.groups())
        return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(groups).tolist()
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\))? \{([^}]*)\}",
        attributes,
    )
    if named:
        axes, dims, order, devices, used = named.groups()
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", axes)}
        numbers = np.arange(math.prod(sizes.values()))
        if dims:
            numbers = numbers.reshape(_integers(dims)).transpose(_integers(order) if order else None)
        elif devices:
            numbers = np.asarray(_integers(devices))
        used = re.findall(r"'(\w+)'", used)
        places = [list(sizes).index(axis) for axis in [*(axis for axis in sizes if axis not in used), *used]]
        numbers = numbers.reshape(list(sizes.values())).transpose(places)
        return numbers.reshape(-1, math.prod(sizes[axis] for axis in used)).tolist()
    if re.search(r"replica_groups=(?!\{\})", attributes):
        raise ValueError(f"groups of devices in an unknown notation: {attributes[:300]}")
    return [list(range(num_devices))]


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
