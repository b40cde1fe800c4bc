"""Runs the instructions of a TPU core's scalar unit that decide branches: how often each block of a kernel executes."""

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from gqe_jax.aot.bundles import Block, Instruction, Program
from gqe_jax.tpu import LANES, SUBLANES

_S32, _U32 = "(({} & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000", "({} & 0xFFFFFFFF)"
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_ARITHMETIC = {
    "sadd.s32": "{0} + {1}",
    "ssub.s32": "{0} - {1}",
    "smul.u32": _S32.format("({0} * {1})"),
    "smulhi.u32": f"({_U32.format('{0}')} * {_U32.format('{1}')}) >> 32",
    "sand.u32": "{0} & {1}",
    "sor.u32": "{0} | {1}",
    "sxor.u32": "{0} ^ {1}",
    "sshll.u32": _S32.format("({0} << {1})"),
    "sshrl.u32": f"{_U32.format('{0}')} >> {{1}}",
    "sshra.s32": "{0} >> {1}",
    "smin.u32": f"min({_U32.format('{0}')}, {_U32.format('{1}')})",
    "smax.u32": f"max({_U32.format('{0}')}, {_U32.format('{1}')})",
    "smov": "{0}",
    "smov.u32": "{0}",  # libtpu 0.0.50 and later
    "scalar_select": "{1} if {0} else {2}",
    "por": "{0} or {1}",
    "pand": "{0} and {1}",
    "pnand": "not ({0} and {1})",
    "pnor": "not ({0} or {1})",
    "pxor": "bool({0}) != bool({1})",
    "pneg": "not {0}",
    "pmov": "{0}",
    "spop.drf": "{0}[{1}]",
}
_ALLOCATION = re.compile(r"#allocation(\d+)(_spill)?")
_ALLOCATION_SIZE = 1 << 18  # words; more than there are in a core's scalar memory


def count_visits(program: Program, scalar_operands: dict[int, np.ndarray]) -> tuple[Block, ...]:
    """Returns the blocks of `program` with their visits: runs the scalar instructions that branches depend on.

    Args:
      program: of a kernel; where two cores share it, their visits are added.
      scalar_operands: values of the operands that the kernel fetches into scalar memory, by index.

    Raises:
      ValueError: a branch depends on what is not known here: vector data, or an unlisted operand or instruction.
    """
    source = _generate(program, _slice(program))
    scope: dict[str, Callable] = {}
    exec(compile(source, "<scalar program>", "exec"), scope)
    operands = {index: words(values, program.operands[index]) for index, values in scalar_operands.items()}
    # A kernel that two cores share asks which one it is on; where only one works, the other leaves at once.
    instructions = [x for block in program.scalar for bundle in block for x in bundle]
    shared = any(x.op == "sld" and "[#allocation0]" in x.operands[0] for x in instructions)
    try:
        per_core = [scope["run"](operands, core) for core in range(2 if shared else 1)]
    except KeyError as error:
        raise ValueError(f"the values of operand {error}, which decides branches, are not given") from error
    visits = map(sum, zip(*per_core, strict=True))
    return tuple(dataclasses.replace(block, visits=n) for block, n in zip(program.blocks, visits, strict=True))


def _reads(x: Instruction) -> set[str]:
    """Names of the values that an instruction reads."""
    text = " ".join((*x.operands, x.otherwise))
    return {*re.findall(r"%([sp]?\d+)", text), *filter(None, [x.predicate.lstrip("!")])}


def _slice(program: Program) -> set[int]:
    """Identities of the instructions whose results decide a branch, through memory too."""
    instructions = [x for block in program.scalar for bundle in block for x in bundle]
    definition = {x.name: x for x in instructions if x.name}
    loads: list[Instruction] = []
    stores = [x for x in instructions if x.op == "sst" or x.op.endswith("_to_smem")]
    needed: set[int] = set()
    wanted = [predicate.lstrip("!") for predicate, _ in program.targets.values() if predicate]
    while wanted:
        while wanted:
            name = wanted.pop()
            if name not in definition:
                raise ValueError(f"a branch depends on %{name}, which the scalar unit does not compute")
            x = definition[name]
            if id(x) not in needed:
                needed.add(id(x))
                wanted.extend(_reads(x))
                loads += [x] if x.op == "sld" else []
        for x in stores:
            if id(x) not in needed and any(_may_alias(definition, x, load) for load in loads):
                needed.add(id(x))
                wanted.extend(_reads(x))
    return needed


def _may_alias(definition: dict[str, Instruction], store: Instruction, load: Instruction) -> bool:
    """Says whether a load may read what a store wrote; a place in memory that is not named may be any but a spill's."""
    address = store.operands[0]
    if store.op != "sst":
        address = definition[store.operands[2].strip("%").split("_")[0]].operands[0]
    (ours, *_), (theirs, *_) = ([*_ALLOCATION.findall(x), None] for x in (address, load.operands[0]))
    if ours and theirs:
        return ours == theirs
    return not any(place and place[1] for place in (ours, theirs))


def _value(text: str) -> str:
    """Returns an operand as a Python expression: a value, a constant, or an address, which is a sum of them in
    brackets."""
    if text.startswith("["):
        return " + ".join(_value(term) for term in text.replace("smem:", "").strip("[]").split(" + "))
    if allocation := _ALLOCATION.fullmatch(text):
        return str((2 * int(allocation[1]) + bool(allocation[2])) * _ALLOCATION_SIZE)
    if text.startswith("$"):
        return str(int(text[1:], 16))
    if value := re.fullmatch(r"(!?)%?([ps]?\d+)(_[a-z]\d+)?", text):
        negated, name, _ = value.groups()
        if text.isdigit():
            return str((int(name) ^ 0x80000000) - 0x80000000)
        return f"(not x_{name})" if negated else f"x_{name}"
    raise ValueError(f"operand {text!r} is not one of the scalar unit")


def _generate(program: Program, needed: set[int]) -> str:
    """Python source of run(words, core) → visits of each block."""
    phi_arguments = {
        name
        for block in program.scalar
        for bundle in block
        for x in bundle
        if x.op == "sphi" and id(x) in needed
        for name in _reads(x)
    }
    names, registers, body = set(), set(), []
    for n, block in enumerate(program.scalar):
        body.append(f"        if at == {n}:\n            n_{n} += 1")
        for bundle in block:
            for x in _ordered([x for x in bundle if id(x) in needed]):
                if x.op == "sphi":
                    registers.add(x.register)
                if x.name in phi_arguments:
                    registers.add(x.register)
                names.add(x.name)
                body.append("            " + _statement(x))
                if x.name in phi_arguments:
                    body.append(f"            r_{x.register} = x_{x.name}")
        following = "None" if n + 1 == len(program.scalar) else str(n + 1)
        if n in program.targets:
            predicate, target = program.targets[n]
            following = f"{target} if {_value(predicate)} else {following}" if predicate else str(target)
        body.append(f"            at = {following}")
    variables = [f"x_{name}" for name in sorted(names) if name] + [f"r_{x}" for x in sorted(registers)]
    counters = [f"n_{n}" for n in range(len(program.scalar))]
    start = "".join(f"    {variable} = 0\n" for variable in [*variables, *counters])
    return (
        f"def run(words, core):\n    memory = {{0: core}}\n    at = 0\n{start}    while at is not None:\n"
        + "\n".join(body)
        + f"\n    return [{', '.join(counters)}]\n"
    )


def _ordered(instructions: list[Instruction]) -> list[Instruction]:
    """Returns one bundle's instructions in an order in which each value is defined before it is read: phis and loads
    first."""
    rank = {"sphi": 0, "sld": 1, "sst": 3}
    waiting = sorted(instructions, key=lambda x: rank.get(x.op, 2))
    ordered: list[Instruction] = []
    while waiting:
        undefined = {x.name for x in waiting if x.name}
        ready = next(x for x in waiting if x.op == "sphi" or not undefined & _reads(x))
        waiting.remove(ready)
        ordered.append(ready)
    return ordered


def _statement(x: Instruction) -> str:
    if x.op == "sphi":
        return f"x_{x.name} = r_{x.register}"
    if x.op == "inlined_call_operand.":  # in no memory: an array of one element is passed as its value
        return f"x_{x.name} = words[{x.operands[0]}][0]"
    if x.op.startswith("inlined_call_operand"):
        return f"x_{x.name} = {2 * int(x.operands[0]) + 1}"
    halves = {"kRem": "%", "kQuot": "//", "kDivAndRem": "// %"}.get(x.operands[-1])
    if not halves and x.op not in _ARITHMETIC and not re.match(r"sst|sld|scmp|scalar_lea|int_to_ptr|dma", x.op):
        raise ValueError(f"a branch depends on {x.op} of {', '.join(x.operands)}: its result is not known here")
    values = [_value(operand) for operand in x.operands[: -1 if halves else None]]
    if x.op == "sst":
        return f"{f'if {_value(x.predicate)}: ' if x.predicate else ''}memory[{values[0]}] = {values[1]}"
    if x.op.endswith("_to_smem"):
        source, _, destination, _ = values
        # An operand's address is an odd number that names it, perhaps shifted (bytes to granules).
        index = f"{source} // ({source} & -{source}) // 2"
        return f"for i, word in enumerate(words[{index}]): memory[{destination} + i] = word"
    if x.op == "sld":
        # Where nothing was stored, nothing will use the value.
        expression = f"memory.get({values[0]}, 0)"
    elif x.op.startswith("scalar_lea"):
        expression = " + ".join(values)
    elif x.op.startswith("int_to_ptr"):
        expression = values[0]
    elif halves:
        a, b = (_U32.format(value) for value in values)
        expression = "(" + "".join(f"{a} {half} {b} if {b} else 0, " for half in halves.split()) + ")"
    elif match := re.fullmatch(r"scmp\.(\w\w)\.([su])32\.totalorder", x.op):
        a, b = values if match[2] == "s" else [_U32.format(value) for value in values]
        expression = f"{a} {_COMPARE[match[1]]} {b}"
    else:
        expression = _ARITHMETIC[x.op].format(*(f"({value})" for value in values))
    if x.otherwise:
        expression = f"({expression}) if {_value(x.predicate)} else {_value(x.otherwise)}"
    return f"x_{x.name} = {expression}"


def words(values: np.ndarray, shape: str) -> list[int]:
    """Returns an array as the 32-bit words of its place in scalar memory.

    One axis lies there as it is. More are tiled, 8 rows of 128, and 8-bit values then packed, four rows to a word.
    """
    values = np.asarray(values)
    if values.ndim <= 1 and values.dtype.itemsize == 4:
        return values.ravel().astype(np.int64).astype(np.int32).tolist()
    if values.ndim <= 1 or values.dtype.itemsize not in (1, 4):
        raise ValueError(f"where {shape} lies in scalar memory is not known: use 32-bit values")
    *_, rows, columns = values.shape
    padded = np.pad(values.reshape(-1, rows, columns), [(0, 0), (0, -rows % SUBLANES), (0, -columns % LANES)])
    tiles = padded.reshape(len(padded), -1, SUBLANES, padded.shape[2] // LANES, LANES).swapaxes(2, 3)
    if values.dtype.itemsize == 1:
        tiles = np.ascontiguousarray(tiles.reshape(*tiles.shape[:3], 2, 4, LANES).swapaxes(-1, -2)).view(np.int32)
    return tiles.ravel().tolist()
