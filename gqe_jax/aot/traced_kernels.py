"""The Pallas kernels of a traced program, and the values of the scalars that they fetch."""

import dataclasses
import math

import numpy as np
from jax.extend.core import Literal


@dataclasses.dataclass(eq=False)
class KernelCall:
    """Describes one traced pallas_call.

    Attributes:
      name: of the kernel.
      shapes: of its operands, as HLO writes them.
      scalars: for each time it runs, the values that it fetches into scalar memory, by operand.
    """

    name: str
    shapes: tuple[str, ...]
    scalars: list[dict[int, np.ndarray]]


def kernel_calls(closed_jaxpr) -> list[KernelCall]:
    """Returns the Pallas kernels of a program, in order.

    Evaluates what does not depend on the function's arguments and is small; prefetched scalars are both.
    """
    calls: dict[int, KernelCall] = {}
    short = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int32": "s32", "int8": "s8", "uint8": "u8"}

    def hlo_shape(aval):
        return f"{short.get(aval.dtype.name, aval.dtype.name)}[{','.join(map(str, aval.shape))}]"

    def record(eqn, inputs):
        grid = eqn.params["grid_mapping"]
        scalars = {i: np.asarray(x) for i, x in enumerate(inputs[: grid.num_index_operands]) if x is not None}
        shapes = tuple(hlo_shape(x.aval) for x in eqn.invars)
        calls.setdefault(id(eqn), KernelCall(str(eqn.params["name"]), shapes, [])).scalars.append(scalars)

    def scan(eqn, inputs):
        params = eqn.params
        consts, num_carry = _scan_sizes(params)
        carry = consts + num_carry
        state = inputs[consts:carry]
        for t in range(params["length"]):
            t = params["length"] - 1 - t if params["reverse"] else t
            xs = [None if x is None else x[t] for x in inputs[carry:]]
            outputs = evaluate(params["jaxpr"].jaxpr, params["jaxpr"].consts, [*inputs[:consts], *state, *xs])
            state = outputs[:num_carry]
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


def _scan_sizes(params: dict) -> tuple[int, int]:
    """Says how many of a scan's inputs are constants, and how many behind them are carried on."""
    if "ft_in" in params:  # jax 0.12 and later
        consts, carry, _ = params["ft_in"].unpack()
        return len(list(consts)), len(list(carry))
    return params["num_consts"], params["num_carry"]


def _inner_jaxprs(eqn) -> list:
    values = [y for x in eqn.params.values() for y in (x if isinstance(x, tuple | list) else [x])]
    return [x for x in values if hasattr(x, "eqns") or hasattr(x, "jaxpr")]


def _has_kernels(jaxpr) -> bool:
    eqns = getattr(jaxpr, "jaxpr", jaxpr).eqns
    return any(eqn.primitive.name == "pallas_call" or any(_has_kernels(x) for x in _inner_jaxprs(eqn)) for eqn in eqns)
