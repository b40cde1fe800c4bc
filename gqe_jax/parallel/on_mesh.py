"""Modules computed device by device: their parameters gathered, their tokens and heads the device's own.

A module states its forward pass as a function of what one device holds. `on_mesh` runs that inside `jax.shard_map`, so
that every collective is one which the code names and a Pallas kernel never meets the partitioner; without a mesh it
calls the function as it is.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType

from gqe_jax.parallel.rules import AXES, EXACT, RULES, parameter_axes, parameter_name, spec_of

GATHERED = "gathered"
"""Name of parameters gathered over devices, for remat policies: what is kept of them is one more copy of the model."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """One device's part in a computation over a mesh.

    Attributes:
      sizes: of the mesh's axes; all 1 where there is no mesh.
    """

    sizes: tuple[tuple[str, int], ...] = tuple((axis, 1) for axis in AXES)

    def size(self, axis: str) -> int:
        return dict(self.sizes)[axis]

    def index(self, axis: str) -> jax.Array | int:
        """This device's place along an axis; traced where there are several."""
        return jax.lax.axis_index(axis) if self.size(axis) > 1 else 0

    def sum(self, x: jax.Array, axis: str) -> jax.Array:
        """x summed over an axis; every device has the result."""
        return jax.lax.psum(x, axis) if self.size(axis) > 1 else x

    def gather(self, x: jax.Array, axis: str, dim: int) -> jax.Array:
        """The parts along an axis, side by side in the dimension `dim`."""
        return jax.lax.all_gather(x, axis, axis=dim, tiled=True) if self.size(axis) > 1 else x


def current_shard() -> Shard | None:
    """How `jax.set_mesh` splits a computation; None: not at all, or the caller's own axes or `jax.shard_map` do."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or set(mesh.axis_names) != set(AXES) or AxisType.Manual in mesh.axis_types:
        return None
    return Shard(tuple(mesh.shape.items()))


def axis_size(axis: str) -> int:
    """Size of an axis of the mesh that splits the computation; 1 where there is none."""
    shard = current_shard()
    return 1 if shard is None else shard.size(axis)


def on_mesh(
    module: nnx.Module,
    function: Callable[..., Any],
    inputs: Sequence[Any],
    axes: Sequence[Any],
    out_axes: Any,
    dtype: jax.typing.DTypeLike | None = None,
) -> Any:
    """`function(module, shard, *inputs)`, computed by each device on its part.

    Args:
      module: whose parameters are split as `rules.PARAMETERS` says. Those split along `embed` reach `function` whole.
      function: of the device's module, its `Shard`, and its parts of `inputs`.
      inputs: trees of arrays; None stays None.
      axes: for each input its logical axes, or a tree of them.
      out_axes: logical axes of the results, the same way. "partial" is an axis of size 1 to the function, and to the
        caller one of as many summands as `expert` has devices: `total` adds them.
      dtype: parameters are gathered in it, those of `rules.EXACT` apart; None: in their own.

    Raises:
      ValueError: a parameter that does not divide over the devices which share it out.
    """
    shard = current_shard()
    if shard is None:
        return function(module, Shard(), *inputs)
    graphdef, state = nnx.split(module)
    paths, treedef = jax.tree.flatten_with_path(state)
    names, leaves = [parameter_name(path) for path, _ in paths], [leaf for _, leaf in paths]
    for name, leaf in zip(names, leaves, strict=True):
        _check_divides(name, leaf.shape, shard)
    kept = [spec_of(parameter_axes(name, leaf.ndim)) for name, leaf in zip(names, leaves, strict=True)]

    def compute(leaves, *inputs):
        whole = [_gather(leaf, name, shard, dtype) for leaf, name in zip(leaves, names, strict=True)]
        return function(nnx.merge(graphdef, jax.tree.unflatten(treedef, whole)), shard, *inputs)

    specs = [_specs(tree, spec) for tree, spec in zip(inputs, axes, strict=True)]
    return jax.shard_map(
        compute,
        in_specs=(kept, *specs),
        out_specs=jax.tree.map(spec_of, out_axes, is_leaf=_is_axes),
        check_vma=False,  # results are split or summands of "partial": none is claimed to be equal on several devices
    )(leaves, *inputs)


def total(partial: jax.Array) -> jax.Array:
    """[n, ...] → [...], the sum of the summands, in their dtype; over a mesh this is one reduction."""
    return jax.lax.reduce_sum(partial, axes=(0,))  # jnp.sum would send bfloat16 as float32


def _check_divides(name: str, shape: Sequence[int], shard: Shard) -> None:
    for dim, (size, axis) in enumerate(zip(shape, parameter_axes(name, len(shape)), strict=True)):
        over = (RULES[axis],) if isinstance(RULES[axis], str) else RULES[axis] or ()
        parts = math.prod(shard.size(axis) for axis in over)
        if size % parts:
            devices = " × ".join(f"{axis}={shard.size(axis)}" for axis in over if shard.size(axis) > 1)
            raise ValueError(
                f"the mesh's {devices} devices do not divide {size}, the size of axis {dim} of the parameter {name} "
                f"{tuple(shape)}, which lies along them: choose divisors of {size}, or make it a multiple of {parts}"
            )


def _gather(leaf: jax.Array, name: str, shard: Shard, dtype: jax.typing.DTypeLike | None) -> jax.Array:
    over = [dim for dim, axis in enumerate(parameter_axes(name, leaf.ndim)) if axis == "embed"]
    axes = tuple(axis for axis in RULES["embed"] if shard.size(axis) > 1)
    if not over or not axes:
        return leaf
    if dtype is not None and name not in EXACT:
        leaf = leaf.astype(dtype)
    return checkpoint_name(jax.lax.all_gather(leaf, axes, axis=over[0], tiled=True), GATHERED)


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple) and all(axis is None or isinstance(axis, str) for axis in x)


def _specs(tree: Any, axes: Any) -> Any:
    """PartitionSpecs in the structure of `tree`, whose None are left as they are."""
    if tree is None:
        return None
    if _is_axes(axes):
        return jax.tree.map(lambda leaf: spec_of(axes), tree)
    return jax.tree.map(_specs, tree, axes, is_leaf=lambda x: x is None or isinstance(x, jax.Array))
