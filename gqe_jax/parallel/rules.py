"""Where things live on a mesh: the one table from logical axes of arrays to axes of the mesh.

A module says the logical axes of each of its parameters where it makes it: `nnx.Param(value, axes=("embed", "group"))`.
A parameter that does not say them is refused, for a guess could split it silently in the wrong place.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "expert", "context")

LogicalAxes = tuple[str | None, ...]

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "sequence": "context",
    "group": "expert",  # KV heads, each with all its query experts: routing and cache need no communication
    "hidden": "expert",
    "vocabulary": "expert",
    "embed": ("fsdp", "context"),  # of parameters, which are gathered where they are used
    "partial": "expert",  # summands of a result, one for each part of `expert`
    None: None,
}
"""Logical axis → mesh axes it is split over."""


def spec_of(axes: Sequence[str | None]) -> PartitionSpec:
    """Logical axes of an array → its PartitionSpec."""
    return PartitionSpec(*(RULES[axis] for axis in axes))


def variable_axes(name: str, variable: nnx.Variable) -> LogicalAxes:
    """Logical axes of a module's variable called `name`; an axis of layers before those it states is not split.

    Raises:
      ValueError: it states none.
    """
    axes = variable.get_metadata().get("axes")
    if axes is None:
        raise ValueError(
            f"the {type(variable).__name__} {name} states no logical axes, so it cannot be placed on a mesh: make it "
            f"with axes=(...), names of gqe_jax.parallel.rules.RULES or None, one for each of its axes"
        )
    return (None,) * (variable.get_value().ndim - len(axes)) + tuple(axes)


def is_exact(variable: nnx.Variable) -> bool:
    """Whether a parameter is used in its own dtype whatever the computation's is: the choice of experts hangs on it."""
    return bool(variable.get_metadata().get("exact"))


def variables_by_path(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Path ("layers/attention/q_proj/kernel") → variable of a module, abstract ones included."""
    return {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(module))}


def state_shardings(mesh: Mesh, tree: Any, model: nnx.Module) -> Any:
    """NamedSharding of each leaf of a tree of the model's parameters, or of what has their paths (moments, gradients).

    Scalars, and arrays of anything but floats (keys, counts), are replicated.

    Args:
      mesh: over which they are split.
      tree: nested dictionaries, in which the path of each array ends with the whole path of a variable of `model`.
      model: may be abstract (`nnx.eval_shape`).

    Raises:
      ValueError: an array that is none of the model's, or a parameter that states no axes.
    """
    variables = variables_by_path(model)

    def sharding(path, leaf):
        if not leaf.ndim or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return replicated(mesh)
        name = _path_in(variables, path)
        axes = variable_axes(name, variables[name])
        return NamedSharding(mesh, spec_of((None,) * (leaf.ndim - len(axes)) + axes))

    return jax.tree.map_with_path(sharding, tree)


def _path_in(variables: Mapping[str, nnx.Variable], path: Sequence[Any]) -> str:
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    for start in range(len(names)):
        if (name := "/".join(names[start:])) in variables:
            return name
    raise ValueError(f"the array {'/'.join(names)} is none of the model's variables: make both by one configuration")


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole."""
    return NamedSharding(mesh, PartitionSpec())
