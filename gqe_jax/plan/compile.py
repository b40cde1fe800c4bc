"""Compiles a configuration's step for a slice of TPUs on a machine that has none, in a child process.

Neither parameters nor data exist: the step is lowered from shapes and shardings, which is all that the compiler asks
for.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gqe_jax.aot.child import Child, CompileError
from gqe_jax.aot.topologies import Topology, topology
from gqe_jax.config import ConfigError, RunConfig
from gqe_jax.config_dict import build, to_dict
from gqe_jax.plan import Mode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Says what to compile.

    Attributes:
      topology: name of the slice or slices (`topologies.topology`).
      mode: "train", the whole step; "prefill", prompts into a cache as long as they; "decode", one token more for each
        row of a full cache, weights in the compute dtype in both.
      batch_size, seq_len: rows of the global batch and tokens of each.
    """

    config: RunConfig
    topology: str
    mode: Mode
    batch_size: int
    seq_len: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """Describes a compiled step; bytes are those of one device.

    Attributes:
      mesh: axis → devices.
      extents: axis of the mesh → chips that it stretches over along each dimension of the slice.
      inputs: bytes of the step's arguments by what they are: parameters, optimizer, cache, batch.
      arguments, outputs, temporaries, aliased, code: as the compiler lays them out; aliased is the part of the outputs
        that takes the place of arguments.
      hlo: the optimised program.
      lower_seconds, compile_seconds: that it took.
    """

    mesh: Mapping[str, int]
    extents: Mapping[str, tuple[int, ...]]
    inputs: Mapping[str, int]
    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    code: int
    hlo: str
    lower_seconds: float
    compile_seconds: float

    @property
    def peak(self) -> int:
        """Bytes that have to fit into a device's memory."""
        return self.arguments + self.temporaries + self.outputs - self.aliased + self.code


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutOfMemory:
    """The compiler finds no room for the step.

    Attributes:
      needed, available: bytes of temporaries, and of memory for everything; None where the message does not say.
      message: the compiler's.
    """

    mesh: Mapping[str, int]
    extents: Mapping[str, tuple[int, ...]]
    inputs: Mapping[str, int]
    needed: int | None
    available: int | None
    message: str


def compile_plan(request: Request) -> Compiled | OutOfMemory:
    """Compiles the step of `request`.

    Raises:
      ConfigError: libtpu is missing; mesh, model and batch do not fit together.
      CompileError: the compiler fails for another reason than memory.
    """
    fields = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    try:
        with Child() as child:
            answer = child.call("gqe_jax.plan.compile:compile_request", **fields | {"config": to_dict(request.config)})
    except CompileError as error:
        raise CompileError(f"compiling for {request.topology} failed: {error}") from None
    return Compiled(**answer) if "hlo" in answer else OutOfMemory(**answer)


# ---- in the child process


def compile_request(config: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Returns the fields of `Compiled` or of `OutOfMemory` for a `Request`, whose config is a dictionary."""
    return _compile(Request(config=build(config), **fields))


def _compile(request: Request) -> dict[str, Any]:
    import time

    import jax

    from gqe_jax.parallel.mesh import check_model, make_mesh

    where = topology(request.topology)
    mesh = make_mesh(request.config.mesh, where.devices())
    check_model(mesh, request.config.model)
    known = {"mesh": dict(mesh.shape), "extents": _extents(mesh, where)}
    with jax.set_mesh(mesh):
        began = time.monotonic()
        function, arguments, inputs = _step(request, mesh)
        lowered = function.lower(*arguments)
        known["inputs"] = {name: _device_bytes(tree) for name, tree in inputs.items()}
        lowered_at = time.monotonic()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return known | _out_of_memory(str(error))
    memory = compiled.memory_analysis()
    return known | {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "hlo": compiled.as_text(),
        "lower_seconds": lowered_at - began,
        "compile_seconds": time.monotonic() - lowered_at,
    }


def _extents(mesh, where: Topology) -> dict[str, tuple[int, ...]]:
    import math

    import numpy as np

    dimensions = len(where.shape)
    extents = {}
    for place, axis in enumerate(mesh.axis_names):
        line = np.moveaxis(mesh.devices, place, 0).reshape(mesh.shape[axis], -1)[:, 0]
        line = line[: len(line) // (where.slices if axis == "data" else 1)]  # in each slice the same
        coordinates = [device.coords[:dimensions] for device in line]
        spans = [len(set(values)) for values in zip(*coordinates, strict=True)]
        while math.prod(spans) > len(line):  # a line that does not keep to one dimension: count its longest
            spans[spans.index(min(span for span in spans if span > 1))] = 1
        extents[axis] = tuple(spans)
    return extents


def _step(request: Request, mesh) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(jitted function, abstract arguments, the same by what they are)."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.sharding import NamedSharding

    from gqe_jax.generate import cast_weights
    from gqe_jax.models.transformer import abstract_model
    from gqe_jax.parallel.mesh import batch_sharding, check_batch
    from gqe_jax.parallel.rules import spec_of, state_shardings
    from gqe_jax.train.step import Step

    config, rows, length = request.config, request.batch_size, request.seq_len

    def placed(tree, shardings):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    def tokens(shape, dtype=jnp.int32):
        sharding = batch_sharding(mesh) if len(shape) == 2 else NamedSharding(mesh, spec_of(("batch",)))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    if request.mode == "train":
        check_batch(mesh, rows // config.train.accumulate, length)
        step = Step(config, mesh)
        state = placed(step.abstract_state, step.shardings)
        names = ("tokens", "targets", "segment_ids", "positions")
        batch = {name: tokens((rows, length)) for name in names} | {"mask": tokens((rows, length), jnp.bool_)}
        return step.train, (state, batch), {"parameters": state.params, "optimizer": state.opt_state, "batch": batch}

    check_batch(mesh, rows, length)
    if mesh.shape["context"] > 1:
        raise ConfigError(
            f"mesh.context={mesh.shape['context']}: a cache is not split along the sequence, so --mode={request.mode} "
            f"needs mesh.context=1: give its devices to mesh.expert or mesh.data"
        )
    abstract = abstract_model(config.model)
    graphdef = nnx.split(abstract)[0]
    params = cast_weights(abstract, jnp.dtype(config.model.dtype))
    params = placed(params, state_shardings(mesh, params, abstract))
    cache = jax.eval_shape(lambda: nnx.merge(graphdef, params).init_cache(rows, length))
    cache_shardings = jax.tree.map(
        lambda axes: NamedSharding(mesh, spec_of(axes)), cache.axes, is_leaf=lambda axes: isinstance(axes, tuple)
    )
    cache = placed(cache, cache_shardings)

    def prefill(params, prompts):
        model = nnx.merge(graphdef, params)
        x, _, cache = model(prompts, cache=model.init_cache(rows, length))
        return jnp.argmax(model.logits(x[:, -1]), axis=-1), cache

    def decode(params, token, cache):
        model = nnx.merge(graphdef, params)
        x, _, cache = model(token[:, None], cache=cache)
        return jnp.argmax(model.logits(x[:, 0]), axis=-1), cache

    if request.mode == "prefill":
        step = jax.jit(prefill, out_shardings=(None, cache_shardings))
        return step, (params, tokens((rows, length))), {"parameters": params}
    step = jax.jit(decode, donate_argnums=2, out_shardings=(None, cache_shardings))
    return step, (params, tokens((rows,)), cache), {"parameters": params, "cache": cache}


def _device_bytes(tree) -> int:
    import math

    import jax

    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def _out_of_memory(message: str) -> dict[str, Any]:
    import re

    sizes = [
        round(float(number) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[unit])
        for number, unit in re.findall(r"\(([\d.]+)([KMGT]?)\)", message)
    ]
    needed, available = sizes[:2] if len(sizes) >= 2 else (None, None)
    return {"needed": needed, "available": available, "message": message[:4000]}
