"""A TPU kernel's instruction bundles, as libtpu dumps them: blocks, what each costs, how often each executes.

A TPU core issues one bundle of instructions a cycle. Branches, loop counters and block indices are the scalar unit's
work, in the same text: `gqe_jax.aot.scalar_unit` runs those instructions alone, and so knows exactly which blocks a
whole kernel executes and how often, grid steps that are skipped and loops inside the kernel's body included.

The dump read here is the schedule with registers assigned (`*-packed-bundles-post-ra.txt`). The final bundles differ
only in that runs of empty bundles have become delays of the bundle before them.
"""

import dataclasses
import re

from gqe_jax.rounding import ceil_div
from gqe_jax.tpu import GENERATIONS

_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) *([A-Z]{2})? *: ", re.MULTILINE)
_EMPTY = re.compile(r"[> ]*\{\s*\}")
_OPERAND = re.compile(r"inlined_call_operand\.[\w<> ]+ \[shape: (\w+\[[\d,]*\]).*?index: (\d+), kind: (\w+)")
_INSTRUCTION = re.compile(r"(?:%([a-z]?\d+)(?:_([a-z]\d+))? = )?([a-z_]+[\w.]*) ?(.*)", re.DOTALL)
_MATMUL = re.compile(r"= vmatmul[a-z0-9.]*")
_SPILL = re.compile(r"vst \[vmem:\[#allocation\d+_spill\]")
_VECTOR_SELECT = re.compile(r"= vsel ")


@dataclasses.dataclass(frozen=True)
class Block:
    """A basic block: a run of bundles that is entered at its first and left after its last.

    Attributes:
      address: of its first bundle, in the dump.
      bundles: in it that hold an instruction, or are a branch's delay slots: one cycle each at least.
      scheduled: all bundles: with those left empty because results are not ready yet.
      mxu_cycles: that its matmul instructions keep all matrix units busy, at least.
      spills: vector registers stored for want of registers.
      selects: vector selects: an element mask shows here.
      visits: how often it executes in a whole run of the kernel.
    """

    address: str
    bundles: int
    scheduled: int
    mxu_cycles: int
    spills: int
    selects: int
    visits: int = 0

    @property
    def bound(self) -> int:
        """Cycles that one pass takes at least: issue or matrix unit, whichever is slower."""
        return max(self.bundles, self.mxu_cycles)

    @property
    def total(self) -> int:
        """`bound` times `visits`."""
        return self.bound * self.visits

    @property
    def scheduled_total(self) -> int:
        """Counts the cycles with the bundles that the compiler leaves empty, times `visits`."""
        return max(self.scheduled, self.mxu_cycles) * self.visits


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of the scalar unit.

    Attributes:
      name: of the value it defines, "" for none.
      register: where that value lives.
      op: mnemonic.
      predicate: value that decides whether it takes effect, "!" before it negates; "" for always.
      otherwise: value that `name` has when the predicate is false, "" for none.
      operands: text of each.
    """

    name: str
    register: str
    op: str
    predicate: str
    otherwise: str
    operands: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """Holds the parsed dump of a kernel.

    Attributes:
      blocks: in the order of their addresses, visits not yet counted.
      scalar: for each block, for each bundle, its scalar instructions.
      targets: for each block that ends in a branch, (predicate, block it leads to).
      operands: shape of each of the kernel's inputs as in HLO ("s32[8]"), by its index.
    """

    blocks: tuple[Block, ...]
    scalar: tuple[tuple[tuple[Instruction, ...], ...], ...]
    targets: dict[int, tuple[str, int]]
    operands: dict[int, str]


def parse(text: str, target: str) -> Program:
    """Takes a `*-packed-bundles-post-ra.txt` of libtpu apart.

    Args:
      text: the dump.
      target: generation, a key of `gqe_jax.tpu.GENERATIONS`.

    Raises:
      ValueError: the text is not laid out as expected (another libtpu, perhaps).
    """
    heads = list(_BUNDLE.finditer(text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    bundles = [text[head.end() : end] for head, end in zip(heads, ends, strict=True)]
    scalar = _numbered_pops([_scalar_instructions(bundle) for bundle in bundles])
    delay = GENERATIONS[target].delay_slots

    branches = {}
    for i, instructions in enumerate(scalar):
        for x in instructions:
            if x.op == "sbr.rel":
                to = re.search(r"target bundleno = (\d+)", x.operands[0])
                if to is None or not int(to.group(1)) < len(bundles):
                    raise ValueError(f"the branch at bundle {heads[i].group(1)} leads to no known place: {x}")
                branches[i] = (x.predicate, int(to.group(1)))
    starts = {0} | {to for _, to in branches.values()} | {i + delay + 1 for i in branches}
    starts = sorted(start for start in starts if start < len(bundles))
    spans = list(zip(starts, [*starts[1:], len(bundles)], strict=True))
    number = {start: n for n, start in enumerate(starts)}

    blocks, targets = [], {}
    for n, (start, end) in enumerate(spans):
        branch = [i for i in range(start, end) if i in branches]
        if branch:
            predicate, to = branches[branch[0]]
            targets[n] = (predicate, number[to])
            if branch != [end - delay - 1]:
                raise ValueError(f"branch at bundle {heads[branch[0]].group(1)}: {target} has {delay} delay slots")
        blocks.append(_block(heads[start].group(1), bundles[start:end], delay if branch else 0, target))
    operands = {int(i): shape for shape, i, kind in _OPERAND.findall(text) if kind == "input"}
    return Program(tuple(blocks), tuple(tuple(scalar[start:end]) for start, end in spans), targets, operands)


def _block(address: str, bundles: list[str], delay_slots: int, target: str) -> Block:
    generation = GENERATIONS[target]
    rows = sum(16 if "bf16" in op else 8 for bundle in bundles for op in _MATMUL.findall(bundle))
    empty = sum(bool(_EMPTY.match(bundle)) for bundle in bundles[: len(bundles) - delay_slots])
    return Block(
        address=address,
        bundles=len(bundles) - empty,
        scheduled=len(bundles),
        mxu_cycles=ceil_div(rows, generation.matrix_units * generation.matrix_unit_rows),
        spills=sum(len(_SPILL.findall(bundle)) for bundle in bundles),
        selects=sum(len(_VECTOR_SELECT.findall(bundle)) for bundle in bundles),
    )


def _numbered_pops(scalar: list[tuple[Instruction, ...]]) -> list[tuple[Instruction, ...]]:
    """A division's results are popped one after the other: each pop gets its place as a second operand."""
    popped: dict[str, int] = {}

    def numbered(x: Instruction) -> Instruction:
        if x.op != "spop.drf":
            return x
        place = popped[x.operands[0]] = popped.get(x.operands[0], -1) + 1
        return dataclasses.replace(x, operands=(x.operands[0], str(place)))

    return [tuple(map(numbered, bundle)) for bundle in scalar]


def _scalar_instructions(bundle: str) -> tuple[Instruction, ...]:
    bundle = re.sub(r"/\* (k[A-Z]\w+) \*/", r", \1", bundle)  # which half of a division: only the comment says
    bundle = re.sub(r"/\*.*?\*/", "", bundle, flags=re.DOTALL)
    found = []
    for text in bundle.split(";;"):
        match = _INSTRUCTION.match(text.strip(" >{}\n"))
        if match is None:
            continue
        name, register, op, rest = (group or "" for group in match.groups())
        if name.startswith("v") or not re.match(r"s|p[a-z]|dma\.\w+_to_smem|int_to_ptr|inlined_call_operand", op):
            continue
        predicate = otherwise = ""
        found_predicate = re.search(r"\((!?)%(p\d+)\w*(?:, ([^()]*))?\),? ?", rest)
        if found_predicate:
            predicate = found_predicate.group(1) + found_predicate.group(2)
            otherwise = found_predicate.group(3) or ""
            rest = rest[: found_predicate.start()] + rest[found_predicate.end() :]
        if op == "sbr.rel":
            operands = (rest,)
        elif op == "sst":
            operands = tuple(part.strip(", ") for part in re.fullmatch(r"(\[smem:\[.*?\]\])(.*)", rest).groups())
        elif op.startswith("inlined_call_operand"):
            operands = re.search(r"index: (\d+), kind", rest).groups()
        elif op.startswith("int_to_ptr"):
            operands = (rest.split()[-1],)
        else:
            operands = tuple(part.strip() for part in rest.split(","))
        found.append(Instruction(name, register, op, predicate, otherwise, operands))
    return tuple(found)
