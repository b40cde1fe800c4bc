"""Runs a module's forward pass device by device, with gathered parameters and the device's own tokens and heads.

A module states its forward pass as a function of what one device holds. `on_mesh` runs that inside `jax.shard_map`, so
that the code names every collective and XLA never has to partition a Pallas kernel; without a mesh it calls the
function as it is.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType

from gqe_jax.parallel.rules import AXES, RULES, LogicalAxes, placed_variables, spec_of
from gqe_jax.remat import GATHERED


@dataclasses.dataclass(frozen=True)
class Shard:
    """Says which part of a computation over a mesh one device has, and communicates with the others.

    Its methods take the name of an axis of the mesh; along an axis of size 1 they do nothing.

    Attributes:
      sizes: (axis, size) of the mesh's axes; all sizes are 1 where there is no mesh.
    """

    sizes: tuple[tuple[str, int], ...] = tuple((axis, 1) for axis in AXES)

    def size(self, axis: str) -> int:
        """Returns the number of devices along an axis."""
        return dict(self.sizes)[axis]

    def index(self, axis: str) -> jax.Array | int:
        """Returns this device's place along an axis, from 0; traced where there are several devices."""
        return jax.lax.axis_index(axis) if self.size(axis) > 1 else 0

    def sum(self, x: jax.Array, axis: str) -> jax.Array:
        """Sums x over the devices along an axis; every device gets the result."""
        return jax.lax.psum(x, axis) if self.size(axis) > 1 else x

    def gather(self, x: jax.Array, axis: str, dim: int) -> jax.Array:
        """Concatenates the x of all devices along an axis in dimension `dim`; every device gets the result."""
        return jax.lax.all_gather(x, axis, axis=dim, tiled=True) if self.size(axis) > 1 else x


def current_shard() -> Shard | None:
    """Returns the axes over which `jax.set_mesh` splits a computation, as a `Shard`.

    None: there is no mesh of several devices, it is none of `make_mesh`, or the caller's `jax.shard_map` splits it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or set(mesh.axis_names) != set(AXES) or AxisType.Manual in mesh.axis_types:
        return None
    return Shard(tuple(mesh.shape.items()))


def axis_size(axis: str) -> int:
    """Returns the size of an axis of the mesh that splits the computation; 1 where no mesh does."""
    shard = current_shard()
    return 1 if shard is None else shard.size(axis)


@dataclasses.dataclass(frozen=True)
class Summed:
    """Marks a result that is the sum over the mesh's `expert` axis of what each device computes; `axes` are logical."""

    axes: LogicalAxes


def summed(*axes: str | None) -> Summed:
    """Makes a `Summed` that is written like a tuple of axes."""
    return Summed(axes)


def on_mesh(
    module: nnx.Module,
    function: Callable[..., Any],
    inputs: Sequence[Any],
    axes: Sequence[Any],
    out_axes: Any,
    dtype: jax.typing.DTypeLike | None = None,
) -> Any:
    """Computes `function(module, shard, *inputs)` on each device of the current mesh, for that device's part.

    Args:
      module: its parameters are split as `rules.placed_variables` says, and gathered along `embed` before the call.
      function: takes the module with the device's parameters, the device's `Shard`, and its parts of `inputs`.
      inputs: trees of arrays; None stays None.
      axes: for each input its logical axes (names in `rules.RULES`), or a tree of them.
      out_axes: the results' logical axes, in the same form. `summed(...)` adds the devices' results over `expert`. An
        axis "partial" has size 1 in the function and the size of `expert` for the caller.
      dtype: parameters are gathered in this dtype, except exact ones; None: in their own.

    Returns:
      The results of `function`, put together from the devices' parts.

    Raises:
      ValueError: the mesh does not divide a parameter's axis that it splits, or no module places a parameter.
    """
    shard = current_shard()
    if shard is None:
        return function(module, Shard(), *inputs)
    graphdef, state = nnx.split(module)
    paths, treedef = jax.tree.flatten_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    variables = placed_variables(module)
    named = {name: variables[name] for name in names}
    for name, each in named.items():
        _check_divides(name, each.variable.get_value().shape, each.axes, shard)

    def compute(values, *inputs):
        whole = [
            each.variable.replace(_gather(value, each.axes, shard, None if each.exact else dtype))
            for each, value in zip(named.values(), values, strict=True)
        ]
        results = function(nnx.merge(graphdef, jax.tree.unflatten(treedef, whole)), shard, *inputs)
        return _each_summed(lambda x: x[None], out_axes, results)

    results = jax.shard_map(
        compute,
        in_specs=(
            [spec_of(each.axes) for each in named.values()],
            *(_specs(x, spec) for x, spec in zip(inputs, axes, strict=True)),
        ),
        out_specs=jax.tree.map(
            lambda x: spec_of(("partial", *x.axes) if isinstance(x, Summed) else x), out_axes, is_leaf=_is_axes
        ),
        check_vma=False,  # results are split or summands of "partial": none is claimed to be equal on several devices
    )([each.variable.get_value() for each in named.values()], *inputs)
    return _each_summed(total, out_axes, results)


def total(partial: jax.Array) -> jax.Array:
    """Sums partial [n, ...] over its first axis in its own dtype; over a mesh this is one reduction."""
    return jax.lax.reduce_sum(partial, axes=(0,))  # jnp.sum would send bfloat16 as float32


def _each_summed(change: Callable[[jax.Array], jax.Array], out_axes: Any, results: Any) -> Any:
    """Applies `change` to the results whose axes are `Summed`."""
    return jax.tree.map(
        lambda axes, x: change(x) if isinstance(axes, Summed) else x, out_axes, results, is_leaf=_is_axes
    )


def _check_divides(name: str, shape: Sequence[int], axes: LogicalAxes, shard: Shard) -> None:
    for dim, (size, axis) in enumerate(zip(shape, axes, strict=True)):
        over = (RULES[axis],) if isinstance(RULES[axis], str) else RULES[axis] or ()
        parts = math.prod(shard.size(axis) for axis in over)
        if size % parts:
            devices = " × ".join(f"{axis}={shard.size(axis)}" for axis in over if shard.size(axis) > 1)
            raise ValueError(
                f"the mesh's {devices} devices do not divide {size}, the size of axis {dim} of the parameter {name} "
                f"{tuple(shape)}, which lies along them: choose divisors of {size}, or make it a multiple of {parts}"
            )


def _gather(value: jax.Array, kept: LogicalAxes, shard: Shard, dtype: jax.typing.DTypeLike | None) -> jax.Array:
    over = [dim for dim, axis in enumerate(kept) if axis == "embed"]
    axes = tuple(axis for axis in RULES["embed"] if shard.size(axis) > 1)
    if not over or not axes:
        return value
    if dtype is not None:
        value = value.astype(dtype)
    return checkpoint_name(jax.lax.all_gather(value, axes, axis=over[0], tiled=True), GATHERED)


def _is_axes(x: Any) -> bool:
    return isinstance(x, Summed) or (
        type(x) is tuple and all(axis is None or isinstance(axis, str) for axis in x)
    )


def _specs(tree: Any, axes: Any) -> Any:
    """Returns PartitionSpecs in the structure of `tree`, whose None are left as they are."""
    if tree is None:
        return None
    if _is_axes(axes):
        return jax.tree.map(lambda leaf: spec_of(axes), tree)
    return jax.tree.map(_specs, tree, axes, is_leaf=lambda x: x is None or isinstance(x, jax.Array))
